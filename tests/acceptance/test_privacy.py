"""What is local stays local: 10,000 requests through failing local LLMs, and not one byte to the API."""

import asyncio
import itertools
import logging
import random
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Self

import pytest
import structlog

from ai_agent_server.config.settings import BalancerSettings, CircuitSettings, LLMSettings
from ai_agent_server.core.chat import ChatDelta, ChatRequest, RouteHints, message
from ai_agent_server.errors import (
    ContextOverflowError,
    EngineAuthError,
    EngineBusyError,
    EngineError,
    EngineFailedError,
    EngineProtocolError,
    EngineTimeoutError,
    EngineUnreachableError,
    ModelNotFoundError,
    NoLLMError,
)
from ai_agent_server.llm_engines.base import ModelCard, chat
from ai_agent_server.load_balancer.balanced_engine import BalancedEngine, Member
from ai_agent_server.load_balancer.strategies.resident_first import ResidentFirst

REQUESTS = 10_000

FAILURES: tuple[EngineError, ...] = (
    EngineUnreachableError("refused"),
    EngineTimeoutError("first_token", 120.0),
    EngineTimeoutError("connect", 5.0),
    EngineBusyError("503"),
    EngineBusyError("429", retry_after_s=3.0),
    EngineAuthError("401"),
    ModelNotFoundError("404"),
    ContextOverflowError("too long"),
    EngineFailedError("500"),
    EngineProtocolError("cut"),
)


class OutsideAPI:
    """A listening socket that stands for the API: every connection and every byte is counted."""

    def __init__(self) -> None:
        self.connections = 0
        self.bytes_seen = 0
        self.port = 0
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while line := await reader.readline():
            self.bytes_seen += len(line)
            writer.write(b"answer\n")
        writer.close()


class APIEngine:
    """Speaks to the outside over a real socket."""

    def __init__(self, port: int) -> None:
        self.port, self.calls = port, 0

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        self.calls += 1
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request.messages[-1].text.encode() + b"\n")
            yield ChatDelta(text=(await reader.readline()).decode())
            yield ChatDelta(finish_reason="stop")
        finally:
            writer.close()
            await writer.wait_closed()

    async def models(self) -> tuple[ModelCard, ...]:
        self.calls += 1
        return ()

    async def load(self) -> None:
        self.calls += 1

    async def unload(self) -> None:
        self.calls += 1

    async def aclose(self) -> None:
        return None


class FailingEngine:
    """A local engine that fails in every way there is, in turn."""

    def __init__(self) -> None:
        self.calls = 0
        self._failures = itertools.cycle(FAILURES)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        self.calls += 1
        failure = next(self._failures)
        if isinstance(failure, EngineProtocolError):
            yield ChatDelta(text="half an ans")
        raise failure

    async def models(self) -> tuple[ModelCard, ...]:
        raise EngineUnreachableError("refused")

    async def load(self) -> None:
        raise EngineUnreachableError("refused")

    async def unload(self) -> None:
        raise EngineUnreachableError("refused")

    async def aclose(self) -> None:
        return None


class SkippedTime:
    """A clock that only sleeping moves, and at once: those who sleep together wake together."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        await asyncio.sleep(0)
        self.now_s = max(self.now_s, until_s)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The log of some 30,000 failures is of no interest."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


def balancer(outside: OutsideAPI) -> tuple[BalancedEngine, APIEngine, tuple[FailingEngine, FailingEngine]]:
    skipped = SkippedTime()
    api, one, locked = APIEngine(outside.port), FailingEngine(), FailingEngine()
    cloud = LLMSettings(engine="api.test", model="m", source="api", tier="small", context=100_000)
    here = LLMSettings(engine="local.test", model="m", source="local", tier="small", slots=4)
    vault = LLMSettings(engine="local.test", model="m", source="local", tier="small", slots=4, locked=True)
    engine = BalancedEngine(
        {
            "cloud": Member(settings=cloud, engine=api),
            "here": Member(settings=here, engine=one),
            "vault": Member(settings=vault, engine=locked),
        },
        strategy=ResidentFirst(),
        # Whoever has to wait at all goes to the API, if it may.
        settings=BalancerSettings(
            circuit=CircuitSettings(failures=5, cooldown_s=1.0), max_wait_s=20.0, spill_after_s=0.0
        ),
        clock=skipped.clock,
        rng=random.Random(3),
        sleep=skipped.sleep,
    )
    return engine, api, (one, locked)


PRIVATE = (
    RouteHints(privacy="local"),
    RouteHints(llm="vault"),
    RouteHints(privacy="local", llm="here"),
    RouteHints(privacy="local", llm="cloud"),
    RouteHints(privacy="local", prefer=("cloud",)),
    RouteHints(privacy="local", tier="main"),
    RouteHints(llm="vault", prefer=("cloud",), tier="main"),
)


async def ask(engine: BalancedEngine, text: str, route: RouteHints) -> bool:
    """Whether there was an answer."""
    request = ChatRequest(messages=(message("user", text),), route=route)
    try:
        async with aclosing(engine.stream(request)) as deltas:
            async for _ in deltas:
                pass
    except (NoLLMError, EngineError):
        return False
    return True


async def test_ten_thousand_private_requests_send_nothing_out() -> None:
    async with OutsideAPI() as outside:
        engine, api, local = balancer(outside)
        routes = itertools.cycle(PRIVATE)
        answered = 0
        for batch in range(REQUESTS // 20):
            asks = (ask(engine, f"secret {batch}.{n}", next(routes)) for n in range(20))
            answered += sum(await asyncio.gather(*asks))
            match batch % 50:
                case 10:
                    await engine.set_toggle("vault", False)
                case 20:
                    await engine.set_toggle("here", False)
                case 30:
                    await engine.set_toggle("vault", True)
                    await engine.set_toggle("here", True)
                case 40:
                    await engine.refresh_residency()
                case _:
                    pass
        await engine.aclose()
        assert answered == 0
        assert all(each.calls > 1000 for each in local), "the local LLMs really were asked, and failed"
        assert (api.calls, outside.connections, outside.bytes_seen) == (0, 0, 0)


async def test_what_may_leave_does_reach_the_api() -> None:
    async with OutsideAPI() as outside:
        engine, api, _ = balancer(outside)
        reply = await chat(engine, ChatRequest(messages=(message("user", "public"),)))
        assert (reply.llm, reply.source, reply.text) == ("cloud", "api", "answer\n")
        assert (api.calls, outside.connections, outside.bytes_seen) == (1, 1, len(b"public\n"))
        await engine.aclose()
