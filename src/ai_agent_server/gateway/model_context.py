"""The Model Context Protocol at `/mcp`. Its server is made when the first request comes."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from litestar import asgi
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send

from ai_agent_server.config.settings import Settings
from ai_agent_server.core.ports import Orchestration
from ai_agent_server.errors import ShuttingDownError
from ai_agent_server.gateway.serving import Serving
from ai_agent_server.gateway.tool_runner import ToolRunner

if TYPE_CHECKING:
    from ai_agent_server.gateway._mcp_server import ContextServer

__all__ = ("ModelContext",)

PATH = "/mcp"


class ModelContext:
    """The endpoint. Use it as `async with`.

    The protocol's SDK takes as long to import as the rest of the server together, and 30 MB: only who
    speaks the protocol waits for it.
    """

    def __init__(
        self,
        *,
        runner: ToolRunner,
        serving: Serving,
        orchestration: Orchestration,
        settings: Callable[[], Settings],
        version: str,
        max_body_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        """`clock` is monotonic, in seconds."""

        def made(server: "type[ContextServer]") -> "ContextServer":
            return server(
                runner=runner,
                serving=serving,
                orchestration=orchestration,
                settings=settings,
                version=version,
                max_body_bytes=max_body_bytes,
                clock=clock,
            )

        self._made = made
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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

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
                    self._server = self._made(there)
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
