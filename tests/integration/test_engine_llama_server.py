"""A llama-server in router mode: it is told to load and unload, and what it says of that is waited for."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from ai_agent_server.core.chat import ChatRequest, Tool, message
from ai_agent_server.errors import EngineFailedError, EngineTimeoutError, ModelNotFoundError
from ai_agent_server.llm_engines.base import EngineSpec, chat
from ai_agent_server.llm_engines.local.llama_server_engine import LlamaServerEngine
from tests.servers.llama_server_double import LlamaServerDouble

MODEL = "ggml-org/gemma-3-4b-it-GGUF:Q4_K_M"


@pytest.fixture
async def router() -> AsyncIterator[LlamaServerDouble]:
    async with LlamaServerDouble() as server:
        server.router = {MODEL: "unloaded", "other": "loaded"}
        server.load_s = 0.05
        yield server


def build(double: LlamaServerDouble, model: str = MODEL, **options: Any) -> LlamaServerEngine:
    spec = EngineSpec(name="it", model=model)
    return LlamaServerEngine(
        spec, msgspec.convert({"base_url": double.url, **options}, LlamaServerEngine.Options)
    )


async def residency(engine: LlamaServerEngine, model: str = MODEL) -> str:
    return next(card.residency for card in await engine.models() if card.name == model)


async def test_a_model_is_there_when_load_returns_and_gone_when_unload_does(
    router: LlamaServerDouble,
) -> None:
    engine = build(router)
    await engine.load()
    assert await residency(engine) == "loaded"
    await engine.load()
    await engine.unload()
    assert await residency(engine) == "unloaded"
    await engine.unload()
    assert await residency(engine, "other") == "loaded"
    assert router.paths().count("/models/load") == router.paths().count("/models/unload") == 1
    await engine.aclose()


async def test_a_load_that_is_under_way_is_waited_for(router: LlamaServerDouble) -> None:
    router.load_s = 0.3
    engine, other = build(router), build(router)
    loading = asyncio.create_task(engine.load())
    while router.router[MODEL] != "loading":
        await asyncio.sleep(0.005)
    await other.load()
    assert router.router[MODEL] == "loaded"
    await loading
    assert router.paths().count("/models/load") == 1
    for each in (engine, other):
        await each.aclose()


async def test_a_model_that_ends_while_it_loads_is_an_error(router: LlamaServerDouble) -> None:
    router.broken = True
    engine = build(router)
    with pytest.raises(EngineFailedError, match="did not load"):
        await engine.load()
    await engine.aclose()


async def test_a_model_that_never_comes_is_given_up_in_time(router: LlamaServerDouble) -> None:
    router.load_s = 60
    engine = build(router, load_timeout_s=0.3)
    with pytest.raises(EngineTimeoutError):
        await engine.load()
    await engine.aclose()


async def test_a_model_that_the_router_does_not_have_is_named(router: LlamaServerDouble) -> None:
    engine = build(router, model="gone")
    with pytest.raises(ModelNotFoundError, match="gone"):
        await engine.load()
    await engine.aclose()


async def test_a_router_is_asked_of_the_model_s_own_template(router: LlamaServerDouble) -> None:
    engine = build(router)
    await chat(engine, ChatRequest(messages=(message("user", "weather?"),), tools=(Tool(name="weather"),)))
    assert "/props?model=ggml-org%2Fgemma-3-4b-it-GGUF%3AQ4_K_M" in router.paths()
    await engine.aclose()


async def test_a_server_of_one_model_is_told_nothing() -> None:
    async with LlamaServerDouble() as plain:
        engine = build(plain, model="double-1")
        await engine.load()
        await engine.unload()
        assert await residency(engine, "double-1") == "loaded"
        assert plain.paths().count("/models/load") == plain.paths().count("/models/unload") == 0
        await engine.aclose()
