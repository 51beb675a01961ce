"""`/v1/responses`: OpenAI's Responses, whole and as events. Nothing is stored."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import msgspec
import structlog
from litestar import Request, Response, post
from litestar.handlers import HTTPRouteHandler
from litestar.response.base import ASGIResponse

from ai_agent_server.core.api_schemas import JSON
from ai_agent_server.core.event_stream import EventStream
from ai_agent_server.core.request_body import read_body
from ai_agent_server.errors import AgentServerError
from ai_agent_server.gateway._asking import tier_of, while_there
from ai_agent_server.gateway._errors import wire_error
from ai_agent_server.gateway._responses_events import Answer, ErrorCode, frame
from ai_agent_server.gateway._responses_wire import decode, translate
from ai_agent_server.gateway.caller import caller_of
from ai_agent_server.gateway.serving import KeepAlive, Opened, Serving

__all__ = ("ResponsesRoutes",)

AnyRequest: TypeAlias = Request[Any, Any, Any]

KEEP_ALIVE = b": keep-alive\n\n"
WRITE_TIMEOUT_S = 30.0

log = structlog.get_logger(__name__)


class ResponsesRoutes:
    """The route."""

    def __init__(
        self,
        serving: Serving,
        *,
        max_body_bytes: Callable[[], int],
        new_id: Callable[[], str],
        now: Callable[[], float],
        write_timeout_s: float = WRITE_TIMEOUT_S,
    ) -> None:
        """`now` is Unix time in seconds."""
        self._serving, self._max_body_bytes = serving, max_body_bytes
        self._new_id, self._now, self._write_timeout_s = new_id, now, write_timeout_s

    def handlers(self) -> list[HTTPRouteHandler]:
        """The route."""
        return [post("/v1/responses", status_code=200)(self.create)]

    async def create(self, request: AnyRequest) -> Response[bytes] | ASGIResponse:
        """Answer what `input` says."""
        started_s = self._serving.now_s()
        draft = decode(await read_body(request, self._max_body_bytes()))
        asked = translate(draft)
        answer = Answer(draft, asked, new_id=self._new_id, now=self._now)

        async def opened() -> Opened:
            return await self._serving.open(
                draft.model,
                asked.request,
                caller_of(request.scope),
                tier=tier_of(request),
                surface="responses",
                started_s=started_s,
                idempotency_key=request.headers.get("idempotency-key"),
            )

        if not draft.stream:
            return await while_there(request, _whole(opened, answer))
        stream = await opened()
        return EventStream(
            _frames(stream, answer),
            about={"surface": "responses", "request": stream.id},
            write_timeout_s=self._write_timeout_s,
            headers=stream.headers,
        )


async def _whole(opened: Callable[[], Any], answer: Answer) -> Response[bytes]:
    stream: Opened = await opened()
    async with aclosing(stream), aclosing(stream.deltas) as deltas:
        async for delta in deltas:
            if not isinstance(delta, KeepAlive):
                answer.take(delta)
        _, response = answer.ending()
        return Response(msgspec.json.encode(response), media_type=JSON, headers=stream.headers)


async def _frames(opened: Opened, answer: Answer) -> AsyncGenerator[bytes]:
    """The answer's events. One that breaks off ends with `response.failed`, never with a clean end."""
    async with aclosing(opened):
        try:
            yield b"".join(map(frame, answer.opening()))
            async for delta in opened.deltas:
                if isinstance(delta, KeepAlive):
                    yield KEEP_ALIVE
                elif events := answer.take(delta):
                    yield b"".join(map(frame, events))
            yield b"".join(map(frame, answer.ending()[0]))
        except AgentServerError as exc:
            yield frame(answer.failing(_code(exc), wire_error(exc).message))
        except Exception as exc:
            # The status line is long gone: this event is where a client can hear of it.
            log.exception("gateway.stream_failed", surface="responses", request=opened.id)
            yield frame(answer.failing("server_error", wire_error(exc).message))


def _code(error: AgentServerError) -> ErrorCode:
    status = wire_error(error).status
    if status == 429:
        return "rate_limit_exceeded"
    return "invalid_prompt" if status < 500 else "server_error"
