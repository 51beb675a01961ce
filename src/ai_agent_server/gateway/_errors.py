"""Errors as the gateway's clients know them: what an HTTP answer says, in OpenAI's form or another."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException

from ai_agent_server import errors
from ai_agent_server.core.api_operations import Answer
from ai_agent_server.core.api_schemas import JSON

__all__ = (
    "OpenAIErrorBody",
    "WireError",
    "openai_body",
    "openai_form",
    "openai_refusals",
    "refused",
    "wire_error",
)

log = structlog.get_logger(__name__)

MAX_RETRY_AFTER_S = 120.0
"""An SDK waits no longer; a greater number makes it give up."""
NEVER = {"x-should-retry": "false"}
"""The SDKs obey it: what failed will fail again."""
INVALID = "invalid_request_error"
FAILED = "server_error"


class WireError(msgspec.Struct, frozen=True, kw_only=True):
    """An error as it goes out: OpenAI's four words, the status, and what the headers say."""

    status: int
    message: str
    type: str = INVALID
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = {}


class OpenAIError(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong. `param` is the place in the body, `code` a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """An error in OpenAI's form."""

    error: OpenAIError


Form: TypeAlias = Callable[[WireError], Response[bytes]]


def wire_error(exc: BaseException) -> WireError:
    """What `exc` is on the wire. Nothing of an unexpected one but that it was."""
    match exc:
        case errors.AccessError():
            return _access(exc)
        case errors.IntakeError():
            return _intake(exc)
        case errors.StoreError():
            return _down("the server cannot keep tasks now; its log says more", "store_unavailable")
        case errors.AgentError():
            # To run the whole task again because of its outcome is the user's choice, not an SDK's.
            return WireError(status=422, message=str(exc), type=FAILED, code="task_failed", headers=NEVER)
        case errors.NoLLMError():
            return _no_llm(exc)
        case errors.EngineError():
            return _engine(exc)
        case HTTPException():
            return _refusal(exc)
        case _:
            return _internal()


def openai_body(error: WireError) -> bytes:
    """`{"error": {message, type, param, code}}`, all four keys whatever they hold."""
    said = OpenAIError(message=error.message, type=error.type, param=error.param, code=error.code)
    return msgspec.json.encode(OpenAIErrorBody(error=said))


def openai_form(error: WireError) -> Response[bytes]:
    """The answer in OpenAI's form."""
    return Response(
        openai_body(error), media_type=JSON, status_code=error.status, headers=dict(error.headers)
    )


def openai_refusals() -> tuple[Answer, ...]:
    """Every error of the OpenAI form, as the API's document tells it."""
    told = {
        400: ("The body is malformed, or cannot be served as it is.", "invalid_value", "input"),
        401: ("No key of this server was shown.", "invalid_api_key", None),
        403: ("The key, or the page that asks, is not for this.", "insufficient_permissions", None),
        404: ("There is no such model.", "model_not_found", "model"),
        409: ("The idempotency key was used before with another body.", "idempotency_conflict", None),
        413: ("The body is too large.", "request_too_large", None),
        415: ("The body is not declared as JSON.", "unsupported_media_type", None),
        422: ("The task that a role was asked for failed.", "task_failed", None),
        429: ("The caller's share is used up, or every LLM is busy; `Retry-After` says when to come again.",
              "rate_limit_exceeded", None),
        500: ("The server failed; its log says more.", "internal_error", None),
        502: ("The LLM's engine failed.", "engine_failed", None),
        503: ("No LLM may serve now.", "llm_unavailable", None),
        504: ("The LLM's engine was silent for too long.", "engine_timeout", None),
    }  # fmt: skip
    return tuple(
        Answer(
            status=status,
            about=about,
            kind=OpenAIErrorBody,
            example=OpenAIErrorBody(
                error=OpenAIError(
                    message=about, type=INVALID if status < 429 else FAILED, param=param, code=code
                )
            ),
        )
        for status, (about, code, param) in told.items()
    )


def refused(
    forms: Mapping[str, Form],
) -> Callable[[Request[Any, Any, Any], Exception], Response[bytes] | None]:
    """Answers an error in the form of the surface whose path is asked for; the longest prefix counts."""
    ordered = sorted(forms.items(), key=lambda item: len(item[0]), reverse=True)

    def answer(request: Request[Any, Any, Any], exc: Exception) -> Response[bytes] | None:
        path = request.scope["path"]
        form = next(
            (form for prefix, form in ordered if path == prefix or path.startswith(prefix + "/")), None
        )
        if form is None:
            return None
        error = wire_error(exc)
        if error.status == 500:
            log.error("gateway.failed", method=request.method, path=path[:200], exc_info=exc)
        return form(error)

    return answer


def _access(exc: errors.AccessError) -> WireError:
    if isinstance(exc, errors.LimitExceededError):
        return _limit(exc)
    status, code = (
        (401, "invalid_api_key")
        if isinstance(exc, errors.KeyNeededError)
        else (403, "insufficient_permissions")
    )
    return WireError(status=status, message=exc.problem, code=code, headers={**NEVER, **exc.headers})


def _intake(exc: errors.IntakeError) -> WireError:
    match exc:
        case errors.UnknownLLMError():
            there = ", ".join(exc.choices)
            return WireError(
                status=404,
                message=f"The model {exc.name!r} does not exist; there are: {there or 'none'}",
                code="model_not_found",
                param="model",
            )
        case errors.UnknownRoleError():
            return WireError(status=404, message=str(exc), code="model_not_found", param="model")
        case errors.MalformedPacketError():
            return WireError(status=400, message=f"We could not parse the JSON body of your request: {exc}")
        case errors.InvalidPacketError():
            return _invalid(exc)
        case errors.IdempotencyConflictError():
            return WireError(status=409, message=str(exc), code="idempotency_conflict", headers=NEVER)
        case errors.IntakeFullError():
            return _busy(str(exc), exc.retry_after_s)
        case errors.ShuttingDownError():
            return _down(str(exc), "shutting_down", exc.retry_after_s)
        case _:
            return _internal()


def _limit(exc: errors.LimitExceededError) -> WireError:
    headers = dict(exc.headers)
    if exc.is_quota or exc.retry_after_s is None:
        return WireError(
            status=429,
            message=exc.problem,
            type="insufficient_quota",
            code="insufficient_quota",
            headers={**headers, **NEVER},
        )
    return WireError(
        status=429,
        message=exc.problem,
        type="tokens" if exc.unit == "tokens" else "requests",
        code="rate_limit_exceeded",
        headers={**_retry_after(exc.retry_after_s), **headers},
    )


def _invalid(exc: errors.InvalidPacketError) -> WireError:
    param = _param(exc.pointer) or None
    about = f"Invalid {param!r}: {exc.problem}" if param else exc.problem
    expected = f"; expected {exc.expected}" if exc.expected else ""
    choices = f" (choices: {', '.join(exc.choices)})" if exc.choices else ""
    return WireError(status=400, message=about + expected + choices, code="invalid_value", param=param)


def _no_llm(exc: errors.NoLLMError) -> WireError:
    cause = exc.__cause__
    if isinstance(cause, errors.EngineBusyError):
        return _busy(str(exc), cause.retry_after_s)
    rules = [why.partition(":")[0] for why in exc.refusals.values()]
    waits = any(rule in {"LB-8 tried", "LB-9 circuit"} for rule in rules)
    return _down(str(exc), "llm_unavailable", may_recover=waits)


def _engine(exc: errors.EngineError) -> WireError:
    match exc:
        case errors.ContextOverflowError():
            return WireError(
                status=400, message=exc.problem, code="context_length_exceeded", param="messages"
            )
        case errors.ModelNotFoundError():
            return WireError(status=404, message=str(exc), code="model_not_found", param="model")
        case errors.EngineRequestError():
            return WireError(status=400, message=str(exc), code="refused_by_engine", headers=NEVER)
        case errors.EngineBusyError():
            return _busy(str(exc), exc.retry_after_s)
        case errors.EngineTimeoutError():
            return WireError(status=504, message=str(exc), type=FAILED, code="engine_timeout")
        case errors.EngineUnreachableError():
            return WireError(status=502, message=str(exc), type=FAILED, code="engine_unreachable")
        case errors.EngineAuthError():
            return WireError(
                status=502, message=str(exc), type=FAILED, code="engine_refused_key", headers=NEVER
            )
        case errors.EngineProtocolError():
            return WireError(status=502, message=str(exc), type=FAILED, code="engine_answer_broken")
        case _:
            return WireError(status=502, message=str(exc), type=FAILED, code="engine_failed")


def _refusal(exc: HTTPException) -> WireError:
    """What was refused before any of our parts was asked."""
    headers = dict(exc.headers or {})
    match exc.status_code:
        case 401:
            return WireError(
                status=401, message=exc.detail, code="invalid_api_key", headers={**NEVER, **headers}
            )
        case 403:
            return WireError(
                status=403, message=exc.detail, code="insufficient_permissions", headers={**NEVER, **headers}
            )
        case 404:
            return WireError(status=404, message="Unknown request URL.", code="unknown_url")
        case 405:
            return WireError(status=405, message=exc.detail, code="method_not_supported", headers=headers)
        case 413:
            return WireError(status=413, message=exc.detail, code="request_too_large")
        case 415:
            return WireError(status=415, message=exc.detail, code="unsupported_media_type")
        case 400:
            return WireError(status=400, message=exc.detail)
        case _:
            return _internal()


def _busy(message: str, retry_after_s: float | None) -> WireError:
    return WireError(
        status=429,
        message=message,
        type="requests",
        code="rate_limit_exceeded",
        headers=_retry_after(1.0 if retry_after_s is None else retry_after_s),
    )


def _down(
    message: str, code: str, retry_after_s: float | None = None, *, may_recover: bool = True
) -> WireError:
    headers = _retry_after(retry_after_s) if retry_after_s is not None else {}
    return WireError(
        status=503,
        message=message,
        type=FAILED,
        code=code,
        headers=headers if may_recover else {**headers, **NEVER},
    )


def _internal() -> WireError:
    return WireError(
        status=500, message="the server failed; its log says more", type=FAILED, code="internal_error"
    )


def _retry_after(wait_s: float) -> dict[str, str]:
    bounded_s = min(MAX_RETRY_AFTER_S, max(0.0, wait_s))
    return {
        "Retry-After": str(max(1, math.ceil(bounded_s))),
        "retry-after-ms": str(max(1, math.ceil(bounded_s * 1000))),
    }


def _param(pointer: str) -> str:
    """`/messages/0/content` as OpenAI writes it: `messages[0].content`; a header's name as it is."""
    if not pointer.startswith("/"):
        return pointer
    written = ""
    for part in pointer[1:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if name.isdecimal():
            written += f"[{name}]"
        else:
            written += f".{name}" if written else name
    return written
