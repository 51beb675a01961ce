"""Many tasks: the start with 10,000 task files, then lists and single tasks over a real socket."""

import asyncio
import random
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import msgspec
import uuid_utils

from ai_agent_server import log
from ai_agent_server.core.task_packet import (
    Artifact,
    Completed,
    ErrorDetail,
    Failed,
    Hop,
    LLMCall,
    Started,
    StepFinished,
    StepStarted,
    Submitted,
    TaskEvent,
    TaskPacket,
)
from ai_agent_server.core.transitions import fold
from ai_agent_server.tasks_state.json_file_store import JsonFileStore
from bench.figures import Figure, at_least, at_most, keep, p95
from bench.server import serving, without_model

TASKS = 10_000
RARE = 1_000
"""One task in so many is of another profile."""
REQUESTS = 300
AT_ONCE = 32
TASKS_A_STREAM = 8
STATES = 13
"""How many states a task of `_story` has."""
WORK = Path(__file__).parent.parent / ".bench"
TEXT = "def add(a, b):\n    return a + b\n" * 8


def main() -> None:
    """Write the files, start a server on them, ask it."""
    log.configure("warning")
    folder = WORK / "task_files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        writes_per_s = asyncio.run(_writes_per_s(folder / "writes"))
        written = [_write(folder / "state", number) for number in range(TASKS)]
        config = without_model(folder)
        with serving(folder / "empty", config) as server:
            empty_s = server.ready_s
        with (
            serving(folder / "state", config) as server,
            httpx.Client(base_url=server.url, timeout=30) as http,
        ):
            figures = [
                at_least(
                    "durable_writes_per_s",
                    writes_per_s,
                    "1/s",
                    2000,
                    "fsynced task states a second, 32 tasks at once",
                ),
                at_most(
                    "start_10000_tasks_s",
                    server.ready_s,
                    "s",
                    5,
                    "from start to ready with 10,000 task files",
                ),
                Figure(name="start_no_tasks_s", value=empty_s, unit="s", what="the same with none"),
                *_figures(http, [task_id for task_id, _ in written]),
                Figure(
                    name="task_file_kb",
                    value=sum(size for _, size in written) / TASKS / 1024,
                    unit="KB",
                    what="mean size of a task's file",
                ),
            ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    keep("task_files", figures, folder=WORK)


async def _writes_per_s(state: Path) -> float:
    """How often a second the store makes a task's next state safe."""
    store = JsonFileStore(state)
    await store.open()

    async def one() -> None:
        task_id = str(uuid_utils.uuid7())
        at = datetime.now(UTC)
        packet = TaskPacket(
            task_id=task_id,
            context_id=task_id,
            profile="developer",
            role="planner",
            payload={"task": TEXT},
            created_at=at,
        )
        first, *rest = _story(at, failed=False)
        packet, _ = await store.create(packet, [first])
        for event in rest:
            packet = await store.append(task_id, [event], expected_revision=packet.revision)

    async def stream() -> None:
        for _ in range(TASKS_A_STREAM):
            await one()

    started = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(AT_ONCE)))
    took_s = time.perf_counter() - started
    await store.aclose()
    return AT_ONCE * TASKS_A_STREAM * STATES / took_s


def _figures(http: httpx.Client, task_ids: list[str]) -> list[Figure]:
    chance = random.Random(0)
    return [
        at_most(
            "list_p95_ms", _p95_ms(http, lambda: "/api/v1/tasks"), "ms", 100, "first page of all tasks, p95"
        ),
        at_most(
            "list_rare_p95_ms",
            _p95_ms(http, lambda: "/api/v1/tasks?profile=productivity"),
            "ms",
            100,
            "first page with a filter that one in a thousand fits, p95",
        ),
        at_most(
            "get_task_p95_ms",
            _p95_ms(http, lambda: f"/api/v1/tasks/{chance.choice(task_ids)}"),
            "ms",
            20,
            "one task, read from its file, p95",
        ),
    ]


def _p95_ms(http: httpx.Client, path: Callable[[], str]) -> float:
    took: list[float] = []
    for _ in range(REQUESTS):
        wanted = path()
        started = time.perf_counter()
        answer = http.get(wanted)
        took.append((time.perf_counter() - started) * 1000)
        assert answer.status_code == 200, answer.text
    return p95(took)


def _write(state: Path, number: int) -> tuple[str, int]:
    """A task's file as the server leaves it, without waiting for the disk; answers its id and size."""
    task_id = str(uuid_utils.uuid7())
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
    packet = TaskPacket(
        task_id=task_id,
        context_id=task_id,
        profile="developer" if number % RARE else "productivity",
        role="planner" if number % RARE else "summarize",
        payload={"task": f"Task number {number}: {TEXT}"},
        created_at=at,
        request_sha256=f"{number:064x}",
    )
    path = Path(JsonFileStore(state).location(task_id))
    path.parent.mkdir(parents=True, exist_ok=True)
    return task_id, path.write_bytes(msgspec.json.encode(fold(packet, _story(at, failed=number % 5 == 0))))


def _story(at: datetime, *, failed: bool) -> list[TaskEvent]:
    """Plan, code, test, debug, test again."""
    told: list[TaskEvent] = [Submitted(at=at, via="rest"), Started(at=at, generation=1)]
    for step, role in enumerate(("planner", "fast-coder", "qa", "debug", "qa"), 1):
        told += [
            StepStarted(
                at=at, step=step, role=role, attempt=1, hop=Hop(on="entry", why="the packet asks for it")
            ),
            StepFinished(
                at=at,
                step=step,
                role=role,
                outcome="done",
                why=TEXT,
                artifact=Artifact(artifact_id=f"{step:064x}", kind="code", content=TEXT),
                call=LLMCall(
                    llm="embedded",
                    model="m",
                    source="local",
                    input_tokens=400,
                    output_tokens=100,
                    finish_reason="stop",
                    time_to_first_token_ms=80.0,
                    duration_ms=900.0,
                    prompt_sha256=f"{step:064x}",
                ),
            ),
        ]
    end: TaskEvent = (
        Failed(at=at, reason="max_debug", error=ErrorDetail(code="max_debug", message="no version passed"))
        if failed
        else Completed(at=at, result={"code": TEXT, "verdict": "pass"})
    )
    return [*told, end]


if __name__ == "__main__":
    main()
