"""The file store after a power cut: the journal reached the disk, what was renamed into place did not."""

import asyncio
import errno
import os
import resource
import shutil
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import uuid_utils

from ai_agent_server.core.task_packet import Canceled, Started, Submitted, TaskPacket
from ai_agent_server.errors import StoreFullError, StoreUnusableError, TaskNotFoundError
from ai_agent_server.tasks_state._journal import Frame, Journal
from ai_agent_server.tasks_state.json_file_store import PACE, JsonFileStore, Pace

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


@asynccontextmanager
async def opened(root: Path, pace: Pace = PACE) -> AsyncIterator[JsonFileStore]:
    store = JsonFileStore(root, pace=pace)
    await store.open()
    try:
        yield store
    finally:
        await store.aclose()


async def accepted(store: JsonFileStore, task_id: str = "", prompt: str = "add") -> TaskPacket:
    task_id = task_id or str(uuid_utils.uuid7())
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


def after_the_cut(root: Path, to: Path) -> Path:
    """What the disk holds of a store that is still open."""
    while True:
        try:
            return Path(shutil.copytree(root, to))
        except shutil.Error:  # a checkpoint removed a segment under our hands
            shutil.rmtree(to)


def file_in(root: Path, task_id: str) -> Path:
    return Path(JsonFileStore(root).location(task_id))


def at_once() -> None:
    """The catching up of files that are never late."""


def not_again(contents: Mapping[str, bytes]) -> None:
    raise AssertionError(f"{contents.keys()} were safe")


def segment_in(root: Path) -> Path:
    (path,) = (root / "journal").iterdir()
    return path


async def ahead_of_its_journal(tmp_path: Path) -> tuple[Path, TaskPacket]:
    """A folder after a cut that took the journal's last frame, and the task as its file has it."""
    async with opened(tmp_path / "state") as store:
        task = await accepted(store)
        length = segment_in(tmp_path / "state").stat().st_size
        ahead = await started(store, task)
        root = after_the_cut(tmp_path / "state", tmp_path / "cut")
    os.truncate(segment_in(root), length)
    return root, ahead


async def test_a_clean_stop_leaves_task_files_and_no_journal(tmp_path: Path) -> None:
    async with opened(tmp_path / "state") as store:
        task = await accepted(store)
        assert segment_in(tmp_path / "state").stat().st_size > 0
    assert not (tmp_path / "state" / "journal").exists()
    assert file_in(tmp_path / "state", task.task_id).is_file()


@pytest.mark.parametrize("left", ["missing", "empty", "zeros", "cut", "older"])
async def test_what_was_answered_comes_back_from_the_journal(tmp_path: Path, left: str) -> None:
    async with opened(tmp_path / "state") as store:
        first = [await accepted(store) for _ in range(3)]
        older = {task.task_id: file_in(tmp_path / "state", task.task_id).read_bytes() for task in first}
        last = [await started(store, task) for task in first]
        last[0] = await canceled(store, last[0])
        root = after_the_cut(tmp_path / "state", tmp_path / "cut")
    for task in last:
        path = file_in(root, task.task_id)
        whole = path.read_bytes()
        path.unlink()
        match left:
            case "empty":
                path.touch()
            case "zeros":
                path.write_bytes(bytes(len(whole)))
            case "cut":
                path.write_bytes(whole[: len(whole) // 2])
            case "older":
                path.write_bytes(older[task.task_id])
    async with opened(root) as store:
        assert [await store.read(task.task_id) for task in last] == last
        assert (await store.health()).corrupt == 0
    assert not (root / "journal").exists()
    async with opened(root) as store:
        assert [await store.read(task.task_id) for task in last] == last


async def test_a_folder_in_the_place_of_a_file_is_moved_out_of_the_journals_way(tmp_path: Path) -> None:
    async with opened(tmp_path / "state") as store:
        task = await accepted(store)
        root = after_the_cut(tmp_path / "state", tmp_path / "cut")
    path = file_in(root, task.task_id)
    path.unlink()
    path.mkdir()
    async with opened(root) as store:
        assert await store.read(task.task_id) == task
    assert (root / "corrupt" / path.name).is_dir()


async def test_a_last_frame_that_was_cut_anywhere_leaves_what_was_before_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "state") as store:
        first = await accepted(store)
        path = file_in(tmp_path / "state", first.task_id)
        before = path.read_bytes()
        length = segment_in(tmp_path / "state").stat().st_size
        second = await started(store, first)
        root = after_the_cut(tmp_path / "state", tmp_path / "cut")
    journal = segment_in(root).read_bytes()
    # Anywhere in its header and id, and here and there in its content, up to the last bytes.
    ends = {
        *range(length, length + 60),
        *range(length, len(journal), 17),
        *range(len(journal) - 4, len(journal) + 1),
    }
    for end in sorted(ends):
        (root / "journal").mkdir(exist_ok=True)
        (root / "journal" / "00000001.log").write_bytes(journal[:end])
        file_in(root, first.task_id).write_bytes(before)
        async with opened(root) as store:
            expected = second if end == len(journal) else first
            assert await store.read(first.task_id) == expected, end
            assert (await store.health()).corrupt == 0


async def test_a_frame_that_broke_in_the_middle_is_kept_for_a_person_and_the_others_count(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path / "state") as store:
        tasks = [await accepted(store) for _ in range(3)]
        root = after_the_cut(tmp_path / "state", tmp_path / "cut")
    segment = segment_in(root)
    journal = segment.read_bytes()
    broken = journal.replace(
        tasks[1].task_id.encode() + b'{"task_id"', tasks[1].task_id.encode() + b'{"task_ie"'
    )
    assert broken != journal
    segment.write_bytes(broken)
    for task in tasks:
        file_in(root, task.task_id).unlink()
    async with opened(root) as store:
        assert await store.read(tasks[0].task_id) == tasks[0]
        assert await store.read(tasks[2].task_id) == tasks[2]
        assert (await store.health()).corrupt == 1
    assert (root / "corrupt" / segment.name).read_bytes() == broken


async def test_a_prompt_cannot_pretend_to_be_a_frame(tmp_path: Path) -> None:
    forged = str(uuid_utils.uuid7())
    other = Journal(tmp_path / "other", lambda task_id: str(tmp_path / task_id), at_once, not_again)
    other.folder.mkdir()
    other.append([Frame(forged, b"{}")])
    frame = next(other.folder.iterdir()).read_bytes()
    other.close()
    async with opened(tmp_path / "state") as store:
        task = await accepted(store, prompt=frame.decode("latin-1"))
        root = after_the_cut(tmp_path / "state", tmp_path / "cut")
    segment = segment_in(root)
    segment.write_bytes(segment.read_bytes()[:-1])
    async with opened(root) as store:
        assert await store.read(task.task_id) == task
        with pytest.raises(TaskNotFoundError):
            await store.read(forged)
        assert (await store.health()).corrupt == 0


async def test_a_deleted_task_stays_deleted(tmp_path: Path) -> None:
    async with opened(tmp_path / "state") as store:
        task = await canceled(store, await accepted(store))
        path = file_in(tmp_path / "state", task.task_id)
        content = path.read_bytes()
        await store.delete(task.task_id)
        root = after_the_cut(tmp_path / "state", tmp_path / "cut")
    file_in(root, task.task_id).write_bytes(content)
    async with opened(root) as store:
        with pytest.raises(TaskNotFoundError):
            await store.read(task.task_id)
    assert not file_in(root, task.task_id).exists()


async def test_a_new_task_under_a_deleted_ones_id_beats_the_old_file(tmp_path: Path) -> None:
    async with opened(tmp_path / "state") as store:
        old = await canceled(store, await accepted(store, prompt="old"))
        content = file_in(tmp_path / "state", old.task_id).read_bytes()
        await store.delete(old.task_id)
        new = await accepted(store, old.task_id, prompt="new")
        root = after_the_cut(tmp_path / "state", tmp_path / "cut")
    file_in(root, old.task_id).write_bytes(content)
    async with opened(root) as store:
        assert await store.read(old.task_id) == new


async def test_a_file_that_is_ahead_of_the_journal_stays(tmp_path: Path) -> None:
    root, ahead = await ahead_of_its_journal(tmp_path)
    async with opened(root) as store:
        assert await store.read(ahead.task_id) == ahead


async def test_a_refused_create_is_not_there_after_a_restart(tmp_path: Path) -> None:
    task_id = str(uuid_utils.uuid7())
    async with opened(tmp_path / "state") as store:
        kept = await accepted(store)
        in_the_way = file_in(tmp_path / "state", task_id)
        in_the_way.mkdir()
        with pytest.raises(StoreUnusableError, match="directory"):
            await accepted(store, task_id)
        in_the_way.rmdir()
        after = await started(store, kept)
        root = after_the_cut(tmp_path / "state", tmp_path / "cut")
    async with opened(root) as store:
        assert await store.live() == (kept.task_id,)
        assert await store.read(kept.task_id) == after


@contextmanager
def no_file_longer_than(size_bytes: int) -> Iterator[None]:
    """As on a disk that is full for a file that grows (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_journal_that_cannot_grow_makes_way_for_a_new_one(tmp_path: Path) -> None:
    async with opened(tmp_path / "state") as store:
        kept = [await accepted(store) for _ in range(3)]
        size = segment_in(tmp_path / "state").stat().st_size
        with no_file_longer_than(size + 10):
            kept = [await started(store, task) for task in kept]
        assert segment_in(tmp_path / "state").name != "00000001.log"
        root = after_the_cut(tmp_path / "state", tmp_path / "cut")
    async with opened(root) as store:
        assert [await store.read(task.task_id) for task in kept] == kept


async def test_a_journal_without_space_refuses_and_the_next_write_works(tmp_path: Path) -> None:
    async with opened(tmp_path / "state") as store:
        kept = await accepted(store)
        size = file_in(tmp_path / "state", kept.task_id).stat().st_size
        refused = str(uuid_utils.uuid7())
        # The file would fit, the frame with its header and id does not.
        with no_file_longer_than(size + 20), pytest.raises(StoreFullError):
            await accepted(store, refused)
        after = await started(store, kept)
        root = after_the_cut(tmp_path / "state", tmp_path / "cut")
    assert not list(root.rglob("*.tmp"))
    async with opened(root) as store:
        assert await store.live() == (kept.task_id,)
        assert await store.read(kept.task_id) == after
        assert (await store.health()).corrupt == 0


def test_a_full_segment_is_retired_while_the_next_one_is_written(tmp_path: Path) -> None:
    task_ids = [str(uuid_utils.uuid7()) for _ in range(40)]
    journal = Journal(
        tmp_path / "journal", lambda task_id: str(tmp_path / task_id), at_once, not_again, segment_bytes=1000
    )
    journal.folder.mkdir()
    for task_id in task_ids:
        journal.append([Frame(task_id, b"x" * 300)])
        (tmp_path / task_id).write_bytes(b"x" * 300)
    journal.append([Frame(task_ids[0], b"")])
    (tmp_path / task_ids[0]).unlink()
    journal.settle()
    assert list(journal.folder.iterdir()) == []
    assert journal.is_empty
    journal.append([Frame(task_ids[1], b"y")])
    (left,) = journal.folder.iterdir()
    assert int(left.stem) > 3
    journal.close()


@pytest.mark.parametrize("at_once", [0, 100], ids=["late files", "files at once"])
async def test_a_checkpoint_while_tasks_are_written_loses_nothing(tmp_path: Path, at_once: int) -> None:
    rounds = 28

    async def one(store: JsonFileStore) -> TaskPacket:
        task = await accepted(store, prompt="x" * 200_000)
        for _ in range(rounds):
            task = await started(store, task)
        return task

    pace = Pace(at_once=at_once, quiet_s=3600, late_s=3600)
    async with opened(tmp_path / "state", pace) as store:
        # Its only frame is in the first segment, which goes.
        still = await accepted(store)
        tasks = [still, *await asyncio.gather(*(one(store) for _ in range(8)))]
        async with asyncio.timeout(60):
            while (tmp_path / "state" / "journal" / "00000001.log").exists():
                await asyncio.sleep(0.01)
        root = after_the_cut(tmp_path / "state", tmp_path / "cut")
    for path in (root / "journal").iterdir():
        assert path.stat().st_size > 0
    async with opened(root) as store:
        assert [await store.read(task.task_id) for task in tasks] == tasks
        assert (await store.health()).corrupt == 0


@contextmanager
def one_fsync_fails(file: Path, number: int, *, lost: bool = False) -> Iterator[list[Path]]:
    """The next fsync of `file` fails, and the ones after it succeed; `lost` says what the disk has then."""
    fsync, failed = os.fsync, list[Path]()

    def failing_once(descriptor: int) -> None:
        if not failed and Path(f"/proc/self/fd/{descriptor}").readlink() == file:
            failed.append(file)
            if lost:
                # What a disk's error leaves: pages that count as written and are not.
                os.truncate(file, 0)
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", failing_once)
        yield failed


async def test_a_file_that_an_fsync_lost_is_written_again_before_the_journal_lets_go_of_it(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path / "state") as store:
        task = await accepted(store)
        file = file_in(tmp_path / "state", task.task_id)
        content = file.read_bytes()
        with one_fsync_fails(file, errno.EIO, lost=True) as failed:
            other = await accepted(store, prompt="x" * 200_000)
            async with asyncio.timeout(60):
                while (tmp_path / "state" / "journal" / "00000001.log").exists():
                    other = await started(store, other)
        assert failed
        assert file.read_bytes() == content
        assert await store.read(other.task_id) == other
    assert not (tmp_path / "state" / "journal").exists()


async def test_a_start_after_an_fsync_that_failed_trusts_no_file(tmp_path: Path) -> None:
    root = tmp_path / "state"
    async with opened(root) as store:
        task = await accepted(store)
        file = file_in(root, task.task_id)
        first = file.stat().st_ino
        with one_fsync_fails(file, errno.EIO) as failed:
            await store.aclose()
        assert failed
    # The content is there, in memory: only what is written anew is on the disk after the next fsync.
    async with opened(root) as store:
        assert await store.read(task.task_id) == task
        assert file.stat().st_ino != first
    assert not (root / "journal").exists()
    again = file.stat().st_ino
    async with opened(root):
        assert file.stat().st_ino == again


async def test_a_file_that_is_ahead_of_a_journal_whose_fsync_fails_stays(tmp_path: Path) -> None:
    root, ahead = await ahead_of_its_journal(tmp_path)
    with one_fsync_fails(file_in(root, ahead.task_id), errno.ENOSPC) as failed:
        async with opened(root) as store:
            assert await store.read(ahead.task_id) == ahead
            await accepted(store)
    assert failed
    async with opened(root) as store:
        assert await store.read(ahead.task_id) == ahead


async def test_a_start_that_finds_no_space_for_the_journals_files_shows_what_is_in_it(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path / "state") as store:
        task = await accepted(store, prompt="x" * 20_000)
        over = await accepted(store, prompt="y" * 20_000)
        older = file_in(tmp_path / "state", over.task_id).read_bytes()
        over = await canceled(store, over)
        other = await accepted(store)
        root = after_the_cut(tmp_path / "state", tmp_path / "cut")
    file_in(root, task.task_id).unlink()
    file_in(root, over.task_id).write_bytes(older)
    with no_file_longer_than(10_000):
        async with opened(root) as store:
            assert [await store.read(each.task_id) for each in (task, over, other)] == [task, over, other]
            assert set(await store.live()) == {task.task_id, other.task_id}
            with pytest.raises(StoreFullError, match=os.strerror(errno.EFBIG)):
                await started(store, other)
            with pytest.raises(StoreFullError):
                await store.delete(over.task_id)
            assert await store.read(other.task_id) == other
            health = await store.health()
            assert not health.ok
            assert os.strerror(errno.EFBIG) in health.detail
    async with opened(root) as store:
        assert [await store.read(each.task_id) for each in (task, over, other)] == [task, over, other]
        assert (await store.health()).corrupt == 0
        await started(store, task)
    assert not (root / "journal").exists()
