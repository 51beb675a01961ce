"""Health under load: how long `/health` takes, and what memory the server takes, with all of this at once.

- 200 live tasks: each has three steps, and an LLM on a socket that says five words a second to each;
- 50 readers of a task of some 3 MB of events that never read, half of them by WebSocket, connected again
  and again after the server cut them;
- code in the sandbox that forks and prints without end, two at a time, again and again.

`python -m bench.under_load [--seconds 120]`; `--minutes 20` makes it the soak, whose figure is the slope of
the server's memory over so many minutes, after ten in which it comes to its level. What ended is deleted,
so that what grows is what leaks. The LLM, the one who asks for health and the load are processes of their
own.
"""

import argparse
import asyncio
import http.client
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import psutil
from tests.servers.ports import held_port
from tests.servers.process import ServerProcess, packaged

from bench.figures import Figure, at_most, keep, median, p95, p99, slope

SECONDS = 120.0
LIVE = 200
STALLED = 50
FLOODS = 2
PIECES, PIECE_S = 75, 0.2
ASK_EVERY_S = 0.05
LOOK_S = 0.5
HOLD_S = 40.0
"""Longer than the server waits for a reader that does not read."""
WARM_UP_S = 600.0
LONG_STEPS, LONG_TEXT = 32, "x" * 100_000
FLOOD = """
import os
os.fork()
os.fork()
while True:
    print("x" * 1000)
"""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How much there is of each."""

    live: int = LIVE
    stalled: int = STALLED
    floods: int = FLOODS
    long_steps: int = LONG_STEPS
    pieces: int = PIECES


class Seen(msgspec.Struct, kw_only=True):
    """What came of it."""

    health_ms: list[float] = msgspec.field(default_factory=list)
    idle_mb: float = 0.0
    memory_mb: list[tuple[float, float]] = msgspec.field(default_factory=list)
    """Seconds since the load began, and the server's resident memory then."""
    ended: int = 0
    floods: int = 0
    connected: int = 0
    """How often a reader connected that did not read."""
    cut: int = 0
    """How often the server cut one of them."""
    live_least: int = 10**9
    """Once they were all there."""


def configuration(folder: Path, llm_url: str, load: Load) -> Path:
    """Three profiles: `live` on the LLM on the socket, `long` for the long history, and the developer's."""
    (folder / "step.md").write_text("Do it: $payload")
    dribbler = {
        "engine": "api.openai",
        "model": "double",
        "source": "api",
        "slots": 2 * load.live,
        "options": {"base_url": llm_url},
    }
    talker = {
        "engine": "local.scripted",
        "model": "scripted",
        "source": "local",
        "options": {"replies": [LONG_TEXT]},
    }
    document = packaged(
        llms={"dribbler": dribbler, "talker": talker},
        messaging={"enabled": False},
        server={"max_running": load.live + load.floods, "max_live": 2 * load.live + load.floods},
    )
    developer = document["profiles"]["developer"]
    developer["roles"]["qa"]["options"] = {"blind_tests": "without_examples"}
    document["profiles"] = {
        "live": _chain(3, llm="dribbler", max_tokens=2 * load.pieces),
        "long": _chain(load.long_steps, llm="talker", max_tokens=100),
        "developer": developer,
    }
    path = folder / "configuration.json"
    path.write_text(json.dumps(document))
    return path


def _chain(steps: int, **role: Any) -> dict[str, Any]:
    """So many roles, one after the other."""
    names = [f"step-{number}" for number in range(steps)]
    limits = {"calls": steps, "tokens": 10_000_000}
    routes = {f"{name}.done": [{"to": after}] for name, after in itertools.pairwise(names)}
    return {
        "roles": {name: {"agent": "prompt", "prompt": "step.md", "limits": limits, **role} for name in names},
        "workflow": {"routes": routes},
    }


class Pressure:
    """All that presses on one server; `run` until it is cancelled."""

    def __init__(self, server: ServerProcess, web: aiohttp.ClientSession, load: Load, seen: Seen) -> None:
        self._server, self._web, self._load, self._seen = server, web, load, seen
        self._address = urlsplit(server.url)

    async def prepare(self) -> str:
        """The id of a task with a long history."""
        task_id = await self._submit("live", "long", "step-0")
        while (status := (await self._get(f"/api/v1/tasks/{task_id}"))["status"]) != "completed":
            assert status in {"submitted", "working"}, status
            await asyncio.sleep(LOOK_S)
        return task_id

    async def run(self, long_task: str) -> None:
        """Press."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_live())
            for number in range(self._load.stalled):
                # One after the other, so that they are not all cut in one moment.
                wait_s = HOLD_S * number / self._load.stalled
                group.create_task(self._stall(long_task, wait_s, by_socket=number % 2 == 1))
            for _ in range(self._load.floods):
                group.create_task(self._flood())

    async def _keep_live(self) -> None:
        """As many tasks as wanted; those that ended are counted and deleted."""
        is_filled = False
        while True:
            ended = await self._get("/api/v1/tasks?profile=live&status=completed&limit=100")
            for task in ended["items"]:
                async with self._web.delete(f"/api/v1/tasks/{task['task_id']}") as answer:
                    assert answer.status == 204, await answer.text()
            self._seen.ended += len(ended["items"])
            live = (await self._get("/api/v1/metrics"))["state"]["live"]
            if is_filled:
                self._seen.live_least = min(self._seen.live_least, live)
            missing = self._load.live + self._load.floods - live
            is_filled = is_filled or missing <= 0
            # Not all at once at first: they would end together too.
            for _ in range(missing if is_filled else max(1, self._load.live // 20)):
                await self._submit("words", "live", "step-0")
            await asyncio.sleep(LOOK_S)

    async def _flood(self) -> None:
        payload = {"task": "Add.", "code": FLOOD, "examples": ["assert add(1, 2) == 3"]}
        while True:
            task_id = await self._submit(payload, "developer", "qa")
            while (await self._get(f"/api/v1/tasks/{task_id}"))["status"] in {"submitted", "working"}:
                await asyncio.sleep(0.1)
            async with self._web.delete(f"/api/v1/tasks/{task_id}") as answer:
                assert answer.status == 204, await answer.text()
            self._seen.floods += 1

    async def _stall(self, task_id: str, wait_s: float, *, by_socket: bool) -> None:
        """Ask for the events of the long task, and read nothing of them."""
        path = f"/api/v1/tasks/{task_id}/events{'/ws' if by_socket else ''}"
        upgrade = (
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        )
        head = f"GET {path} HTTP/1.1\r\nHost: {self._address.netloc}\r\n{upgrade if by_socket else ''}\r\n"
        loop = asyncio.get_running_loop()
        await asyncio.sleep(wait_s)
        while True:
            with socket.socket() as reader:
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                reader.setblocking(False)
                await loop.sock_connect(reader, (self._address.hostname, self._address.port))
                await loop.sock_sendall(reader, head.encode())
                self._seen.connected += 1
                await asyncio.sleep(HOLD_S)

    async def _submit(self, task: Any, profile: str, role: str) -> str:
        payload = task if isinstance(task, dict) else {"task": task}
        scope = "role" if profile == "developer" else "workflow"
        body = {"payload": payload, "scope": scope}
        async with self._web.post(f"/api/v1/{profile}/{role}", json=body) as answer:
            assert answer.status == 202, await answer.text()
            task_id: str = (await answer.json())["task_id"]
            return task_id

    async def _get(self, path: str) -> dict[str, Any]:
        async with self._web.get(path) as answer:
            assert answer.status == 200, await answer.text()
            found: dict[str, Any] = await answer.json()
            return found


async def _measure_memory(pid: int, seen: Seen) -> None:
    process, began_s = psutil.Process(pid), time.monotonic()
    told_s = 0.0
    while True:
        at_s = time.monotonic() - began_s
        seen.memory_mb.append((at_s, process.memory_info().rss / 2**20))
        if at_s - told_s >= 60:
            told_s = at_s
            print(f"{at_s:.0f} s, {seen.memory_mb[-1][1]:.1f} MB, {seen.ended} tasks ended", flush=True)
        await asyncio.sleep(LOOK_S)


def probe(url: str, seconds: float) -> list[float]:
    """Milliseconds that each look at health took, one every `ASK_EVERY_S`, over one connection."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
    until_s = time.monotonic() + seconds
    took_ms = []
    while time.monotonic() < until_s:
        began_s = time.perf_counter()
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        took_ms.append(1000 * (time.perf_counter() - began_s))
        assert answer.status == 200, answer.status
        time.sleep(ASK_EVERY_S)
    return took_ms


@asynccontextmanager
async def _program(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *arguments, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def measured(load: Load, seconds: float, folder: Path) -> Seen:
    """Press for so long, and see."""
    seen = Seen()
    async with AsyncExitStack() as stack:
        port = stack.enter_context(held_port())
        llm = await stack.enter_async_context(
            _program("bench.dribbler", str(port), str(load.pieces), str(PIECE_S))
        )
        assert llm.stdout is not None
        assert await llm.stdout.readline() == b"ready\n"
        config = configuration(folder, f"http://127.0.0.1:{port}/v1", load)
        server = await stack.enter_async_context(ServerProcess(folder / "state", config))
        web = await stack.enter_async_context(aiohttp.ClientSession(server.url))
        seen.idle_mb = psutil.Process(server.pid).memory_info().rss / 2**20
        pressure = Pressure(server, web, load, seen)
        long_task = await pressure.prepare()
        asking = await stack.enter_async_context(
            _program("bench.under_load", "--probe", server.url, "--seconds", str(seconds))
        )
        assert asking.stdout is not None
        pressing = asyncio.create_task(pressure.run(long_task))
        watching = asyncio.create_task(_measure_memory(server.pid, seen))
        told = asyncio.create_task(asking.stdout.read())
        try:
            await asyncio.wait({pressing, told}, return_when=asyncio.FIRST_COMPLETED)
            if pressing.done():
                pressing.result()
            seen.health_ms = json.loads(await told)
        finally:
            for task in (pressing, watching, told):
                task.cancel()
            await asyncio.gather(pressing, watching, told, return_exceptions=True)
        seen.cut = server.log.read_text().count("events.slow_reader_cut")
    return seen


def figures(seen: Seen, load: Load, *, warm_up_s: float | None = None) -> list[Figure]:
    """What was seen; with the slope of the memory after `warm_up_s`, if that is given."""
    before, most = seen.memory_mb[0][1], max(mb for _, mb in seen.memory_mb)
    what = f"{load.live} live tasks, {load.stalled} stalled readers and a sandbox flood"
    found = [
        Figure(name="health_p50", value=median(seen.health_ms), unit="ms", what="/health"),
        at_most("health_p95", p95(seen.health_ms), "ms", 25, f"/health under {what}"),
        Figure(name="health_p99", value=p99(seen.health_ms), unit="ms", what="/health"),
        Figure(name="memory_idle", value=seen.idle_mb, unit="MB", what="resident memory after the start"),
        Figure(name="memory_before", value=before, unit="MB", what="and before the load"),
        at_most("memory_growth", most - before, "MB", 100, f"memory's growth under {what}"),
        Figure(name="tasks_ended", value=seen.ended, unit="", what="live tasks that ended"),
        Figure(name="live_least", value=seen.live_least, unit="", what="live tasks, at the least"),
        Figure(name="floods", value=seen.floods, unit="", what="floods that were stopped"),
        Figure(name="readers_cut", value=seen.cut, unit="", what=f"of {seen.connected} stalled readers"),
    ]
    if warm_up_s is not None:
        warm = [(at_s, mb) for at_s, mb in seen.memory_mb if at_s >= warm_up_s]
        minutes = (warm[-1][0] - warm_up_s) / 60
        what = f"memory's slope over {minutes:.0f} minutes, after a warm-up"
        found.append(at_most("memory_slope", 3600 * slope(warm), "MB/h", 10, what))
    return found


def main() -> int:
    """Measure, print, keep; answers 1 where a bound was not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--minutes", type=float, help="after a warm-up, with the slope of the memory")
    parser.add_argument("--probe", metavar="URL", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.probe:
        print(json.dumps(probe(given.probe, given.seconds)))
        return 0
    warm_up_s = None if given.minutes is None else WARM_UP_S
    seconds = given.seconds if given.minutes is None else WARM_UP_S + 60 * given.minutes
    load = Load()
    with tempfile.TemporaryDirectory() as folder:
        seen = asyncio.run(measured(load, seconds, Path(folder)))
    found = figures(seen, load, warm_up_s=warm_up_s)
    keep("soak" if given.minutes else "under_load", found, folder=Path(tempfile.gettempdir()))
    return int(any(figure.kept is False for figure in found))


if __name__ == "__main__":
    sys.exit(main())
