"""A stream that a task of its own reads a few pieces ahead: its reader may wait a while and come back."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Generic, TypeVar

from ai_agent_server.deadline import Deadline

__all__ = ("Pump",)

AHEAD = 32
"""Pieces that are read before the reader wants them; then the source has to wait."""

T = TypeVar("T")


class Pump(Generic[T]):
    """Owns `source`: whatever happens, `aclose` ends it, and it is closed in the task that ran it.

    `asyncio.wait_for` around each `anext` would cancel the source at each time-out, and a task for each
    piece costs more than the piece.
    """

    def __init__(self, source: AsyncGenerator[T, None]) -> None:
        self._source = source
        self._ready: deque[T] = deque()
        self._room: asyncio.Future[None] | None = None
        self._news: asyncio.Future[bool] | None = None
        self._loop = asyncio.get_running_loop()
        self._deadline = Deadline(self._loop, lambda: self._tell(False))
        self._task = asyncio.create_task(self._run(), name="pump")
        self._task.add_done_callback(lambda _: self._tell(True))

    async def wait(self, timeout_s: float) -> bool:
        """True as soon as there is a piece or the source has ended, False after `timeout_s`."""
        if self._ready or self._task.done():
            return True
        self._news = self._loop.create_future()
        self._deadline.start(timeout_s)
        try:
            return await self._news
        finally:
            self._deadline.stop()
            self._news = None

    def look(self) -> None:
        """Raise what the source raised instead of a first piece; nothing is taken."""
        if not self._ready and self._task.done():
            self._task.result()

    def take(self) -> T | None:
        """The next piece that is there; None where the source ended well. Raises what the source raised."""
        if self._ready:
            if self._room is not None and not self._room.done():
                self._room.set_result(None)
            return self._ready.popleft()
        self._task.result()
        return None

    async def aclose(self) -> None:
        """Close the source, and wait until it is closed. May be called twice."""
        self._deadline.close()
        self._task.cancel()
        await asyncio.wait((self._task,))
        if not self._task.cancelled():
            self._task.exception()  # the reader that leaves need not know of it

    async def _run(self) -> None:
        async with aclosing(self._source) as pieces:
            async for piece in pieces:
                self._ready.append(piece)
                self._tell(True)
                if len(self._ready) >= AHEAD:
                    self._room = asyncio.get_running_loop().create_future()
                    await self._room

    def _tell(self, has_come: bool) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(has_come)
