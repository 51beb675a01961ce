"""The file store under SIGKILL: a child writes, says what was acknowledged, and is killed at any moment."""

import asyncio
import random
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
import uuid_utils

from ai_agent_server.core.task_packet import Canceled, Started, Submitted, TaskPacket
from ai_agent_server.errors import TaskNotFoundError
from ai_agent_server.tasks_state.base import TaskFilter
from ai_agent_server.tasks_state.json_file_store import JsonFileStore, Pace

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
KILLS = 24
DELETED = -1


async def _write_for_ever(root: Path, pace: Pace) -> None:
    store = JsonFileStore(root, pace=pace)
    await store.open()
    say(f"open {len(await store.live())}")
    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(_one_task_after_another(store, number))


async def _one_task_after_another(store: JsonFileStore, number: int) -> None:
    """Tasks of twenty revisions, half of them deleted at their end; some have a large payload."""
    large = number % 3 == 0
    while True:
        task_id = str(uuid_utils.uuid7())
        task, _ = await store.create(
            TaskPacket(
                task_id=task_id,
                context_id=task_id,
                profile="developer",
                role="planner",
                payload={"prompt": task_id[-1] * (300_000 if large else 300)},
                created_at=NOW,
            ),
            [Submitted(at=NOW, via="rest")],
        )
        say(f"{task_id} {task.revision}")
        while task.revision < 20:
            task = await store.append(
                task_id,
                [Started(at=NOW, generation=task.generation + 1)],
                expected_revision=task.revision,
            )
            say(f"{task_id} {task.revision}")
        task = await store.append(task_id, [Canceled(at=NOW)], expected_revision=task.revision)
        say(f"{task_id} {task.revision}")
        if number % 2:
            say(f"{task_id} deleting")
            await store.delete(task_id)
            say(f"{task_id} {DELETED}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@pytest.mark.parametrize("at_once", [0, 100], ids=["late files", "files at once"])
async def test_every_acknowledged_revision_outlives_a_kill_at_any_moment(
    tmp_path: Path, at_once: int
) -> None:
    root = tmp_path / "state"
    chance = random.Random(1)
    acknowledged: dict[str, int] = {}
    going: set[str] = set()
    for _ in range(KILLS):
        said = await asyncio.to_thread(_killed_after, root, 1 + chance.randrange(300), at_once)
        for line in said:
            name, what = line.split()
            if what == "deleting":
                going.add(name)
            else:
                acknowledged[name] = int(what)
        store = JsonFileStore(root)
        await store.open()
        assert (await store.health()).corrupt == 0
        await _agrees(store, acknowledged, going)
        await store.aclose()
    assert sum(revision == DELETED for revision in acknowledged.values()) > 0
    assert len(acknowledged) > KILLS


def _killed_after(root: Path, lines: int, at_once: int) -> list[str]:
    """What a child acknowledged before it was killed, at the earliest when it had said `lines` lines."""
    with subprocess.Popen(
        [sys.executable, "-m", __name__, str(root), str(at_once)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("open "), "the child could not open what the last one left"
        said = [child.stdout.readline() for _ in range(lines)]
        child.kill()
        said += child.stdout.readlines()
    assert child.returncode == -9
    return [line for line in said if line.endswith("\n")]


async def _agrees(store: JsonFileStore, acknowledged: dict[str, int], going: set[str]) -> None:
    there: dict[str, TaskPacket] = {}
    cursor: str | None = None
    while True:
        page = await store.list(TaskFilter(), limit=100, cursor=cursor)
        for item in page.items:
            there[item.task_id] = await store.read(item.task_id)
        if (cursor := page.next_cursor) is None:
            break
    for task_id, revision in acknowledged.items():
        if revision == DELETED or (task_id in going and task_id not in there):
            assert task_id not in there
            continue
        # One write more may have become safe before the kill than was said.
        assert there[task_id].revision in (revision, revision + 1), "an acknowledged revision is lost"
    for task in there.values():
        assert [event.seq for event in task.history] == list(range(1, task.revision + 1))
        assert task.payload["prompt"].strip(task.task_id[-1]) == ""
    for task_id, revision in acknowledged.items():
        if revision == DELETED:
            try:
                await store.read(task_id)
            except TaskNotFoundError:
                continue
            raise AssertionError("a deleted task came back")


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(_write_for_ever(Path(sys.argv[1]), Pace(at_once=int(sys.argv[2]), late_s=0.05)))
