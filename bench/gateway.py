"""The gateway: requests a second and added latency, against the thinnest proxy of the same framework.

Three parts on loopback: a mock upstream that answers at once, the server with everything on (a key,
limits, tiers, metrics, two LLMs to choose from), and the floor: Litestar and aiohttp passing bytes,
which know nothing of what they pass. Server and floor run on one core, upstream and load on another,
by turns; a figure is the middle one of several rounds. CPU time a request is told too: on a machine
that has other work it is the steadier figure.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import psutil
import uvloop

from ai_agent_server.config.settings import packaged_configuration
from bench.figures import Figure, at_least, at_most, keep, median
from bench.server import serving

SECONDS = 4.0
ROUNDS = 3
WARM_UP = 300
SERVER_CORE, LOAD_CORE = 0, 1
KEY = "bench-key-of-thirty-two-characters"
BODY = {
    "model": "auto",
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Say something about foxes."},
    ],
    "max_tokens": 64,
}
TEXT = "The quick brown fox jumps over the lazy dog. " * 2
USAGE = {"prompt_tokens": 24, "completion_tokens": 20, "total_tokens": 44}


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What one round of load showed."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    failed: int
    cpu_us: float = 0.0
    """CPU time of the server's process for a request."""

    @property
    def per_s(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


# The mock upstream


def _answers() -> tuple[bytes, bytes]:
    """A whole answer, and the same as a stream of one piece a word."""
    common = {"id": "chatcmpl-bench", "created": 1790000000, "model": "mock"}
    message = {"role": "assistant", "content": TEXT}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    whole = json.dumps({**common, "object": "chat.completion", "choices": [choice], "usage": USAGE}).encode()
    events: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"content": TEXT}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": USAGE},
    ]
    streamed = b"".join(
        b"data: %s\n\n" % json.dumps({**common, "object": "chat.completion.chunk", **event}).encode()
        for event in events
    )
    streamed += b"data: [DONE]\n\n"
    return _response(b"application/json", whole), _response(b"text/event-stream", streamed)


def _response(media_type: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (
        media_type,
        len(body),
        body,
    )


class _Upstream(asyncio.Protocol):
    """HTTP/1.1 for one kind of request, answered from memory."""

    def __init__(self, whole: bytes, streamed: bytes) -> None:
        self._whole, self._streamed = whole, streamed
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._rest += data
        while (end := self._rest.find(b"\r\n\r\n")) >= 0:
            length = _content_length(self._rest[:end])
            if len(self._rest) < end + 4 + length:
                return
            body, self._rest = self._rest[end + 4 : end + 4 + length], self._rest[end + 4 + length :]
            is_streamed = b'"stream":true' in body or b'"stream": true' in body
            self._transport.write(self._streamed if is_streamed else self._whole)


def _is_whole(answer: bytes) -> bool:
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    head = answer[:end].lower()
    if b"transfer-encoding: chunked" in head:
        return answer.endswith(b"\r\n0\r\n\r\n")
    return len(answer) >= end + 4 + _content_length(head)


def _content_length(head: bytes) -> int:
    lowered = head.lower()
    at = lowered.find(b"content-length:")
    return int(lowered[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0


async def upstream(port: int) -> None:
    """Serve until the process is ended."""
    whole, streamed = _answers()
    server = await asyncio.get_running_loop().create_server(
        lambda: _Upstream(whole, streamed), "127.0.0.1", port
    )
    print("ready", flush=True)
    await server.serve_forever()


# The floor


def floor(port: int, upstream_url: str) -> None:
    """Litestar and aiohttp: the body in, the body out."""
    import aiohttp
    import uvicorn
    from litestar import Litestar, Request, Response, post

    sessions: list[aiohttp.ClientSession] = []

    async def start() -> None:
        sessions.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))

    @post("/v1/chat/completions", status_code=200)
    async def chat(request: Request[Any, Any, Any]) -> Response[bytes]:
        body = await request.body()
        headers = {"Content-Type": "application/json"}
        async with sessions[0].post(f"{upstream_url}/v1/chat/completions", data=body, headers=headers) as got:
            return Response(await got.read(), status_code=got.status, media_type="application/json")

    app = Litestar([chat], on_startup=[start], openapi_config=None, logging_config=None)
    print("ready", flush=True)
    uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, access_log=False, http="httptools")


# The load


class _Client(asyncio.Protocol):
    """One connection that sends the same request again as soon as it was answered."""

    def __init__(self, request: bytes, latencies_s: list[float], until_s: float) -> None:
        self._request, self._latencies_s, self._until_s = request, latencies_s, until_s
        self._rest = b""
        self.failed = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        self._sent_s = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._rest += data
        if not _is_whole(self._rest):
            return
        now_s = time.perf_counter()
        self._latencies_s.append(now_s - self._sent_s)
        self.failed += not self._rest.startswith(b"HTTP/1.1 200")
        self._rest = b""
        if now_s < self._until_s:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.failed += exc is not None
        if not self.ended.done():
            self.ended.set_result(None)


async def load(url: str, connections: int, seconds: float, headers: bytes = b"") -> Load:
    """Ask without a pause on so many connections. `headers` are further ones, each with its line's end."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(BODY).encode()
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: %s:%s\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %s\r\n%sContent-Length: %d\r\n\r\n%s"
        % (host.encode(), port.encode(), KEY.encode(), headers, len(body), body)
    )
    latencies_s: list[float] = []
    began_s = time.perf_counter()
    clients = []
    for _ in range(connections):
        _, client = await asyncio.get_running_loop().create_connection(
            lambda: _Client(request, latencies_s, began_s + seconds), host, int(port)
        )
        clients.append(client)
    await asyncio.gather(*(client.ended for client in clients))
    ordered = sorted(latencies_s)
    return Load(
        requests=len(ordered),
        seconds=time.perf_counter() - began_s,
        p50_ms=1000 * ordered[len(ordered) // 2],
        p99_ms=1000 * ordered[len(ordered) * 99 // 100],
        failed=sum(client.failed for client in clients),
    )


# One round after the other


@contextmanager
def part(name: str, *arguments: str, core: int) -> Iterator[int]:
    """A part of the measurement in a process of its own: its id."""
    command = [sys.executable, "-m", "bench.gateway", name, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as process:
        try:
            os.sched_setaffinity(process.pid, {core})
            assert process.stdout is not None
            assert process.stdout.readline().strip() == b"ready", f"{name} did not start"
            yield process.pid
        finally:
            process.kill()


def configuration(folder: Path, upstream_url: str) -> Path:
    """The packaged configuration with two LLMs at the upstream, a key and limits."""
    document: dict[str, Any] = json.loads(packaged_configuration())
    llm = {
        "engine": "api.openai",
        "model": "mock",
        "source": "api",
        "capabilities": ["chat", "tools", "json_schema"],
        "context": 8192,
        "options": {"base_url": f"{upstream_url}/v1"},
    }
    document["llms"] = {"first": {**llm, "tier": "small"}, "second": {**llm, "tier": "main"}}
    document["messaging"] = {"enabled": False}
    document["gateway"] = {
        "keys": {
            "bench": {
                "api_key": {"env": "BENCH_KEY"},
                "limits": [{"per_s": 60, "requests": 10**8, "tokens": 10**11}],
            }
        },
        "limits": {"tiers": {"small": [{"per_s": 60, "requests": 10**8}]}},
    }
    path = folder / "configuration.json"
    path.write_text(json.dumps(document))
    return path


def cpu_s(pid: int) -> float:
    """The CPU time that a process has had, its threads' together."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def _measured(url: str, pid: int, connections: int, seconds: float) -> Load:
    before_s = cpu_s(pid)
    found = asyncio.run(load(url, connections, seconds))
    return msgspec.structs.replace(found, cpu_us=1e6 * (cpu_s(pid) - before_s) / found.requests)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="of each round")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    chosen = parser.parse_args(arguments)
    os.environ["BENCH_KEY"] = KEY
    os.sched_setaffinity(0, {LOAD_CORE})
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    rounds: dict[tuple[str, int], list[Load]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream_url, floor_url = "http://127.0.0.1:19001", "http://127.0.0.1:19002"
        stack.enter_context(part("upstream", "19001", core=LOAD_CORE))
        floor_pid = stack.enter_context(part("floor", "19002", upstream_url, core=SERVER_CORE))
        ours = stack.enter_context(serving(folder / "state", configuration(folder, upstream_url)))
        os.sched_setaffinity(ours.pid, {SERVER_CORE})
        targets = {"floor": (floor_url, floor_pid), "ours": (ours.url, ours.pid)}
        time.sleep(1.0)
        for url, _ in targets.values():
            warm = asyncio.run(load(url, 4, 1.0))
            assert not warm.failed, f"{url} answers something else than 200"
        for _ in range(chosen.rounds):
            for connections in (1, 16, 64):
                for name, (url, pid) in targets.items():
                    found = _measured(url, pid, connections, chosen.seconds)
                    print(f"{name} {connections}: {found}", flush=True)
                    rounds.setdefault((name, connections), []).append(found)
        memory_mb = psutil.Process(ours.pid).memory_info().rss / 1e6

    def middle(name: str, connections: int, of: str) -> float:
        return median([getattr(each, of) for each in rounds[name, connections]])

    figures: list[Figure] = []
    for connections in (16, 64):
        ratio = middle("ours", connections, "per_s") / middle("floor", connections, "per_s")
        figures.append(
            at_least(
                f"share_of_floor_{connections}",
                ratio,
                "x",
                0.6,
                f"requests/s at {connections} connections, of the thin proxy's",
            )
        )
        figures.append(
            Figure(
                name=f"requests_per_s_{connections}",
                value=middle("ours", connections, "per_s"),
                unit="requests/s",
            )
        )
        figures.append(
            Figure(
                name=f"cpu_us_{connections}",
                value=middle("ours", connections, "cpu_us"),
                unit="us of CPU a request",
            )
        )
        figures.append(
            Figure(
                name=f"cpu_share_of_floor_{connections}",
                value=middle("floor", connections, "cpu_us") / middle("ours", connections, "cpu_us"),
                unit="x",
            )
        )
    added = middle("ours", 1, "p50_ms") / middle("floor", 1, "p50_ms")
    figures.append(at_most("p50_of_floor_1", added, "x", 2.0, "p50 at 1 connection, of the thin proxy's"))
    figures.append(Figure(name="p50_ms_1", value=middle("ours", 1, "p50_ms"), unit="ms"))
    figures.append(Figure(name="memory_mb", value=memory_mb, unit="MB"))
    keep("gateway", figures, folder=Path.cwd())


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["upstream", port]:
            uvloop.run(upstream(int(port)))
        case ["floor", port, url]:
            floor(int(port), url)
        case arguments:
            main(arguments)
