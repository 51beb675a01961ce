"""The test runner: code and its assertions into the sandbox, a report out. A program, not an LLM.

Inside, a judge process takes the tests apart and a worker process holds the code under test. What
this guarantees on the confined tiers:

- Nothing that the code prints, patches, leaves running or ends can make a test pass. The verdict
  comes over a pipe that the code's process never holds.
- Where a test compares plain values (`f(3) == [1, 2]`, `not f(4)`, `abs(f(2) - 1.4) < 0.1`,
  `len(f(5)) == 3`), the comparison happens where the code under test has never been, and the code's
  process is not told what its value is compared with.

And what it does not: a value without a literal form (an object, a generator, a Counter) is compared
in the code's own process, with builtins that the code has not touched but with the object's own
`__eq__`; an object that equals everything is found out, one that lies more cleverly is not. And code
may always know the expected values by heart. On the tier `unsafe` the judge itself is within reach.
"""

import ast
import asyncio
import hashlib
from pathlib import Path
from typing import Literal

import msgspec

from ai_agent_server.core.code_text import builtin_under_test, missing_imports
from ai_agent_server.core.task_packet import TestReport
from ai_agent_server.sandbox.base import Sandbox, SandboxLimits, SandboxReport

__all__ = ("run_probes", "run_suite", "suite_sha256")

MAX_DETAIL_BYTES = 2048
_TEST_TIMEOUT_S = 5.0
_PROBE_TIMEOUT_S = 1.0
_SHARE_OF_WALL = 0.8
_OUTPUT_KB = 256

Verdict = Literal[
    "pass", "fail", "error", "timeout", "memory", "signal", "output_limit", "sandbox_error", "unverified"
]


class _Line(msgspec.Struct, frozen=True):
    test: int
    outcome: str
    detail: str


class _Suite(msgspec.Struct, frozen=True):
    code: str
    imports: tuple[str, ...]
    """Of the standard library, for names that the tests use and the code does not bring."""
    own: tuple[str, ...]
    """Names of Python's that in this suite are the code's."""
    tests: tuple[str, ...]
    test_timeout_s: float
    probes: tuple[str, ...] = ()


def suite_sha256(anchors: tuple[str, ...], tests: tuple[str, ...]) -> str:
    """What names this suite: the same anchors and tests in the same order."""
    return hashlib.sha256(msgspec.json.encode((anchors, tests))).hexdigest()


async def run_suite(
    sandbox: Sandbox,
    *,
    code: str,
    anchors: tuple[str, ...],
    tests: tuple[str, ...],
    limits: SandboxLimits,
    entry_point: str = "",
) -> TestReport:
    """Load `code`, then run each assertion of `anchors`, then each of `tests`.

    A builtin's name in a test is Python's, even if the code defines it too, unless it is what the suite
    is about: the `entry_point`, or what every test calls where none calls anything else.

    A test that hangs or ends its process fails alone; the next one gets a new process. `error` says
    that the code does not load. A statement that is not one `assert` counts as failing. Raises
    `SandboxError` when the sandbox cannot be started.
    """
    suite = (*anchors, *tests)
    sha256 = suite_sha256(anchors, tests)
    share_s = limits.wall_s * _SHARE_OF_WALL / (len(suite) + 1)
    runnable = tuple(index for index, test in enumerate(suite) if _is_assertion(test))
    subject = builtin_under_test(tuple(suite[index] for index in runnable), entry_point)
    request = _Suite(
        code=code,
        imports=missing_imports("\n".join((code, *(suite[index] for index in runnable)))),
        own=(subject,) if subject else (),
        tests=tuple(suite[index] for index in runnable),
        test_timeout_s=max(0.2, min(_TEST_TIMEOUT_S, share_s)),
    )
    report = await sandbox.run(
        await asyncio.to_thread(_programs),
        ("python", "judge.py"),
        stdin=msgspec.json.encode(request).decode(),
        limits=msgspec.structs.replace(limits, output_kb=max(limits.output_kb, _OUTPUT_KB)),
    )
    lines = _lines(report.stdout)
    outcomes = {runnable[line.test]: line for line in lines if 0 <= line.test < len(runnable)}
    passed = tuple(index in outcomes and outcomes[index].outcome == "pass" for index in range(len(suite)))
    loading = next((line for line in lines if line.test == -1), None)
    loaded = loading is not None and loading.outcome == "loaded"
    if loading is not None and not loaded:
        verdict, detail = _load_verdict(loading)
    elif loading is None:
        verdict, detail = _sandbox_verdict(report), report.detail
    else:
        verdict, detail = _suite_verdict(suite, passed, outcomes, report)
    return TestReport(
        verdict=verdict,
        tier=report.tier,
        suite_sha256=sha256,
        anchors_passed=sum(passed[: len(anchors)]),
        anchors_total=len(anchors),
        tests_passed=sum(passed[len(anchors) :]),
        tests_total=len(tests),
        failing=tuple(test for test, ok in zip(suite, passed, strict=True) if not ok) if loaded else (),
        detail=_cut(detail),
        cpu_ms=report.cpu_ms,
        wall_ms=report.wall_ms,
        memory_peak_kb=report.memory_peak_kb,
    )


async def run_probes(
    sandbox: Sandbox, *, code: str, expressions: tuple[str, ...], limits: SandboxLimits
) -> tuple[str, ...]:
    """What each of `expressions` is once `code` is loaded: a digest, the same for equal values.

    "" where it raises, hangs, or is no plain value. Raises `SandboxError` when the sandbox cannot be
    started.
    """
    request = _Suite(
        code=code,
        imports=(),
        own=(),
        tests=(),
        test_timeout_s=max(
            0.1, min(_PROBE_TIMEOUT_S, limits.wall_s * _SHARE_OF_WALL / (len(expressions) + 1))
        ),
        probes=expressions,
    )
    report = await sandbox.run(
        await asyncio.to_thread(_programs),
        ("python", "judge.py"),
        stdin=msgspec.json.encode(request).decode(),
        limits=limits,
    )
    values = {line.test: line.detail for line in _lines(report.stdout) if line.outcome == "value"}
    return tuple(values.get(index, "") for index in range(len(expressions)))


def _programs() -> dict[str, str]:
    """What runs inside, by the names it has there."""
    here = Path(__file__).parent
    return {
        "judge.py": (here / "_suite_judge.py").read_text(encoding="utf-8"),
        "worker.py": (here / "_suite_worker.py").read_text(encoding="utf-8"),
    }


def _is_assertion(test: str) -> bool:
    try:
        tree = ast.parse(test)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return len(tree.body) == 1 and isinstance(tree.body[0], ast.Assert)


def _lines(stdout: str) -> tuple[_Line, ...]:
    found = []
    for text in stdout.splitlines():
        try:
            found.append(msgspec.json.decode(text, type=_Line))
        except msgspec.DecodeError:
            continue
    return tuple(found)


def _load_verdict(loading: _Line) -> tuple[Verdict, str]:
    match loading.outcome:
        case "timeout":
            return "timeout", f"loading the code: {loading.detail}"
        case "signal":
            return "signal", f"loading the code: {loading.detail}"
        case "syntax":
            return "error", loading.detail
        case _ if "MemoryError" in loading.detail[:40]:
            return "memory", f"loading the code: {loading.detail}"
        case _:
            return "error", f"loading the code: {loading.detail}"


def _sandbox_verdict(report: SandboxReport) -> Verdict:
    """What a run that ended by itself too early, or was ended, means for the suite."""
    match report.verdict:
        case "ok" | "fail":
            return "error"
        case verdict:
            return verdict


def _suite_verdict(
    suite: tuple[str, ...],
    passed: tuple[bool, ...],
    outcomes: dict[int, _Line],
    report: SandboxReport,
) -> tuple[Verdict, str]:
    if all(passed):
        # every line was told; what the code did to the run afterwards still counts
        return ("pass", "") if report.verdict == "ok" else (_sandbox_verdict(report), report.detail)
    first = passed.index(False)
    line = outcomes.get(first)
    if line is not None:
        detail = f"{suite[first]}\n{line.detail}"
        match line.outcome:
            case "timeout" | "memory" | "signal":
                return line.outcome, detail
            case _:
                return "fail", detail
    if not _is_assertion(suite[first]):
        return "fail", f"{suite[first]}\nnot a single assert statement"
    verdict = _sandbox_verdict(report)
    return verdict, f"{suite[first]}\n{report.detail or 'the run ended before this test was decided'}"


def _cut(detail: str) -> str:
    encoded = detail.encode("utf-8", "replace")
    if len(encoded) <= MAX_DETAIL_BYTES:
        return detail
    return encoded[: MAX_DETAIL_BYTES - 4].decode("utf-8", "ignore") + " ..."
