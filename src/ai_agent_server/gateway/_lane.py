"""A lane past the framework: the route that every chat takes is answered before a router is asked."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import structlog
from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send

from ai_agent_server.errors import AgentServerError
from ai_agent_server.gateway._errors import openai_body, wire_error

__all__ = ("Guard", "JsonAnswer", "Lane")

log = structlog.get_logger(__name__)

Guard: TypeAlias = Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], None]


class JsonAnswer:
    """A whole answer that is JSON, an ASGI application."""

    def __init__(self, body: bytes, *, headers: Mapping[str, str], status: int = 200) -> None:
        """`headers` are ASCII."""
        self._body, self._headers, self._status = body, headers, status

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send it."""
        await send(
            {
                "type": "http.response.start",
                "status": self._status,
                "headers": [
                    (b"content-type", b"application/json"),
                    (b"content-length", b"%d" % len(self._body)),
                    *[(name.lower().encode(), value.encode()) for name, value in self._headers.items()],
                ],
            }
        )
        await send({"type": "http.response.body", "body": self._body, "more_body": False})


class Lane:
    """An ASGI application around `app`, which has the same route and answers its other methods.

    A short chat costs the server about as much as the framework's way to it and back; the door and the
    errors are the same here.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        route: HTTPRouteHandler,
        answer: Callable[[Any, Receive], Awaitable[ASGIApp]],
        guard: Guard,
    ) -> None:
        """`route` is the one that `app` has; POSTs to it are given to `answer`."""
        self._app, self._route, self._answer, self._guard = app, route, answer, guard
        (self._path,) = route.paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let `app` answer."""
        connection: Any = scope
        if connection.get("path") != self._path or connection.get("method") != "POST":
            await self._app(scope, receive, send)
            return
        answer = await self._answered(connection, receive)
        await answer(scope, receive, send)

    async def _answered(self, scope: Any, receive: Receive) -> ASGIApp:
        try:
            scope.setdefault("state", {})
            self._guard(ASGIConnection(scope), self._route)
            return await self._answer(scope, receive)
        except (AgentServerError, HTTPException) as exc:
            error = wire_error(exc)
            if error.status == 500:
                log.exception("gateway.failed", method="POST", path=self._path)
        except Exception as exc:
            # Whatever it was, the client is told in its own form.
            log.exception("gateway.failed", method="POST", path=self._path)
            error = wire_error(exc)
        return JsonAnswer(openai_body(error), headers=error.headers, status=error.status)
