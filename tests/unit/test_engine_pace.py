"""The time-outs of an answer: what counts, and what it is called."""

import asyncio

import pytest

from ai_agent_server.errors import EngineTimeoutError
from ai_agent_server.llm_engines._pace import Pace
from ai_agent_server.llm_engines.base import EngineTimeouts


async def wait(pace: Pace, duration_s: float) -> None:
    async with pace.waiting():
        await asyncio.sleep(duration_s)


async def test_signs_of_life_without_a_token_do_not_put_the_first_token_off() -> None:
    pace = Pace(EngineTimeouts(first_token_s=0.2), "it")
    with pytest.raises(EngineTimeoutError) as caught:
        async with asyncio.timeout(60):
            while True:
                await wait(pace, 0.02)
    assert (caught.value.phase, caught.value.timeout_s) == ("first_token", 0.2)


async def test_after_progress_the_idle_time_counts_anew_each_time() -> None:
    pace = Pace(EngineTimeouts(first_token_s=0.01, idle_s=5), "it")
    for _ in range(3):
        pace.progress()
        await wait(pace, 0.02)
    short = Pace(EngineTimeouts(first_token_s=5, idle_s=0.01), "it")
    short.progress()
    with pytest.raises(EngineTimeoutError) as caught:
        await wait(short, 5)
    assert caught.value.phase == "idle"


async def test_only_waiting_counts() -> None:
    pace = Pace(EngineTimeouts(first_token_s=0.2), "it")
    await asyncio.sleep(0.3)
    await wait(pace, 0)


async def test_a_timeout_of_something_else_stays_what_it_is() -> None:
    pace = Pace(EngineTimeouts(), "it")
    with pytest.raises(TimeoutError, match="of the system"):
        async with pace.waiting():
            raise TimeoutError("of the system")
