"""What is Ollama's own: residency, keep_alive, one context, its tools and its key."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from ai_agent_server.core.chat import ChatRequest, Message, TextPart, Tool, ToolCall, message
from ai_agent_server.errors import EngineBusyError, EngineTimeoutError
from ai_agent_server.llm_engines.base import EngineSpec, EngineTimeouts, chat
from ai_agent_server.llm_engines.local.ollama_engine import OllamaEngine
from tests.servers.ollama_double import SIZE, SIZE_VRAM, OllamaDouble


@pytest.fixture
async def double() -> AsyncIterator[OllamaDouble]:
    async with OllamaDouble() as server:
        yield server


def build(double: OllamaDouble, timeouts: EngineTimeouts | None = None, **options: Any) -> OllamaEngine:
    spec = EngineSpec(name="it", model="double-1", context_tokens=8192, timeouts=timeouts or EngineTimeouts())
    return OllamaEngine(spec, msgspec.convert({"base_url": double.url, **options}, OllamaEngine.Options))


def ask(text: str = "Hello.", **rest: Any) -> ChatRequest:
    return ChatRequest(messages=(message("user", text),), **rest)


async def test_load_and_unload_move_the_model_and_models_tells(double: OllamaDouble) -> None:
    engine = build(double)
    await engine.load()
    (card,) = await engine.models()
    assert (card.residency, card.memory_bytes, card.size_bytes) == ("loaded", SIZE_VRAM, SIZE)
    assert card.context_tokens == 8192
    await engine.unload()
    (card,) = await engine.models()
    assert (card.residency, card.memory_bytes) == ("unloaded", None)
    await engine.aclose()


async def test_every_request_asks_for_the_same_context_so_that_none_reloads(double: OllamaDouble) -> None:
    engine = build(double, keep_alive="10m", model_options={"num_gpu": 99, "num_ctx": 1})
    await engine.load()
    for request in (ask(), ask(max_tokens=3, temperature=0.5, stop=("x",)), ask(seed=1)):
        await chat(engine, request)
    assert double.loads == 1
    body = double.requests[-2].json
    assert body["options"] == {
        "num_ctx": 8192,
        "num_gpu": 99,
        "num_predict": 3,
        "temperature": 0.5,
        "stop": ["x"],
    }
    assert body["keep_alive"] == "10m"
    await engine.aclose()


async def test_a_slow_load_is_waited_for_within_the_first_tokens_time(double: OllamaDouble) -> None:
    double.load_s = 0.3
    patient = build(double)
    assert (await chat(patient, ask())).text == double.reply
    await patient.unload()
    impatient = build(double, EngineTimeouts(first_token_s=0.1))
    with pytest.raises(EngineTimeoutError) as caught:
        await chat(impatient, ask())
    assert caught.value.phase == "first_token"
    for engine in (patient, impatient):
        await engine.aclose()


async def test_a_tools_schema_arrives_whole(double: OllamaDouble) -> None:
    schema = {
        "type": "object",
        "properties": {
            "where": {
                "type": "object",
                "properties": {"city": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
                "required": ["city"],
            }
        },
        "required": ["where"],
    }
    engine = build(double)
    reply = await chat(engine, ask(tools=(Tool(name="weather", parameters=schema),)))
    assert double.requests[-1].json["tools"][0]["function"]["parameters"] == schema
    assert reply.finish_reason == "tool_calls"
    assert reply.tool_calls == (
        ToolCall(id="call-1-0", name="weather", arguments='{"where":{"city":"Paris"}}'),
    )
    await engine.aclose()


async def test_a_tools_result_goes_back_under_the_tools_name(double: OllamaDouble) -> None:
    engine = build(double)
    turns = (
        message("user", "Weather?"),
        Message(
            role="assistant",
            parts=(),
            tool_calls=(
                ToolCall(id="a", name="weather", arguments='{"city": "Paris"}'),
                ToolCall(id="b", name="clock", arguments="not json"),
            ),
        ),
        Message(role="tool", parts=(TextPart(text="21 C"),), tool_call_id="a"),
    )
    await chat(engine, ChatRequest(messages=turns))
    _, called, result = double.requests[-1].json["messages"]
    assert [call["function"]["arguments"] for call in called["tool_calls"]] == [
        {"city": "Paris"},
        {"text": "not json"},
    ]
    assert result["tool_name"] == "weather"
    await engine.aclose()


async def test_a_key_of_the_environment_goes_to_no_server(
    double: OllamaDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "sk-of-somebody-else")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    engine = build(double)
    await chat(engine, ask())
    assert "sk-of-somebody-else" not in str(double.requests[-1].headers)
    await engine.aclose()


async def test_a_full_queue_says_so(double: OllamaDouble) -> None:
    double.fault = "overloaded"
    engine = build(double)
    with pytest.raises(EngineBusyError, match="server busy"):
        await engine.load()
    await engine.aclose()
