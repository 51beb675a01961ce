"""A model server on this machine that speaks OpenAI's form, and beside it a language of its own."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx
import msgspec

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
from ai_agent_server.llm_engines._refusal import refusal, retry_after_s
from ai_agent_server.llm_engines.base import EngineTimeouts

T = TypeVar("T")


class ServerHTTP:
    """A client of one server at `base_url` (no `/v1`)."""

    def __init__(
        self,
        base_url: str,
        *,
        engine: str,
        timeouts: EngineTimeouts,
        api_key: str | None = None,
        keep_alive: bool = True,
    ) -> None:
        """`keep_alive`: an answer's connection may serve the next one."""
        self._engine, self._timeouts, self._secret = engine, timeouts, api_key
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._chats = EventSource(
            f"{base_url}/v1/chat/completions",
            headers=headers,
            engine=engine,
            timeouts=timeouts,
            secret=api_key,
            keep_alive=keep_alive,
        )
        self._client = httpx.AsyncClient(
            base_url=base_url,
            headers=headers,
            # Silence is timed by Pace; only the connect is left to the transport.
            timeout=httpx.Timeout(None, connect=timeouts.connect_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=16),
            # What a local server is asked must not leave the machine by a proxy or a redirect.
            trust_env=False,
            follow_redirects=False,
        )

    def stream(self, request: ChatRequest, model: str, extra: JSONObject) -> AsyncGenerator[ChatDelta, None]:
        """Answer `request`; `extra` goes into the body as it is."""
        body = {**wire.payload(request, model, max_tokens_field="max_tokens"), **extra}
        return self._chats.deltas(body, Pace(self._timeouts, self._engine), request.traceparent)

    async def embed(self, request: EmbeddingRequest, model: str) -> EmbeddingReply:
        """The vectors of the inputs."""
        body = _vectors.payload(request, model)
        pace = Pace(self._timeouts, self._engine)
        with self._translated(connecting=True):
            async with pace.waiting():
                response = await self._client.post("/v1/embeddings", json=body)
        answer = self._decoded(response, "/v1/embeddings", _vectors.Embeddings)
        return _vectors.reply(answer, request, engine=self._engine)

    async def get(self, path: str, shape: type[T]) -> T:
        """What a GET of `path` answers, within the connect time-out. Never touches a model."""
        response = await self._ask("GET", path, None, self._timeouts.connect_s)
        return self._decoded(response, path, shape)

    async def post(self, path: str, body: JSONObject | None, timeout_s: float) -> None:
        """POST `body` to `path` and have it answered within `timeout_s`; what it answers is not read."""
        response = await self._ask("POST", path, body, timeout_s)
        if response.status_code != httpx.codes.OK:
            raise self._refused(response, response.content)

    async def ask(self, path: str, body: JSONObject, shape: type[T]) -> T:
        """What a POST of `body` to `path` answers, within the connect time-out. Never touches a model."""
        response = await self._ask("POST", path, body, self._timeouts.connect_s)
        return self._decoded(response, path, shape)

    async def _ask(self, method: str, path: str, body: JSONObject | None, within_s: float) -> httpx.Response:
        pace = Pace(msgspec.structs.replace(self._timeouts, first_token_s=within_s), self._engine)
        with self._translated(connecting=True):
            async with pace.waiting():
                return await self._client.request(method, path, json=body)

    def _decoded(self, response: httpx.Response, path: str, shape: type[T]) -> T:
        if response.status_code != httpx.codes.OK:
            raise self._refused(response, response.content)
        try:
            return msgspec.json.decode(response.content, type=shape)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise EngineProtocolError(f"{path} answered something else", engine=self._engine) from exc

    async def aclose(self) -> None:
        """Close every socket."""
        await self._chats.aclose()
        await self._client.aclose()

    def _refused(self, response: httpx.Response, body: bytes) -> EngineError:
        said = wire.decode_error(body)
        return refusal(
            response.status_code,
            said.message,
            engine=self._engine,
            code=said.code,
            retry_after_s=retry_after_s(response.headers),
            secret=self._secret,
        )

    @contextmanager
    def _translated(self, *, connecting: bool = False) -> Iterator[None]:
        if connecting and self._client.is_closed:
            raise EngineUnreachableError("the engine was closed", engine=self._engine)
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as exc:
            raise translate(exc, engine=self._engine, timeouts=self._timeouts, connecting=connecting) from exc


def translate(exc: Exception, *, engine: str, timeouts: EngineTimeouts, connecting: bool) -> EngineError:
    """Our error for one of httpx's. `connecting`: nothing of an answer came yet."""
    match exc:
        case httpx.ConnectTimeout() | httpx.PoolTimeout():
            return EngineTimeoutError("connect", timeouts.connect_s, engine=engine)
        case httpx.TimeoutException():
            return EngineTimeoutError("idle", timeouts.idle_s, engine=engine)
        case httpx.UnsupportedProtocol() | httpx.LocalProtocolError() | httpx.InvalidURL():
            return EngineRequestError(f"cannot be asked: {exc}", engine=engine)
        case httpx.ConnectError() | httpx.ProxyError():
            return EngineUnreachableError(f"cannot be reached: {exc}", engine=engine)
        case httpx.TransportError() if connecting:
            return EngineUnreachableError(
                f"the connection was lost before an answer began ({type(exc).__name__})", engine=engine
            )
        case _:
            return EngineProtocolError(f"the answer was cut ({type(exc).__name__})", engine=engine)
