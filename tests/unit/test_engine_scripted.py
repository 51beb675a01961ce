"""The scripted engine does what its options say."""

from typing import Any

import msgspec
import pytest

from ai_agent_server.core.chat import ChatRequest, message
from ai_agent_server.errors import EngineBusyError, EngineProtocolError
from ai_agent_server.llm_engines.base import EngineSpec, chat
from ai_agent_server.llm_engines.local.scripted_engine import ScriptedEngine


def scripted(**options: Any) -> ScriptedEngine:
    return ScriptedEngine(
        EngineSpec(name="it", model="whatever"), msgspec.convert(options, ScriptedEngine.Options)
    )


def ask(text: str) -> ChatRequest:
    return ChatRequest(messages=(message("user", text),))


async def test_plain_replies_come_in_turn_round_and_round() -> None:
    engine = scripted(replies=["one", "two"])
    assert [(await chat(engine, ask("?"))).text for _ in range(3)] == ["one", "two", "one"]


async def test_a_reply_with_when_answers_the_prompts_that_contain_it() -> None:
    engine = scripted(replies=["other", {"when": "plan", "say": ["first", {"steps": 2}]}])
    texts = [(await chat(engine, ask(text))).text for text in ("a plan", "code", "plan b", "my plan")]
    assert texts == ["first", "other", '{"steps":2}', "first"]


async def test_its_answers_say_that_they_are_scripted_and_it_keeps_what_was_asked() -> None:
    engine = scripted(replies=["x"])
    assert (await chat(engine, ask("hello"))).model == "scripted"
    assert [request.messages[0].text for request in engine.requests] == ["hello"]


async def test_it_fails_as_often_as_it_was_told_to() -> None:
    engine = scripted(replies=["fine"], fail="busy", fail_first=2, retry_after_s=3)
    for _ in range(2):
        with pytest.raises(EngineBusyError) as caught:
            await chat(engine, ask("?"))
        assert caught.value.retry_after_s == 3
    assert (await chat(engine, ask("?"))).text == "fine"


async def test_a_cut_answer_begins_well() -> None:
    seen = []
    with pytest.raises(EngineProtocolError):
        async for delta in scripted(replies=["one two three"], fail="cut").stream(ask("?")):
            seen.append(delta.text)  # noqa: PERF401 - what came before the error is what is looked at
    assert seen == ["one two"[: len("one two three") // 2 + 1]]


def test_a_typo_in_its_options_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field `replys`"):
        scripted(replys=[])
