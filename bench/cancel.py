"""Cancelling: how long until the task has ended, its LLM's socket is closed, and its sandbox is dead.

`python -m bench.cancel [--trials 200] [--seed 1]`, some three minutes. Each trial gives the server as a
user runs it one task, and cancels it at a random moment: while an LLM on a socket dribbles its answer
(or has not begun), or while code that forks and never ends runs in the sandbox. The end is taken where
clients see it: the answer to the cancel and the last event of a reader, whichever is later. An event
after that, in the reader's stream or in the task's history at the end, breaks the promise.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import aiohttp
import msgspec
import psutil
from tests.servers.process import ServerProcess, packaged

from bench.dribbler import Dribbler, dribbling
from bench.figures import Figure, at_most, keep, median, p99

Kind = Literal["llm", "sandbox"]
TRIALS = 200
WAIT_S = 15.0
"""Less than the answer and the code would take by themselves."""
PIECE_S = 0.1
LOOK_S = 0.002
FORKS = 4
CODE = f"""
import os
for _ in range({FORKS}):
    if os.fork() == 0:
        break
while True:
    pass
"""
CANCELED = "task.canceled"


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One cancel. Times are from the sending of the request."""

    kind: Kind
    ended_ms: float
    """Until it was answered and the reader had the last event."""
    released_ms: float
    """Until the LLM's socket was closed, or the last process of the sandbox dead."""
    late: int
    """What came or was left after that: events, processes."""


def configuration(llm_url: str) -> dict[str, Any]:
    """The packaged one with the dribbling LLM in the place of the embedded one."""
    llm = {
        "engine": "api.openai",
        "model": "double",
        "source": "api",
        "capabilities": ["chat", "json_schema", "tools"],
        "options": {"base_url": llm_url},
    }
    document = packaged(llms={"double": llm}, messaging={"enabled": False})
    # QA goes straight to the sandbox, by the task's own examples.
    document["profiles"]["developer"]["roles"]["qa"]["options"] = {"blind_tests": "without_examples"}
    return document


class Tries:
    """A server, its LLM, and who cancels."""

    def __init__(
        self, server: ServerProcess, http: aiohttp.ClientSession, llm: Dribbler, rng: random.Random
    ) -> None:
        self._http, self._llm, self._rng = http, llm, rng
        self._process = psutil.Process(server.pid)
        self._own = self._processes()
        self._ends: dict[str, int] = {}

    async def trial(self, kind: Kind, number: int) -> Trial:
        """Give a task, and cancel it when it is in the midst of its work."""
        name = f"{kind}-{number}"
        task: dict[str, Any] = {"task": f"Do it. #{name}#"}
        if kind == "sandbox":
            task |= {"code": CODE, "examples": ["assert add(1, 2) == 3"]}
        role = "planner" if kind == "llm" else "qa"
        path = f"/api/v1/developer/{role}"
        async with self._http.post(path, json={"payload": task, "scope": "role"}) as answer:
            assert answer.status == 202, await answer.text()
            task_id: str = (await answer.json())["task_id"]
        reading = asyncio.create_task(self._read(task_id))
        if kind == "llm":
            await self._llm.asked(name)
        else:
            await _until(lambda: len(self._processes() - self._own) > FORKS)
        await asyncio.sleep(self._rng.uniform(0.0, 0.3))
        inside = self._processes() - self._own
        began_s = time.perf_counter()
        released = asyncio.create_task(self._llm.left(name) if kind == "llm" else _all_dead(inside))
        async with self._http.post(f"/api/v1/tasks/{task_id}/cancel") as answer:
            assert (await answer.json())["status"] == "canceled"
        answered_s = time.perf_counter()
        async with asyncio.timeout(WAIT_S):
            last_s, end, after = await reading
            released_s = await released
        self._ends[task_id] = end
        return Trial(
            kind=kind,
            ended_ms=1000 * (max(answered_s, last_s) - began_s),
            released_ms=1000 * (released_s - began_s),
            late=after + len(self._processes() - self._own),
        )

    async def grown(self) -> int:
        """How many of the tasks had an event after their end, as it is now."""
        late = 0
        for task_id, end in self._ends.items():
            async with self._http.get(f"/api/v1/tasks/{task_id}") as answer:
                packet = await answer.json()
            late += packet["revision"] != end or packet["status"] != "canceled"
        return late

    async def _read(self, task_id: str) -> tuple[float, int, int]:
        """When the end was told, its number, and how many events came after it."""
        ended_s, end, after, place = 0.0, 0, 0, 0
        async with self._http.get(f"/api/v1/tasks/{task_id}/events") as answer:
            async for line in answer.content:
                if line.startswith(b"id: "):
                    place = int(line[4:])
                elif line.startswith(b"event: "):
                    after += bool(end)
                    if line[7:].strip() == CANCELED.encode():
                        ended_s, end = time.perf_counter(), place
        assert end, f"the stream of {task_id} ended without {CANCELED}"
        return ended_s, end, after

    def _processes(self) -> frozenset[int]:
        """What runs below the server."""
        below = self._process.children(recursive=True)
        return frozenset(child.pid for child in below if _runs(child.pid))


async def _all_dead(inside: frozenset[int]) -> float:
    await _until(lambda: not any(_runs(pid) for pid in inside))
    return time.perf_counter()


def _runs(pid: int) -> bool:
    try:
        return b") Z" not in Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


async def _until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not met():
            await asyncio.sleep(LOOK_S)


async def measured(trials: int, seed: int, folder: Path) -> tuple[list[Trial], int]:
    """So many of each kind, by turns, and how many of their tasks changed after their end."""
    async with dribbling(piece_s=PIECE_S) as llm:
        config = folder / "configuration.json"
        config.write_text(json.dumps(configuration(llm.url)))
        async with (
            ServerProcess(folder / "state", config) as server,
            aiohttp.ClientSession(server.url, timeout=aiohttp.ClientTimeout(total=2 * WAIT_S)) as http,
        ):
            tries = Tries(server, http, llm, random.Random(seed))
            made = []
            for number in range(trials):
                made += [await tries.trial(kind, number) for kind in get_args(Kind)]
                if (number + 1) % 20 == 0:
                    print(f"{number + 1} of {trials} trials of each kind", flush=True)
            return made, await tries.grown()


def figures(trials: list[Trial], grown: int) -> list[Figure]:
    """What the trials come to."""
    found = []
    released = {"llm": "its LLM's socket is closed", "sandbox": "its sandbox's processes are dead"}
    for kind in get_args(Kind):
        of = [trial for trial in trials if trial.kind == kind]
        ended, freed = [trial.ended_ms for trial in of], [trial.released_ms for trial in of]
        found += [
            Figure(name=f"cancel_{kind}_ended_p50", value=median(ended), unit="ms", what="a task ends"),
            at_most(
                f"cancel_{kind}_ended_p99", p99(ended), "ms", 250, f"a task ends, {len(of)} cancels ({kind})"
            ),
            at_most(f"cancel_{kind}_released_p99", p99(freed), "ms", 1000, released[kind]),
        ]
    late = sum(trial.late for trial in trials) + grown
    return [*found, at_most("cancel_late", late, "", 0, "events or processes after the end")]


def main() -> int:
    """Measure, print, keep; answers 1 where a bound was not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trials, grown = asyncio.run(measured(given.trials, given.seed, Path(folder)))
    found = figures(trials, grown)
    keep("cancel", found, folder=Path(tempfile.gettempdir()))
    return int(any(figure.kept is False for figure in found))


if __name__ == "__main__":
    sys.exit(main())
