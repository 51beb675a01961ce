"""A task's events over a WebSocket: the frames of the event stream, each as one JSON text."""

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl

import msgspec
import structlog
from litestar import asgi
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send

from ai_agent_server.core.api_schemas import (
    INTERNAL,
    PROBLEM_JSON,
    REFUSALS,
    BadParameterError,
    EventsQuery,
    Problem,
    problem,
    refusal,
)
from ai_agent_server.core.event_stream import write_unless_left
from ai_agent_server.core.packet_json import decode_query
from ai_agent_server.core.ports import Orchestration
from ai_agent_server.core.task_frames import CUT, Frame, frames
from ai_agent_server.core.task_packet import is_task_id
from ai_agent_server.errors import AccessError, AgentServerError, InvalidPacketError, TaskNotFoundError

__all__ = ("PROTOCOL", "EventSockets")

Guard: TypeAlias = Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], None]

PATH: Final = "/api/v1/tasks/{task_id:str}/events/ws"
PROTOCOL: Final = "ai-agent-server"
"""The subprotocol that is spoken, where a client offers any."""
KEY_PREFIX: Final = "bearer."
"""A web page cannot set a header: it offers its key as a subprotocol, `bearer.` and base64url of the key."""
ENDED, COME_BACK = 1000, 1013
"""Close codes: the task has ended; nothing more comes here, though the task goes on."""

_PATH = re.compile(r"/api/v1/tasks/(?P<task_id>[^/]+)/events/ws")
_encoder = msgspec.json.Encoder()

log = structlog.get_logger(__name__)


class EventSockets:
    """An ASGI application around `app`, which answers everything that is no WebSocket.

    What is refused is refused before the handshake, with problem details. What a client sends is not
    read. A reader that does not read for `write_timeout_s` is cut.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        engine: Orchestration,
        guard: Guard,
        keep_alive_s: float,
        write_timeout_s: float,
    ) -> None:
        """`guard` lets a connection in or raises an `AccessError`."""
        self._app, self._engine, self._guard = app, engine, guard
        self._keep_alive_s, self._write_timeout_s = keep_alive_s, write_timeout_s
        self._route = asgi(PATH)(self._answered_here)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a WebSocket, or let `app` answer."""
        connection: Any = scope
        if connection["type"] != "websocket":
            await self._app(scope, receive, send)
            return
        await receive()  # websocket.connect
        try:
            told = await self._let_in(connection)
        except AgentServerError as exc:
            await _deny(connection, send, problem(exc, connection["path"]), exc)
            return
        except Exception:
            # The handler's boundary: whoever asked is told, and the log has the rest.
            log.exception("events.refused", path=connection["path"])
            await _deny(connection, send, refusal(INTERNAL, "the server failed", connection["path"]))
            return
        if told is None:
            await _deny(connection, send, refusal(REFUSALS[404], "Not Found", connection["path"]))
            return
        await self._serve(connection, told, receive, send)

    async def _let_in(self, scope: Any) -> AsyncGenerator[Frame] | None:
        """The frames that are wanted; None where nothing is here."""
        match = _PATH.fullmatch(scope["path"])
        if match is None:
            return None
        scope.setdefault("state", {})
        self._guard(ASGIConnection(_with_key(scope)), self._route)
        query = _query(scope)
        if not is_task_id(match["task_id"]):
            raise TaskNotFoundError(match["task_id"][:64])
        packet = await self._engine.read(match["task_id"])
        since = query.since if isinstance(query.since, int) else 0
        followed = self._engine.follow(packet.task_id, since=since)
        return frames(packet, followed, since=since, keep_alive_s=self._keep_alive_s)

    async def _serve(self, scope: Any, told: AsyncGenerator[Frame], receive: Receive, send: Send) -> None:
        subprotocol = PROTOCOL if PROTOCOL in scope.get("subprotocols", ()) else None
        await send({"type": "websocket.accept", "subprotocol": subprotocol, "headers": []})
        try:
            problem = await write_unless_left(self._write(told, send), _left(receive))
        finally:
            await told.aclose()
        if problem is not None and not isinstance(problem, OSError):
            log.error("events.failed", path=scope["path"], exc_info=problem)

    async def _write(self, told: AsyncGenerator[Frame], send: Send) -> None:
        code = ENDED
        try:
            async with aclosing(told) as coming:
                async for frame in coming:
                    code = COME_BACK if frame.event == CUT else ENDED
                    async with asyncio.timeout(self._write_timeout_s):
                        await send({"type": "websocket.send", "bytes": None, "text": _text(frame)})
            async with asyncio.timeout(self._write_timeout_s):
                await send({"type": "websocket.close", "code": code, "reason": ""})
        except TimeoutError:
            log.info("events.slow_reader_cut", form="websocket")

    async def _answered_here(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What the route does: it is no route of `app`, but what the guard asks about it."""
        await self(scope, receive, send)


def _text(frame: Frame) -> str:
    return _encoder.encode(frame).decode()


def _with_key(scope: Any) -> Any:
    """The scope with the key that was offered as a subprotocol where a header would have it."""
    if any(name in {b"authorization", b"x-api-key"} for name, _ in scope["headers"]):
        return scope
    offered = (name for name in scope.get("subprotocols", ()) if name.startswith(KEY_PREFIX))
    text = next(offered, "").removeprefix(KEY_PREFIX)
    if not text:
        return scope
    try:
        key = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return scope
    return {**scope, "headers": [*scope["headers"], (b"authorization", b"Bearer " + key)]}


def _query(scope: Any) -> EventsQuery:
    try:
        return decode_query(
            parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True), EventsQuery
        )
    except InvalidPacketError as exc:
        raise BadParameterError(
            exc.problem, pointer=exc.pointer.removeprefix("/"), expected=exc.expected, choices=exc.choices
        ) from exc


async def _deny(scope: Any, send: Send, told: Problem, exc: AgentServerError | None = None) -> None:
    more = exc.headers if isinstance(exc, AccessError) else {}
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": told.title})
        return
    headers = {"content-type": PROBLEM_JSON, **more}
    message: Any = {
        "type": "websocket.http.response.start",
        "status": told.status,
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }
    await send(message)
    body: Any = {
        "type": "websocket.http.response.body",
        "body": msgspec.json.encode(told),
        "more_body": False,
    }
    await send(body)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "websocket.disconnect":
        pass
