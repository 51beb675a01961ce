"""Anthropic's API for Claude Code and Anthropic's SDKs: messages, their token count, and the first knock."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeAlias, get_args

import msgspec
import structlog
from litestar import Request, Response, head, post
from litestar.handlers import HTTPRouteHandler
from litestar.response.base import ASGIResponse

from ai_agent_server.config.settings import Settings
from ai_agent_server.core.api_operations import Answer, Header, Operation
from ai_agent_server.core.api_schemas import JSON
from ai_agent_server.core.chat import ChatRequest, JSONObject, Tier
from ai_agent_server.core.event_stream import ClientLeftError, EventStream, WhileConnected
from ai_agent_server.core.request_body import read_body
from ai_agent_server.errors import AgentServerError
from ai_agent_server.gateway import _anthropic_wire as wire
from ai_agent_server.gateway._asking import NO_LONGER_READ, tier_of
from ai_agent_server.gateway._errors import Form, WireError, wire_error
from ai_agent_server.gateway.caller import caller_of
from ai_agent_server.gateway.door import COUNTED
from ai_agent_server.gateway.serving import KeepAlive, Opened, Serving
from ai_agent_server.load_balancer import estimate

__all__ = ("AnthropicApi", "anthropic_form", "operations")

log = structlog.get_logger(__name__)

PATH = "/v1/messages"
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Anthropic's words for the statuses; all others are an `api_error`."""

AnyRequest: TypeAlias = Request[Any, Any, Any]


class AnthropicApi:
    """`POST /v1/messages`, `POST /v1/messages/count_tokens` and `HEAD /`."""

    def __init__(self, serving: Serving, *, settings: Callable[[], Settings], write_timeout_s: float) -> None:
        self._serving, self._settings, self._write_timeout_s = serving, settings, write_timeout_s

    def handlers(self) -> list[HTTPRouteHandler]:
        """The routes."""
        return [
            post(PATH, status_code=200)(self.messages),
            post(f"{PATH}/count_tokens", status_code=200, opt={COUNTED: False})(self.count_tokens),
            head("/", opt={"public": True})(self.knock),
        ]

    async def messages(self, request: AnyRequest) -> ASGIResponse:
        """The next message of a conversation, streamed or whole."""
        started_s = self._serving.now_s()
        draft = wire.decode_messages(await self._body(request))
        asked = wire.chat_request(draft)
        opened: Opened | None = None
        try:
            async with WhileConnected(request.receive):
                opened = await self._serving.open(
                    draft.model,
                    asked,
                    caller_of(request.scope),
                    tier=tier_of(request),
                    surface="messages",
                    started_s=started_s,
                    idempotency_key=request.headers.get("idempotency-key"),
                )
                if not draft.stream:
                    return await _whole(opened, draft, asked)
        except ClientLeftError:
            if opened is not None:
                await opened.aclose()
            return ASGIResponse(status_code=NO_LONGER_READ, media_type=JSON)
        return EventStream(
            _frames(opened, draft, asked),
            about={"request_id": opened.id, "surface": "messages"},
            write_timeout_s=self._write_timeout_s,
            headers=_headers(opened),
            aclose=opened.aclose,
        )

    async def count_tokens(self, request: AnyRequest) -> Response[bytes]:
        """How many tokens the prompt has, about where the LLM cannot count."""
        draft = wire.decode_token_count(await self._body(request))
        asked, caller = wire.chat_request(draft), caller_of(request.scope)
        tokens = await self._serving.count(draft.model, asked, caller)
        return Response(msgspec.json.encode(wire.TokenCount(input_tokens=tokens)), media_type=JSON)

    async def knock(self) -> None:
        """Claude Code looks whether somebody is there before it speaks."""

    async def _body(self, request: AnyRequest) -> bytes:
        return await read_body(request, int(self._settings().server.max_body_mb * 1024 * 1024))


def operations() -> tuple[Operation, ...]:
    """The routes as the API's document tells them."""
    asked: JSONObject = {
        "model": "auto",
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    message = wire.MessageReply(
        id="msg_01936f2a-7c1e-7b3a-9d55-2f4be0a1c9d7",
        model="embedded",
        content=(wire.TextBlock(text="Paris."),),
        stop_reason="end_turn",
        usage=wire.MessageUsage(input_tokens=31, output_tokens=3),
    )
    return (
        Operation(
            method="post",
            path=PATH,
            id="createMessage",
            tag="llms",
            summary="The next message of a conversation, in Anthropic's form",
            about="For Anthropic's SDKs and Claude Code. `model` is an LLM, a tier, `profile/role`, `auto`, "
            "or an alias of `gateway.aliases`. With `stream` it comes as named events, and `ping` while "
            "nothing else does; one that broke ends with `error` and without `message_stop`. Fields, tools "
            "and blocks that are not known here are let pass.",
            query=None,
            headers=(
                Header("X-Tier", "Which LLMs should serve.", {"enum": list(get_args(Tier))}, example="main"),
            ),
            body=wire.MessagesDraft,
            body_example={**asked, "max_tokens": 200},
            answers=(
                Answer(
                    status=200,
                    about="The message.",
                    kind=wire.MessageReply,
                    example=message,
                    is_also_streamed=True,
                ),
            ),
            refusals=_refusals(),
        ),
        Operation(
            method="post",
            path=f"{PATH}/count_tokens",
            id="countTokens",
            tag="llms",
            summary="How many tokens a conversation has, in Anthropic's form",
            about="Counted by the LLM that `model` leads to where its engine can (llama.cpp with the model "
            "in memory, vLLM), else estimated.",
            query=None,
            body=wire.TokenCountDraft,
            body_example=asked,
            answers=(
                Answer(
                    status=200,
                    about="The number.",
                    kind=wire.TokenCount,
                    example=wire.TokenCount(input_tokens=19),
                ),
            ),
            refusals=_refusals(),
        ),
    )


def _refusals() -> tuple[Answer, ...]:
    told = {
        400: "The body is malformed, or cannot be served as it is.",
        401: "No key of this server was shown.",
        403: "The key, or the page that asks, is not for this.",
        404: "There is no such model.",
        409: "The idempotency key was used before with another body.",
        413: "The body is too large.",
        415: "The body is not declared as JSON.",
        422: "The task that a role was asked for failed.",
        429: "The caller's share is used up, or every LLM is busy; `Retry-After` says when to come again.",
        500: "The server failed; its log says more.",
        502: "The LLM's engine failed.",
        503: "No LLM may serve, and none will.",
        504: "The LLM's engine was silent for too long.",
        529: "No LLM can serve now.",
    }
    return tuple(
        Answer(
            status=status,
            about=about,
            kind=wire.AnthropicErrorBody,
            example=wire.AnthropicErrorBody(
                error=wire.AnthropicError(
                    type="api_error" if status == 503 else _TYPES.get(status, "api_error"), message=about
                ),
                request_id="01936f2a-7c1e-7b3a-9d55-2f4be0a1c9d7",
            ),
        )
        for status, about in told.items()
    )


def anthropic_form(new_id: Callable[[], str]) -> Form:
    """Answers errors in Anthropic's form. Each has an id, as a successful answer has."""

    def form(error: WireError) -> Response[bytes]:
        request_id = error.headers.get("x-request-id") or new_id()
        status, detail = _told(error)
        body = wire.AnthropicErrorBody(error=detail, request_id=request_id)
        return Response(
            msgspec.json.encode(body),
            media_type=JSON,
            status_code=status,
            headers={**error.headers, "request-id": request_id},
        )

    return form


def _told(error: WireError) -> tuple[int, wire.AnthropicError]:
    """The status and Anthropic's words for an error."""
    status, message = error.status, error.message
    match error.code:
        case "context_length_exceeded":
            # By these words Claude Code knows that it has to shorten the conversation.
            message = f"prompt is too long: {message}"
        case "model_not_found":
            message = (
                f"model: {message}. An alias can lead a name that a client insists on to one of them: "
                "`gateway.aliases` in configuration.json"
            )
        case _:
            pass
    if status == 503 and error.headers.get("x-should-retry") != "false":
        status = 529
    elif status == 503:
        return status, wire.AnthropicError(type="api_error", message=message)
    return status, wire.AnthropicError(type=_TYPES.get(status, "api_error"), message=message)


async def _whole(opened: Opened, draft: wire.MessagesDraft, asked: ChatRequest) -> ASGIResponse:
    async with aclosing(opened):
        answer: wire.Answer | None = None
        async for delta in opened.deltas:
            if isinstance(delta, KeepAlive):
                continue
            answer = answer or _answer(opened, draft, asked)
            answer.take(delta)
            if answer.stopped:
                break
        answer = answer or _answer(opened, draft, asked)
        answer.end()
        body = msgspec.json.encode(answer.message())
        return ASGIResponse(body=body, media_type=JSON, headers=_headers(opened))


async def _frames(opened: Opened, draft: wire.MessagesDraft, asked: ChatRequest) -> AsyncGenerator[bytes]:
    """The stream's events. Whatever breaks is told as its last one."""
    async with aclosing(opened):
        answer: wire.Answer | None = None
        try:
            async for delta in opened.deltas:
                if isinstance(delta, KeepAlive):
                    yield wire.PING
                    continue
                frame = b""
                if answer is None:
                    # Not before: it names the LLM that answers.
                    answer = _answer(opened, draft, asked)
                    frame = answer.start()
                frame += answer.take(delta)
                if frame:
                    yield frame
                if answer.stopped:
                    break
            answer = answer or _answer(opened, draft, asked)
            yield answer.end()
        except AgentServerError as exc:
            error = wire_error(exc)
            log.warning("gateway.stream_broken", request_id=opened.id, code=error.code, llm=opened.model)
            yield _last_words(error, opened.id)
        except Exception as exc:
            # The status line is long gone: a failure of our own has to be told here.
            log.exception("gateway.stream_failed", request_id=opened.id, surface="messages")
            yield _last_words(wire_error(exc), opened.id)


def _answer(opened: Opened, draft: wire.MessagesDraft, asked: ChatRequest) -> wire.Answer:
    return wire.Answer(
        message_id=f"msg_{opened.id}",
        model=opened.model,
        input_tokens=estimate.input_tokens(asked),
        stops=draft.stop_sequences or (),
        shows_thinking=draft.shows_thinking,
        keep=not draft.stream,
    )


def _last_words(error: WireError, request_id: str) -> bytes:
    _, detail = _told(error)
    return wire.error_event(detail.type, detail.message, request_id)


def _headers(opened: Opened) -> dict[str, str]:
    return {**opened.headers, "request-id": opened.id}
