"""A model server's double: HTTP/1.1 on a real socket, told to fail in every way that we know."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal, Self

Fault = Literal[
    "reset",  # reads the request, then RST
    "silent",  # reads the request, answers nothing
    "stall",  # two pieces, then silence
    "cut",  # two pieces, then the socket closes in the middle of the body
    "unfinished",  # two pieces, then a clean end of the body without a last piece
    "malformed",  # a piece that is no JSON
    "misshapen",  # a piece that is JSON, but another shape
    "error_in_stream",  # two pieces, then an error object
    "ok_then_error",  # 200, and an error object as the first piece
    "busy",  # 429 with Retry-After: 7
    "overloaded",  # 503
    "auth",  # 401, echoing the key
    "no_model",  # 404
    "overflow",  # 400, the prompt is longer than the context
    "bad_request",  # 400
    "failed",  # 500
    "redirect",  # 307 to another server
]

RETRY_AFTER_S = 7


class Request:
    """What came in."""

    def __init__(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self.method, self.path, self.headers = method, path, headers
        self.json: Any = json.loads(body) if body else None


class HTTPDouble:
    """Accepts, records, answers; subclasses say what. Used as an async context manager.

    `requests` is every request; `hung_up` counts the clients that closed during an answer;
    `writing` is how many answers are being written now.
    """

    def __init__(
        self, *, reply: str = "The answer is 42, of course.", piece_s: float = 0.0, port: int = 0
    ) -> None:
        self.reply, self.piece_s, self.port = reply, piece_s, port
        self.fault: Fault | None = None
        self.api_key: str | None = None
        self.redirect_to = ""
        self.requests: list[Request] = []
        self.hung_up = 0
        self.writing = 0
        self._changed = asyncio.Condition()
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def asked(self) -> list[Request]:
        """The requests that wanted an answer of a model, without the probes that may come at any time."""
        return [request for request in self.requests if request.method == "POST"]

    def paths(self) -> list[str]:
        """The paths that were asked for, in order."""
        return [request.path for request in self.requests]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    async def until_hung_up(self, times: int = 1) -> None:
        """Wait until so many clients closed during an answer, and none is being written."""
        async with self._changed, asyncio.timeout(60):
            await self._changed.wait_for(lambda: self.hung_up >= times and self.writing == 0)

    async def until_writing(self, answers: int = 1) -> None:
        """Wait until so many answers are being written."""
        async with self._changed, asyncio.timeout(60):
            await self._changed.wait_for(lambda: self.writing >= answers)

    async def answer(self, request: Request, out: "Out") -> None:
        """Answer one request."""
        raise NotImplementedError

    def error(self, status: int, message: str, code: str) -> Any:
        """The body of an error, as this server writes it."""
        raise NotImplementedError

    def text(self, body: Any) -> str:
        """What is written where `body` asks for no other form."""
        return self.reply

    def out(self, request: Request, writer: asyncio.StreamWriter) -> "Out":
        """Where the answer to `request` goes."""
        return Out(writer)

    async def refuse(self, out: "Out") -> bool:
        """Have the fault that comes instead of an answer, if there is one."""
        match self.fault:
            case "reset":
                out.reset()
            case "silent":
                await asyncio.Event().wait()
            case "busy":
                await self._refuse(out, 429, "too many requests", "rate_limit_exceeded")
            case "overloaded":
                await self._refuse(out, 503, "server busy, please try again", "unavailable_error")
            case "auth":
                await self._refuse(out, 401, f"Incorrect API key provided: {self.api_key}", "invalid_api_key")
            case "no_model":
                await self._refuse(out, 404, "model 'nope' not found", "model_not_found")
            case "overflow":
                await self._refuse(
                    out,
                    400,
                    "request (9000 tokens) exceeds the available context size (4096 tokens)",
                    "context_length_exceeded",
                )
            case "bad_request":
                await self._refuse(out, 400, "temperature must not be a fish", "invalid_request_error")
            case "failed":
                await self._refuse(out, 500, "something broke", "server_error")
            case "redirect":
                await out.whole(307, {}, {"Location": self.redirect_to})
            case _:
                return False
        return True

    async def _refuse(self, out: "Out", status: int, message: str, code: str) -> None:
        headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 429 else {}
        await out.whole(status, self.error(status, message, code), headers)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._connection(reader, writer)
        finally:
            self._connections.discard(task)
            writer.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(1)
        while first:
            request = await _read(first, reader)
            self.requests.append(request)
            out = self.out(request, writer)
            answering = asyncio.create_task(self.answer(request, out))
            # The next request's first byte, or nothing: the client closed.
            listening = asyncio.create_task(reader.read(1))
            try:
                # A connection that is kept open between two answers counts for none.
                async with self._counted(request):
                    await asyncio.wait((answering, listening), return_when=asyncio.FIRST_COMPLETED)
                # A write to a socket that closed tells of it as well as the read does.
                if not answering.done() or isinstance(answering.exception(), ConnectionError):
                    await self._hang_up()
                    return
                await answering
                if out.ended:
                    return
                first = await listening
            finally:
                for task in (answering, listening):
                    task.cancel()
                await asyncio.gather(answering, listening, return_exceptions=True)

    async def _hang_up(self) -> None:
        async with self._changed:
            self.hung_up += 1
            self._changed.notify_all()

    @asynccontextmanager
    async def _counted(self, request: Request) -> AsyncIterator[None]:
        # A probe that happens to come is nobody's answer.
        answers = int(request.method == "POST")
        await self._count(answers)
        try:
            yield
        finally:
            await self._count(-answers)

    async def _count(self, change: int) -> None:
        async with self._changed:
            self.writing += change
            self._changed.notify_all()


class Out:
    """The answer's side of a connection."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.ended = False

    async def whole(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        """A complete JSON answer."""
        content = json.dumps(body).encode()
        lines = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        self._head(status, lines)
        self.writer.write(content)
        await self.writer.drain()

    def begin(self, media_type: str) -> None:
        """The head of a streamed answer."""
        self._head(200, {"Content-Type": media_type, "Transfer-Encoding": "chunked"})

    async def piece(self, content: bytes) -> None:
        """One piece of a streamed answer."""
        self.writer.write(b"%x\r\n%s\r\n" % (len(content), content))
        await self.writer.drain()

    async def end(self) -> None:
        """The clean end of a streamed answer."""
        await self.piece(b"")

    def cut(self) -> None:
        """Close in the middle."""
        self.ended = True
        self.writer.close()

    def reset(self) -> None:
        """RST."""
        self.ended = True
        self.writer.transport.abort()

    def _head(self, status: int, headers: dict[str, str]) -> None:
        lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in headers.items())]
        self.writer.write("\r\n".join((*lines, "", "")).encode())


async def _read(first: bytes, reader: asyncio.StreamReader) -> Request:
    head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    start, *lines = head.strip().split("\r\n")
    method, path, _ = start.split(" ", 2)
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(method, path, headers, body)


def pieces(text: str) -> list[str]:
    """`text` as a model would stream it: word by word."""
    words = text.split(" ")
    return words[:1] + [" " + word for word in words[1:]]


def vector(text: str) -> list[float]:
    """A vector that tells texts apart: how long it is, and how it begins."""
    return [len(text) / 256, ord(text[0]) / 1024, 0.5]


def example(schema: dict[str, Any]) -> Any:
    """A value that obeys `schema`, as a grammar would make the model write one."""
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return example(schema["anyOf"][0])
    match schema.get("type"):
        case "object":
            return {name: example(prop) for name, prop in schema.get("properties", {}).items()}
        case "array":
            return [example(schema["items"])]
        case "integer" | "number":
            return 7
        case "boolean":
            return True
        case _:
            return "Paris"
