"""A prompt's length where the estimate may be wrong about it: the engine that can count decides."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator

import msgspec
import pytest

from ai_agent_server.config.settings import BalancerSettings, LLMSettings
from ai_agent_server.core.chat import ChatDelta, ChatRequest, ChatUsage, RouteHints, message
from ai_agent_server.errors import EngineFailedError, NoLLMError
from ai_agent_server.llm_engines.base import ModelCard, chat
from ai_agent_server.load_balancer import estimate
from ai_agent_server.load_balancer.balanced_engine import BalancedEngine, Member
from ai_agent_server.load_balancer.strategies.resident_first import ResidentFirst

SMALL = LLMSettings(engine="local.counter", model="m", source="local", context=1000)
LARGE = msgspec.structs.replace(SMALL, context=100_000)
DEADLINE_S = 60.0


class Counter:
    """Answers each prompt, and says that it has `tokens`; None: it says nothing for ever."""

    def __init__(self, tokens: int | Exception | None) -> None:
        self.tokens = tokens
        self.counted = self.answered = 0

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        self.answered += 1
        await asyncio.sleep(0)
        yield ChatDelta(text="four", model="m")
        yield ChatDelta(finish_reason="stop", usage=ChatUsage(input_tokens=3, output_tokens=5))

    async def count(self, request: ChatRequest) -> int | None:
        self.counted += 1
        if self.tokens is None:
            await asyncio.Event().wait()
        if isinstance(self.tokens, Exception):
            raise self.tokens
        return self.tokens

    async def models(self) -> tuple[ModelCard, ...]:
        return (ModelCard(name="m"),)

    async def load(self) -> None: ...

    async def unload(self) -> None: ...

    async def aclose(self) -> None: ...


def balanced(**members: tuple[LLMSettings, Counter]) -> BalancedEngine:
    return BalancedEngine(
        {name: Member(settings=llm, engine=engine) for name, (llm, engine) in members.items()},
        strategy=ResidentFirst(),
        settings=BalancerSettings(),
        clock=time.monotonic,
        rng=random.Random(7),
    )


def prompt(estimated: int, **route: object) -> ChatRequest:
    """One whose tokens are estimated at about that."""
    text = "x" * round((estimated - estimate.MESSAGE_TOKENS) * estimate.BYTES_PER_TOKEN)
    hints = msgspec.convert(route, RouteHints)
    return ChatRequest(messages=(message("user", text),), route=hints, max_tokens=100)


async def test_what_the_estimate_lets_in_and_the_count_does_not_is_served_by_a_larger_context() -> None:
    small, large = Counter(901), Counter(901)
    engine = balanced(small=(SMALL, small), large=(LARGE, large))
    reply = await chat(engine, prompt(600))
    assert reply.llm == "large"
    assert reply.decision is not None
    refused = {each.llm: (each.refused_by, each.why) for each in reply.decision.candidates}
    assert refused["small"] == ("LB-6 context", "1001 tokens do not fit its context of 1000")
    assert (small.answered, large.counted) == (0, 0)


async def test_what_only_the_estimate_refuses_is_served() -> None:
    small = Counter(900)
    reply = await chat(balanced(small=(SMALL, small)), prompt(1500))
    assert reply.llm == "small"


@pytest.mark.parametrize(("estimated", "fits"), [(200, True), (4000, False)])
async def test_nobody_counts_what_is_far_from_the_limit(estimated: int, fits: bool) -> None:
    small = Counter(999_999 if fits else 1)
    engine = balanced(small=(SMALL, small))
    if fits:
        await chat(engine, prompt(estimated))
    else:
        with pytest.raises(NoLLMError, match=r"about 4\d\d\d tokens do not fit"):
            await chat(engine, prompt(estimated))
    assert small.counted == 0


@pytest.mark.parametrize("tokens", [None, EngineFailedError("500")])
async def test_a_count_that_does_not_come_leaves_the_estimate(tokens: Exception | None) -> None:
    small = Counter(tokens)
    async with asyncio.timeout(DEADLINE_S):
        reply = await chat(balanced(small=(SMALL, small)), prompt(800))
    assert reply.llm == "small"
    assert small.counted == 1


@pytest.mark.parametrize("tokens", [0, -1000])
async def test_a_count_that_no_prompt_has_leaves_the_estimate(tokens: int) -> None:
    engine = balanced(small=(SMALL, Counter(tokens)))
    assert await engine.count(prompt(800)) is None
    with pytest.raises(NoLLMError, match=r"about 1\d\d\d tokens do not fit"):
        await chat(engine, prompt(1500))


async def test_an_llm_that_may_not_serve_or_is_elsewhere_is_not_told_the_prompt() -> None:
    off, elsewhere, other, mine = (Counter(1) for _ in range(4))
    engine = balanced(
        off=(msgspec.structs.replace(SMALL, toggle=False), off),
        elsewhere=(msgspec.structs.replace(SMALL, source="api"), elsewhere),
        other=(SMALL, other),
        mine=(SMALL, mine),
    )
    await chat(engine, prompt(800, allowed=["off", "elsewhere", "mine"]))
    assert [each.counted for each in (off, elsewhere, other, mine)] == [0, 0, 0, 1]


async def test_a_prompt_is_counted_by_the_llm_that_would_serve_it_if_it_may_fit() -> None:
    small, large = Counter(5000), Counter(7000)
    engine = balanced(small=(SMALL, small), large=(LARGE, large))
    assert await engine.count(prompt(1900, llm="small")) == 5000
    assert await engine.count(prompt(2100, llm="small")) is None
    assert small.counted == 1
    assert await engine.count(prompt(10, llm="large")) == 7000
    assert await engine.count(prompt(10, llm="nobody")) is None
    assert small.answered == large.answered == 0
