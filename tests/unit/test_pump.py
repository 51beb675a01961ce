"""A stream that is read ahead: waits that end, errors in their place, and a source that is always closed."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from ai_agent_server.gateway._pump import AHEAD, Pump


class Source:
    """Numbers, as many as were let out."""

    def __init__(self, error: Exception | None = None) -> None:
        self.given, self.is_closed = 0, False
        self.more = asyncio.Semaphore(0)
        self._error = error
        self.is_over = False

    async def numbers(self) -> AsyncGenerator[int, None]:
        try:
            while True:
                await self.more.acquire()
                if self.is_over:
                    if self._error is not None:
                        raise self._error
                    return
                self.given += 1
                yield self.given
        finally:
            self.is_closed = True

    def end(self) -> None:
        self.is_over = True
        self.more.release()


async def test_a_wait_that_ends_breaks_nothing() -> None:
    source = Source()
    pump = Pump(source.numbers())
    assert not await pump.wait(0.01)
    source.more.release()
    assert await pump.wait(10)
    assert pump.take() == 1
    source.end()
    assert await pump.wait(10)
    assert pump.take() is None
    assert source.is_closed
    await pump.aclose()


async def test_the_source_is_read_no_further_ahead_than_the_bound() -> None:
    source = Source()
    pump = Pump(source.numbers())
    for _ in range(AHEAD * 3):
        source.more.release()
    await pump.wait(10)
    for _ in range(AHEAD * 3):
        await asyncio.sleep(0)
    assert source.given == AHEAD
    assert [pump.take() for _ in range(AHEAD)] == list(range(1, AHEAD + 1))
    assert await pump.wait(10)
    assert pump.take() == AHEAD + 1
    await pump.aclose()
    assert source.is_closed


async def test_an_error_comes_after_what_came_before_it() -> None:
    source = Source(ValueError("broken"))
    pump = Pump(source.numbers())
    source.more.release()
    await pump.wait(10)
    source.end()
    while not source.is_closed:
        await asyncio.sleep(0)
    pump.look()
    assert pump.take() == 1
    await pump.wait(10)
    with pytest.raises(ValueError, match="broken"):
        pump.look()
    with pytest.raises(ValueError, match="broken"):
        pump.take()
    await pump.aclose()


async def test_closing_closes_the_source_wherever_it_is() -> None:
    for wanted in range(3):
        source = Source()
        pump = Pump(source.numbers())
        for _ in range(wanted):
            source.more.release()
        if wanted:
            await pump.wait(10)
        await pump.aclose()
        await pump.aclose()
        assert source.is_closed or source.given == 0
