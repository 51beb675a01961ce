"""Streamed answers over kept connections: a POST, and the server-sent events that answer it."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress

import msgspec
from yarl import URL

from ai_agent_server.core.chat import ChatDelta, JSONObject
from ai_agent_server.errors import EngineError, EngineTimeoutError
from ai_agent_server.llm_engines import _openai_wire as wire
from ai_agent_server.llm_engines._aiohttp_posts import AiohttpPosts
from ai_agent_server.llm_engines._pace import Pace
from ai_agent_server.llm_engines._plain_posts import PlainPosts
from ai_agent_server.llm_engines._posts import Answer, Posts
from ai_agent_server.llm_engines._refusal import refusal, retry_after_s
from ai_agent_server.llm_engines._sse import Events
from ai_agent_server.llm_engines.base import EngineTimeouts

__all__ = ("EventSource",)

DONE = b"[DONE]"
ERROR_BYTES = 64 * 1024
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
        self._engine, self._secret = engine, secret
        self._posts = _posts(
            URL(url),
            {"Content-Type": "application/json", **headers},
            engine=engine,
            timeouts=timeouts,
            trust_env=trust_env,
            keep_alive=keep_alive,
        )

    async def deltas(
        self, body: JSONObject, pace: Pace, traceparent: str = ""
    ) -> AsyncGenerator[ChatDelta, None]:
        """The answer that OpenAI's form of chat completions gives to `body`, piece by piece.

        It lasts until `[DONE]` or the body's end. Closed before, it closes the connection.
        """
        folded, events = wire.Answer(engine=self._engine, secret=self._secret), Events(engine=self._engine)
        answer = await self._posts.post(
            msgspec.json.encode(body), pace, {"traceparent": traceparent} if traceparent else {}
        )
        try:
            if answer.status != 200:
                raise await self._refused(answer, pace)
            is_done = False
            # What is there already need not be timed.
            while not is_done and (piece := answer.read_nowait() or await answer.read(pace)):
                for event in events.feed(piece):
                    if event == DONE:
                        is_done = True
                        break
                    delta = folded.take(wire.decode_chunk(event, engine=self._engine))
                    if folded.progressed:
                        pace.progress()
                    if delta is not None:
                        yield delta
            if not answer.is_over:
                with suppress(TimeoutError, EngineTimeoutError):
                    async with asyncio.timeout(END_S):
                        while await answer.read(pace):
                            pass
        finally:
            answer.close()
        yield folded.end()

    async def aclose(self) -> None:
        """Close every socket. May be called twice."""
        await self._posts.aclose()

    async def _refused(self, answer: Answer, pace: Pace) -> EngineError:
        said = b""
        while len(said) < ERROR_BYTES:
            piece = await answer.read(pace)
            if not piece:
                break
            said += piece
        error = wire.decode_error(said)
        return refusal(
            answer.status,
            error.message,
            engine=self._engine,
            code=error.code,
            retry_after_s=retry_after_s(answer.headers),
            secret=self._secret,
        )


def _posts(
    url: URL,
    headers: Mapping[str, str],
    *,
    engine: str,
    timeouts: EngineTimeouts,
    trust_env: bool,
    keep_alive: bool,
) -> Posts:
    is_open = url.user is None and url.password is None
    if url.scheme == "http" and url.host and is_open and not trust_env:
        return PlainPosts(url, headers=headers, engine=engine, timeouts=timeouts, keep_alive=keep_alive)
    return AiohttpPosts(
        url, headers=headers, engine=engine, timeouts=timeouts, trust_env=trust_env, keep_alive=keep_alive
    )
