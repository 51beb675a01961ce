"""POSTs over plain HTTP/1.1, to a server on this machine or beside it; llhttp reads what it answers.

The way that every token of a local engine takes. An answer costs a seventh of the CPU time that it does
through aiohttp, which is for all that lies behind TLS, proxies or passwords.
"""

import asyncio
from collections.abc import Mapping
from typing import cast

import httptools
from yarl import URL

from ai_agent_server.deadline import Deadline
from ai_agent_server.errors import (
    EngineError,
    EngineProtocolError,
    EngineRequestError,
    EngineTimeoutError,
    EngineUnreachableError,
)
from ai_agent_server.llm_engines._pace import Pace
from ai_agent_server.llm_engines.base import EngineTimeouts

__all__ = ("PlainPosts",)

KEPT_FOR_S = 30.0
MAX_BARE_BYTES = 64 * 1024
"""So much may come without a piece of the body: of a head, of trailers, of what is beside a chunk."""
AHEAD_BYTES = 256 * 1024
"""So much is read before the reader wants it; then the server has to wait."""


class PlainPosts:
    """See `Posts`. A connection that is not used for half a minute is closed."""

    def __init__(
        self,
        url: URL,
        *,
        headers: Mapping[str, str],
        engine: str,
        timeouts: EngineTimeouts,
        keep_alive: bool,
    ) -> None:
        self.engine = engine
        self.is_closed = False
        self._host, self._port, self._target = url.host or "", url.port or 80, url.raw_path_qs
        self._timeouts, self._keep_alive = timeouts, keep_alive
        self._headers = {
            "Host": url.host_port_subcomponent or "",
            "User-Agent": "ai-agent-server",
            "Accept": "*/*",
            "Connection": "keep-alive" if keep_alive else "close",
            **headers,
        }
        self._head = b""
        """Of every request, made with the first connection."""
        self._open: set[_Connection] = set()
        self._idle: dict[_Connection, asyncio.TimerHandle] = {}

    async def post(self, body: bytes, pace: Pace, headers: Mapping[str, str]) -> "_Connection":
        """See `Posts.post`."""
        if self.is_closed:
            raise EngineUnreachableError("the engine was closed", engine=self.engine)
        more = self._lines(headers) if headers else b""
        if self._idle:
            connection, timer = self._idle.popitem()
            timer.cancel()
        else:
            connection = await self._connected(pace)
        await connection.ask(b"%b%bContent-Length: %d\r\n\r\n%b" % (self._head, more, len(body), body), pace)
        return connection

    async def aclose(self) -> None:
        """See `Posts.aclose`."""
        self.is_closed = True
        for connection in tuple(self._open):
            connection.drop()

    def own(self, connection: "_Connection") -> None:
        """It is open now."""
        self._open.add(connection)

    def keep(self, connection: "_Connection") -> None:
        """It may serve again."""
        if not self._keep_alive or self.is_closed:
            connection.drop()
            return
        loop = asyncio.get_running_loop()
        self._idle[connection] = loop.call_later(KEPT_FOR_S, connection.drop)

    def forget(self, connection: "_Connection") -> None:
        """It is no more."""
        self._open.discard(connection)
        if (timer := self._idle.pop(connection, None)) is not None:
            timer.cancel()

    async def _connected(self, pace: Pace) -> "_Connection":
        if not self._head:
            self._head = b"POST %b HTTP/1.1\r\n%b" % (self._target.encode(), self._lines(self._headers))
        bound_s = self._timeouts.connect_s
        try:
            async with pace.waiting(), asyncio.timeout(bound_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(self), self._host, self._port
                )
        except TimeoutError as exc:
            raise EngineTimeoutError("connect", bound_s, engine=self.engine) from exc
        except (OSError, ValueError) as exc:
            raise EngineUnreachableError(f"cannot be reached: {exc}", engine=self.engine) from exc
        if self.is_closed:
            connection.drop()
            raise EngineUnreachableError("the engine was closed", engine=self.engine)
        return connection

    def _lines(self, headers: Mapping[str, str]) -> bytes:
        text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        if text.count("\n") != len(headers) or text.count("\r") != len(headers) or "\0" in text:
            raise EngineRequestError("cannot be asked: a header has a line's end in it", engine=self.engine)
        # A key may be any bytes: the environment has those that are no UTF-8 as surrogates.
        return text.encode("utf-8", "surrogateescape")


class _Connection(asyncio.Protocol):
    """A connection, and the answer that comes over it: one at a time."""

    def __init__(self, posts: PlainPosts) -> None:
        self._posts = posts
        self._parser = httptools.HttpResponseParser(self)
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[bool] | None = None
        self._deadline = Deadline(self._loop, lambda: self._tell(False))
        self._is_lost = False
        self._renew(is_asked=False)

    def _renew(self, *, is_asked: bool) -> None:
        self.status = 0
        """0 until the head came."""
        self._is_asked, self._is_whole, self._may_serve_again = is_asked, False, False
        self._fault: BaseException | None = None
        self._fields: list[tuple[bytes, bytes]] = []
        self._pieces: list[bytes] = []
        self._bare_bytes = self._ahead_bytes = 0
        self._is_paused = False

    # As `Answer`

    @property
    def headers(self) -> Mapping[str, str]:
        """See `Answer.headers`."""
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self._fields}

    @property
    def is_over(self) -> bool:
        """See `Answer.is_over`."""
        return self._is_whole and not self._pieces

    def read_nowait(self) -> bytes:
        """See `Answer.read_nowait`."""
        if not self._pieces:
            return b""
        read = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._ahead_bytes = 0
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        return read

    async def read(self, pace: Pace) -> bytes:
        """See `Answer.read`."""
        while not (self._pieces or self._is_whole):
            await self._news(pace)
        return self.read_nowait()

    def close(self) -> None:
        """See `Answer.close`."""
        # One that answered before it was asked to the end may never read the rest.
        if self.is_over and self._may_serve_again and not self._transport.get_write_buffer_size():
            self._renew(is_asked=False)
            self._posts.keep(self)
        else:
            self.drop()

    # As the one whom `PlainPosts` owns

    async def ask(self, request: bytes, pace: Pace) -> None:
        """Send `request`, and wait for the head of its answer."""
        self._renew(is_asked=True)
        if self._is_lost:
            # Some accept whoever comes and close at once, before the first request is sent.
            self._fault = ConnectionResetError("closed by the server")
        try:
            self._transport.write(request)
            while not self.status:
                await self._news(pace)
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Close it at once."""
        self._may_serve_again = False
        self._posts.forget(self)
        self._transport.abort()

    async def _news(self, pace: Pace) -> None:
        """Wait until something came. Raises what the answer broke with."""
        if self._fault is not None:
            raise self._broken(self._fault) from self._fault
        if pace.left_s <= 0:
            raise pace.expired()  # bytes without end come before any timer
        began_s = self._loop.time()
        self._waiter = self._loop.create_future()
        self._deadline.start(pace.left_s)
        try:
            has_come = await self._waiter
        finally:
            self._deadline.stop()
            self._waiter = None
        if not has_come:
            raise pace.expired()
        pace.waited(self._loop.time() - began_s)

    def _broken(self, fault: BaseException) -> EngineError:
        engine, what = self._posts.engine, type(fault).__name__
        if self._posts.is_closed:
            return EngineUnreachableError("the engine was closed", engine=engine)
        if not self.status:
            return EngineUnreachableError(
                f"the connection was lost before an answer began ({what})", engine=engine
            )
        return EngineProtocolError(f"the answer was cut ({what})", engine=engine)

    def _tell(self, has_come: bool) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(has_come)

    # As asyncio's protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        # uvloop's is no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._posts.own(self)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if not self._is_asked or self._is_whole:
            self.drop()  # nobody asked for them: what comes next could not be told from an answer
            return
        self._bare_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._break(exc)
            return
        if self._bare_bytes > MAX_BARE_BYTES:
            self._break(ValueError("64 KiB came without a piece of the body"))
            return
        if self._ahead_bytes > AHEAD_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
        self._tell(True)

    def eof_received(self) -> None:
        """The server sends no more: what it has not read of the request is in vain."""
        self.drop()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed, by whomever."""
        self._is_lost, self._may_serve_again = True, False
        self._deadline.close()
        self._posts.forget(self)
        if not self._is_whole and self._fault is None:
            is_its_end = exc is None and self.status and not self._says_its_end
            if is_its_end and not self._posts.is_closed:
                self._is_whole = True
            else:
                self._fault = exc or ConnectionResetError("closed by the server")
        self._tell(True)

    def _break(self, fault: BaseException) -> None:
        self._fault = fault
        self._tell(True)
        self.drop()

    @property
    def _says_its_end(self) -> bool:
        """Whether the answer's body has an end of its own; else the connection's is."""
        return not {"content-length", "transfer-encoding"}.isdisjoint(self.headers)

    # As llhttp's protocol

    def on_message_begin(self) -> None:
        """An answer begins: where one was whole already, nobody asked for it."""
        self._may_serve_again = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head, or of a trailer."""
        if not self.status:
            self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        """The head came, perhaps that of an interim answer (1xx)."""
        status = self._parser.get_status_code()
        if status < 200:
            self._fields.clear()
        else:
            self.status = self.status or status

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._bare_bytes = 0
        if not self._is_whole:
            self._pieces.append(body)
            self._ahead_bytes += len(body)

    def on_message_complete(self) -> None:
        """The answer is whole, if it was no interim one."""
        if self.status and not self._is_whole:
            self._is_whole, self._may_serve_again = True, self._parser.should_keep_alive()
