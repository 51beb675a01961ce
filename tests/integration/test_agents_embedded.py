"""The packaged roles on the real embedded model: answers of the right form, code that is really run."""

from collections.abc import AsyncIterator

import pytest

from ai_agent_server.agents.base import Outcome
from ai_agent_server.core.chat import ChatReply, ChatRequest, JSONObject
from ai_agent_server.errors import InvalidOutputError
from ai_agent_server.llm_engines.base import EngineSpec, chat
from ai_agent_server.llm_engines.local.llama_cpp_engine import LlamaCppEngine
from tests.agent_context import Chat, Task

MODEL = "SmolLM2-135M-Instruct"
ADD: JSONObject = {
    "task": "Write a function that adds two numbers.",
    "entry_point": "add",
    "examples": ["assert add(1, 2) == 3"],
}


class Model(Chat):
    """The real model behind the same counter of requests."""

    def __init__(self, engine: LlamaCppEngine) -> None:
        super().__init__()
        self._engine = engine

    async def __call__(self, request: ChatRequest) -> ChatReply:
        self.sent.append(request)
        return await chat(self._engine, request)


@pytest.fixture
async def engine() -> AsyncIterator[LlamaCppEngine]:
    embedded = LlamaCppEngine(EngineSpec(name="embedded", model=MODEL), LlamaCppEngine.Options())
    yield embedded
    await embedded.aclose()


@pytest.fixture
def model(engine: LlamaCppEngine) -> Model:
    return Model(engine)


async def test_a_small_task_is_planned_written_tested_and_accepted(model: Model) -> None:
    task = Task("developer", "planner", ADD)
    assert (await _answered(task, "planner", model))["plan"]
    written = await task.run("fast-coder", model)
    assert written.artifact is not None
    tested = await task.run("qa", model, options={})
    if tested.verdict == "disputed":
        tested = await task.run("qa", model, options={})
    assert tested.verdict == "pass"
    assert tested.report is not None
    assert tested.report.anchors_passed == 1
    assert tested.report.tier == "bubblewrap"


async def test_debug_answers_with_code(model: Model) -> None:
    task = Task("developer", "debug", ADD | {"code": "def add(a, b):\n    return a - b\n"})
    assert (await task.run("qa", Chat(""))).verdict == "fail"
    mended = await _until_usable(task, "debug", model)
    assert mended.artifact is not None
    assert "def " in mended.artifact.content


@pytest.mark.parametrize("role", ["diagnosis", "architect", "planner"])
async def test_the_grammar_holds_an_answer_to_its_schema(model: Model, role: str) -> None:
    task = Task("developer", role, {"task": "Write a small program that counts the words of a file."})
    assert await _answered(task, role, model)


async def test_a_label_is_one_of_those_given(model: Model) -> None:
    task = Task(
        "productivity", "classify", {"text": "I love this phone!", "labels": ["positive", "negative"]}
    )
    assert (await _answered(task, "classify", model))["label"] in {"positive", "negative"}


async def test_every_field_is_there(model: Model) -> None:
    fields = {"name": {"type": "string"}, "age": {"type": "integer"}}
    task = Task("productivity", "extract", {"text": "Ada Lovelace is 36 years old.", "fields": fields})
    assert set(await _answered(task, "extract", model)) == {"name", "age"}


@pytest.mark.parametrize(
    ("role", "payload", "key"),
    [
        (
            "summarize",
            {"text": "The cat sat on the mat. It was warm there, and it slept all day."},
            "summary",
        ),
        ("rewrite", {"text": "hey, send me the report", "instructions": "Make it polite."}, "text"),
    ],
)
async def test_text_roles_answer_in_text(model: Model, role: str, payload: JSONObject, key: str) -> None:
    assert (await _answered(Task("productivity", role, payload), role, model))[key]


async def _answered(task: Task, role: str, model: Model) -> JSONObject:
    """What a role that answers in fields answered."""
    output = (await _until_usable(task, role, model)).output
    assert output is not None
    return output


async def _until_usable(task: Task, role: str, model: Model) -> Outcome:
    """As the engine does: an unusable answer is asked for again, three times at most."""
    for attempt in (1, 2, 3):
        try:
            return await task.run(role, model, attempt=attempt)
        except InvalidOutputError:
            continue
    pytest.fail(f"{role} gave three unusable answers")
