"""OpenAI, and every server that speaks its chat completions.

Chats go over the wire as it is, which costs a sixth of what the `openai` client does for each; that
client asks for vectors and for the list of models.
"""

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Literal

import httpx2
import msgspec
import openai

from ai_agent_server.core.chat import ChatDelta, ChatRequest, JSONObject
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.errors import (
    EngineError,
    EngineProtocolError,
    EngineRequestError,
    EngineTimeoutError,
    EngineUnreachableError,
)
from ai_agent_server.llm_engines import _openai_wire as wire
from ai_agent_server.llm_engines import _vectors
from ai_agent_server.llm_engines._event_source import EventSource
from ai_agent_server.llm_engines._pace import Pace
from ai_agent_server.llm_engines._refusal import in_stream, refusal, retry_after_s
from ai_agent_server.llm_engines.base import EngineSpec, ModelCard
from ai_agent_server.loopback import is_loopback_url

__all__ = ("OpenAIEngine",)

OPENAI_URL = "https://api.openai.com/v1"
NO_KEY = "none"
"""Sent where no key is configured: the client would take OPENAI_API_KEY to any server otherwise."""


class OpenAIEngine:
    """One model behind one base URL."""

    class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Where it is and what it is peculiar about."""

        base_url: str = OPENAI_URL
        """With its version: `https://openrouter.ai/api/v1`."""
        max_tokens_field: wire.MaxTokensField | None = None
        """By default `max_completion_tokens` for OpenAI and `max_tokens`, which all others know."""
        omit: tuple[Literal["temperature", "top_p", "seed", "stop", "stream_options"], ...] = ()
        """What the server refuses (reasoning models: `temperature`)."""
        strict_schema: bool = False
        """OpenAI's strict mode, which holds the model to a schema but knows only some schemas."""
        extra_body: JSONObject = msgspec.field(default_factory=dict)
        """Goes into each request as it is."""
        organization: str | None = None
        project: str | None = None

    def __init__(self, spec: EngineSpec, options: Options) -> None:
        self._spec, self._options = spec, options
        self._max_tokens_field: wire.MaxTokensField = options.max_tokens_field or (
            "max_completion_tokens" if options.base_url.rstrip("/") == OPENAI_URL else "max_tokens"
        )
        # Silence is timed by Pace; only the connect is left to the transport.
        timeout = httpx2.Timeout(None, connect=spec.timeouts.connect_s)
        self._client = openai.AsyncOpenAI(
            api_key=spec.api_key or NO_KEY,
            base_url=options.base_url,
            max_retries=0,
            timeout=timeout,
            http_client=openai.DefaultAsyncHttpxClient(
                timeout=timeout,
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=16),
                # What a server on this machine is asked must not leave it by a proxy or a redirect.
                trust_env=not is_loopback_url(options.base_url),
                follow_redirects=False,
            ),
        )
        self._chats = EventSource(
            options.base_url.rstrip("/") + "/chat/completions",
            headers=_headers(spec, options),
            engine=spec.name,
            timeouts=spec.timeouts,
            secret=spec.api_key,
            # What a server on this machine is asked must not leave it by a proxy.
            trust_env=not is_loopback_url(options.base_url),
        )
        # The client has taken these from the environment; they are for OpenAI alone.
        self._client.organization, self._client.project = options.organization, options.project
        self._client.admin_api_key = None

    def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        """Answer `request`."""
        return self._chats.deltas(
            self._body(request), Pace(self._spec.timeouts, self._spec.name), request.traceparent
        )

    async def embed(self, request: EmbeddingRequest) -> EmbeddingReply:
        """The vectors of the inputs."""
        name = self._spec.name
        pace = Pace(self._spec.timeouts, name)
        with self._translated(connecting=True):
            async with pace.waiting():
                # The body is ours: to a vector that it did not ask for by itself the client does nothing.
                answer = await self._client.embeddings.create(
                    model=self._spec.model,
                    input=list(request.inputs),
                    encoding_format="base64",
                    extra_body={**_vectors.payload(request, self._spec.model), **self._options.extra_body},
                )
        try:
            plain = msgspec.convert(answer, _vectors.Embeddings, from_attributes=True)
        except msgspec.ValidationError as exc:
            raise EngineProtocolError("the vectors have another shape", engine=name) from exc
        return _vectors.reply(plain, request, engine=name)

    async def models(self) -> tuple[ModelCard, ...]:
        """What the server lists; it says nothing of memory."""
        timeouts = self._spec.timeouts
        pace = Pace(msgspec.structs.replace(timeouts, first_token_s=timeouts.connect_s), self._spec.name)
        with self._translated(connecting=True):
            async with pace.waiting():
                page = await self._client.models.list()
        return tuple(ModelCard(name=model.id) for model in page.data)

    async def load(self) -> None:
        """Nothing: it cannot be told."""

    async def unload(self) -> None:
        """Nothing: it cannot be told."""

    async def aclose(self) -> None:
        """Close every socket."""
        await self._chats.aclose()
        await self._client.close()

    def _body(self, request: ChatRequest) -> JSONObject:
        body = wire.payload(request, self._spec.model, max_tokens_field=self._max_tokens_field)
        for name in self._options.omit:
            body.pop(name, None)
        if self._options.strict_schema and "response_format" in body:
            body["response_format"]["json_schema"]["strict"] = True
        return {**body, **self._options.extra_body}

    @contextmanager
    def _translated(self, *, connecting: bool = False) -> Iterator[None]:
        if connecting and self._client.is_closed():
            raise EngineUnreachableError("the engine was closed", engine=self._spec.name)
        try:
            yield
        except (
            openai.OpenAIError,
            httpx2.HTTPError,
            httpx2.InvalidURL,
            httpx2.StreamError,
            ValueError,
        ) as exc:
            raise translate(exc, spec=self._spec, connecting=connecting) from exc


def _headers(spec: EngineSpec, options: OpenAIEngine.Options) -> dict[str, str]:
    given = {
        "Authorization": f"Bearer {spec.api_key}" if spec.api_key else None,
        "OpenAI-Organization": options.organization,
        "OpenAI-Project": options.project,
    }
    return {name: value for name, value in given.items() if value is not None}


def translate(exc: Exception, *, spec: EngineSpec, connecting: bool) -> EngineError:
    """Our error for one of the client's. `connecting`: nothing of an answer came yet."""
    name, secret = spec.name, spec.api_key
    match exc:
        case openai.APITimeoutError() | openai.APIConnectionError() if exc.__cause__ is not None:
            return _from_transport(exc.__cause__, spec, connecting)
        case openai.APITimeoutError() | openai.APIConnectionError():
            return _from_transport(exc, spec, connecting)
        case openai.APIStatusError():
            said = wire.error_body(exc.body)
            return refusal(
                exc.status_code,
                said.message or exc.message,
                engine=name,
                code=said.code,
                retry_after_s=retry_after_s(exc.response.headers),
                secret=secret,
            )
        case openai.APIResponseValidationError():
            return EngineProtocolError("the answer has another shape", engine=name, status=exc.status_code)
        case openai.APIError():
            said = wire.error_body(exc.body)
            return in_stream(
                said.message or exc.message, engine=name, code=said.code, status=said.status, secret=secret
            )
        case httpx2.HTTPError() | httpx2.InvalidURL() | httpx2.StreamError():
            return _from_transport(exc, spec, connecting)
        case _:
            return EngineProtocolError(f"the answer is malformed ({type(exc).__name__})", engine=name)


def _from_transport(exc: BaseException, spec: EngineSpec, connecting: bool) -> EngineError:
    match exc:
        case httpx2.ConnectTimeout() | httpx2.PoolTimeout():
            return EngineTimeoutError("connect", spec.timeouts.connect_s, engine=spec.name)
        case httpx2.TimeoutException() | openai.APITimeoutError():
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
