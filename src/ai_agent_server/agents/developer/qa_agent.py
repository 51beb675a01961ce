"""QA: writes tests from the specification alone, and runs the code against them."""

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from ai_agent_server.agents._prompt import request
from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.agents.developer import _history
from ai_agent_server.agents.developer._probes import agree, probes
from ai_agent_server.agents.developer._tests import claim, runnable
from ai_agent_server.core.answer import read_object, read_text
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.code_text import assertions, usable_tests
from ai_agent_server.core.task_packet import FeedbackReceived, StepFinished, TaskPacket, TestReport
from ai_agent_server.errors import ConfigurationError, InvalidOutputError, SandboxError
from ai_agent_server.sandbox.base import SandboxLimits
from ai_agent_server.sandbox.python_suite import run_probes, run_suite

__all__ = ("QAAgent",)

REVIEW: JSONObject = {
    "type": "object",
    "properties": {
        "problems": {
            "type": "array",
            "maxItems": 5,
            "items": {"type": "string", "minLength": 1, "maxLength": 300},
        }
    },
    "required": ["problems"],
    "additionalProperties": False,
}


TWO_VALUES = 2


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a version did on the probes: a digest of each value, "" where it had none."""

    artifact_id: str
    values: tuple[str, ...]


class Suite(msgspec.Struct, frozen=True, kw_only=True):
    """QA's own tests, as each of its visits leaves them in its output.

    `confirmed` were derived twice, or reported by an outside agent: when they fail, the code is
    wrong. The others wait to be looked at again when they fail. `disputed` failed at the last run.
    """

    tests: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    confirmed: tuple[str, ...] = ()
    disputed: tuple[str, ...] = ()
    unusable_examples: tuple[str, ...] = ()
    """Examples of the task that are no assertions: nothing was held to them."""
    seen: tuple[Seen, ...] = ()
    """Every version so far that passed everything, where versions have to agree."""


class QAAgent:
    """Accepts code only because it ran.

    The task's own examples are anchors. The LLM writes the other tests once, from the task; it is
    never shown code, so its tests cannot be fitted to what the code does. A test of its own that
    fails while every anchor passes is derived again before it counts; what is not confirmed is
    dropped. Later visits run the tests that are there, without an LLM. In a language that cannot be
    run here an LLM reads the code instead, and the report says `unverified`.
    """

    class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """`options` of the role. `sandbox_limits` stand in place of the configuration's own."""

        sandbox_limits: SandboxLimits | None = None
        blind_tests: Literal["always", "without_examples"] = "always"
        """When the LLM writes tests. One that is wrong more often than the code it tests is better not
        asked where the task has examples."""
        agree: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
        """Versions drawn apart that have to do the same on inputs like the examples before one of them
        is accepted; those that pass alone end as `unsure`. Twice as many where all that they answer is one
        of two values. 1: passing is enough."""
        enough_examples: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
        """A task with so many examples is held to them alone; no versions have to agree."""

    card = AgentCard(
        name="qa",
        description="Writes tests from the specification alone and runs the code in the sandbox.",
        outcomes=("pass", "fail", "disputed", "unsure"),
        skills=("test",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Test the latest code: output {"tests", "dropped", ...} and a report.

        Raises `InvalidOutputError` while there is nothing to test with, `SandboxError` where nothing
        can be run.
        """
        packet = context.packet
        if not _history.is_python(packet):
            return await self._review(context)
        options = _options(context)
        limits = options.sandbox_limits or context.spec.sandbox_limits
        anchors = _history.anchors(packet)
        kept = _kept(packet, context.spec.role)
        if kept is not None:
            written = kept
        elif anchors and options.blind_tests == "without_examples":
            written = Suite(unusable_examples=_history.unusable_examples(packet))
        else:
            written = await self._write(context, anchors)
        suite = _with_outside_tests(written, packet, context.spec.role)
        if suite.disputed:
            suite = await self._look_again(context, suite)
        if not suite.tests and not anchors:
            raise InvalidOutputError("there is no usable test, and the task gives no example")
        code = _history.latest_code(packet)
        if code is None:
            return Outcome(verdict="fail", why="there is no code to run yet", output=_output(suite))
        report = await run_suite(
            context.sandbox,
            code=code.content,
            anchors=anchors,
            tests=suite.tests,
            limits=limits,
            entry_point=_history.entry_point(packet),
        )
        if report.verdict == "sandbox_error":
            raise SandboxError(report.detail or "the sandbox broke")
        if report.verdict == "pass" and 0 < len(anchors) < options.enough_examples and options.agree > 1:
            calls = probes(anchors, _history.entry_point(packet))
            values = await run_probes(context.sandbox, code=code.content, expressions=calls, limits=limits)
            return agreed(suite, Seen(artifact_id=code.artifact_id, values=values), report, options.agree)
        return judge(suite, anchors, report)

    async def _write(self, context: AgentContext, anchors: tuple[str, ...]) -> Suite:
        """Tests from the specification alone; the anchors stand for them where none can be used."""
        fields = _history.specification(context.packet)
        reply = await context.chat(request(context, fields, section="write"))
        name = fields["entry_point"]
        written = usable_tests(reply.text, name.rpartition(".")[2])
        kept = runnable(written, name, anchors)
        return Suite(
            tests=kept,
            dropped=tuple(test for test in written if test not in kept),
            unusable_examples=_history.unusable_examples(context.packet),
        )

    async def _look_again(self, context: AgentContext, suite: Suite) -> Suite:
        """The disputed expectations derived once more, the earlier answers out of sight."""
        claims = {test: claim(test) for test in suite.disputed}
        fields = _history.specification(context.packet) | {
            "calls": "\n".join(dict.fromkeys(found.call for found in claims.values() if found.call))
        }
        reply = await context.chat(request(context, fields, section="look again"))
        text, name = read_text(reply), fields["entry_point"]
        again = {claim(test) for test in usable_tests(text, name.rpartition(".")[2])}
        confirmed = tuple(test for test, found in claims.items() if found in again)
        gone = tuple(test for test in suite.disputed if test not in confirmed)
        # Confirmed first: the first failing test is what debug is shown.
        kept = (*suite.confirmed, *confirmed)
        return msgspec.structs.replace(
            suite,
            tests=(*kept, *(test for test in suite.tests if test not in kept and test not in gone)),
            dropped=(*suite.dropped, *gone),
            confirmed=kept,
            disputed=(),
        )

    async def _review(self, context: AgentContext) -> Outcome:
        """Read the code instead of running it. No review makes code `pass` as verified."""
        packet = context.packet
        code = _history.latest_code(packet)
        if code is None:
            return Outcome(verdict="fail", why="there is no code to read yet")
        fields = _history.specification(packet) | {"code": code.content}
        reply = await context.chat(request(context, fields, section="review", schema=REVIEW))
        problems: list[str] = read_object(reply, REVIEW)["problems"]
        report = TestReport(verdict="unverified", tier="none", detail="\n".join(problems))
        return Outcome(
            verdict="fail" if problems else "pass",
            why=problems[0] if problems else f"read, not run: {_history.language(packet)} cannot be run here",
            output={"verdict": "unverified", "problems": problems},
            report=report,
        )


def judge(suite: Suite, anchors: tuple[str, ...], report: TestReport) -> Outcome:
    """What a run of `suite` means."""
    shown = f"{report.anchors_passed}/{report.anchors_total} examples, "
    shown += f"{report.tests_passed}/{report.tests_total} tests"
    if report.verdict == "pass":
        return Outcome(verdict="pass", why=shown, output=_output(suite), report=report)
    anchors_hold = report.anchors_passed == report.anchors_total
    doubtful = tuple(test for test in report.failing if test not in suite.confirmed and test not in anchors)
    only_doubtful = bool(doubtful) and len(doubtful) == len(report.failing)
    if anchors_hold and only_doubtful:
        suite = msgspec.structs.replace(suite, disputed=doubtful)
        report = msgspec.structs.replace(report, disputed=doubtful)
        why = f"{shown}; {len(doubtful)} to be derived again"
        return Outcome(verdict="disputed", why=why, output=_output(suite), report=report)
    return Outcome(verdict="fail", why=shown, output=_output(suite), report=report)


def agreed(suite: Suite, now: Seen, report: TestReport, wanted: int) -> Outcome:
    """What passing means where `wanted` versions have to do the same.

    Twice as many where there are two values to choose from, as of a function that answers yes or no:
    there wrong versions agree often.
    """
    wanted *= 2 if len(set(filter(None, now.values))) <= TWO_VALUES else 1
    agreeing = 1 + sum(agree(now.values, before.values) for before in suite.seen)
    suite = msgspec.structs.replace(suite, seen=(*suite.seen, now))
    report = msgspec.structs.replace(report, agreeing=agreeing)
    shown = f"{report.anchors_passed}/{report.anchors_total} examples"
    if agreeing >= wanted:
        why = f"{shown}; {agreeing} versions do the same on {len(now.values)} other inputs"
        return Outcome(verdict="pass", why=why, output=_output(suite), report=report)
    why = f"{shown}; {agreeing} of the {wanted} versions that have to do the same on other inputs"
    return Outcome(verdict="unsure", why=why, output=_output(suite), report=report)


def _output(suite: Suite) -> JSONObject:
    found: JSONObject = msgspec.json.decode(msgspec.json.encode(suite))
    return found


def _kept(packet: TaskPacket, role: str) -> Suite | None:
    """The suite that the last visit left."""
    for event in reversed(packet.history):
        if not isinstance(event, StepFinished) or event.role != role or event.output is None:
            continue
        if "tests" in event.output:
            return msgspec.convert(event.output, Suite)
    return None


def _with_outside_tests(suite: Suite, packet: TaskPacket, role: str) -> Suite:
    """`suite` and the tests that outside agents saw fail: somebody answers for those."""
    new = tuple(dict.fromkeys(test for test in _reported(packet, role) if test not in suite.confirmed))
    return msgspec.structs.replace(
        suite,
        tests=(*new, *(test for test in suite.tests if test not in new)),
        confirmed=(*suite.confirmed, *new),
        disputed=tuple(test for test in suite.disputed if test not in new),
    )


def _reported(packet: TaskPacket, role: str) -> Iterator[str]:
    for event in packet.history:
        if isinstance(event, FeedbackReceived) and event.role == role and event.report is not None:
            for test in event.report.failing:
                yield from assertions(test)


def _options(context: AgentContext) -> QAAgent.Options:
    try:
        return msgspec.convert(context.spec.options, QAAgent.Options)
    except msgspec.ValidationError as exc:
        raise ConfigurationError(
            str(exc), pointer=f"/profiles/{context.spec.profile}/roles/qa/options"
        ) from exc
