"""What a sandbox costs: the wall time of an empty program in each tier, over a bare subprocess."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable
from pathlib import Path

from ai_agent_server.sandbox._choose import choose_sandbox
from ai_agent_server.sandbox.base import Sandbox, SandboxLimits
from ai_agent_server.sandbox.python_suite import run_suite
from bench.figures import Figure, at_most, keep, median, p95

RUNS = 100
TIERS = ("bubblewrap", "landlock")
LIMITS = SandboxLimits()
PROGRAM = {"main.py": "pass\n"}
CODE = "def f(x):\n    return x + 1\n"
TESTS = tuple(f"assert f({n}) == {n + 1}" for n in range(8))


def main() -> None:
    """The arms take turns, so that a busy machine is busy for all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "main.py").write_text(PROGRAM["main.py"])
        times_ms = asyncio.run(_measure(folder))
        keep("sandbox_overhead", _figures(times_ms), folder=folder)


async def _measure(folder: Path) -> dict[str, list[float]]:
    sandboxes: dict[str, Sandbox] = {}
    for tier in TIERS:
        sandbox, probe = await choose_sandbox(tier)
        if probe.works:
            sandboxes[tier] = sandbox
        else:
            print(f"{tier} does not work here: {probe.detail}")
    times_ms: dict[str, list[float]] = defaultdict(list)
    for _ in range(RUNS):
        times_ms["bare"].append(await _timed(_bare(folder)))
        for tier, sandbox in sandboxes.items():
            times_ms[tier].append(await _timed(_empty(sandbox)))
            times_ms[f"{tier}_suite"].append(await _timed(_suite(sandbox)))
    return times_ms


async def _timed(work: Awaitable[None]) -> float:
    began = time.perf_counter()
    await work
    return (time.perf_counter() - began) * 1000


async def _bare(folder: Path) -> None:
    """The same interpreter and flags, with nothing around it."""
    process = await asyncio.create_subprocess_exec(
        os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8", "main.py",
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    await process.communicate()


async def _empty(sandbox: Sandbox) -> None:
    report = await sandbox.run(PROGRAM, ("python", "main.py"), limits=LIMITS)
    if report.verdict != "ok":
        raise SystemExit(f"{report.tier}: {report.verdict} {report.detail}")


async def _suite(sandbox: Sandbox) -> None:
    report = await run_suite(sandbox, code=CODE, anchors=(), tests=TESTS, limits=LIMITS)
    if report.verdict != "pass":
        raise SystemExit(f"{report.tier}: {report.verdict} {report.detail}")


def _figures(times_ms: dict[str, list[float]]) -> list[Figure]:
    bare_ms = median(times_ms["bare"])
    figures = [Figure(name="bare_ms_p50", value=bare_ms, unit="ms", what="a bare subprocess, p50")]
    for tier in TIERS:
        if tier not in times_ms:
            continue
        over = f"the sandbox over a bare subprocess, {tier}"
        figures += [
            at_most(f"{tier}_overhead_ms_p50", median(times_ms[tier]) - bare_ms, "ms", 50, f"{over}, p50"),
            Figure(
                name=f"{tier}_overhead_ms_p95",
                value=p95(times_ms[tier]) - bare_ms,
                unit="ms",
                what=f"{over}, p95",
            ),
            Figure(
                name=f"{tier}_suite_ms_p50",
                value=median(times_ms[f"{tier}_suite"]),
                unit="ms",
                what=f"code and 8 tests judged, {tier}, p50",
            ),
        ]
    return figures


if __name__ == "__main__":
    main()
