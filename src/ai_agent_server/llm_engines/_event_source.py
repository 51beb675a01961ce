"""Streamed answers over pooled connections: a POST, and the server-sent events that answer it.

The path that every token of the gateway takes: measured beside the clients of openai and httpx, it costs
a sixth of their CPU time for a request.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress

import aiohttp
import msgspec
from yarl import URL

from ai_agent_server.core.chat import ChatDelta, JSONObject
from ai_agent_server.errors import (
    EngineError,
    EngineProtocolError,
    EngineRequestError,
    EngineTimeoutError,
    EngineUnreachableError,
)
from ai_agent_server.llm_engines import _openai_wire as wire
from ai_agent_server.llm_engines._pace import Pace
from ai_agent_server.llm_engines._refusal import refusal, retry_after_s
from ai_agent_server.llm_engines._sse import Events
from ai_agent_server.llm_engines.base import EngineTimeouts

DONE = b"[DONE]"
ERROR_BYTES = 64 * 1024
KEPT_OPEN = 16
END_S = 0.1
"""After its last event a server ends the body at once; one that does not loses the connection."""


class EventSource:
    """POSTs to one URL. Its errors are `EngineError`s; it repeats nothing and follows no redirect."""

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str],
        engine: str,
        timeouts: EngineTimeouts,
        secret: str | None = None,
        trust_env: bool = False,
        keep_alive: bool = True,
    ) -> None:
        """`trust_env`: a proxy that the environment names may be used.

        Without `keep_alive` each POST has a connection of its own, for a server that closes kept ones
        as it likes: a request that meets such a moment is lost.
        """
        self._url = URL(url)
        self._headers = {"Content-Type": "application/json", **headers}
        self._engine, self._timeouts, self._secret = engine, timeouts, secret
        self._trust_env, self._keep_alive = trust_env, keep_alive
        # Made here, since reading certificates blocks.
        self._tls = ssl.create_default_context() if self._url.scheme == "https" else None
        self._session: aiohttp.ClientSession | None = None
        self._is_closed = False

    async def events(self, body: bytes, pace: Pace, traceparent: str = "") -> AsyncGenerator[bytes, None]:
        """Each event's payload, until `[DONE]` or the end. Closed before, it closes the connection."""
        headers = {**self._headers, "traceparent": traceparent} if traceparent else self._headers
        with self._translated(connecting=True):
            session = self._opened()
            async with pace.waiting():
                response = await session.post(
                    self._url, data=body, headers=headers, allow_redirects=False, ssl=self._tls or True
                )
        try:
            with self._translated():
                if response.status != 200:
                    raise await self._refused(response, pace)
                events = Events(engine=self._engine)
                content, is_done = response.content, False
                while not is_done:
                    # What is there already need not be timed.
                    piece = content.read_nowait()
                    if not piece:
                        async with pace.waiting():
                            piece = await content.readany()
                    if not piece:
                        return
                    for event in events.feed(piece):
                        if event == DONE:
                            is_done = True
                            break
                        yield event
                if not content.at_eof():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(END_S):
                            while await content.readany():
                                pass
        finally:
            # Back to the pool where the body was read to its end; closed otherwise.
            response.close() if not response.content.at_eof() else response.release()

    async def deltas(
        self, body: JSONObject, pace: Pace, traceparent: str = ""
    ) -> AsyncGenerator[ChatDelta, None]:
        """The answer that OpenAI's form of chat completions gives to `body`, piece by piece."""
        answer = wire.Answer(engine=self._engine, secret=self._secret)
        async with aclosing(self.events(msgspec.json.encode(body), pace, traceparent)) as events:
            async for event in events:
                delta = answer.take(wire.decode_chunk(event, engine=self._engine))
                if answer.progressed:
                    pace.progress()
                if delta is not None:
                    yield delta
        yield answer.end()

    async def aclose(self) -> None:
        """Close every socket. May be called twice."""
        self._is_closed = True
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._is_closed:
            raise EngineUnreachableError("the engine was closed", engine=self._engine)
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0)
                if self._keep_alive
                else aiohttp.TCPConnector(limit=0, force_close=True),
                # Silence is timed by Pace; only the connect is left to the transport.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timeouts.connect_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=self._trust_env,
            )
        return self._session

    async def _refused(self, response: aiohttp.ClientResponse, pace: Pace) -> EngineError:
        said = b""
        while len(said) < ERROR_BYTES:
            async with pace.waiting():
                piece = await response.content.readany()
            if not piece:
                break
            said += piece
        error = wire.decode_error(said)
        return refusal(
            response.status,
            error.message,
            engine=self._engine,
            code=error.code,
            retry_after_s=retry_after_s(response.headers),
            secret=self._secret,
        )

    @contextmanager
    def _translated(self, *, connecting: bool = False) -> Iterator[None]:
        try:
            yield
        except (aiohttp.ClientError, ssl.SSLError, OSError, ValueError) as exc:
            if isinstance(exc, TimeoutError) and not isinstance(exc, aiohttp.ClientError):
                raise  # of no connection of ours
            raise translate(exc, engine=self._engine, timeouts=self._timeouts, connecting=connecting) from exc
        except RuntimeError as exc:
            # aiohttp's for a session or a connection that was closed under its reader.
            if not self._is_closed:
                raise
            raise EngineUnreachableError("the engine was closed", engine=self._engine) from exc


def translate(exc: Exception, *, engine: str, timeouts: EngineTimeouts, connecting: bool) -> EngineError:
    """Our error for one of aiohttp's. `connecting`: nothing of an answer came yet."""
    match exc:
        case aiohttp.ConnectionTimeoutError():
            return EngineTimeoutError("connect", timeouts.connect_s, engine=engine)
        case aiohttp.ServerTimeoutError():
            return EngineTimeoutError("idle", timeouts.idle_s, engine=engine)
        case aiohttp.InvalidURL() | aiohttp.NonHttpUrlClientError():
            return EngineRequestError(f"cannot be asked: {exc}", engine=engine)
        case (
            aiohttp.ClientConnectorError()
            | aiohttp.ClientHttpProxyError()
            | aiohttp.ServerFingerprintMismatch()
        ):
            return EngineUnreachableError(f"cannot be reached: {exc}", engine=engine)
        case _ if connecting:
            return EngineUnreachableError(
                f"the connection was lost before an answer began ({type(exc).__name__})", engine=engine
            )
        case _:
            return EngineProtocolError(f"the answer was cut ({type(exc).__name__})", engine=engine)
