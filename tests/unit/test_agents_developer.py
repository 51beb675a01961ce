"""The developer's agents over the course of a task: what each is told, and what it makes of an answer."""

import pytest

from ai_agent_server.agents.base import Outcome
from ai_agent_server.agents.developer import _history
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.code_text import assertions
from ai_agent_server.core.task_packet import Artifact, TestReport
from ai_agent_server.errors import InvalidOutputError
from tests.agent_context import Chat, Task

ADD: JSONObject = {"task": "Add two numbers.", "entry_point": "add", "examples": ["assert add(1, 2) == 3"]}
GOOD = "def add(a, b):\n    return a + b\n"


def code(content: str) -> Artifact:
    return Artifact(artifact_id=str(hash(content)), kind="code", content=content)


def tried(task: Task, content: str, *, anchors: int, tests: int, failing: str, detail: str = "") -> None:
    """A version was made, and run."""
    task.finish("fast-coder", Outcome(verdict="done", artifact=code(content)))
    report = TestReport(
        verdict="fail",
        tier="bubblewrap",
        anchors_passed=anchors,
        anchors_total=2,
        tests_passed=tests,
        tests_total=3,
        failing=(failing,),
        detail=detail,
    )
    task.finish("qa", Outcome(verdict="fail", report=report))


# --- coders ---


@pytest.mark.parametrize("role", ["fast-coder", "deep-coder", "debug"])
async def test_a_coder_makes_code_of_text(role: str) -> None:
    task = Task("developer", role, ADD)
    outcome = await task.run(role, Chat(f"Here it is:\n```python\n{GOOD}```\nDone!"))
    assert outcome.artifact is not None
    assert outcome.artifact.content == GOOD
    assert outcome.artifact.kind == "code"
    assert "fences" in outcome.artifact.repairs
    assert len(outcome.artifact.artifact_id) == 64


async def test_the_same_code_has_the_same_id() -> None:
    first = await Task("developer", "fast-coder", ADD).run("fast-coder", Chat(GOOD))
    second = await Task("developer", "fast-coder", ADD).run("fast-coder", Chat(f"```\n{GOOD}```"))
    assert first.artifact is not None and second.artifact is not None
    assert first.artifact.artifact_id == second.artifact.artifact_id


@pytest.mark.parametrize("text", ["Sorry.", "I cannot do that, Dave.", "'add'", "# nothing to see", "None"])
async def test_prose_is_not_code(text: str) -> None:
    with pytest.raises(InvalidOutputError):
        await Task("developer", "fast-coder", ADD).run("fast-coder", Chat(text))


async def test_code_that_was_cut_is_not_tested() -> None:
    chat = Chat("def add(a, b):\n    return (a +", finish_reason="length")
    with pytest.raises(InvalidOutputError, match="cut off"):
        await Task("developer", "fast-coder", ADD).run("fast-coder", chat)


async def test_a_function_by_another_name_is_given_the_name_that_was_asked_for() -> None:
    outcome = await Task("developer", "fast-coder", ADD).run(
        "fast-coder", Chat("def plus(a, b):\n    return a + b")
    )
    assert outcome.artifact is not None
    assert "renamed" in outcome.artifact.repairs
    names: dict[str, object] = {}
    exec(outcome.artifact.content, names)
    assert names["add"] is names["plus"]


async def test_of_two_functions_none_is_renamed() -> None:
    text = "def plus(a, b):\n    return a + b\n\ndef minus(a, b):\n    return a - b\n"
    outcome = await Task("developer", "fast-coder", ADD).run("fast-coder", Chat(text))
    assert outcome.artifact is not None
    assert outcome.artifact.content == text


async def test_another_language_is_taken_as_it_is() -> None:
    task = Task("developer", "fast-coder", {"task": "Add two numbers.", "language": "Rust"})
    chat = Chat("```rust\nfn add(a: i32, b: i32) -> i32 { a + b }\n```")
    outcome = await task.run("fast-coder", chat)
    assert outcome.artifact is not None
    assert outcome.artifact.content == "fn add(a: i32, b: i32) -> i32 { a + b }\n"
    assert outcome.artifact.language == "rust"
    assert "rust" in chat.prompt


async def test_a_coder_is_told_the_task_the_name_and_an_example() -> None:
    chat = Chat(GOOD)
    await Task("developer", "fast-coder", ADD).run("fast-coder", chat)
    assert "Add two numbers." in chat.prompt
    assert "`add`" in chat.prompt
    assert "assert add(1, 2) == 3" in chat.prompt
    assert "$" not in chat.prompt


async def test_the_deep_coder_sees_the_plan_and_the_failures_but_no_code() -> None:
    task = Task("developer", "planner", ADD)
    tried(
        task,
        "def add(a, b): return 'SECRET'",
        anchors=0,
        tests=0,
        failing="assert add(1, 2) == 3",
        detail="actual: 4",
    )
    task.finish("planner", Outcome(verdict="done", output={"plan": ["take both", "sum them"]}))
    chat = Chat(GOOD)
    await task.run("deep-coder", chat)
    assert "1. take both\n2. sum them" in chat.prompt
    assert "assert add(1, 2) == 3" in chat.prompt
    assert "actual: 4" in chat.prompt
    assert "SECRET" not in chat.prompt


# --- debug ---


async def test_debug_is_shown_the_code_the_first_failing_test_and_what_happened() -> None:
    task = Task("developer", "debug", ADD)
    test = "assert add(2, 2) == 4"
    tried(
        task,
        "def add(a, b): return a",
        anchors=1,
        tests=0,
        failing=test,
        detail=f"{test}\nactual: 2\nexpected: 4",
    )
    chat = Chat(GOOD)
    await task.run("debug", chat)
    assert "def add(a, b): return a" in chat.prompt
    assert "actual: 2\nexpected: 4" in chat.prompt
    assert chat.prompt.count(test) == 1


async def test_debug_leaves_a_fix_behind_that_broke_what_passed() -> None:
    task = Task("developer", "debug", ADD)
    tried(task, "better = 1", anchors=2, tests=1, failing="assert add(0, 0) == 0")
    tried(task, "worse = 1", anchors=0, tests=0, failing="assert add(9, 9) == 18")
    chat = Chat(GOOD)
    await task.run("debug", chat)
    assert "better = 1" in chat.prompt
    assert "assert add(0, 0) == 0" in chat.prompt
    assert "worse = 1" not in chat.prompt


async def test_debug_goes_on_with_the_latest_of_equals() -> None:
    task = Task("developer", "debug", ADD)
    tried(task, "older = 1", anchors=1, tests=1, failing="assert add(0, 0) == 0")
    tried(task, "newer = 1", anchors=1, tests=1, failing="assert add(0, 0) == 0")
    chat = Chat(GOOD)
    await task.run("debug", chat)
    assert "newer = 1" in chat.prompt


async def test_debug_asks_with_another_seed_each_time() -> None:
    task = Task("developer", "debug", ADD)
    tried(task, "older = 1", anchors=1, tests=1, failing="assert add(0, 0) == 0")
    first, second = Chat(GOOD), Chat(GOOD)
    await task.run("debug", first)
    await task.run("debug", second)
    assert first.sent[0].seed != second.sent[0].seed


async def test_debug_mends_what_an_outside_agent_reported() -> None:
    task = Task("developer", "fast-coder", ADD)
    task.finish("fast-coder", Outcome(verdict="done", artifact=code("mine = 1")))
    task.feedback("qa", "fail", why="overflows at 2**64", failing=["assert add(2**64, 1) == 2**64 + 1"])
    chat = Chat(GOOD)
    await task.run("debug", chat)
    assert "mine = 1" in chat.prompt
    assert "assert add(2**64, 1) == 2**64 + 1" in chat.prompt
    assert "overflows at 2**64" in chat.prompt


async def test_debug_starts_from_code_that_came_with_the_task() -> None:
    task = Task("developer", "debug", {"task": "It adds wrongly.", "code": "def add(a, b): return a - b"})
    chat = Chat(GOOD)
    await task.run("debug", chat)
    assert "return a - b" in chat.prompt


# --- planner, architect, diagnosis ---


async def test_the_planner_answers_with_steps() -> None:
    outcome = await Task("developer", "planner", ADD).run("planner", Chat('{"plan": ["add them"]}'))
    assert outcome.output == {"plan": ["add them"]}


async def test_a_planner_without_a_schema_plans_in_text() -> None:
    task = Task("developer", "planner", ADD)
    await task.run("planner", Chat("Just add them."), result_schema=None)
    chat = Chat(GOOD)
    await task.run("deep-coder", chat)
    assert "Just add them." in chat.prompt


async def test_a_fresh_plan_is_made_from_the_failures_and_not_from_the_old_plan() -> None:
    task = Task("developer", "planner", ADD)
    await task.run("planner", Chat('{"plan": ["OLD PLAN"]}'))
    tried(task, "x = 1", anchors=0, tests=0, failing="assert add(1, 2) == 3", detail="actual: None")
    chat = Chat('{"plan": ["add them"]}')
    await task.run("planner", chat)
    assert "assert add(1, 2) == 3" in chat.prompt
    assert "actual: None" in chat.prompt
    assert "OLD PLAN" not in chat.prompt


async def test_the_architects_parts_reach_the_planner() -> None:
    task = Task("developer", "architect", ADD)
    await task.run("architect", Chat('{"parts": [{"name": "adder", "purpose": "adds"}]}'))
    chat = Chat('{"plan": ["add them"]}')
    await task.run("planner", chat)
    assert "1. adder: adds" in chat.prompt


UNCLEAR = (
    '{"kind": "function", "language": "python", "checkable": true, "clear": false, "question": "Which two?"}'
)


async def test_diagnosis_asks_a_person_once() -> None:
    task = Task("developer", "diagnosis", {"task": "Add them."})
    outcome = await task.run("diagnosis", Chat(UNCLEAR))
    assert (outcome.verdict, outcome.why) == ("unclear", "Which two?")
    task.feedback("user", "answer", why="The two integers.")
    chat = Chat(UNCLEAR)
    outcome = await task.run("diagnosis", chat)
    assert outcome.verdict == "done"
    assert "The two integers." in chat.prompt


async def test_a_task_with_examples_is_clear_enough() -> None:
    assert (await Task("developer", "diagnosis", ADD).run("diagnosis", Chat(UNCLEAR))).verdict == "done"


async def test_an_answer_reaches_everyone() -> None:
    task = Task("developer", "diagnosis", {"task": "Add them."})
    task.feedback("user", "answer", why="The two integers.")
    for role in ("fast-coder", "deep-coder", "debug"):
        chat = Chat(GOOD)
        await task.run(role, chat)
        assert "The two integers." in chat.prompt


# --- what a task says ---


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        ({"task": "x", "entry_point": "f"}, "f"),
        ({"task": "x", "examples": ["assert sorted(pick([3])) == [3]"]}, "pick"),
        ({"task": "x", "examples": ["not python (", "first(1) == 1"]}, "first"),
        ({"task": "Write a function called is_even."}, "is_even"),
        ({"task": "Write a function to find primes."}, "solution"),
        ({"task": "Write the class `Stack` with push and pop."}, "Stack"),
        ({"task": "Fix `parse(text)`."}, "parse"),
        ({"task": "Make it: def total(xs):"}, "total"),
    ],
)
def test_coder_and_qa_agree_on_a_name(payload: JSONObject, name: str) -> None:
    assert _history.entry_point(Task("developer", "planner", payload).packet) == name


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ("assert f(1) == 2", ("assert f(1) == 2",)),
        ("  f(1) == 2 ", ("assert f(1) == 2",)),
        ("import math\nassert math.isclose(f(1), 2)", ("assert math.isclose(f(1), 2)",)),
        ("assert f(1) == 2\nassert f(2) == 3", ("assert f(1) == 2", "assert f(2) == 3")),
        ("x = f(1)\nassert x == 2", ()),
        ("f(1) gives 2", ()),
        ("f(1)", ()),
        ("\0", ()),
    ],
)
def test_an_example_is_read_as_assertions(example: str, expected: tuple[str, ...]) -> None:
    assert assertions(example) == expected


def test_a_guessed_language_counts_only_if_the_task_says_the_word() -> None:
    for words, language in (("Write a Rust function.", "rust"), ("Write a trustworthy function.", "python")):
        task = Task("developer", "diagnosis", {"task": words})
        task.finish("diagnosis", Outcome(verdict="done", output={"language": "Rust", "clear": True}))
        assert _history.language(task.packet) == language


async def test_the_fast_coders_second_answer_is_drawn_warm_from_a_function_begun() -> None:
    task = Task("developer", "fast-coder", ADD)
    chats = [Chat(GOOD), Chat(GOOD), Chat(GOOD)]
    for chat in chats:
        await task.run("fast-coder", chat)
    assert [chat.sent[0].temperature for chat in chats] == [0.0, 0.8, 0.8]
    assert len({chat.sent[0].seed for chat in chats}) == 3
    assert ["def add(" in chat.prompt for chat in chats] == [False, True, False]
    assert all(chat.sent[0].stop == ("\n```\n",) for chat in chats)


@pytest.mark.parametrize("more", [{"language": "go"}, {"code": "def add(a, b): ..."}, {"entry_point": "Sum"}])
async def test_a_function_is_begun_for_python_alone_and_not_for_given_code(more: JSONObject) -> None:
    task = Task("developer", "fast-coder", {**ADD, **more})
    chat = Chat(GOOD, GOOD)
    for _ in range(2):
        await task.run("fast-coder", chat)
    assert "def add(\n" not in f"{chat.sent[1].messages[-1].text}\n"
