"""POSTs over plain HTTP, to servers that answer byte for byte what a test says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import pytest
from yarl import URL

from ai_agent_server.errors import (
    EngineProtocolError,
    EngineRequestError,
    EngineTimeoutError,
    EngineUnreachableError,
)
from ai_agent_server.llm_engines import _plain_posts
from ai_agent_server.llm_engines._event_source import EventSource
from ai_agent_server.llm_engines._pace import Pace
from ai_agent_server.llm_engines._plain_posts import PlainPosts
from ai_agent_server.llm_engines.base import EngineTimeouts

TIMEOUTS = EngineTimeouts(first_token_s=30, idle_s=30)
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """What was asked over how many connections."""

    def __init__(self, serve: Serve) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self.url = ""
        self._serve = serve

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.connections += 1
        try:
            await self._serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def request(self, reader: asyncio.StreamReader) -> None:
        """Read one."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        self.requests.append(head + await reader.readexactly(length))


@asynccontextmanager
async def answering(*answers: bytes, closes: bool = False) -> AsyncIterator[Server]:
    """A server that gives `answers` one after the other on each connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await server.request(reader)
            writer.write(answer)
            await writer.drain()
        if not closes:
            await reader.read()

    server = Server(serve)
    async with listening(server):
        yield server


@asynccontextmanager
async def listening(server: Server) -> AsyncIterator[None]:
    """Until the end."""
    listener = await asyncio.start_server(server.accept, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1/chat?x=1"
    try:
        yield
    finally:
        listener.close()


@asynccontextmanager
async def posts(
    url: str, headers: Mapping[str, str] = {}, *, keep_alive: bool = True
) -> AsyncIterator[PlainPosts]:
    """What is tested."""
    asked = PlainPosts(URL(url), headers=headers, engine="it", timeouts=TIMEOUTS, keep_alive=keep_alive)
    try:
        yield asked
    finally:
        await asked.aclose()


def pace() -> Pace:
    """Of one answer."""
    return Pace(TIMEOUTS, "it")


async def whole(asked: PlainPosts, body: bytes = b"{}") -> bytes:
    """The whole body of one answer."""
    timed = pace()
    answer = await asked.post(body, timed, {})
    try:
        said = b""
        while piece := await answer.read(timed):
            said += piece
        return said
    finally:
        answer.close()


async def test_a_request_is_sent_as_http_says() -> None:
    async with answering(WHOLE) as server, posts(server.url, {"X-Own": "mine"}) as asked:
        answer = await asked.post(b"body", pace(), {"traceparent": "00-1"})
        answer.close()
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    fields = dict(line.split(b": ", 1) for line in lines)
    assert first == b"POST /v1/chat?x=1 HTTP/1.1"
    assert fields[b"Host"].startswith(b"127.0.0.1:")
    assert (fields[b"X-Own"], fields[b"traceparent"], fields[b"Content-Length"]) == (b"mine", b"00-1", b"4")
    assert body == b"body"


async def test_a_connection_serves_one_answer_after_the_other() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
    async with answering(WHOLE, chunked, WHOLE) as server, posts(server.url) as asked:
        assert [await whole(asked) for _ in range(3)] == [b"ok", b"onetwo", b"ok"]
    assert server.connections == 1


async def test_without_keep_alive_each_has_its_own_connection() -> None:
    async with answering(WHOLE, WHOLE) as server, posts(server.url, keep_alive=False) as asked:
        assert [await whole(asked) for _ in range(2)] == [b"ok", b"ok"]
    assert server.connections == 2
    assert b"Connection: close" in server.requests[0]


async def test_what_the_server_closes_is_not_asked_again() -> None:
    async with answering(WHOLE, closes=True) as server, posts(server.url) as asked:
        assert await whole(asked) == b"ok"
        async with asyncio.timeout(60):
            while asked._idle:
                await asyncio.sleep(0.01)
        assert await whole(asked) == b"ok"
    assert server.connections == 2


async def test_an_answer_that_nobody_read_to_its_end_takes_its_connection_with_it() -> None:
    async with answering(WHOLE, WHOLE) as server, posts(server.url) as asked:
        (await asked.post(b"{}", pace(), {})).close()
        assert await whole(asked) == b"ok"
    assert server.connections == 2


async def test_a_second_answer_that_nobody_asked_for_is_given_to_nobody() -> None:
    other = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nothers"
    async with answering(WHOLE + other, WHOLE) as server, posts(server.url) as asked:
        assert [await whole(asked) for _ in range(2)] == [b"ok", b"ok"]
    assert server.connections == 2


async def test_an_interim_answer_is_passed_over() -> None:
    async with (
        answering(b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n" + WHOLE) as server,
        posts(server.url) as asked,
    ):
        answer = await asked.post(b"{}", pace(), {})
        assert (answer.status, dict(answer.headers)) == (200, {"content-length": "2"})
        answer.close()


async def test_a_body_without_a_length_lasts_until_the_server_closes() -> None:
    body = b"all of it"
    async with (
        answering(b"HTTP/1.1 200 OK\r\n\r\n" + body, closes=True) as server,
        posts(server.url) as asked,
    ):
        assert await whole(asked) == body


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nno chunk\r\n",
    ],
)
async def test_a_body_that_breaks_is_a_cut_answer_after_what_came_of_it(answer: bytes) -> None:
    async with answering(answer, closes=True) as server, posts(server.url) as asked:
        timed = pace()
        cut = await asked.post(b"{}", timed, {})
        assert await cut.read(timed) == b"half"
        with pytest.raises(EngineProtocolError, match="was cut"):
            await cut.read(timed)
        cut.close()


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200", b"SSH-2.0-it\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000]
)
async def test_what_begins_no_answer_is_a_lost_connection(answer: bytes) -> None:
    async with answering(answer, closes=len(answer) < 1000) as server, posts(server.url) as asked:
        with pytest.raises(EngineUnreachableError, match="lost before an answer began"):
            await asked.post(b"{}", pace(), {})


@pytest.mark.parametrize("banner", [b"", b"SSH-2.0-it\r\n"])
async def test_a_server_that_accepts_and_closes_at_once_is_a_lost_connection(banner: bytes) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(banner)

    server = Server(serve)
    async with listening(server), posts(server.url) as asked, asyncio.timeout(60):
        for _ in range(20):
            with pytest.raises(EngineUnreachableError, match="lost before an answer began"):
                await asked.post(b"{}", pace(), {})


async def test_what_was_lost_before_it_was_asked_is_found_lost() -> None:
    async with answering(closes=True) as server, posts(server.url) as asked, asyncio.timeout(60):
        connection = await asked._connected(pace())
        while not connection._is_lost:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineUnreachableError, match="lost before an answer began"):
            await connection.ask(b"", pace())


async def test_a_reader_that_waits_makes_the_server_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plain_posts, "AHEAD_BYTES", 1000)
    body = b"x" * 64 * 1024 * 1024
    is_written = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        is_written.set()

    server = Server(serve)
    async with listening(server), posts(server.url) as asked:
        timed = pace()
        answer = await asked.post(b"{}", timed, {})
        await asyncio.sleep(0.2)
        assert not is_written.is_set()
        length = 0
        while piece := await answer.read(timed):
            length += len(piece)
        answer.close()
    assert length == len(body)


async def test_to_close_ends_whoever_reads() -> None:
    async with answering(b"HTTP/1.1 200 OK\r\n\r\n") as server, posts(server.url) as asked:
        timed = pace()
        answer = await asked.post(b"{}", timed, {})
        reading = asyncio.ensure_future(answer.read(timed))
        await asyncio.sleep(0)
        await asked.aclose()
        with pytest.raises(EngineUnreachableError, match="closed"):
            await reading
        answer.close()
        with pytest.raises(EngineUnreachableError, match="closed"):
            await asked.post(b"{}", pace(), {})


async def test_a_server_that_is_not_there_or_says_nothing_is_told_apart() -> None:
    async with answering() as server, posts(server.url) as asked:
        with pytest.raises(EngineTimeoutError) as silent:
            await asked.post(b"{}", Pace(EngineTimeouts(first_token_s=0.05), "it"), {})
        assert silent.value.phase == "first_token"
    async with posts(server.url) as asked:
        with pytest.raises(EngineUnreachableError, match="cannot be reached"):
            await asked.post(b"{}", pace(), {})


async def test_a_key_that_is_no_text_is_sent_as_it_stands() -> None:
    key = b"Bearer \xe9".decode("utf-8", "surrogateescape")
    async with answering(WHOLE) as server, posts(server.url, {"Authorization": key}) as asked:
        assert await whole(asked) == b"ok"
    assert b"Authorization: Bearer \xe9\r\n" in server.requests[0]


async def test_a_header_does_not_break_out_of_its_line() -> None:
    async with answering(WHOLE) as server, posts(server.url, {"Authorization": "Bearer a\r\nX: y"}) as asked:
        with pytest.raises(EngineRequestError, match="a line's end"):
            await asked.post(b"{}", pace(), {})
    assert not server.requests


UNREAD = b"x" * 32 * 1024 * 1024
"""More than the sockets between take."""


@asynccontextmanager
async def answering_unread(answer: bytes, *, is_half_closed: bool = False) -> AsyncIterator[Server]:
    """A server that answers to a request's head, and reads no more."""
    is_over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if is_half_closed:
            writer.write_eof()
        await is_over.wait()

    server = Server(serve)
    async with listening(server):
        try:
            yield server
        finally:
            is_over.set()


async def test_a_connection_whose_server_did_not_read_all_of_a_request_serves_no_other() -> None:
    async with answering_unread(WHOLE) as server, posts(server.url) as asked, asyncio.timeout(60):
        assert await whole(asked, UNREAD) == b"ok"
        assert await whole(asked) == b"ok"
        assert server.connections == 2


async def test_an_answer_ends_with_what_its_server_sends_though_it_read_not_all_of_the_request() -> None:
    async with (
        answering_unread(b"HTTP/1.1 200 OK\r\n\r\nok", is_half_closed=True) as server,
        posts(server.url) as asked,
        asyncio.timeout(60),
    ):
        assert await whole(asked, UNREAD) == b"ok"


@asynccontextmanager
async def answering_without_end(beginning: bytes, more: bytes) -> AsyncIterator[Server]:
    """A server that goes on with `more` until it is left."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(beginning)
        while True:
            writer.write(more)
            await writer.drain()

    server = Server(serve)
    async with listening(server):
        yield server


@pytest.mark.parametrize("beside", [b"2\r\nok\r\n0\r\n", b"2\r\nok\r\n2;"], ids=["trailers", "chunk"])
async def test_what_comes_beside_a_body_is_bounded(beside: bytes) -> None:
    beginning = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + beside
    async with (
        answering_without_end(beginning, b"x" * 65536) as server,
        posts(server.url) as asked,
        asyncio.timeout(60),
    ):
        with pytest.raises(EngineProtocolError, match="was cut"):
            await whole(asked)


async def test_a_server_that_sends_without_end_and_says_nothing_runs_out_of_time() -> None:
    async with (
        answering_without_end(b"HTTP/1.1 200 OK\r\n\r\n", b": I am here\n\n" * 5000) as server,
        posts(server.url) as asked,
        asyncio.timeout(60),
    ):
        timed = Pace(EngineTimeouts(first_token_s=2.0), "it")
        answer = await asked.post(b"{}", timed, {})
        with pytest.raises(EngineTimeoutError):
            while await answer.read(timed):
                pass
        answer.close()


async def test_a_password_without_a_name_is_told() -> None:
    done = b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\ndata: [DONE]\n\n"
    async with answering(done) as server:
        url = server.url.replace("127.0.0.1", ":secret@127.0.0.1")
        source = EventSource(url, headers={}, engine="it", timeouts=TIMEOUTS)
        with pytest.raises(EngineProtocolError, match="finish_reason"):
            async for _ in source.deltas({}, pace()):
                pass
        await source.aclose()
    assert b"Authorization: Basic OnNlY3JldA==" in server.requests[0]
