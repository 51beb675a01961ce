"""The Model Context Protocol at `/mcp`. Its server is made when the first request comes."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from litestar import asgi
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send

from ai_agent_server.errors import ShuttingDownError

if TYPE_CHECKING:
    from ai_agent_server.gateway._mcp_server import ContextServer

__all__ = ("ModelContext",)

PATH = "/mcp"


class ModelContext:
    """The endpoint, until `aclose`.

    The protocol's SDK takes as long to import as the rest of the server together, and 30 MB: only who
    speaks the protocol waits for it.
    """

    def __init__(self, make: "Callable[[type[ContextServer]], ContextServer]") -> None:
        """`make` makes the server of its class."""
        self._make = make
        self._making = asyncio.Lock()
        self._server: ContextServer | None = None
        self._running: asyncio.Task[None] | None = None
        self._ready, self._stop = asyncio.Event(), asyncio.Event()

    def handler(self) -> ASGIRouteHandler:
        """The route. Who may come in at all, the door decides before it."""

        @asgi(PATH, copy_scope=True)
        async def model_context(scope: Scope, receive: Receive, send: Send) -> None:
            server = await self._started()
            # The space around a value is no part of it (RFC 9110, 5.5); the parser leaves what follows it.
            scope["headers"] = [(name, value.strip(b" \t")) for name, value in scope["headers"]]
            await server.sessions.handle_request(scope, receive, send)  # type: ignore[arg-type]

        return model_context

    async def aclose(self) -> None:
        """End every session, and take no request any more. May be called twice."""
        self._stop.set()
        if self._running is not None:
            await asyncio.wait((self._running,))

    async def _started(self) -> "ContextServer":
        async with self._making:
            if self._server is None and not self._stop.is_set():
                there = await asyncio.to_thread(_imported)
                if not self._stop.is_set():
                    self._server = self._make(there)
                    # A task of its own: the SDK's group has to be left by the task that entered it.
                    self._running = asyncio.create_task(self._run(self._server), name="model-context")
        if self._server is not None:
            await self._ready.wait()
        if self._server is None or self._stop.is_set():
            raise ShuttingDownError
        return self._server

    async def _run(self, server: "ContextServer") -> None:
        async with server.sessions.run():
            self._ready.set()
            await self._stop.wait()


def _imported() -> "type[ContextServer]":
    from ai_agent_server.gateway._mcp_server import ContextServer  # noqa: PLC0415 - see `ModelContext`

    return ContextServer
