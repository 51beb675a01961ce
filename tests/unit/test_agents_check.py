"""The check: what it accepts, what it says is wrong, and what it cannot decide."""

from typing import Any

import pytest

from ai_agent_server.agents.base import AgentContext, Outcome, RoleSpec
from ai_agent_server.agents.check_agent import CheckAgent
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.task_packet import Artifact
from ai_agent_server.errors import ConfigurationError, InvalidPacketError, SandboxError
from ai_agent_server.sandbox._choose import NoSandbox
from ai_agent_server.sandbox.base import Sandbox
from ai_agent_server.sandbox.bubblewrap import Bubblewrap
from tests.agent_context import Chat, Task, no_file

SCHEMA: JSONObject = {
    "type": "object",
    "properties": {
        "date": {"type": "string", "format": "date"},
        "total": {"type": "number", "minimum": 0},
        "paid": {"type": "boolean"},
        "paid_on": {"type": "string"},
    },
    "required": ["date", "total"],
    "if": {"properties": {"paid": {"const": True}}, "required": ["paid"]},
    "then": {"required": ["paid_on"]},
}


async def checked(task: Task, *, sandbox: Sandbox | None = None, **role: Any) -> Outcome:
    """What the check says of the task's work; it must not ask an LLM."""
    chat = Chat()
    outcome = await CheckAgent().run(
        AgentContext(
            packet=task.packet,
            spec=RoleSpec(profile="clerk", role="validate", **role),
            attempt=1,
            chat=chat,
            sandbox=sandbox or Bubblewrap(),
            read_file=no_file,
        )
    )
    assert chat.sent == []
    return outcome


def record(output: JSONObject) -> Task:
    task = Task("clerk", "extract", {"text": "a letter"})
    task.finish("extract", Outcome(verdict="done", output=output))
    return task


def program(code: str, **payload: Any) -> Task:
    task = Task("clerk", "formula", {"task": "t", "examples": ["assert f(1) == 2", "f(2) == 3"], **payload})
    artifact = Artifact(artifact_id=code, kind="code", content=code)
    task.finish("formula", Outcome(verdict="done", artifact=artifact))
    return task


@pytest.mark.parametrize(
    ("output", "problems", "right"),
    [
        ({"date": "2026-05-03", "total": 1}, (), 5),
        ({"date": "soon", "total": 1}, ("/date: 'soon' is not a 'date'",), 4),
        ({"date": "soon", "total": -1}, ("/date: ", "/total: -1 is less than the minimum of 0"), 3),
        ({"total": 1}, ("'date' is a required property",), 4),
        ({"date": "2026-05-03", "total": 1, "paid": True}, ("'paid_on' is a required property",), 4),
        ({"date": "2026-05-03", "total": "9" * 5000}, ("/total: '999",), 4),
    ],
)
async def test_an_output_is_held_to_the_schema(
    output: JSONObject, problems: tuple[str, ...], right: int
) -> None:
    outcome = await checked(record(output), result_schema=SCHEMA)
    report = outcome.report
    assert report is not None
    assert outcome.verdict == report.verdict == ("fail" if problems else "pass")
    assert len(report.failing) == len(problems)
    assert all(said.startswith(problem) for said, problem in zip(report.failing, problems, strict=True))
    assert all(problem in outcome.why for problem in problems)
    assert (report.tests_passed, report.tests_total, report.tier) == (right, 5, "schema")
    assert len(outcome.why) <= 1_000


async def test_a_schema_that_refers_elsewhere_is_never_fetched() -> None:
    with pytest.raises(ConfigurationError):
        await checked(record({}), result_schema={"$ref": "http://127.0.0.1:1/schema"})


async def test_where_nothing_was_made_nothing_passes() -> None:
    outcome = await checked(Task("clerk", "validate", {"text": "x"}), result_schema={})
    assert (outcome.verdict, outcome.why) == ("fail", "there is nothing to check yet")
    outcome = await checked(Task("clerk", "run", {"examples": ["assert f(1) == 2"]}))
    assert (outcome.verdict, outcome.why) == ("fail", "there is no code to run yet")


async def test_code_is_run_against_the_payloads_assertions() -> None:
    outcome = await checked(program("def f(x): return x + 1"))
    assert (outcome.verdict, outcome.why) == ("pass", "2 of 2 assertions hold")
    outcome = await checked(program("def f(x): return 2"))
    assert outcome.verdict == "fail"
    assert "1 of 2 assertions hold" in outcome.why
    assert "actual: 2" in outcome.why
    assert outcome.report is not None
    assert outcome.report.failing == ("assert f(2) == 3",)


async def test_code_that_cannot_be_run_here_is_not_accepted() -> None:
    task = Task("clerk", "formula", {"examples": ["assert f(1) == 2"]})
    artifact = Artifact(artifact_id="a", kind="code", content="fn f() {}", language="rust")
    task.finish("formula", Outcome(verdict="done", artifact=artifact))
    outcome = await checked(task)
    assert (outcome.verdict, outcome.why) == ("fail", "rust cannot be run here")
    assert outcome.report is not None
    assert outcome.report.verdict == "unverified"


async def test_code_in_the_payload_is_checked_as_it_is() -> None:
    task = Task("clerk", "run", {"code": "def f(x): return x + 1", "proof": "assert f(1) == 2"})
    assert (await checked(task, options={"tests": "proof"})).verdict == "pass"


async def test_without_an_assertion_there_is_nothing_to_decide_by() -> None:
    with pytest.raises(InvalidPacketError) as refused:
        await checked(program("def f(x): return 2", examples=["it adds one", 7]))
    assert refused.value.pointer == "/payload/examples"


async def test_without_a_sandbox_no_code_is_accepted() -> None:
    with pytest.raises(SandboxError):
        await checked(program("def f(x): return x + 1"), sandbox=NoSandbox("none", "none"))


async def test_an_option_that_is_a_typo_is_named() -> None:
    with pytest.raises(ConfigurationError, match="test`") as refused:
        await checked(program("x = 1"), options={"test": "examples"})
    assert refused.value.pointer == "/profiles/clerk/roles/validate/options"
