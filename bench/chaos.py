"""Chaos: servers are killed, frozen and starved while clients give them work; then everything is counted.

python -m bench.chaos --tasks 1000 --kills 100 --seed 7 --servers 1
python -m bench.chaos --tasks 300 --kills 30 --seed 7 --servers 3

The servers, the nats-server and the sockets are real; the LLM is a program of ours on a socket, since
its faults and its counts are wanted. What happened is judged from the servers' files and from what
clients were told, by `problems`, which knows nothing of the server's inside. Every choice comes from
the seed; when it falls is up to the machine.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
from tests.servers.cluster import CHAIN, CountingLLM, counting_llm
from tests.servers.nats import NatsServer
from tests.servers.ports import holder
from tests.servers.process import ServerProcess, write_config

QUIET_S = 60.0
"""For so long after the last fault a task may still run."""
START_S = 300.0
LEASE_S = 2.0
FINAL = frozenset({"completed", "failed", "canceled", "rejected"})
ENDS = frozenset(f"task.{status}" for status in FINAL)
UPSTREAM = ("reset", "error", "malformed", "cut", "silent")
DISK_MB = 256


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done, and to whom."""

    tasks: int
    kills: int
    seed: int
    servers: int = 1
    workers: int = 1
    upstream: float = 0.03
    """The share of LLM calls that go wrong by themselves."""
    others: float = 0.2
    """The chance, after a kill, of another fault: a frozen server, a killed NATS, a full disk."""


class Told(msgspec.Struct, kw_only=True):
    """What clients saw, and what was done to the servers."""

    accepted: dict[str, set[str]] = msgspec.field(default_factory=dict)
    """Key -> the ids that it was answered with."""
    read: dict[str, list[int]] = msgspec.field(default_factory=dict)
    """Task id -> the `seq`s that its reader was sent, over all its connections."""
    reconnects: int = 0
    resumed_s: list[float] = msgspec.field(default_factory=list)
    """From a restarted server's being ready to the next LLM call of any."""
    faults: Counter[str] = msgspec.field(default_factory=Counter)
    unended: int = 0
    quiet_s: float = 0.0


def packets(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Every task as the furthest of its files has it."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for path in (folder / "tasks_state").rglob("*.json"):
            packet = json.loads(path.read_bytes())
            if path.stem not in found or found[path.stem]["revision"] < packet["revision"]:
                found[path.stem] = packet
    return found


def repeated_calls(kept: Mapping[str, dict[str, Any]], answered: Mapping[str, int]) -> int:
    """How many whole answers of the LLM stand in no history: calls that were made again."""
    again = 0
    for packet in kept.values():
        task = packet["payload"]["task"].partition("#")[2].partition("#")[0]
        recorded = sum(
            event.get("call", {}).get("finish_reason", "error") != "error"
            for event in packet["history"]
            if event["type"] == "step.finished"
        )
        again += max(0, answered.get(task, 0) - recorded)
    return again


def problems(kept: Mapping[str, dict[str, Any]], told: Told) -> list[str]:
    """Everything that should not be, in words."""
    found = []
    for key, ids in told.accepted.items():
        if len(ids) != 1:
            found.append(f"{key} became {len(ids)} tasks")
        found += [f"{key}: its task {task_id} is lost" for task_id in ids if task_id not in kept]
    ids_of = Counter(packet["idempotency_key"] for packet in kept.values())
    found += [f"{key} was run {count} times" for key, count in ids_of.items() if count > 1]
    for task_id, packet in kept.items():
        events = packet["history"]
        if [event["seq"] for event in events] != list(range(1, packet["revision"] + 1)):
            found.append(f"{task_id}: its history has a hole")
        if packet["status"] not in FINAL:
            found.append(f"{task_id} has not ended")
        steps = Counter(event["step"] for event in events if event["type"] == "step.finished")
        found += [f"{task_id}: step {step} has {n} results" for step, n in steps.items() if n > 1]
        if sum(event["type"] in ENDS for event in events) > 1:
            found.append(f"{task_id} ended twice")
        generations = [event["generation"] for event in events if "generation" in event]
        if generations != sorted(set(generations)):
            found.append(f"{task_id}: generations {generations} do not rise")
    for task_id, seqs in told.read.items():
        if task_id in kept and seqs != list(range(1, kept[task_id]["revision"] + 1)):
            found.append(f"{task_id}: its reader was told {seqs} of {kept[task_id]['revision']}")
    return found


class Chaos:
    """The servers, those who use them, and what is done to them."""

    def __init__(self, plan: Plan, folder: Path, llm: CountingLLM) -> None:
        self.plan, self.folder, self.llm = plan, folder, llm
        self.rng = random.Random(plan.seed)
        self.told = Told()
        self.nats = NatsServer(folder / "nats")
        self.names = [f"s{n}" for n in range(plan.servers)]
        self.servers: dict[str, ServerProcess] = {}
        self.held = {name: holder() for name in self.names}
        self.ports: dict[str, int] = {name: held.getsockname()[1] for name, held in self.held.items()}
        self.frozen: set[str] = set()
        self.rounds = [asyncio.Event() for _ in range(max(1, plan.kills))]
        self.over = asyncio.Event()
        upstream = random.Random(plan.seed + 1)
        llm.fault = lambda _task, nth: (
            upstream.choice(UPSTREAM) if nth < 9 and upstream.random() < plan.upstream else ""
        )
        shared = {"cluster": {"enabled": True, "lease_s": LEASE_S}} if plan.servers > 1 else {}
        (folder / "chain.md").write_text("Do it, and say that it is done: $payload")
        self.config = write_config(
            folder,
            llms={
                "double": {
                    "engine": "api.openai",
                    "model": "double",
                    "source": "api",
                    "slots": 64,
                    "timeouts": {"first_token_s": 2.0, "idle_s": 2.0},
                    "options": {"base_url": llm.url},
                }
            },
            profiles={"chain": CHAIN},
            messaging={"url": self.nats.url, "credentials": {"env": "NATS_LOGIN"}},
            server={"max_running": plan.workers, "max_live": 5000, "shutdown_s": 5.0},
            balancer={"circuit": {"failures": 1000}},
            **shared,
        )

    def state(self, name: str) -> Path:
        """The state folder of a server."""
        return self.folder / name / "state"

    async def start(self, name: str) -> None:
        """Start a server on the port that it has for life."""
        server = ServerProcess(
            self.state(name), self.config, start_timeout_s=START_S, NATS_LOGIN=self.nats.credentials
        )
        self.servers[name] = await server.start(self.ports[name])

    def url(self) -> str:
        """Some server's address."""
        return f"http://127.0.0.1:{self.ports[self.rng.choice(self.names)]}"

    async def run(self) -> None:
        """Start everything, let it be used and broken, wait until it is quiet, stop it."""
        self.nats.start()
        self._small_disks()
        try:
            for name in self.names:
                await self.start(name)
            async with asyncio.TaskGroup() as group, httpx.AsyncClient(timeout=15) as http:
                users = [group.create_task(self._use(http, n)) for n in range(self.plan.tasks)]
                await self._break()
                self.over.set()
                await asyncio.wait(users)
                await self._quiet(http)
        finally:
            for server in self.servers.values():
                with suppress(TimeoutError, ProcessLookupError):
                    await server.stop()
                await server.kill()
            self.nats.kill()
            for held in self.held.values():
                held.close()

    # --- who uses them ---

    async def _use(self, http: httpx.AsyncClient, n: int) -> None:
        """One task: submitted, now and then twice at once, and now and then followed."""
        key, copies = f"k{n}", 2 if self.rng.random() < 0.2 else 1
        await self.rounds[n % len(self.rounds)].wait()
        ids = await asyncio.gather(*(self._submit(http, key) for _ in range(copies)))
        self.told.accepted[key] = set(ids)
        if n % 10 == 0:
            await self._follow(http, ids[0])

    async def _submit(self, http: httpx.AsyncClient, key: str) -> str:
        while True:
            try:
                answer = await http.post(
                    f"{self.url()}/api/v1/chain/first",
                    json={"payload": {"task": f"Do it. #{key}#"}},
                    headers={"Idempotency-Key": key},
                )
            except httpx.HTTPError:
                await asyncio.sleep(0.2)
                continue
            if answer.status_code in {200, 202}:
                task_id: str = answer.json()["task_id"]
                return task_id
            if answer.status_code not in {429, 500, 503, 507}:
                raise AssertionError(f"{answer.status_code}: {answer.text[:500]}")
            await asyncio.sleep(0.2)

    async def _follow(self, http: httpx.AsyncClient, task_id: str) -> None:
        seqs = self.told.read.setdefault(task_id, [])
        while True:
            headers = {"Last-Event-ID": str(seqs[-1])} if seqs else {}
            with suppress(httpx.HTTPError):
                async with http.stream(
                    "GET", f"{self.url()}/api/v1/tasks/{task_id}/events", headers=headers
                ) as answer:
                    async for line in answer.aiter_lines():
                        if line.startswith("id: "):
                            seqs.append(int(line[4:]))
                        elif line.startswith("event: ") and line[7:] in ENDS:
                            # The frame's id came before it: this was the last one.
                            return
            self.told.reconnects += 1
            await asyncio.sleep(0.1)

    async def _quiet(self, http: httpx.AsyncClient) -> None:
        """Wait until every task has ended."""
        began = time.monotonic()
        live = -1
        while live and time.monotonic() - began < QUIET_S:
            with suppress(httpx.HTTPError):
                live = (await http.get(f"{self.url()}/api/v1/metrics")).json()["state"]["live"]
            await asyncio.sleep(0.2)
        self.told.unended, self.told.quiet_s = live, time.monotonic() - began

    # --- who breaks them ---

    async def _break(self) -> None:
        for coming in self.rounds:
            coming.set()
            await asyncio.sleep(self.rng.uniform(0.1, 0.9))
            await self._kill(self.rng.choice(self.names))
            if self.rng.random() < self.plan.others:
                await self.rng.choice(self._other_faults())()
        await asyncio.sleep(0.5)

    def _other_faults(self) -> list[Any]:
        faults = [self._kill_nats, self._freeze]
        return [*faults, self._fill_disk] if self._is_small(self.names[0]) else faults

    async def _kill(self, name: str) -> None:
        self.told.faults["server killed"] += 1
        await self.servers[name].kill()
        await asyncio.sleep(self.rng.uniform(0.0, 0.3))
        # Taken now: a server calls before it says that it is ready.
        calls = sum(self.llm.asked.values())
        await self.start(name)
        ready = time.monotonic()
        asyncio.get_running_loop().call_soon(self._note_resume, ready, calls)

    def _note_resume(self, ready: float, calls: int) -> None:
        if sum(self.llm.asked.values()) > calls:
            self.told.resumed_s.append(time.monotonic() - ready)
        elif time.monotonic() - ready < 10 and not self.over.is_set():
            asyncio.get_running_loop().call_later(0.02, self._note_resume, ready, calls)

    async def _freeze(self) -> None:
        """Longer than a lease: where there are others they take its tasks, and it wakes up too late."""
        self.told.faults["server frozen"] += 1
        pid = self.servers[self.rng.choice(self.names)].pid
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(self.rng.uniform(0.5, 2.5) * LEASE_S)
        os.kill(pid, signal.SIGCONT)

    async def _kill_nats(self) -> None:
        self.told.faults["nats killed"] += 1
        self.nats.kill()
        await asyncio.sleep(self.rng.uniform(0.1, 1.5))
        await asyncio.to_thread(self.nats.start)

    async def _fill_disk(self) -> None:
        self.told.faults["disk full"] += 1
        disk = self.folder / self.rng.choice(self.names)
        filler = disk / "filler"
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(2**20))
                file.flush()
        await asyncio.sleep(self.rng.uniform(0.3, 1.5))
        filler.unlink()

    def _small_disks(self) -> None:
        """A disk of its own for each server, where this user may mount one."""
        for name in self.names:
            disk = self.folder / name
            disk.mkdir()
            if shutil.which("mount"):
                options = ["-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)]
                subprocess.run(["mount", *options], check=False, capture_output=True)

    def _is_small(self, name: str) -> bool:
        return (self.folder / name).is_mount()

    def forget_disks(self) -> None:
        """Give the disks back."""
        for name in self.names:
            if self._is_small(name):
                subprocess.run(["umount", "-l", str(self.folder / name)], check=False)


async def measure(plan: Plan, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Run the plan in `folder`: (what was wrong, the figures)."""
    async with counting_llm(delay_s=0.03) as llm:
        chaos = Chaos(plan, folder, llm)
        began = time.monotonic()
        try:
            await chaos.run()
            kept = packets([chaos.state(name) for name in chaos.names])
        finally:
            chaos.forget_disks()
        told = chaos.told
        again = repeated_calls(kept, llm.answered)
        wrong = problems(kept, told)
        faults = sum(told.faults[name] for name in ("server killed", "server frozen", "disk full"))
        if again > faults * plan.workers + told.faults["nats killed"] * plan.workers * plan.servers:
            wrong.append(f"{again} LLM calls were repeated for {faults} faults")
        if told.unended:
            wrong.append(f"{told.unended} tasks had not ended after {QUIET_S:g} s of quiet")
        figures = {
            "tasks": len(told.accepted),
            "completed": sum(packet["status"] == "completed" for packet in kept.values()),
            "failed": dict(Counter(p["reason"] for p in kept.values() if p["status"] == "failed")),
            "faults": dict(told.faults),
            "LLM calls": sum(llm.asked.values()),
            "LLM calls repeated": again,
            "readers": len(told.read),
            "reconnects": told.reconnects,
            "until all had ended after the last fault, s": round(told.quiet_s, 1),
            "resumed after a restart, worst, s": round(max(told.resumed_s, default=0.0), 2),
            "took, s": round(time.monotonic() - began),
            "wrong": len(wrong),
        }
        return wrong, figures


def main() -> int:
    """Run once, print the table; answers 1 when something was wrong, and leaves the folder then."""
    parser = argparse.ArgumentParser(prog="bench.chaos", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--servers", type=int, default=1)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    plan = Plan(tasks=given.tasks, kills=given.kills, seed=given.seed, servers=given.servers)
    wrong, figures = asyncio.run(measure(plan, folder))
    for name, value in figures.items():
        print(f"| {name} | {value} |")
    for line in wrong[:50]:
        print(line)
    if wrong:
        print(f"the logs are in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
