"""`/v1/responses`: OpenAI's Responses, whole and as events. Nothing is stored."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import msgspec
import structlog
from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.response.base import ASGIResponse

from ai_agent_server.config.settings import Settings
from ai_agent_server.core.api_operations import Answer as DocumentedAnswer
from ai_agent_server.core.api_operations import Operation
from ai_agent_server.core.api_schemas import JSON
from ai_agent_server.core.event_stream import ClientLeftError, EventStream, WhileConnected
from ai_agent_server.core.request_body import read_body
from ai_agent_server.errors import AgentServerError
from ai_agent_server.gateway._asking import NO_LONGER_READ, tier_of
from ai_agent_server.gateway._errors import WireError, openai_refusals, wire_error
from ai_agent_server.gateway._responses_events import (
    Answer,
    ErrorCode,
    OutputMessage,
    OutputText,
    ResponsesBody,
    ResponsesUsage,
    frame,
)
from ai_agent_server.gateway._responses_wire import ResponsesDraft, decode, translate
from ai_agent_server.gateway.caller import caller_of
from ai_agent_server.gateway.serving import KeepAlive, Opened, Serving, Whole

__all__ = ("ResponsesRoutes", "operations")

AnyRequest: TypeAlias = Request[Any, Any, Any]

KEEP_ALIVE = b": keep-alive\n\n"

log = structlog.get_logger(__name__)


class ResponsesRoutes:
    """The route; what it answers is `Serving`'s."""

    def __init__(
        self,
        *,
        serving: Serving,
        settings: Callable[[], Settings],
        new_id: Callable[[], str],
        now_s: Callable[[], float],
        write_timeout_s: float,
    ) -> None:
        """`now_s` answers seconds since 1970."""
        self._serving, self._settings = serving, settings
        self._new_id, self._now_s, self._write_timeout_s = new_id, now_s, write_timeout_s

    def handlers(self) -> list[HTTPRouteHandler]:
        """The route."""
        return [post("/v1/responses", status_code=200)(self.create)]

    async def create(self, request: AnyRequest) -> ASGIResponse:
        """Answer what `input` says, whole or as events."""
        started_s = self._serving.now_s()
        limit_bytes = int(self._settings().server.max_body_mb * 1024 * 1024)
        draft = decode(await read_body(request, limit_bytes))
        asked = translate(draft)
        served: Opened | Whole | None = None
        # Made before there is an answer to be closed: nothing may fail between its opening and its stream.
        answer = Answer(
            draft,
            asked,
            model=lambda: draft.model if served is None else served.model,
            new_id=self._new_id,
            now=self._now_s,
        )
        serve = self._serving.open if draft.stream else self._serving.whole
        try:
            async with WhileConnected(request.receive):
                served = await serve(
                    draft.model,
                    asked.request,
                    caller_of(request.scope),
                    tier=tier_of(request),
                    surface="responses",
                    started_s=started_s,
                    idempotency_key=request.headers.get("idempotency-key"),
                )
        except ClientLeftError:
            return ASGIResponse(status_code=NO_LONGER_READ, media_type=JSON)
        if isinstance(served, Opened):
            return EventStream(
                _frames(served, answer),
                about={"request_id": served.id, "surface": "responses"},
                write_timeout_s=self._write_timeout_s,
                headers=served.headers,
                aclose=served.aclose,
            )
        response = answer.whole(served.reply)
        return ASGIResponse(body=msgspec.json.encode(response), media_type=JSON, headers=served.headers)


async def _frames(opened: Opened, answer: Answer) -> AsyncGenerator[bytes]:
    """The answer's events. One that breaks off ends with `response.failed`, never with a clean end."""
    try:
        yield b"".join(map(frame, answer.opening()))
        async with aclosing(opened.deltas) as deltas:
            async for delta in deltas:
                if isinstance(delta, KeepAlive):
                    yield KEEP_ALIVE
                elif events := answer.take(delta):
                    yield b"".join(map(frame, events))
        yield b"".join(map(frame, answer.ending()[0]))
    except AgentServerError as exc:
        error = wire_error(exc)
        log.warning("gateway.stream_broken", request_id=opened.id, code=error.code, llm=opened.model)
        yield frame(answer.failing(_code(error), error.message))


def _code(error: WireError) -> ErrorCode:
    """The few codes that the Responses form has."""
    if error.status == 429:
        return "rate_limit_exceeded"
    return "invalid_prompt" if error.status < 500 else "server_error"


def operations() -> tuple[Operation, ...]:
    """The route as the API's document tells it."""
    return (
        Operation(
            method="post",
            path="/v1/responses",
            id="createResponse",
            tag="llms",
            summary="Answer in OpenAI's Responses form",
            about="`model` is an LLM, a tier, a role (`developer/planner`) or `auto`. With `stream` the "
            "answer comes as OpenAI's events, from `response.created` to `response.completed`, `.incomplete` "
            "or `.failed`. Nothing is stored: `store` is false in every answer, and `previous_response_id` "
            "is refused. Functions, namespaces of functions and custom tools are given to the LLM; hosted "
            "tools are left out.",
            query=None,
            body=ResponsesDraft,
            body_example={"model": "auto", "instructions": "Be brief.", "input": "Name a colour."},
            answers=(
                DocumentedAnswer(
                    status=200,
                    about="The whole answer, or its events.",
                    kind=ResponsesBody,
                    is_also_streamed=True,
                    example=ResponsesBody(
                        id="resp_01a1fcd08cc975928d2286079bf98aca",
                        created_at=1795242888,
                        completed_at=1795242889,
                        status="completed",
                        model="embedded",
                        output=(
                            OutputMessage(
                                id="msg_01a1fcd08cc975928d228608fcb95926",
                                status="completed",
                                content=(OutputText(text="Blue."),),
                            ),
                        ),
                        usage=ResponsesUsage(input_tokens=14, output_tokens=3, total_tokens=17),
                    ),
                ),
            ),
            refusals=openai_refusals(),
        ),
    )
