"""Workers: how much faster four of them end tasks than one, with an LLM that takes a second.

`python -m bench.workers [--tasks 40]`, some two minutes. A worker is one of a server's `max_running`, or
a server of a cluster that runs one task at a time; both are measured, each against one of its own kind.
Servers, nats-server and sockets are real. The tasks have one step, are all given at once, in turn to
each server, and are waited for to the last one's end.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from tests.servers.cluster import Cluster, a_cluster

from bench.figures import Figure, at_least, keep

TASKS = 40
DELAY_S = 1.0
WORKERS = 4
AT_LEAST = 3.4
DEADLINE_S = 600.0
LOOK_S = 0.02


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """So many servers, each with so many workers; a single one may be alone or a cluster of itself."""

    name: str
    servers: int = 1
    workers: int = 1
    clustered: bool = False


SETUPS = (
    Setup(name="workers_1"),
    Setup(name="workers_4", workers=WORKERS),
    Setup(name="servers_1", clustered=True),
    Setup(name="servers_4", servers=WORKERS, clustered=True),
)


async def timed(setup: Setup, *, tasks: int, delay_s: float, folder: Path) -> float:
    """Seconds from the first task's being given to the last one's end."""
    names = [f"s{number}" for number in range(setup.servers)]
    async with a_cluster(
        folder,
        *names,
        delay_s=delay_s,
        cluster={"enabled": setup.clustered},
        server={"max_running": setup.workers},
    ) as cluster:
        for name in names:
            await _given(cluster, [name], f"warm-{name}", 1)
        began_s = time.perf_counter()
        await _given(cluster, names, "task", tasks)
        return time.perf_counter() - began_s


async def _given(cluster: Cluster, names: Sequence[str], word: str, tasks: int) -> None:
    """Give `tasks` tasks to `names` by turns, and wait until all have ended well."""

    async def one(number: int) -> None:
        http = clients[number % len(clients)]
        payload = {"task": f"Do it. #{word}-{number}#"}
        answer = await http.post("/api/v1/chain/first", json={"payload": payload, "scope": "role"})
        assert answer.status_code == 202, answer.text
        path = f"/api/v1/tasks/{answer.json()['task_id']}"
        while (status := (await http.get(path)).json()["status"]) in {"submitted", "working"}:
            await asyncio.sleep(LOOK_S)
        assert status == "completed", status

    clients = [cluster.client(name) for name in names]
    try:
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
            for number in range(tasks):
                group.create_task(one(number))
    finally:
        for http in clients:
            await http.aclose()


async def measured(tasks: int, delay_s: float, folder: Path) -> dict[str, float]:
    """Tasks per second of each setup."""
    rates = {}
    for setup in SETUPS:
        place = folder / setup.name
        place.mkdir()
        rates[setup.name] = tasks / await timed(setup, tasks=tasks, delay_s=delay_s, folder=place)
        print(f"{setup.name}: {rates[setup.name]:.2f} tasks a second", flush=True)
    return rates


def figures(rates: dict[str, float]) -> list[Figure]:
    """The rates, and what four come to."""
    made = [Figure(name=f"{name}_tasks_per_s", value=rate, unit="1/s") for name, rate in rates.items()]
    for kind, what in (("workers", "workers of one server"), ("servers", "servers on one NATS")):
        gain = rates[f"{kind}_4"] / rates[f"{kind}_1"]
        made.append(
            at_least(f"{kind}_gain", gain, "x", AT_LEAST, f"the tasks per second of one, by 4 {what}")
        )
    return made


def main() -> int:
    """Measure, print, keep; answers 1 where a bound was not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=TASKS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = figures(asyncio.run(measured(given.tasks, DELAY_S, Path(folder))))
    keep("workers", found, folder=Path(tempfile.gettempdir()))
    return int(any(figure.kept is False for figure in found))


if __name__ == "__main__":
    sys.exit(main())
