"""What servers behind OpenAI's wire differ in, and whose key goes where."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from ai_agent_server.core.chat import ChatRequest, message
from ai_agent_server.errors import EngineFailedError, EngineTimeoutError
from ai_agent_server.llm_engines.api.openai_engine import OpenAIEngine
from ai_agent_server.llm_engines.base import EngineSpec, EngineTimeouts, chat
from tests.servers.openai_double import OpenAIDouble


@pytest.fixture
async def double() -> AsyncIterator[OpenAIDouble]:
    async with OpenAIDouble() as server:
        yield server


def build(double: OpenAIDouble, spec: dict[str, Any] | None = None, **options: Any) -> OpenAIEngine:
    made = msgspec.convert({"base_url": double.url + "/v1", **options}, OpenAIEngine.Options)
    return OpenAIEngine(EngineSpec(**{"name": "it", "model": "double-1", **(spec or {})}), made)


def ask(**rest: Any) -> ChatRequest:
    return ChatRequest(messages=(message("user", "Hello."),), **rest)


async def test_the_body_is_what_the_options_make_of_it(double: OpenAIDouble) -> None:
    engine = build(
        double,
        max_tokens_field="max_completion_tokens",
        omit=["temperature"],
        strict_schema=True,
        extra_body={"reasoning_effort": "low"},
    )
    await chat(engine, ask(max_tokens=9, temperature=0.0, response_schema={"type": "object"}))
    body = double.requests[-1].json
    assert body["max_completion_tokens"] == 9
    assert body["reasoning_effort"] == "low"
    assert body["response_format"]["json_schema"]["strict"] is True
    assert body["model"] == "double-1"
    assert [turn["content"] for turn in body["messages"]] == ["Hello."]
    assert body["stream"] is True
    assert {"temperature", "max_tokens"} & set(body) == set()
    await engine.aclose()


async def test_keys_and_names_of_the_environment_go_to_no_server(
    double: OpenAIDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "of-somebody-else")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    engine = build(double)
    await chat(engine, ask())
    await engine.models()
    for request in double.requests:
        assert "of-somebody-else" not in str(request.headers)
    await engine.aclose()


async def test_the_configured_key_is_sent(double: OpenAIDouble) -> None:
    double.api_key = "sk-1"
    engine = build(double, {"api_key": "sk-1"})
    assert (await chat(engine, ask())).text == double.reply
    assert "sk-1" not in repr(engine)
    await engine.aclose()


async def test_nothing_is_repeated(double: OpenAIDouble) -> None:
    double.fault = "failed"
    engine = build(double)
    with pytest.raises(EngineFailedError):
        await chat(engine, ask())
    assert len(double.requests) == 1
    await engine.aclose()


async def test_a_slow_reader_is_not_a_silent_server(double: OpenAIDouble) -> None:
    engine = build(double, {"timeouts": EngineTimeouts(idle_s=1.5)})
    double.reply = "one two three four five"
    stream = engine.stream(ask())
    seen = ""
    async for delta in stream:
        if not seen:
            # Longer than the server may be silent for.
            await asyncio.sleep(1.7)
        seen += delta.text
    assert seen == double.reply
    await engine.aclose()


async def test_a_server_that_does_not_list_its_models_in_time_is_a_timeout(double: OpenAIDouble) -> None:
    engine = build(
        double,
        {"timeouts": EngineTimeouts(connect_s=0.2, first_token_s=10)},
    )
    double.fault = "silent"
    with pytest.raises(EngineTimeoutError):
        await engine.models()
    await engine.aclose()
