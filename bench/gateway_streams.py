"""The gateway's streams: what each piece is delayed by, a thousand at once, and memory over many requests.

An upstream of its own writes into every piece when it was sent; the reader subtracts. What is told of
one stream is the difference to reading the same upstream without the gateway. `--soak N` asks N
whole requests at 16 connections instead, and fits a line through the server's memory.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil

from bench import gateway
from bench.figures import Figure, at_most, keep, median, p99, slope
from bench.server import serving

STREAMS = 1000
PIECES = 30
PIECE_S = 1.0
ONE_PIECES = 1000
ONE_PIECE_S = 0.005
ROUNDS = 3
SAMPLE_S = 5.0
WARM_UP_SHARE = 0.2
CONNECTIONS = 16
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Read(msgspec.Struct, frozen=True):
    """What one stream brought: each piece's delay, and whether it ended as it should."""

    delays_ms: list[float]
    whole: bool


async def upstream(port: int) -> None:
    """As many pieces as `max_tokens`, one every so many microseconds as `seed` says."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                writer.write(HEAD)
                for _ in range(body["max_tokens"]):
                    _piece(writer, {"content": f"{time.monotonic_ns()} "}, None)
                    await writer.drain()
                    await asyncio.sleep(body["seed"] / 1e6)
                _piece(writer, {}, "stop")
                writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port, backlog=2 * STREAMS)
    print("ready", flush=True)
    await server.serve_forever()


def _piece(writer: asyncio.StreamWriter, delta: dict[str, str], finish: str | None) -> None:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    event = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1790000000}
    content = b"data: %s\n\n" % json.dumps({**event, "model": "mock", "choices": [choice]}).encode()
    writer.write(b"%x\r\n%s\r\n" % (len(content), content))


async def read(http: aiohttp.ClientSession, url: str, pieces: int, piece_s: float) -> Read:
    """One stream to its end."""
    body = {**gateway.BODY, "stream": True, "max_tokens": pieces, "seed": round(piece_s * 1e6)}
    delays_ms: list[float] = []
    ended = finished = False
    async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                ended = True
                continue
            now_ns = time.monotonic_ns()
            for choice in json.loads(line[6:]).get("choices", ()):
                finished = finished or choice["finish_reason"] == "stop"
                sent = (choice["delta"].get("content") or "").split()
                delays_ms += [(now_ns - int(sent_ns)) / 1e6 for sent_ns in sent]
    return Read(delays_ms, whole=ended and finished and len(delays_ms) == pieces)


async def one_after_the_other(url: str) -> list[float]:
    """The delays of one stream's pieces, in milliseconds."""
    async with _session() as http:
        found = await read(http, url, ONE_PIECES, ONE_PIECE_S)
    assert found.whole, f"{url} did not answer whole"
    return found.delays_ms


async def all_at_once(url: str, pid: int) -> tuple[int, float]:
    """How many of the streams were whole, and the server's most memory meanwhile, in MB."""
    process, peak_mb = psutil.Process(pid), 0.0
    async with _session() as http:
        reading = asyncio.gather(*(read(http, url, PIECES, PIECE_S) for _ in range(STREAMS)))
        while not reading.done():
            peak_mb = max(peak_mb, process.memory_info().rss / 1e6)
            await asyncio.wait((reading,), timeout=0.2)
        return sum(found.whole for found in await reading), peak_mb


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=600),
        headers={"Authorization": f"Bearer {gateway.KEY}"},
    )


def soak(url: str, pid: int, requests: int) -> list[Figure]:
    """The slope of the server's memory over so many requests, after a warm-up."""
    process, done, samples = psutil.Process(pid), 0, []
    began_s = time.perf_counter()
    while done < requests:
        found = asyncio.run(gateway.load(url, CONNECTIONS, SAMPLE_S))
        assert not found.failed, f"{found.failed} requests failed"
        done += found.requests
        samples.append((done, time.perf_counter() - began_s, process.memory_info().rss / 1e6))
        print(f"{done} requests, {samples[-1][1]:.0f} s, {samples[-1][2]:.1f} MB", flush=True)
    warm = [(at_s, mb) for so_far, at_s, mb in samples if so_far >= WARM_UP_SHARE * requests]
    return [
        Figure(name="soak_requests", value=done, unit="requests"),
        Figure(name="soak_memory_mb", value=samples[-1][2], unit="MB"),
        at_most("soak_slope", 3600 * slope(warm), "MB/h", 1.0, f"memory's growth over {done:,} requests"),
    ]


@contextmanager
def _upstream(port: int) -> Iterator[str]:
    command = [sys.executable, "-m", "bench.gateway_streams", "--upstream", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == b"ready", "the upstream did not start"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _configuration(folder: Path, upstream_url: str) -> Path:
    path = gateway.configuration(folder, upstream_url)
    document: dict[str, Any] = json.loads(path.read_text())
    for llm in document["llms"].values():
        llm["slots"] = 2 * STREAMS
    path.write_text(json.dumps(document))
    return path


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", type=int, metavar="N", help="N whole requests instead of the streams")
    parser.add_argument("--upstream", type=int, metavar="PORT", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.upstream:
        asyncio.run(upstream(chosen.upstream))
        return
    os.environ["BENCH_KEY"] = gateway.KEY
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if chosen.soak:
            port = 19003
            stack.enter_context(gateway.part("upstream", str(port), core=gateway.LOAD_CORE))
            url = f"http://127.0.0.1:{port}"
            ours = stack.enter_context(serving(folder / "state", gateway.configuration(folder, url)))
            keep("gateway_soak", soak(ours.url, ours.pid, chosen.soak), folder=Path.cwd())
            return
        url = stack.enter_context(_upstream(19003))
        ours = stack.enter_context(serving(folder / "state", _configuration(folder, url)))
        rounds = {"direct": [asyncio.run(one_after_the_other(url)) for _ in range(ROUNDS)]}
        before_s = gateway.cpu_s(ours.pid)
        rounds["ours"] = [asyncio.run(one_after_the_other(ours.url)) for _ in range(ROUNDS)]
        piece_cpu_us = 1e6 * (gateway.cpu_s(ours.pid) - before_s) / sum(map(len, rounds["ours"]))
        whole, peak_mb = asyncio.run(all_at_once(ours.url, ours.pid))
    added = {
        of: median([at(delays) for delays in rounds["ours"]])
        - median([at(delays) for delays in rounds["direct"]])
        for of, at in {"p50": median, "p99": p99}.items()
    }
    figures = [
        Figure(name="piece_added_p50_ms", value=added["p50"], unit="ms"),
        at_most("piece_added_p99_ms", added["p99"], "ms", 0.2, "added to a streamed piece, p99"),
        Figure(name="piece_cpu_us", value=piece_cpu_us, unit="us of CPU a piece"),
        Figure(name="streams_whole", value=whole, unit=f"of {STREAMS}", kept=whole == STREAMS),
        at_most("streams_memory_mb", peak_mb, "MB", 300, f"memory with {STREAMS} streams at once"),
    ]
    keep("gateway_streams", figures, folder=Path.cwd())


if __name__ == "__main__":
    main()
