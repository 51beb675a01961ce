"""An OpenAI-compatible LLM on a socket that says a word now and then, and notes when it is left.

`python -m bench.dribbler PORT PIECES PIECE_S` is one in a process of its own.
"""

import asyncio
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.servers.listener import listening

FIRST_PIECE_S = 0.1


class Dribbler:
    """Says `pieces` words to each request, None: it never ends. It notes who leaves.

    A request is known by the `#name#` in its prompt.
    """

    def __init__(self, *, pieces: int | None = None, piece_s: float = 0.02) -> None:
        self.url = ""
        self._pieces, self._piece_s = pieces, piece_s
        self._asked: dict[str, asyncio.Event] = {}
        self._left: dict[str, asyncio.Future[float]] = {}

    async def asked(self, name: str) -> None:
        """Until the request came."""
        await self._asked.setdefault(name, asyncio.Event()).wait()

    async def left(self, name: str) -> float:
        """When whoever asked closed the socket, on the clock of `time.perf_counter`."""
        return await self._left[name]

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection with one request."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
            body = json.loads(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()  # the server's look at what models there are, or nobody
            return
        name = json.dumps(body["messages"]).partition("#")[2].partition("#")[0]
        gone = self._left[name] = asyncio.get_running_loop().create_future()
        self._asked.setdefault(name, asyncio.Event()).set()
        talking = asyncio.create_task(self._talk(writer))
        try:
            while await reader.read(1):
                pass
        except ConnectionError:
            pass
        finally:
            gone.set_result(time.perf_counter())
            talking.cancel()
            await asyncio.gather(talking, return_exceptions=True)
            writer.transport.abort()

    async def _talk(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        await asyncio.sleep(FIRST_PIECE_S)
        for _ in itertools.count() if self._pieces is None else range(self._pieces):
            writer.write(_PIECE)
            await writer.drain()
            await asyncio.sleep(self._piece_s)
        writer.write(_END)
        writer.write_eof()


def _chunk(delta: dict[str, str], finish_reason: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    chunk = {
        "id": "x",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "double",
        "choices": [choice],
    }
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


_PIECE = _chunk({"role": "assistant", "content": "word "}, None)
_END = _chunk({}, "stop") + b"data: [DONE]\n\n"


@asynccontextmanager
async def dribbling(
    port: int = 0, *, pieces: int | None = None, piece_s: float = 0.02
) -> AsyncIterator[Dribbler]:
    """One on loopback. Whoever listens to it at the end is cut off."""
    llm = Dribbler(pieces=pieces, piece_s=piece_s)
    async with listening(llm.answer, port=port, backlog=1024) as address:
        llm.url = f"{address}/v1"
        yield llm


async def _serve(port: int, pieces: int, piece_s: float) -> None:
    async with dribbling(port, pieces=pieces, piece_s=piece_s):
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
