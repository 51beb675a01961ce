"""Waiting for what is to come true."""

import asyncio
from collections.abc import Awaitable, Callable

LIMIT_S = 60.0
"""Only bounds a wait that would never end: how long one takes says something about the machine alone."""


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Return when it holds. Raises `TimeoutError`."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0.005)
