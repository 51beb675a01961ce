"""The check: a program that accepts the work or says what is wrong with it. It asks no LLM."""

from collections.abc import Iterator

import msgspec
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from referencing import Registry
from referencing.exceptions import Unresolvable

from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.code_text import assertions
from ai_agent_server.core.next_step import drafts
from ai_agent_server.core.packet_json import json_pointer
from ai_agent_server.core.task_packet import FeedbackReceived, StepFinished, TaskPacket, TestReport
from ai_agent_server.core.workflow import Workflow
from ai_agent_server.errors import ConfigurationError, InvalidPacketError, SandboxError
from ai_agent_server.sandbox.base import SandboxLimits
from ai_agent_server.sandbox.python_suite import run_suite

__all__ = ("CheckAgent",)

TIER = "schema"
"""What stands for a sandbox tier in the report of a check that runs nothing."""
RUNS = ("python", "python3", "py", "")
"""Languages that can be run; "" is code of which nobody said what it is."""
MAX_PROBLEMS = 20
MAX_PROBLEM_CHARS = 300
MAX_WHY_CHARS = 1_000


class CheckAgent:
    """Ends with `pass` or `fail`, and `why` is what a repairing role needs to know.

    With a `result_schema` the latest output must obey it, `format` included: also what no grammar can
    hold an LLM to, such as a pattern, a range, or one field that depends on another. Without one the
    latest code is run in the sandbox, against the assertions that the task's payload gives.
    """

    class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """`options` of the role."""

        tests: str = "examples"
        """The payload's field with the assertions, one Python assert statement each."""
        sandbox_limits: SandboxLimits | None = None
        """In place of the configuration's own."""

    card = AgentCard(
        name="check",
        description="Holds the work to a JSON Schema, or runs it against the task's assertions.",
        outcomes=("pass", "fail"),
        needs_llm=False,
        skills=("check",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Check the latest work. Raises `SandboxError` where code cannot be run."""
        schema = context.spec.result_schema
        if schema is None:
            return await _run_code(context)
        try:
            return _hold_to(schema, context.packet)
        except Unresolvable as exc:
            raise ConfigurationError(
                f"the schema refers to {exc.ref}, which is not in it",
                pointer=_pointer(context, "result_schema"),
            ) from exc


def _hold_to(schema: JSONObject, packet: TaskPacket) -> Outcome:
    found = _latest_output(packet)
    if found is None:
        return Outcome(verdict="fail", why="there is nothing to check yet")
    # A registry of its own: a schema that refers elsewhere is never fetched.
    validator = Draft202012Validator(
        schema, registry=Registry(), format_checker=Draft202012Validator.FORMAT_CHECKER
    )
    mistakes = sorted(
        validator.iter_errors(found), key=lambda mistake: [str(p) for p in mistake.absolute_path]
    )
    problems = tuple(_told(mistake) for mistake in mistakes[:MAX_PROBLEMS])
    # Each property is a test of its own, and the whole is one more: a repair that mends one is progress.
    tests = {"", *schema.get("properties", {})}
    broken = {str(mistake.absolute_path[0]) if mistake.absolute_path else "" for mistake in mistakes}
    report = TestReport(
        verdict="fail" if problems else "pass",
        tier=TIER,
        tests_passed=len(tests - broken),
        tests_total=len(tests),
        failing=problems,
        detail="\n".join(problems),
    )
    if not problems:
        return Outcome(verdict="pass", why="it obeys the schema", report=report)
    return Outcome(verdict="fail", why="; ".join(problems)[:MAX_WHY_CHARS], report=report)


def _told(mistake: ValidationError) -> str:
    where = json_pointer(mistake.absolute_path)
    return f"{where}: {mistake.message}"[:MAX_PROBLEM_CHARS] if where else mistake.message[:MAX_PROBLEM_CHARS]


def _latest_output(packet: TaskPacket) -> JSONObject | None:
    for event in reversed(packet.history):
        if isinstance(event, StepFinished | FeedbackReceived) and event.output is not None:
            return event.output
    return None


async def _run_code(context: AgentContext) -> Outcome:
    options = _options(context)
    tests = tuple(_assertions(context.packet, options.tests))
    made = [draft.artifact for draft in drafts(context.packet, Workflow()) if draft.artifact.kind == "code"]
    if not made:
        return Outcome(verdict="fail", why="there is no code to run yet")
    language = made[-1].language
    if language not in RUNS:
        report = TestReport(verdict="unverified", tier="none", detail=f"{language} cannot be run here")
        return Outcome(verdict="fail", why=report.detail, report=report)
    report = await run_suite(
        context.sandbox,
        code=made[-1].content,
        anchors=tests,
        tests=(),
        limits=options.sandbox_limits or context.spec.sandbox_limits,
        entry_point=str(context.packet.payload.get("entry_point") or ""),
    )
    if report.verdict == "sandbox_error":
        raise SandboxError(report.detail or "the sandbox broke")
    shown = f"{report.anchors_passed} of {report.anchors_total} assertions hold"
    if report.verdict == "pass":
        return Outcome(verdict="pass", why=shown, report=report)
    return Outcome(verdict="fail", why=f"{shown}; {report.detail}"[:MAX_WHY_CHARS], report=report)


def _assertions(packet: TaskPacket, field: str) -> Iterator[str]:
    given = packet.payload.get(field)
    texts = given if isinstance(given, list) else [given] if isinstance(given, str) else []
    found = [test for text in texts for test in assertions(str(text))]
    if not found:
        raise InvalidPacketError(
            "nothing here can be run against the code",
            pointer=json_pointer(("payload", field)),
            expected="Python assert statements, one each",
        )
    yield from found


def _options(context: AgentContext) -> CheckAgent.Options:
    try:
        return msgspec.convert(context.spec.options, CheckAgent.Options)
    except msgspec.ValidationError as exc:
        raise ConfigurationError(str(exc), pointer=_pointer(context, "options")) from exc


def _pointer(context: AgentContext, key: str) -> str:
    return json_pointer(("profiles", context.spec.profile, "roles", context.spec.role, key))
