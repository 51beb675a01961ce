"""Readers that are cut off again and again, and submissions that come again and again.

Every reader of a task, by server-sent events or WebSocket, has to see its events 1..N once and in order,
and one idempotency key has to be one task that ran once. `python -m bench.readers [DISCONNECTS [DUPLICATES
[SEED]]]`; a breach ends it with what was seen.
"""

import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import aiohttp

from bench.server import serving, without_model

DEADLINE_S = 900.0
RETRY_S = 0.1
AT_ONCE = 32
COPIES = 20
"""How often each key is sent."""
ENDS = frozenset({"task.completed", "task.failed", "task.canceled", "task.rejected"})
Kind = Literal["sse", "websocket"]


class BreachError(Exception):
    """What must not be was seen."""


class Cuts:
    """How many disconnects are left, shared by all readers."""

    def __init__(self, left: int, rng: random.Random) -> None:
        self.left, self._rng = left, rng

    def next(self) -> int | None:
        """After how many events a reader is to leave; None: it is to stay."""
        if self.left <= 0:
            return None
        self.left -= 1
        return self._rng.randint(0, 3)


async def storm(
    url: Callable[[], str], task_ids: Sequence[str], *, disconnects: int, rng: random.Random
) -> int:
    """Follow every task in both ways until so many connections were cut; answers the passes that were whole.

    `url` is asked at each connection: a server may be away, and come back elsewhere.
    """
    cuts = Cuts(disconnects, rng)
    async with aiohttp.ClientSession() as http, asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        readers = [
            group.create_task(_read_on(http, url, task_id, kind, cuts))
            for task_id in task_ids
            for kind in ("sse", "websocket")
        ]
    return sum(reader.result() for reader in readers)


async def _read_on(
    http: aiohttp.ClientSession, url: Callable[[], str], task_id: str, kind: Kind, cuts: Cuts
) -> int:
    passes = 0
    while passes == 0 or cuts.left > 0:
        seen: list[int] = []
        while not await _read(http, f"{url()}/api/v1/tasks/{task_id}/events", kind, seen, cuts.next()):
            await asyncio.sleep(0)
        if seen != list(range(1, len(seen) + 1)):
            raise BreachError(f"task {task_id} by {kind}: {seen}")
        passes += 1
    return passes


async def _read(
    http: aiohttp.ClientSession, url: str, kind: Kind, seen: list[int], leave_after: int | None
) -> bool:
    """Read on after what was seen, until the end of the task (True) or the connection's."""
    until = None if leave_after is None else len(seen) + leave_after
    query = {"since": str(seen[-1] if seen else 0)}
    try:
        if kind == "sse":
            async with http.get(url, params=query) as answer:
                answer.raise_for_status()
                place = 0
                async for line in answer.content:
                    if line.startswith(b"id: "):
                        place = int(line[4:])
                    elif line.startswith(b"event: ") and place:
                        seen.append(place)
                        place = 0
                        if line[7:].decode().strip() in ENDS:
                            return True
                    if until is not None and len(seen) >= until:
                        return False
            return False
        async with http.ws_connect(f"{url}/ws", params=query) as socket:
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    return False  # the connection broke
                frame: dict[str, Any] = message.json()
                if "id" in frame:
                    seen.append(frame["id"])
                    if frame["event"] in ENDS:
                        return True
                if until is not None and len(seen) >= until:
                    return False
            return False
    except (aiohttp.ClientError, OSError):
        await asyncio.sleep(RETRY_S)
        return False


async def repeat(url: Callable[[], str], *, keys: int, copies: int, rng: random.Random) -> dict[str, str]:
    """Submit one task for each of so many keys, each so often, in any order; answers the key's task.

    A copy whose server went away is sent again.
    """
    order = [f"key-{number}" for number in range(keys)] * copies
    rng.shuffle(order)
    made: dict[str, str] = {}
    places = asyncio.Semaphore(AT_ONCE)

    async def send(http: aiohttp.ClientSession, key: str) -> None:
        body = {"payload": {"text": f"The text of {key}."}}
        async with places:
            while True:
                try:
                    answer = await http.post(
                        f"{url()}/api/v1/productivity/summarize", json=body, headers={"Idempotency-Key": key}
                    )
                    async with answer:
                        if answer.status in {200, 202}:
                            task_id = (await answer.json())["task_id"]
                            break
                except (aiohttp.ClientError, OSError):
                    pass
                await asyncio.sleep(RETRY_S)
        if made.setdefault(key, task_id) != task_id:
            raise BreachError(f"{key} became {made[key]} and {task_id}")

    async with aiohttp.ClientSession() as http, asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        for key in order:
            group.create_task(send(http, key))
    return made


def main(disconnects: int = 1000, duplicates: int = 10_000, seed: int = 1) -> None:
    """Run both on a server of its own."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = without_model(Path(folder))
        with serving(Path(folder) / "state", config) as server:
            keys = max(1, duplicates // COPIES)
            made = asyncio.run(repeat(lambda: server.url, keys=keys, copies=COPIES, rng=rng))
            task_ids = sorted(made.values())[:8]
            passes = asyncio.run(storm(lambda: server.url, task_ids, disconnects=disconnects, rng=rng))
    told = {
        "seed": seed,
        "disconnects": disconnects,
        "whole_passes": passes,
        "submissions": keys * COPIES,
        "tasks": len(set(made.values())),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
