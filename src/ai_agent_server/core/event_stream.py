"""Clients that leave, or read slowly: server-sent events, and work that ends when nobody waits for it."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

import structlog
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send

from ai_agent_server.deadline import Deadline

log = structlog.get_logger(__name__)

__all__ = ("ClientLeftError", "EventStream", "WhileConnected", "disconnected", "write_unless_left")

WATCHED_AFTER_S = 0.02
"""Nothing is saved by ending what ends by itself so soon; to watch its client would cost more."""


class EventStream(ASGIResponse):
    """`frames` until they end, the client leaves, or it stops reading; then they are closed."""

    _should_set_content_length = False

    def __init__(
        self,
        frames: AsyncGenerator[bytes],
        *,
        about: Mapping[str, str],
        write_timeout_s: float,
        headers: Mapping[str, str] | None = None,
        aclose: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`about` names the stream in the log.

        `aclose` is called at the end, also where the client left before the first frame was asked for:
        a generator that never began does not run its `finally`.
        """
        super().__init__(
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})},
        )
        self._frames = frames
        self._about = about
        self._write_timeout_s = write_timeout_s
        self._aclose = aclose

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. However that ends, also before the first line, `aclose` is called."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._aclose is not None:
                await self._aclose()

    async def send_body(self, send: Send, receive: Receive) -> None:
        """Write until one of the two sides is done; a client that leaves cancels nothing but this."""
        problem = await write_unless_left(self._write(send), disconnected(receive))
        if problem is not None:
            # The status line is long gone: the end without a final event is all that can be said.
            log.error("events.failed", **self._about, exc_info=problem)

    async def _write(self, send: Send) -> None:
        loop, limit = asyncio.get_running_loop(), asyncio.timeout(None)
        deadline = Deadline(loop, lambda: limit.reschedule(loop.time()))
        try:
            async with limit:
                async with aclosing(self._frames) as frames:
                    async for frame in frames:
                        deadline.start(self._write_timeout_s)
                        try:
                            await send({"type": "http.response.body", "body": frame, "more_body": True})
                        finally:
                            deadline.stop()
                # The server takes a frame and only then waits until it is read: so for the last one here.
                deadline.start(self._write_timeout_s)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.info("events.slow_reader_cut", **self._about)
        finally:
            deadline.close()


class ClientLeftError(Exception):
    """Nobody is there any more to be answered."""


class WhileConnected:
    """`async with`: its body is cancelled as soon as the client leaves, and `ClientLeftError` raised.

    The client is watched once the body has run for `WATCHED_AFTER_S`.
    """

    def __init__(self, receive: Receive) -> None:
        """`receive` is the request's, whose body was read."""
        self._receive = receive
        self._watch: asyncio.Task[None] | None = None
        self._has_left = self._is_over = False

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._timer = asyncio.get_running_loop().call_later(WATCHED_AFTER_S, self._begin)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None
    ) -> None:
        self._is_over = True
        self._timer.cancel()
        if self._watch is None:
            return
        self._watch.cancel()
        if self._has_left:
            is_ours = self._task.uncancel() <= self._cancelling
            if is_ours and (kind is None or issubclass(kind, asyncio.CancelledError)):
                raise ClientLeftError from exc
        await asyncio.wait((self._watch,))

    def _begin(self) -> None:
        self._watch = asyncio.create_task(disconnected(self._receive), name="client-watch")
        self._watch.add_done_callback(self._on_left)

    def _on_left(self, watch: asyncio.Task[None]) -> None:
        if not watch.cancelled() and watch.exception() is None and not self._is_over:
            self._has_left = True
            self._task.cancel()


async def write_unless_left(
    write: Coroutine[Any, Any, None], left: Coroutine[Any, Any, None]
) -> Exception | None:
    """Run both until one of them ends, and end the other; answers what the writing failed with."""
    writing, leaving = asyncio.ensure_future(write), asyncio.ensure_future(left)
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (writing, leaving):
            task.cancel()
        problem, _ = await asyncio.gather(writing, leaving, return_exceptions=True)
    return problem if isinstance(problem, Exception) else None


async def disconnected(receive: Receive) -> None:
    """Until the client is gone. To be asked once the whole body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
