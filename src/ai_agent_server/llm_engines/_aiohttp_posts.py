"""POSTs through aiohttp: to what lies behind TLS, a proxy or a password."""

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import aiohttp
from yarl import URL

from ai_agent_server.errors import (
    EngineError,
    EngineProtocolError,
    EngineRequestError,
    EngineTimeoutError,
    EngineUnreachableError,
)
from ai_agent_server.llm_engines._pace import Pace
from ai_agent_server.llm_engines.base import EngineTimeouts

__all__ = ("AiohttpPosts", "translate")


class AiohttpPosts:
    """See `Posts`."""

    def __init__(
        self,
        url: URL,
        *,
        headers: Mapping[str, str],
        engine: str,
        timeouts: EngineTimeouts,
        trust_env: bool,
        keep_alive: bool,
    ) -> None:
        self._url, self._headers = url, headers
        self._engine, self._timeouts = engine, timeouts
        self._trust_env, self._keep_alive = trust_env, keep_alive
        # Made here, since reading certificates blocks.
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._session: aiohttp.ClientSession | None = None
        self._is_closed = False

    async def post(self, body: bytes, pace: Pace, headers: Mapping[str, str]) -> "_Answer":
        """See `Posts.post`."""
        with self.translated(connecting=True):
            session = self._opened()
            async with pace.waiting():
                response = await session.post(
                    self._url,
                    data=body,
                    headers={**self._headers, **headers},
                    allow_redirects=False,
                    ssl=self._tls or True,
                )
        return _Answer(self, response)

    async def aclose(self) -> None:
        """See `Posts.aclose`."""
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

    @contextmanager
    def translated(self, *, connecting: bool = False) -> Iterator[None]:
        """aiohttp's errors become ours."""
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


class _Answer:
    """See `Answer`."""

    def __init__(self, posts: AiohttpPosts, response: aiohttp.ClientResponse) -> None:
        self._posts, self._response = posts, response
        self.status = response.status

    @property
    def headers(self) -> Mapping[str, str]:
        """See `Answer.headers`."""
        return self._response.headers

    @property
    def is_over(self) -> bool:
        """See `Answer.is_over`."""
        return self._response.content.at_eof()

    def read_nowait(self) -> bytes:
        """See `Answer.read_nowait`."""
        with self._posts.translated():
            return self._response.content.read_nowait()

    async def read(self, pace: Pace) -> bytes:
        """See `Answer.read`."""
        with self._posts.translated():
            async with pace.waiting():
                return await self._response.content.readany()

    def close(self) -> None:
        """See `Answer.close`."""
        self._response.release() if self.is_over else self._response.close()


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
