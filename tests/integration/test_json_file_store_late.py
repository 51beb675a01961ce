"""Task files that follow the journal: when they do, what is in their way, a disk without space for them."""

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
import structlog
import uuid_utils

from ai_agent_server.core.task_packet import Canceled, Started, Submitted, TaskPacket, TaskStatus
from ai_agent_server.errors import StoreFullError, TaskNotFoundError
from ai_agent_server.tasks_state.base import TaskFilter
from ai_agent_server.tasks_state.json_file_store import PACE, JsonFileStore, Pace
from tests.integration.test_json_file_store import mounting, say
from tests.waiting import until

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
MODULE = f"tests.integration.{Path(__file__).stem}"
HELD = Pace(at_once=0, quiet_s=3600, late_s=3600)
"""Every file is late, and follows when the store closes."""


@asynccontextmanager
async def opened(root: Path, pace: Pace = HELD) -> AsyncIterator[JsonFileStore]:
    store = JsonFileStore(root, pace=pace)
    await store.open()
    try:
        yield store
    finally:
        await store.aclose()


async def accepted(store: JsonFileStore, prompt: str = "add") -> TaskPacket:
    task_id = str(uuid_utils.uuid7())
    kept, _ = await store.create(
        TaskPacket(
            task_id=task_id,
            context_id=task_id,
            profile="developer",
            role="planner",
            payload={"prompt": prompt},
            created_at=NOW,
        ),
        [Submitted(at=NOW, via="rest")],
    )
    return kept


async def started(store: JsonFileStore, task: TaskPacket) -> TaskPacket:
    return await store.append(
        task.task_id,
        [Started(at=NOW, generation=task.generation + 1)],
        expected_revision=task.revision,
    )


async def canceled(store: JsonFileStore, task: TaskPacket) -> TaskPacket:
    return await store.append(task.task_id, [Canceled(at=NOW)], expected_revision=task.revision)


def path_of(store: JsonFileStore, task: TaskPacket) -> Path:
    return Path(store.location(task.task_id))


def revision_in(path: Path) -> int:
    """What the file says, 0 where there is none; a file that is not whole fails here."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=TaskPacket).revision
    except FileNotFoundError:
        return 0


async def test_where_little_is_written_every_file_is_current_when_its_change_is_answered(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path / "state", PACE) as store:
        task = await accepted(store)
        path = path_of(store, task)
        assert revision_in(path) == 1
        while task.revision < 5:
            task = await started(store, task)
            assert revision_in(path) == task.revision


async def test_a_late_file_follows_when_it_is_quiet(tmp_path: Path) -> None:
    async with opened(tmp_path / "state", Pace(at_once=0, quiet_s=0.001, late_s=3600)) as store:
        tasks = [await started(store, await accepted(store)) for _ in range(3)]
        await until(lambda: all(revision_in(path_of(store, task)) == 2 for task in tasks))


async def test_late_files_follow_while_others_are_written_all_the_time(tmp_path: Path) -> None:
    """More of them than are put in place at once."""
    async with opened(tmp_path / "state", Pace(at_once=0, quiet_s=3600, late_s=0.05)) as store:
        tasks = await asyncio.gather(*(accepted(store) for _ in range(200)))
        busy = [await accepted(store) for _ in range(16)]

        async def write_on(task: TaskPacket) -> None:
            while True:
                task = await started(store, task)

        writing = asyncio.gather(*(write_on(task) for task in busy))
        await until(lambda: all(revision_in(path_of(store, task)) == 1 for task in tasks))
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def test_a_task_that_ended_is_read_as_it_ended_before_its_file_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path / "state") as store:
        task = await started(store, await accepted(store))
        over = await canceled(store, task)
        assert not path_of(store, task).exists()
        assert await store.read(task.task_id) == over
        await store.delete(task.task_id)
        with pytest.raises(TaskNotFoundError):
            await store.read(task.task_id)


async def test_what_is_read_is_the_newest_whatever_the_file_says(tmp_path: Path) -> None:
    async with opened(tmp_path / "state", PACE) as store:
        first = await accepted(store)
    async with opened(tmp_path / "state") as store:
        task = await started(store, first)
        assert revision_in(path_of(store, task)) == 1
        assert await store.read(task.task_id) == task
        assert (await store.list(TaskFilter(), limit=1)).items[0].updated_at == task.updated_at


async def test_a_stop_puts_every_file_in_place_and_leaves_no_journal(tmp_path: Path) -> None:
    root = tmp_path / "state"
    async with opened(root) as store:
        tasks = [await started(store, await accepted(store)) for _ in range(3)]
        assert [revision_in(path_of(store, task)) for task in tasks] == [0, 0, 0]
    assert [revision_in(path_of(store, task)) for task in tasks] == [2, 2, 2]
    assert not (root / "journal").exists()


async def test_tasks_end_while_their_late_files_make_way_for_the_next_segment(tmp_path: Path) -> None:
    """Every batch has some that end; the journal goes on in another segment at two of them."""
    ended: list[TaskPacket] = []

    async def one(store: JsonFileStore, number: int) -> None:
        for turn in range(5):
            task = await accepted(store, "x" * 200_000)
            for _ in range(1 + (number if turn == 0 else 0) % 3):
                task = await started(store, task)
            over = await canceled(store, task)
            assert await store.read(over.task_id) == over
            ended.append(over)

    async with opened(tmp_path / "state") as store:
        await asyncio.gather(*(one(store, number) for number in range(24)))
        assert any(path_of(store, over).exists() for over in ended)
    for over in ended:
        assert revision_in(path_of(store, over)) == over.revision


async def test_late_tasks_come_back_after_a_kill(tmp_path: Path) -> None:
    async with opened(tmp_path / "state") as store:
        new, over, deleted = [await accepted(store) for _ in range(3)]
        new, over = await started(store, new), await canceled(store, over)
        deleted = await canceled(store, deleted)
        await store.delete(deleted.task_id)
        root = Path(shutil.copytree(tmp_path / "state", tmp_path / "killed"))
    async with opened(root) as store:
        assert revision_in(path_of(store, new)) == 2
        assert [await store.read(task.task_id) for task in (new, over)] == [new, over]
        assert await store.live() == (new.task_id,)
        with pytest.raises(TaskNotFoundError):
            await store.read(deleted.task_id)


async def test_a_new_task_under_a_deleted_ones_id_is_not_taken_for_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "state") as store:
        old = await canceled(store, await started(store, await accepted(store, "old")))
        await store.delete(old.task_id)
        new, _ = await store.create(
            msgspec.structs.replace(old, history=(), revision=0, status=TaskStatus.SUBMITTED, generation=0),
            [Submitted(at=NOW, via="rest")],
        )
        root = Path(shutil.copytree(tmp_path / "state", tmp_path / "killed"))
        assert not path_of(store, new).exists()
    assert revision_in(path_of(store, new)) == 1
    async with opened(root) as store:
        assert await store.read(old.task_id) == new


@pytest.mark.parametrize(
    "in_the_way", ["removed", "edited", "a folder", "a folder beside", "no shard", "a file for a shard"]
)
async def test_what_somebody_did_to_a_late_file_does_not_keep_it_from_its_place(
    tmp_path: Path, in_the_way: str
) -> None:
    root = tmp_path / "state"
    async with opened(root, PACE) as store:
        first = await accepted(store)
        path = path_of(store, first)
    async with opened(root) as store:
        task = await started(store, first)
        match in_the_way:
            case "removed":
                path.unlink()
            case "edited":
                path.write_bytes(b"mine")
            case "a folder":
                path.unlink()
                path.mkdir()
            case "a folder beside":
                path.with_name(path.name + ".late.tmp").mkdir()
            case "no shard":
                shutil.rmtree(path.parent)
            case "a file for a shard":
                shutil.rmtree(path.parent)
                path.parent.write_bytes(b"mine")
    assert revision_in(path) == 2
    assert len(list((root / "corrupt").glob("*"))) == (in_the_way.startswith("a "))
    async with opened(root) as store:
        assert await store.read(task.task_id) == task


async def test_a_task_that_cannot_end_in_its_file_is_still_the_one_before(tmp_path: Path) -> None:
    root = tmp_path / "state"
    async with opened(root, PACE) as store:
        task = await started(store, await accepted(store))
        path_of(store, task).unlink()
        path_of(store, task).mkdir()
        with pytest.raises(Exception, match="directory"):
            await canceled(store, task)
        assert await store.read(task.task_id) == task
        path_of(store, task).rmdir()
        over = await canceled(store, task)
        assert revision_in(path_of(store, task)) == over.revision
    async with opened(root) as store:
        assert await store.read(task.task_id) == over


async def _on_a_full_disk(root: Path) -> None:
    """Write late files, fill the disk, and look what becomes of them: before a kill, after it, with space."""
    filler = root.parent / "filler"
    if "killed" in sys.argv:
        async with opened(root, PACE) as store:
            for _ in range(2):
                await canceled(store, await accepted(store, "old " * 2000))
        store = JsonFileStore(root, pace=HELD)
        await store.open()
        tasks = [await started(store, await accepted(store, "x" * 20_000)) for _ in range(4)]
        with suppress(OSError), filler.open("ab", buffering=0) as rest:
            while rest.write(bytes(4096)):
                pass
        async with asyncio.timeout(50):
            while (await store.health()).ok:
                await asyncio.sleep(0.05)
        say("late: " + " ".join(str(path_of(store, task).exists()) for task in tasks))
        say("ids: " + " ".join(task.task_id for task in tasks))
        for attempt in (started(store, tasks[0]), canceled(store, tasks[1]), accepted(store)):
            with pytest.raises(StoreFullError):
                await attempt
        assert [await store.read(task.task_id) for task in tasks] == tasks
        sys.stdout.flush()
        signal.raise_signal(signal.SIGKILL)
    first = subprocess.run(
        [sys.executable, "-m", MODULE, str(root), "killed"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert first.returncode == -signal.SIGKILL, first.stderr
    say(first.stdout)
    task_ids = first.stdout.split("ids: ")[1].split()
    store = JsonFileStore(root)
    await store.open()
    tasks = [await store.read(task_id) for task_id in task_ids]
    say(f"shown: {[task.revision for task in tasks]} {set(await store.live()) == set(task_ids)}")
    say(f"ok: {(await store.health()).ok}")
    with pytest.raises(StoreFullError):
        await started(store, tasks[0])
    there = (await store.list(TaskFilter(), limit=10)).items
    old = next(item.task_id for item in there if item.task_id not in task_ids)
    await store.delete(old)
    say(f"deleted: {not Path(store.location(old)).exists()}")
    filler.unlink()
    await until(lambda: all(revision_in(path_of(store, task)) == 2 for task in tasks))
    tasks = [await started(store, task) for task in tasks]
    await store.aclose()
    async with opened(root) as store:
        assert [await store.read(task_id) for task_id in task_ids] == tasks
        with pytest.raises(TaskNotFoundError):
            await store.read(old)
        health = await store.health()
        say(f"in the end: {health.ok} {health.tasks} {health.corrupt}")


def test_a_disk_that_fills_up_before_the_late_files_are_there_loses_nothing(tmp_path: Path) -> None:
    ran = subprocess.run(
        [
            *mounting(f"mount -t tmpfs -o size=80m tmpfs {tmp_path}"),
            *(sys.executable, "-m", MODULE, str(tmp_path / "state"), "alive"),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[2],
    )
    assert "late: False False False False" in ran.stdout, ran.stderr
    assert "shown: [2, 2, 2, 2] True" in ran.stdout, ran.stderr
    assert "ok: False" in ran.stdout, ran.stderr
    assert "deleted: True" in ran.stdout, ran.stderr
    assert "in the end: True 5 0" in ran.stdout, ran.stderr


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(_on_a_full_disk(Path(sys.argv[1])))
