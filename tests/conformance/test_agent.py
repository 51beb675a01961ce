"""What every agent promises; parametrised by the files that are there, driven by a chat by hand."""

import asyncio
import base64

import pytest

from ai_agent_server import agents, discovery
from ai_agent_server.agents.base import Agent, AgentContext, RoleSpec
from ai_agent_server.core.chat import ChatReply, ChatRequest, FinishReason, JSONObject
from ai_agent_server.errors import InvalidOutputError
from ai_agent_server.sandbox.bubblewrap import Bubblewrap
from tests.agent_context import Chat, Task, no_file, packaged, spec

PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * 16).decode()
PAYLOADS: dict[str, JSONObject] = {
    "developer": {"task": "Add two numbers.", "entry_point": "add", "examples": ["assert add(1, 2) == 3"]},
    "productivity.classify": {"text": "I was charged twice.", "labels": ["billing", "other"]},
    "productivity.extract": {"text": "Ada is 36.", "fields": {"age": {"type": "integer"}}},
    "productivity.summarize": {"text": "A long story. " * 50},
    "productivity.rewrite": {"text": "A long story.", "instructions": "Shorter."},
    "productivity.vision": {"task": "What is it?", "image": f"data:image/png;base64,{PIXEL}"},
    "check": {"code": "def f(): return 1", "examples": ["assert f() == 1"]},
    "prompt": {"text": "hello", "instructions": "shout"},
}
"""By kind or its folder; a new agent without a line here is given a task in words."""

ANSWERS = {
    "nothing": "",
    "white space": " \n\t\n ",
    "garbage": "\x00\x1b[31m}{ %s $task {{{ \ud83d",
    "prose": "I am sorry, but as a language model I would rather not.",
    "code": "def add(a, b):\n    return a + b\n",
    "fenced code": "Sure!\n```python\ndef add(a, b):\n    return a + b\n```\nHope it helps.",
    "an open fence": "```python\ndef add(a, b):\n    return a +",
    "asserts": "assert add(2, 2) == 4\nassert add(0, 0) == 1\nassert nobody(1) == 2",
    "JSON in prose": 'Here you are: {"label": "billing", "plan": ["add"], "age": 36, "clear": true} done.',
    "fenced JSON": '```json\n{"plan": ["add them"]}\n```',
    "JSON of another shape": '{"plan": {"steps": 7}, "label": 3}',
    "cut JSON": '{"plan": ["add th',
    "deep JSON": '{"a":' * 20_000,
    "NaN": '{"age": NaN}',
    "a huge number": '{"age": ' + "9" * 10_000 + "}",
    "huge text": "word " * 300_000,
    "many braces": "{" * 200_000,
}

pytestmark = pytest.mark.parametrize("kind", sorted(discovery.kinds(agents)))


def agent_of(kind: str) -> Agent:
    found: Agent = discovery.implementation(agents, kind)()
    return found


def role_of(kind: str) -> RoleSpec:
    profile, _, name = kind.partition(".")
    if not name:
        return spec("productivity", "rewrite")
    role = name.replace("_", "-")
    if role not in packaged().profiles[profile].roles:
        return RoleSpec(profile=profile, role=role)
    # As packaged QA asks no LLM about a task that has examples.
    return spec(profile, role, **({"options": {}} if kind == "developer.qa" else {}))


def task_of(kind: str) -> Task:
    role = role_of(kind)
    payload = PAYLOADS.get(kind) or PAYLOADS.get(kind.partition(".")[0]) or {"task": "Say hello."}
    return Task(role.profile, role.role, payload)


def context_of(kind: str, chat: Chat, *, attempt: int = 1) -> AgentContext:
    return AgentContext(
        packet=task_of(kind).packet,
        spec=role_of(kind),
        attempt=attempt,
        chat=chat,
        sandbox=Bubblewrap(),
        read_file=no_file,
    )


def test_its_card_says_who_it_is(kind: str) -> None:
    card = agent_of(kind).card
    assert card.name == kind.rpartition(".")[2].replace("_", "-")
    assert card.description.endswith(".")
    assert card.outcomes


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_ends_in_an_outcome_of_its_card_or_refuses_the_answer(
    kind: str, answer: str, finish_reason: FinishReason
) -> None:
    chat = Chat(ANSWERS[answer], finish_reason=finish_reason)
    agent = agent_of(kind)
    try:
        outcome = await agent.run(context_of(kind, chat))
    except InvalidOutputError as exc:
        assert 0 < len(str(exc)) < 1000
    else:
        assert outcome.verdict in agent.card.outcomes
    assert len(chat.sent) <= agent.card.needs_llm


def _needs_llm(kind: str) -> None:
    if not agent_of(kind).card.needs_llm:
        pytest.skip("it asks no LLM")


async def test_an_empty_answer_is_never_taken_for_work(kind: str) -> None:
    _needs_llm(kind)
    if kind == "developer.qa":
        pytest.skip("the task's own examples are tests enough")
    with pytest.raises(InvalidOutputError):
        await agent_of(kind).run(context_of(kind, Chat("")))


async def test_a_repeat_is_warmer_and_has_the_bound_of_its_role(kind: str) -> None:
    _needs_llm(kind)
    first, second = Chat("?"), Chat("?")
    for chat, attempt in ((first, 1), (second, 2)):
        try:
            await agent_of(kind).run(context_of(kind, chat, attempt=attempt))
        except InvalidOutputError:
            continue
    before, after = first.sent[0], second.sent[0]
    assert (after.temperature or 0) >= max(0.7, before.temperature or 0)
    assert before.max_tokens == after.max_tokens == role_of(kind).max_tokens


async def test_cancelling_it_leaves_nothing_running(kind: str) -> None:
    _needs_llm(kind)
    asked = asyncio.Event()

    class Silent(Chat):
        async def __call__(self, request: ChatRequest) -> ChatReply:
            asked.set()
            await asyncio.Event().wait()
            raise AssertionError("nobody woke it")

    before = asyncio.all_tasks()
    running = asyncio.create_task(agent_of(kind).run(context_of(kind, Silent())))
    await asyncio.wait_for(asked.wait(), 30)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert asyncio.all_tasks() == before
