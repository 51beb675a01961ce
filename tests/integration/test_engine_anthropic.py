"""What Claude's API wants of a conversation, and whose key goes where."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from ai_agent_server.core.chat import ChatRequest, Message, TextPart, Tool, ToolCall, message
from ai_agent_server.errors import (
    ContextOverflowError,
    EngineAuthError,
    EngineBusyError,
    EngineFailedError,
    EngineProtocolError,
    EngineRequestError,
)
from ai_agent_server.llm_engines.api.anthropic_engine import AnthropicEngine
from ai_agent_server.llm_engines.base import EngineSpec, chat
from tests.servers.anthropic_double import AnthropicDouble
from tests.servers.http_double import Out, Request

WEATHER = Tool(name="weather", parameters={"properties": {"city": {"type": "string"}}})


@pytest.fixture
async def double() -> AsyncIterator[AnthropicDouble]:
    async with AnthropicDouble() as server:
        yield server


@pytest.fixture
async def engine(double: AnthropicDouble) -> AsyncIterator[AnthropicEngine]:
    made = build(double)
    yield made
    await made.aclose()


def build(double: AnthropicDouble, spec: dict[str, Any] | None = None, **options: Any) -> AnthropicEngine:
    made = msgspec.convert({"base_url": double.url, **options}, AnthropicEngine.Options)
    return AnthropicEngine(EngineSpec(**{"name": "it", "model": "double-1", **(spec or {})}), made)


def ask(*messages: Message, **rest: Any) -> ChatRequest:
    return ChatRequest(messages=messages or (message("user", "Hello."),), **rest)


def call(call_id: str, arguments: str = '{"city": "Paris"}') -> ToolCall:
    return ToolCall(id=call_id, name="weather", arguments=arguments)


def result(call_id: str, text: str) -> Message:
    return Message(role="tool", parts=(TextPart(text=text),), tool_call_id=call_id)


async def test_the_body_is_what_the_options_make_of_it(double: AnthropicDouble) -> None:
    engine = build(double, max_tokens=99, prompt_cache=True, extra_body={"thinking": {"type": "adaptive"}})
    await chat(engine, ask(temperature=0.0, top_p=0.5, stop=("END",)))
    body = double.requests[-1].json
    assert body["model"] == "double-1"
    assert body["max_tokens"] == 99
    assert body["stream"] is True
    assert body["stop_sequences"] == ["END"]
    assert body["cache_control"] == {"type": "ephemeral"}
    assert body["thinking"] == {"type": "adaptive"}
    assert {"temperature", "top_p", "system", "tools", "tool_choice"} & set(body) == set()
    await engine.aclose()


async def test_sampling_is_sent_to_a_server_that_takes_it(double: AnthropicDouble) -> None:
    engine = build(double, omit=[])
    with pytest.raises(EngineRequestError, match="temperature"):
        await chat(engine, ask(temperature=0.5))
    assert double.requests[-1].json["temperature"] == 0.5
    await engine.aclose()


async def test_a_conversation_is_told_as_the_api_wants_it(
    double: AnthropicDouble, engine: AnthropicEngine
) -> None:
    reply = await chat(
        engine,
        ask(
            message("system", "Be brief."),
            message("user", "What is the weather"),
            message("user", "in Paris and Rome?"),
            Message(role="assistant", parts=(TextPart(text=" "),), tool_calls=(call("a:1"), call("b"))),
            result("a:1", "Rain."),
            result("b", "Sun."),
            message("user", "And now?"),
            message("system", "Answer in French."),
            tools=(WEATHER,),
            tool_choice="none",
        ),
    )
    assert reply.text == double.reply
    body = double.requests[-1].json
    assert body["system"] == "Be brief.\n\nAnswer in French."
    asked, calls, answered = body["messages"]
    assert [block["text"] for block in asked["content"]] == ["What is the weather", "in Paris and Rome?"]
    assert [(block["type"], block["id"]) for block in calls["content"]] == [
        ("tool_use", "a_1"),
        ("tool_use", "b"),
    ]
    assert calls["content"][0]["input"] == {"city": "Paris"}
    assert [block["type"] for block in answered["content"]] == ["tool_result", "tool_result", "text"]
    assert answered["content"][0]["tool_use_id"] == "a_1"
    assert body["tools"][0]["input_schema"]["type"] == "object"
    assert body["tool_choice"] == {"type": "none"}


async def test_a_call_in_the_history_that_is_no_object_is_told_and_not_sent(
    double: AnthropicDouble, engine: AnthropicEngine
) -> None:
    turn = Message(role="assistant", parts=(), tool_calls=(call("a", '{"city": '),))
    with pytest.raises(EngineRequestError, match="arguments of the call 'a'"):
        await chat(engine, ask(message("user", "Hello."), turn, result("a", "Rain.")))
    assert double.requests == []


async def test_a_schema_is_sent_as_the_apis_grammar_knows_it(
    double: AnthropicDouble, engine: AnthropicEngine
) -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20, "description": "Of a person."},
            "born": {"oneOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
            "marks": {"type": "array", "items": {"type": "integer", "maximum": 6}, "maxItems": 9},
        },
        "required": ["name"],
        "additionalProperties": True,
    }
    await chat(engine, ask(response_schema=schema))
    assert double.requests[-1].json["output_config"]["format"] == {
        "type": "json_schema",
        "schema": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "description": 'Of a person. {"maxLength":20}'},
                "born": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
                "marks": {
                    "type": "array",
                    "items": {"type": "integer", "description": '{"maximum":6}'},
                    "description": '{"maxItems":9}',
                },
            },
            "required": ["name"],
            "additionalProperties": False,
        },
    }


async def test_all_of_the_prompt_is_counted_cached_or_not(engine: AnthropicEngine) -> None:
    usage = (await chat(engine, ask())).usage
    assert (usage.input_tokens, usage.output_tokens, usage.cached_tokens) == (11, 6, 4)


async def test_thinking_is_told_apart_from_the_answer(
    double: AnthropicDouble, engine: AnthropicEngine
) -> None:
    double.thinks = True
    deltas = [delta async for delta in engine.stream(ask())]
    assert "".join(delta.reasoning for delta in deltas) == "Hm."
    assert "".join(delta.text for delta in deltas) == double.reply


REFUSALS: dict[str, tuple[int, str, type[Exception]]] = {
    "Overloaded": (529, "overloaded_error", EngineBusyError),
    "Your account is past due.": (402, "billing_error", EngineAuthError),
    "Your credit balance is too low.": (400, "invalid_request_error", EngineAuthError),
    "Request exceeds the maximum size": (413, "request_too_large", EngineRequestError),
    "max_tokens exceed context limit: 9 + 9 > 10": (400, "invalid_request_error", ContextOverflowError),
    "Internal server error": (500, "api_error", EngineFailedError),
}


@pytest.mark.parametrize("said", REFUSALS)
async def test_an_error_is_taken_at_what_it_means(
    double: AnthropicDouble, engine: AnthropicEngine, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    status, kind, ours = REFUSALS[said]

    async def refuse(_request: Request, out: Out) -> None:
        await out.whole(status, {"type": "error", "error": {"type": kind, "message": said}})

    monkeypatch.setattr(double, "answer", refuse)
    with pytest.raises(ours) as caught:
        await chat(engine, ask())
    assert said in str(caught.value)


async def test_an_overload_in_the_stream_is_a_busy_engine(
    double: AnthropicDouble, engine: AnthropicEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    monkeypatch.setattr(double, "error", lambda *_: error)
    double.fault = "error_in_stream"
    with pytest.raises(EngineBusyError):
        await chat(engine, ask())


async def test_an_answer_without_its_last_event_is_no_answer(
    double: AnthropicDouble, engine: AnthropicEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = double._send

    async def all_but_the_last(out: Out, event: Any) -> None:
        if event["type"] != "message_stop":
            await send(out, event)

    monkeypatch.setattr(double, "_send", all_but_the_last)
    with pytest.raises(EngineProtocolError):
        await chat(engine, ask())


async def test_keys_and_headers_of_the_environment_go_to_no_server(
    double: AnthropicDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_PROFILE"):
        monkeypatch.setenv(name, "of-somebody-else")
    monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "X-Gateway-Key: of-somebody-else")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    engine = build(double)
    await chat(engine, ask())
    await engine.models()
    for request in double.requests:
        assert "of-somebody-else" not in str(request.headers)
    await engine.aclose()


async def test_the_configured_key_is_sent(double: AnthropicDouble) -> None:
    double.api_key = "sk-1"
    engine = build(double, {"api_key": "sk-1"})
    assert (await chat(engine, ask())).text == double.reply
    assert "sk-1" not in repr(engine)
    await engine.aclose()


async def test_nothing_is_repeated(double: AnthropicDouble, engine: AnthropicEngine) -> None:
    double.fault = "failed"
    with pytest.raises(EngineFailedError):
        await chat(engine, ask())
    assert len(double.requests) == 1


async def test_a_models_context_is_known_from_the_list(engine: AnthropicEngine) -> None:
    (card,) = await engine.models()
    assert (card.name, card.context_tokens) == ("double-1", 200_000)
