"""Claude, and every server that speaks Anthropic's messages, through the `anthropic` client."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Literal

import anthropic
import httpx2
import msgspec

from ai_agent_server.core.chat import ChatDelta, ChatRequest, JSONObject
from ai_agent_server.errors import (
    EngineAuthError,
    EngineBusyError,
    EngineError,
    EngineProtocolError,
    EngineRequestError,
    EngineTimeoutError,
    EngineUnreachableError,
)
from ai_agent_server.llm_engines import _anthropic_wire as wire
from ai_agent_server.llm_engines._pace import Pace
from ai_agent_server.llm_engines._refusal import in_stream, refusal, retry_after_s, short
from ai_agent_server.llm_engines._sse import Events
from ai_agent_server.llm_engines.base import EngineSpec, ModelCard
from ai_agent_server.loopback import is_loopback_url

__all__ = ("AnthropicEngine",)

ANTHROPIC_URL = "https://api.anthropic.com"
NO_KEY = "none"
"""Sent where no key is configured: the client would take ANTHROPIC_API_KEY to any server otherwise."""


class AnthropicEngine:
    """One model behind one base URL."""

    class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Where it is and what it is peculiar about."""

        base_url: str = ANTHROPIC_URL
        """Without a version: the client adds `/v1/messages`."""
        max_tokens: int = 8192
        """For a request that sets none: the API wants a number."""
        omit: tuple[Literal["temperature", "top_p"], ...] = ("temperature", "top_p")
        """What is not sent. Claude's present models refuse both; name neither for one that takes them."""
        prompt_cache: bool = False
        """Let the API keep each prompt for the next turn, which reads it at a tenth of the price; a prompt
        that never comes again costs a quarter more."""
        extra_body: JSONObject = msgspec.field(default_factory=dict)
        """Goes into each request as it is: `{"thinking": {"type": "adaptive"}}`."""

    def __init__(self, spec: EngineSpec, options: Options) -> None:
        self._spec, self._options = spec, options
        # Silence is timed by Pace; only the connect is left to the transport.
        timeout = httpx2.Timeout(None, connect=spec.timeouts.connect_s)
        self._client = anthropic.AsyncAnthropic(
            api_key=spec.api_key or NO_KEY,
            base_url=options.base_url,
            max_retries=0,
            timeout=timeout,
            open_telemetry=False,
            # Not the client's own kind: that takes a proxy from the environment even when told not to.
            http_client=httpx2.AsyncClient(
                timeout=timeout,
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=16),
                # What a server on this machine is asked must not leave it by a proxy or a redirect.
                trust_env=not is_loopback_url(options.base_url),
                follow_redirects=False,
            ),
        )
        # The client has taken ANTHROPIC_CUSTOM_HEADERS from the environment, which may hold another
        # gateway's key. It has no public way to leave them out.
        self._client._custom_headers = {}

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        """Answer `request`."""
        name = self._spec.name
        pace = Pace(self._spec.timeouts, name)
        answer = wire.Answer(engine=name)
        body = self._body(request)
        with self._translated(connecting=True):
            async with pace.waiting():
                # The body is built by our own wire module; the client sends `extra_body` over the
                # parameters that it asks for.
                events = await self._client.messages.create(
                    model=self._spec.model,
                    max_tokens=body["max_tokens"],
                    messages=[],
                    stream=True,
                    extra_body=body,
                )
        # The client's reader passes over events whose name it does not know, also where the name is what
        # a fault has spoiled, and the answer would lack a part that nobody misses.
        lines, pieces = Events(engine=name), events.response.aiter_bytes()
        try:
            with self._translated():
                while True:
                    async with pace.waiting():
                        piece = await anext(pieces, None)
                    if piece is None:
                        break
                    for payload in lines.feed(piece):
                        delta = self._take(answer, payload)
                        if answer.progressed:
                            pace.progress()
                        if delta is not None:
                            yield delta
            yield answer.end()
        finally:
            await events.close()

    def _take(self, answer: wire.Answer, payload: bytes) -> ChatDelta | None:
        event = wire.decode_event(payload, engine=self._spec.name)
        if event.error is not None:
            raise _in_stream(event.error.type, event.error.message, self._spec)
        return answer.take(event)

    async def models(self) -> tuple[ModelCard, ...]:
        """What the account may use; it says nothing of memory."""
        timeouts = self._spec.timeouts
        pace = Pace(msgspec.structs.replace(timeouts, first_token_s=timeouts.connect_s), self._spec.name)
        with self._translated(connecting=True):
            async with pace.waiting():
                page = await self._client.models.list(limit=1000)
        return tuple(ModelCard(name=model.id, context_tokens=model.max_input_tokens) for model in page.data)

    async def load(self) -> None:
        """Nothing: it cannot be told."""

    async def unload(self) -> None:
        """Nothing: it cannot be told."""

    async def aclose(self) -> None:
        """Close every socket."""
        await self._client.close()

    def _body(self, request: ChatRequest) -> JSONObject:
        options = self._options
        body = wire.payload(request, self._spec.model, max_tokens=options.max_tokens, engine=self._spec.name)
        for name in options.omit:
            body.pop(name, None)
        if options.prompt_cache:
            body["cache_control"] = {"type": "ephemeral"}
        return {**body, **options.extra_body}

    @contextmanager
    def _translated(self, *, connecting: bool = False) -> Iterator[None]:
        if connecting and self._client.is_closed():
            raise EngineUnreachableError("the engine was closed", engine=self._spec.name)
        try:
            yield
        except (
            anthropic.AnthropicError,
            httpx2.HTTPError,
            httpx2.InvalidURL,
            httpx2.StreamError,
            ValueError,
        ) as exc:
            raise translate(exc, spec=self._spec, connecting=connecting) from exc


def translate(exc: Exception, *, spec: EngineSpec, connecting: bool) -> EngineError:
    """Our error for one of the client's. `connecting`: nothing of an answer came yet."""
    name = spec.name
    match exc:
        case anthropic.APIConnectionError() if exc.__cause__ is not None:
            return _from_transport(exc.__cause__, spec, connecting)
        case anthropic.APIConnectionError():
            return _from_transport(exc, spec, connecting)
        case anthropic.APIStatusError():
            return _refused(exc, spec)
        case anthropic.APIResponseValidationError():
            return EngineProtocolError("the answer has another shape", engine=name, status=exc.status_code)
        case anthropic.APIError():
            return in_stream(exc.message, engine=name, secret=spec.api_key)
        case httpx2.HTTPError() | httpx2.InvalidURL() | httpx2.StreamError():
            return _from_transport(exc, spec, connecting)
        case anthropic.AnthropicError():
            return EngineRequestError(short(str(exc), spec.api_key), engine=name)
        case _:
            return EngineProtocolError(f"the answer is malformed ({type(exc).__name__})", engine=name)


def _refused(exc: anthropic.APIStatusError, spec: EngineSpec) -> EngineError:
    status, said = exc.status_code, exc.api_message or exc.message
    text, after_s = short(said, spec.api_key), retry_after_s(exc.response.headers)
    if status == 529:
        return EngineBusyError(text, engine=spec.name, status=status, retry_after_s=after_s)
    if status == 402 or exc.type == "billing_error" or "credit balance is too low" in said:
        # As with a wrong key, no wait and no repeat will help.
        return EngineAuthError(text, engine=spec.name, status=status)
    code: str = exc.type or ""
    if status == 404 and said.startswith("model:"):
        code = "model_not_found"
    elif "exceed context limit" in said:
        code = "context_length_exceeded"
    return refusal(status, said, engine=spec.name, code=code, retry_after_s=after_s, secret=spec.api_key)


def _in_stream(kind: str, said: str, spec: EngineSpec) -> EngineError:
    """An error event: the HTTP status was 200."""
    if kind in {"overloaded_error", "rate_limit_error"}:
        return EngineBusyError(short(said, spec.api_key), engine=spec.name)
    return in_stream(said, engine=spec.name, code=kind, secret=spec.api_key)


def _from_transport(exc: BaseException, spec: EngineSpec, connecting: bool) -> EngineError:
    match exc:
        case httpx2.ConnectTimeout() | httpx2.PoolTimeout():
            return EngineTimeoutError("connect", spec.timeouts.connect_s, engine=spec.name)
        case httpx2.TimeoutException() | anthropic.APITimeoutError():
            return EngineTimeoutError("idle", spec.timeouts.idle_s, engine=spec.name)
        case httpx2.UnsupportedProtocol() | httpx2.LocalProtocolError() | httpx2.InvalidURL():
            return EngineRequestError(f"cannot be asked: {exc}", engine=spec.name)
        case httpx2.ConnectError() | httpx2.ProxyError():
            return EngineUnreachableError(f"cannot be reached: {exc}", engine=spec.name)
        case _ if connecting:
            return EngineUnreachableError(
                f"the connection was lost before an answer began ({type(exc).__name__})", engine=spec.name
            )
        case _:
            return EngineProtocolError(f"the answer was cut ({type(exc).__name__})", engine=spec.name)
