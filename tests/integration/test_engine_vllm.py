"""What is vLLM's own: it sleeps and wakes, by two levels, where it was started so that it can."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from ai_agent_server.core.chat import ChatRequest, message
from ai_agent_server.errors import EngineTimeoutError
from ai_agent_server.llm_engines.base import EngineSpec, EngineTimeouts, ModelCard, chat
from ai_agent_server.llm_engines.local.vllm_engine import VLLMEngine
from tests.servers.vllm_double import VLLMDouble

HELLO = ChatRequest(messages=(message("user", "Hello."),))


@pytest.fixture
async def double() -> AsyncIterator[VLLMDouble]:
    async with VLLMDouble() as server:
        yield server


def build(double: VLLMDouble, **options: Any) -> VLLMEngine:
    spec = EngineSpec(name="it", model="double-1", timeouts=EngineTimeouts(connect_s=5))
    return VLLMEngine(spec, msgspec.convert({"base_url": double.url, **options}, VLLMEngine.Options))


@pytest.mark.parametrize(
    ("level", "woken_by"),
    [
        (1, ["/wake_up"]),
        (2, ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache"]),
    ],
)
async def test_it_sleeps_and_wakes_with_its_weights(
    double: VLLMDouble, level: int, woken_by: list[str]
) -> None:
    engine = build(double, sleep_level=level)
    await engine.unload()
    assert double.asleep
    assert await engine.models() == (ModelCard(name="double-1", residency="unloaded", context_tokens=8192),)
    await engine.load()
    told = [request.path for request in double.requests if request.method == "POST"]
    assert told == [f"/sleep?level={level}", *woken_by]
    assert (await chat(engine, HELLO)).text == double.reply
    await engine.aclose()


async def test_many_requests_wake_it_once(double: VLLMDouble) -> None:
    double.wake_s = 0.05
    engine = build(double)
    await engine.unload()
    replies = await asyncio.gather(*(chat(engine, HELLO) for _ in range(4)))
    assert [reply.text for reply in replies] == [double.reply] * 4
    assert double.paths().count("/wake_up") == 1
    await engine.aclose()


@pytest.mark.parametrize("options", [{"sleep_level": 0}, {}])
async def test_one_that_cannot_or_shall_not_sleep_stays_in_memory(
    double: VLLMDouble, options: dict[str, int]
) -> None:
    double.development = bool(options)
    engine = build(double, **options)
    await engine.unload()
    await engine.load()
    (card,) = await engine.models()
    assert card.residency == "loaded"
    assert not any(request.method == "POST" for request in double.requests)
    await engine.aclose()


async def test_one_that_does_not_wake_is_given_up_in_time(double: VLLMDouble) -> None:
    double.wake_s = 60
    engine = build(double, load_timeout_s=0.1)
    await engine.unload()
    with pytest.raises(EngineTimeoutError):
        await engine.load()
    await engine.aclose()
