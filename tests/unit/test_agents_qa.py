"""QA: tests from the specification alone, run in the real sandbox, disputed at most once each."""

import pytest

from ai_agent_server.agents.base import Outcome
from ai_agent_server.agents.developer._tests import Claim, claim, runnable
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.next_step import best, drafts
from ai_agent_server.core.task_packet import Artifact
from ai_agent_server.core.workflow import Workflow
from ai_agent_server.errors import ConfigurationError, InvalidOutputError, SandboxError
from ai_agent_server.sandbox.base import SandboxLimits, SandboxProbe, SandboxReport
from tests.agent_context import Chat, Task

ANCHOR = "assert add(1, 2) == 3"
ADD: JSONObject = {"task": "Add two numbers.", "entry_point": "add", "examples": [ANCHOR]}
NO_EXAMPLE: JSONObject = {"task": "Add two numbers.", "entry_point": "add"}
GOOD = "def add(a, b):\n    return a + b\n"
BLIND: JSONObject = {}
"""The options of a QA whose LLM writes tests for every task."""
RIGHT_TESTS = "assert add(2, 2) == 4\nassert add(-1, 1) == 0"


def task_with(code: str, payload: JSONObject = ADD) -> Task:
    task = Task("developer", "fast-coder", payload)
    wrote(task, code)
    return task


def wrote(task: Task, code: str) -> None:
    artifact = Artifact(artifact_id=str(hash(code)), kind="code", content=code)
    task.finish("fast-coder", Outcome(verdict="done", artifact=artifact))


def found(outcome: Outcome) -> tuple[str, list[str], list[str]]:
    assert outcome.output is not None
    return outcome.verdict, list(outcome.output["tests"]), list(outcome.output["dropped"])


async def test_good_code_passes_its_examples_and_tests() -> None:
    outcome = await task_with(GOOD).run("qa", Chat(RIGHT_TESTS), options=BLIND)
    assert found(outcome) == ("pass", ["assert add(2, 2) == 4", "assert add(-1, 1) == 0"], [])
    assert outcome.report is not None
    assert (outcome.report.anchors_passed, outcome.report.tests_passed) == (1, 2)
    assert outcome.report.suite_sha256


async def test_the_tests_author_is_never_shown_code() -> None:
    task = task_with("def add(a, b):\n    return 'THE CODE'\n")
    task.finish("planner", Outcome(verdict="done", output={"plan": ["THE PLAN"]}))
    chat = Chat(RIGHT_TESTS)
    await task.run("qa", chat, options=BLIND)
    assert "Add two numbers." in chat.prompt
    assert ANCHOR in chat.prompt
    assert "THE CODE" not in chat.prompt
    assert "THE PLAN" not in chat.prompt


async def test_code_that_breaks_an_example_fails_with_what_it_did() -> None:
    outcome = await task_with("def add(a, b):\n    return a * b\n").run(
        "qa", Chat(RIGHT_TESTS), options=BLIND
    )
    assert outcome.verdict == "fail"
    assert outcome.report is not None
    assert outcome.report.failing[0] == ANCHOR
    assert "2" in outcome.report.detail and "3" in outcome.report.detail


async def test_the_tests_are_written_once() -> None:
    task = task_with("def add(a, b):\n    return a * b\n")
    await task.run("qa", Chat(RIGHT_TESTS), options=BLIND)
    wrote(task, GOOD)
    silent = Chat()
    outcome = await task.run("qa", silent, options=BLIND)
    assert outcome.verdict == "pass"
    assert silent.sent == []


async def test_a_wrong_test_is_disputed_and_then_dropped() -> None:
    task = task_with(GOOD)
    outcome = await task.run("qa", Chat("assert add(2, 2) == 4\nassert add(5, 5) == 11"), options=BLIND)
    assert outcome.verdict == "disputed"
    assert outcome.report is not None
    assert outcome.report.disputed == ("assert add(5, 5) == 11",)
    again = Chat("assert add(5, 5) == 10")
    outcome = await task.run("qa", again, options=BLIND)
    assert found(outcome) == ("pass", ["assert add(2, 2) == 4"], ["assert add(5, 5) == 11"])
    assert "add(5, 5)" in again.prompt
    assert "11" not in again.prompt
    assert "return a + b" not in again.prompt


async def test_a_right_test_is_confirmed_and_counts_from_then_on() -> None:
    task = task_with("def add(a, b):\n    return 3\n")
    assert (await task.run("qa", Chat("assert add(2, 2) == 4"), options=BLIND)).verdict == "disputed"
    assert (await task.run("qa", Chat("assert add(2, 2) == (4)"), options=BLIND)).verdict == "fail"
    wrote(task, "def add(a, b):\n    return 3 + 0\n")
    silent = Chat()
    assert (await task.run("qa", silent, options=BLIND)).verdict == "fail"
    assert silent.sent == []
    wrote(task, GOOD)
    assert (await task.run("qa", Chat(), options=BLIND)).verdict == "pass"


async def test_nothing_is_accepted_without_a_test() -> None:
    task = task_with(GOOD, NO_EXAMPLE)
    with pytest.raises(InvalidOutputError):
        await task.run("qa", Chat("It looks right to me."), options=BLIND)


async def test_tests_that_nobody_confirms_leave_nothing_to_accept_by() -> None:
    task = task_with(GOOD, NO_EXAMPLE)
    assert (await task.run("qa", Chat("assert add(1, 1) == 3"), options=BLIND)).verdict == "disputed"
    with pytest.raises(InvalidOutputError):
        await task.run("qa", Chat("assert add(1, 1) == 2"), options=BLIND)


async def test_an_outside_agents_failing_test_is_run_from_then_on() -> None:
    task = task_with("def add(a, b):\n    return abs(a) + b\n")
    assert (await task.run("qa", Chat("assert add(2, 2) == 4"), options=BLIND)).verdict == "pass"
    task.feedback("qa", "fail", why="negative numbers", failing=["assert add(-1, 0) == -1", "see the log"])
    outcome = await task.run("qa", Chat(), options=BLIND)
    assert outcome.verdict == "fail"
    assert outcome.report is not None
    assert outcome.report.failing == ("assert add(-1, 0) == -1",)
    wrote(task, GOOD)
    assert (await task.run("qa", Chat(), options=BLIND)).verdict == "pass"


async def test_examples_that_are_no_assertions_are_told_of() -> None:
    payload = ADD | {"examples": [ANCHOR, "add(1, 1) gives 2"]}
    outcome = await task_with(GOOD, payload).run("qa", Chat(RIGHT_TESTS), options=BLIND)
    assert outcome.output is not None
    assert outcome.output["unusable_examples"] == ["add(1, 1) gives 2"]


async def test_a_function_that_is_called_as_a_builtin_is_tested_as_any_other() -> None:
    task = {"task": "Find the sum of the common divisors.", "examples": ["assert sum(10, 15) == 6"]}
    code = "def sum(a, b):\n    return len([n for n in range(1, a + 1) if a % n == b % n == 0])\n"
    chat = Chat("assert sum(2, 2) == 3\nassert sum([1, 2]) == 3\nassert sum(1, 1) == sum(1, 2)")
    outcome = await task_with(code, task).run("qa", chat, options=BLIND)
    assert "`sum`" in chat.prompt
    assert found(outcome)[1] == ["assert sum(2, 2) == 3"]
    assert outcome.report is not None
    assert outcome.report.failing == ("assert sum(10, 15) == 6", "assert sum(2, 2) == 3")
    assert "actual: 2" in outcome.report.detail


async def test_without_code_it_answers_with_tests() -> None:
    outcome = await Task("developer", "qa", ADD).run("qa", Chat(RIGHT_TESTS), options=BLIND)
    assert found(outcome)[0] == "fail"
    assert found(outcome)[1]
    assert outcome.report is None


async def test_what_cannot_be_run_is_read_and_says_so() -> None:
    task = task_with("fn add(a: i32) -> i32 { a }", {"task": "Add two numbers.", "language": "rust"})
    outcome = await task.run("qa", Chat('{"problems": []}'), options=BLIND)
    assert outcome.verdict == "pass"
    assert outcome.report is not None and outcome.report.verdict == "unverified"
    assert outcome.output == {"verdict": "unverified", "problems": []}
    outcome = await task.run("qa", Chat('{"problems": ["b is missing"]}'), options=BLIND)
    assert (outcome.verdict, outcome.why) == ("fail", "b is missing")


class NoSandbox:
    async def probe(self) -> SandboxProbe:
        return SandboxProbe(tier="none", works=False)

    async def run(
        self, files: object, argv: object, *, stdin: str = "", limits: SandboxLimits
    ) -> SandboxReport:
        raise SandboxError("nothing works here")


async def test_without_a_sandbox_nothing_is_accepted() -> None:
    with pytest.raises(SandboxError):
        await task_with(GOOD).run("qa", Chat(RIGHT_TESTS), sandbox=NoSandbox(), options=BLIND)


async def test_the_roles_options_bound_the_sandbox_and_a_typo_is_named() -> None:
    slow = "def add(a, b):\n    while True:\n        pass\n"
    limits = {"sandbox_limits": {"wall_s": 2.0, "cpu_s": 1}}
    outcome = await task_with(slow).run("qa", Chat(RIGHT_TESTS), options=limits)
    assert outcome.verdict == "fail"
    with pytest.raises(ConfigurationError, match="sandbox_limit"):
        await task_with(GOOD).run("qa", Chat(RIGHT_TESTS), options={"sandbox_limit": {}})


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("assert f(1) == 2", Claim("f(1)", "2")),
        ('assert f("a") == "b"', Claim("f('a')", "'b'")),
        ("assert f('a') == 'b'", Claim("f('a')", "'b'")),
        ("assert f(1)", Claim("f(1)", "True")),
        ("assert f(1) is True", Claim("f(1)", "True")),
        ("assert not f(1)", Claim("f(1)", "False")),
        ("assert f(1) == (2)", Claim("f(1)", "2")),
        ("assert f(1) in (2, 3)", Claim("f(1) in (2, 3)", "True")),
        ("nonsense (", Claim("", "nonsense (")),
    ],
)
def test_a_test_is_a_claim(test: str, said: Claim) -> None:
    assert claim(test) == said


@pytest.mark.parametrize(
    "test",
    [
        "assert add(1, 2) == 4",  # contradicts the anchor
        "assert add(1, 2) == 3",  # says what the anchor says
        "assert add(1) == 1",  # no anchor calls it so
        "assert add(2, x) == 3",  # nobody defines x
        "assert other(1, 2) == 3",
        "assert add(2, 3) == add(3, 2)",
        "assert True",
    ],
)
def test_a_test_that_cannot_tell_is_dropped(test: str) -> None:
    assert runnable((test,), "add", (ANCHOR,)) == ()


def test_a_test_may_use_the_standard_library() -> None:
    test = "assert math.isclose(add(0.1, 0.2), 0.3)"
    assert runnable((test,), "add", (ANCHOR,)) == (test,)


DRAWN: JSONObject = {"blind_tests": "without_examples", "agree": 3, "enough_examples": 3}
SAME = ("def add(a, b):\n    return b + a\n", "def add(x, y):\n    return sum((x, y))\n", GOOD)


async def test_code_is_accepted_when_as_many_versions_as_asked_do_the_same_on_other_inputs() -> None:
    task = Task("developer", "fast-coder", ADD)
    outcomes = []
    for code in SAME:
        wrote(task, code)
        outcomes.append(await task.run("qa", Chat(), options=DRAWN))
    assert [outcome.verdict for outcome in outcomes] == ["unsure", "unsure", "pass"]
    assert [outcome.report.agreeing for outcome in outcomes if outcome.report] == [1, 2, 3]
    assert "3 versions do the same" in outcomes[-1].why


async def test_versions_that_pass_the_example_and_differ_elsewhere_do_not_agree() -> None:
    task = Task("developer", "fast-coder", ADD)
    for code in (GOOD, "def add(a, b):\n    return 3\n", "def add(a, b):\n    return b + 1\n"):
        wrote(task, code)
        outcome = await task.run("qa", Chat(), options=DRAWN)
        assert outcome.verdict == "unsure"
        assert outcome.report is not None and outcome.report.agreeing == 1
    best_one = best(drafts(task.packet, Workflow()))
    assert best_one is not None and best_one.report is not None and best_one.report.agreeing == 1


async def test_the_version_that_most_others_agree_with_is_the_best() -> None:
    task = Task("developer", "fast-coder", ADD)
    for code in ("def add(a, b):\n    return 3\n", SAME[0], SAME[1]):
        wrote(task, code)
        await task.run("qa", Chat(), options=DRAWN)
    chosen = best(drafts(task.packet, Workflow()))
    assert chosen is not None and chosen.artifact.content == SAME[1]


async def test_versions_that_only_say_yes_or_no_have_to_agree_twice_as_often() -> None:
    payload = {**ADD, "entry_point": "is_even", "examples": ["assert is_even(2) == True"]}
    task, verdicts = Task("developer", "fast-coder", payload), []
    for number in range(6):
        wrote(task, f"def is_even(n):\n    return (n + {2 * number}) % 2 == 0\n")
        verdicts.append((await task.run("qa", Chat(), options=DRAWN)).verdict)
    assert verdicts == ["unsure"] * 5 + ["pass"]


async def test_enough_examples_are_enough() -> None:
    payload = {**ADD, "examples": [ANCHOR, "assert add(0, 0) == 0", "assert add(2, 5) == 7"]}
    outcome = await task_with(GOOD, payload).run("qa", Chat(), options=DRAWN)
    assert outcome.verdict == "pass"


async def test_one_example_whose_inputs_cannot_be_varied_is_not_enough_to_stand_by_code() -> None:
    task = Task("developer", "fast-coder", {**ADD, "examples": ["assert add(*(1, 2)) == 3"]})
    for code in SAME:
        wrote(task, code)
        assert (await task.run("qa", Chat(), options=DRAWN)).verdict == "unsure"


async def test_without_examples_tests_are_written_all_the_same() -> None:
    chat = Chat(RIGHT_TESTS)
    outcome = await task_with(GOOD, NO_EXAMPLE).run("qa", chat, options=DRAWN)
    assert outcome.verdict == "pass"
    assert chat.sent
