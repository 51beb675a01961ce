"""The file store on a real folder: what lies there, what is moved aside, what is swept, what is refused."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
import structlog
import uuid_utils

from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.task_packet import (
    Canceled,
    Completed,
    FeedbackReceived,
    Started,
    Submitted,
    TaskPacket,
)
from ai_agent_server.errors import CorruptTaskError, StoreFullError, StoreUnusableError, TaskNotFoundError
from ai_agent_server.tasks_state.base import TaskFilter
from ai_agent_server.tasks_state.json_file_store import PACE, JsonFileStore, Pace

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
LARGE = {"prompt": "\u00e9" * 200_000}


@asynccontextmanager
async def opened(root: Path) -> AsyncIterator[JsonFileStore]:
    store = JsonFileStore(root)
    await store.open()
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "state"


async def accepted(
    store: JsonFileStore, payload: JSONObject | None = None, *, key: str | None = None
) -> TaskPacket:
    task_id = str(uuid_utils.uuid7())
    kept, _ = await store.create(
        TaskPacket(
            task_id=task_id,
            context_id=task_id,
            profile="developer",
            role="planner",
            payload=payload if payload is not None else {"prompt": "add"},
            created_at=NOW,
            idempotency_key=key,
        ),
        [Submitted(at=NOW, via="rest")],
    )
    return kept


async def canceled(store: JsonFileStore, task: TaskPacket) -> TaskPacket:
    return await store.append(task.task_id, [Canceled(at=NOW)], expected_revision=task.revision)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


async def test_a_task_lies_in_the_shard_of_its_ids_tail(root: Path) -> None:
    async with opened(root) as store:
        task = await accepted(store)
    assert files(root / "tasks_state") == [root / "tasks_state" / task.task_id[-2:] / f"{task.task_id}.json"]


async def test_a_file_that_was_cut_is_moved_aside_and_the_others_serve(root: Path) -> None:
    async with opened(root) as store:
        cut, whole = await accepted(store), await canceled(store, await accepted(store))
        path = Path(store.location(cut.task_id))
    half = path.read_bytes()[:-20]
    path.write_bytes(half)
    async with opened(root) as store:
        with pytest.raises(TaskNotFoundError):
            await store.read(cut.task_id)
        assert await store.read(whole.task_id) == whole
        health = await store.health()
        assert (health.ok, health.tasks, health.corrupt) == (True, 1, 1)
    assert (root / "corrupt" / path.name).read_bytes() == half
    assert not path.exists()


@pytest.mark.parametrize(
    ("true", "false"),
    [
        (b'"created_at":"2026-01-01T12:00:00Z"', b'"created_at":"2026-01-01T12:00:00"'),
        (b'"revision":1', b'"revision":2'),
        (b'"status":"submitted"', b'"status":"lost"'),
    ],
)
async def test_a_live_task_that_was_edited_into_nonsense_is_moved_aside(
    root: Path, true: bytes, false: bytes
) -> None:
    async with opened(root) as store:
        path = Path(store.location((await accepted(store)).task_id))
    content = path.read_bytes()
    assert true in content
    path.write_bytes(content.replace(true, false))
    async with opened(root) as store:
        assert (await store.health()).corrupt == 1
        assert await store.live() == ()


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 400, b"[]", b'{"task_id":"x"}', b"[" * 100_000, b'{"profile":"\xff"}'],
    ids=["empty", "zeros", "list", "fields", "deep", "utf8"],
)
async def test_what_is_no_task_is_moved_aside_as_it_is(root: Path, content: bytes) -> None:
    async with opened(root) as store:
        task = await accepted(store)
    name = f"{str(uuid_utils.uuid7())[:-2]}aa.json"
    alien = root / "tasks_state" / "aa" / name
    alien.parent.mkdir(exist_ok=True)
    alien.write_bytes(content)
    async with opened(root) as store:
        assert await store.read(task.task_id) == task
        assert (await store.health()).corrupt == 1
    assert (root / "corrupt" / name).read_bytes() == content


async def test_a_copy_under_another_name_or_in_another_folder_is_moved_aside(root: Path) -> None:
    async with opened(root) as store:
        task = await accepted(store)
        path = Path(store.location(task.task_id))
    other = f"{str(uuid_utils.uuid7())[:-2]}{path.parent.name}.json"
    (path.parent / other).write_bytes(path.read_bytes())
    (path.parent / "notes.txt").write_text("mine")
    stray = root / "tasks_state" / "zz"
    stray.mkdir()
    async with opened(root) as store:
        assert (await store.list(TaskFilter(), limit=10)).items[0].task_id == task.task_id
        assert (await store.health()).corrupt == 3
    assert {path.name for path in (root / "corrupt").iterdir()} == {other, "notes.txt", "zz"}


async def test_nothing_that_was_moved_aside_is_ever_overwritten(root: Path) -> None:
    async with opened(root) as store:
        task = await accepted(store)
        path = Path(store.location(task.task_id))
    for content in (b"one", b"two", b"three"):
        path.write_bytes(content)
        async with opened(root):
            pass
    assert {file.read_bytes() for file in files(root / "corrupt")} == {b"one", b"two", b"three"}


async def test_a_newer_servers_file_stops_the_start_and_stays(root: Path) -> None:
    async with opened(root) as store:
        task = await canceled(store, await accepted(store))
        path = Path(store.location(task.task_id))
    newer = path.read_bytes().replace(b'"schema_version":1', b'"schema_version":2')
    path.write_bytes(newer)
    with pytest.raises(StoreUnusableError, match="newer release"):
        await JsonFileStore(root).open()
    assert path.read_bytes() == newer


async def test_what_a_crash_left_half_written_is_removed(root: Path) -> None:
    async with opened(root) as store:
        task = await accepted(store)
        path = Path(store.location(task.task_id))
    path.with_name(path.name + ".tmp").write_bytes(b"half")
    (root / "blobs" / "half.tmp").write_bytes(b"half")
    async with opened(root) as store:
        assert await store.read(task.task_id) == task
    assert files(root / "tasks_state") == [path]
    assert files(root / "blobs") == []


async def test_a_file_that_broke_after_the_start_is_said_to_be_corrupt(root: Path) -> None:
    async with opened(root) as store:
        task = await canceled(store, await accepted(store))
        Path(store.location(task.task_id)).write_bytes(b"{")
        with pytest.raises(CorruptTaskError):
            await store.read(task.task_id)


async def test_a_large_payload_has_a_file_of_its_own_that_is_written_once(root: Path) -> None:
    async with opened(root) as store:
        task = await accepted(store, LARGE)
        (blob,) = files(root / "blobs")
        written_at = blob.stat().st_mtime_ns
        again = await accepted(store, LARGE)
        task = await store.append(task.task_id, [Started(at=NOW, generation=1)], expected_revision=1)
        path = Path(store.location(task.task_id))
        assert files(root / "blobs") == [blob]
        assert blob.stat().st_mtime_ns == written_at
    assert blob.name == sha256(blob.read_bytes()).hexdigest()
    assert path.stat().st_size < 4096
    document = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    assert document["payload"] == {"$blob": f"sha256:{blob.name}"}
    async with opened(root) as store:
        assert await store.read(task.task_id) == task
        assert (await store.read(again.task_id)).payload == LARGE


async def test_large_outputs_and_results_go_the_same_way(root: Path) -> None:
    async with opened(root) as store:
        task = await accepted(store)
        task = await store.append(
            task.task_id,
            [FeedbackReceived(at=NOW, role="qa", outcome="pass", via="rest", output=LARGE)],
            expected_revision=1,
        )
        task = await store.append(task.task_id, [Completed(at=NOW, result=LARGE)], expected_revision=2)
        assert await store.read(task.task_id) == task
        assert Path(store.location(task.task_id)).stat().st_size < 4096
        assert len(files(root / "blobs")) == 1
    async with opened(root) as store:
        assert await store.read(task.task_id) == task
        await store.delete(task.task_id)
    assert files(root / "blobs") == []


async def test_a_task_that_uses_a_blob_twice_lets_go_of_it_at_once(root: Path) -> None:
    async with opened(root) as store:
        task = await accepted(store, LARGE)
        await store.append(task.task_id, [Completed(at=NOW, result=LARGE)], expected_revision=1)
        await store.delete(task.task_id)
        assert files(root / "blobs") == []


async def test_a_blob_goes_with_the_last_task_that_uses_it(root: Path) -> None:
    async with opened(root) as store:
        first, second = await accepted(store, LARGE), await accepted(store, LARGE)
        await canceled(store, first)
        await store.delete(first.task_id)
        assert len(files(root / "blobs")) == 1
    async with opened(root) as store:
        assert (await store.read(second.task_id)).payload == LARGE
        await canceled(store, second)
        await store.delete(second.task_id)
    assert files(root / "blobs") == []


async def test_a_client_cannot_name_a_blob_that_is_not_its_own(root: Path) -> None:
    async with opened(root) as store:
        await accepted(store, LARGE)
        (blob,) = files(root / "blobs")
        forged: dict[str, object] = {"$blob": f"sha256:{blob.name}"}
        task = await accepted(store, forged)
        task = await store.append(
            task.task_id,
            [FeedbackReceived(at=NOW, role="qa", outcome="pass", via="rest", output={"text": "x" * 300_000})],
            expected_revision=1,
        )
    async with opened(root) as store:
        assert await store.read(task.task_id) == task
        assert (await store.read(task.task_id)).payload == forged


async def test_a_blob_that_was_changed_is_not_believed(root: Path) -> None:
    async with opened(root) as store:
        task = await canceled(store, await accepted(store, LARGE))
        (blob,) = files(root / "blobs")
        blob.write_bytes(b'{"prompt":"other"}')
        with pytest.raises(CorruptTaskError):
            await store.read(task.task_id)


async def test_a_file_that_names_anything_but_a_digest_as_its_blob_is_moved_aside(root: Path) -> None:
    async with opened(root) as store:
        path = Path(store.location((await canceled(store, await accepted(store, LARGE))).task_id))
    (blob,) = files(root / "blobs")
    path.write_bytes(path.read_bytes().replace(f'["{blob.name}"]'.encode(), b'["../lock"]'))
    async with opened(root) as store:
        assert (await store.health()).corrupt == 1
    assert (root / "lock").exists()


async def test_blobs_are_not_swept_while_a_file_waits_to_be_repaired(root: Path) -> None:
    async with opened(root) as store:
        task = await accepted(store, LARGE)
        path = Path(store.location(task.task_id))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    async with opened(root):
        pass
    (root / "corrupt" / path.name).unlink()
    path.write_bytes(whole)
    async with opened(root) as store:
        assert await store.read(task.task_id) == task


async def test_a_second_server_is_told_who_has_the_folder(root: Path) -> None:
    async with opened(root):
        with pytest.raises(StoreUnusableError, match=rf"another server \(pid {os.getpid()}\)"):
            await JsonFileStore(root).open()


async def test_who_leaves_takes_a_write_from_nobody_who_waits_for_it_too(root: Path) -> None:
    async with opened(root) as store:
        first = asyncio.ensure_future(accepted(store, key="twice"))
        second = asyncio.ensure_future(accepted(store, key="twice"))
        third = asyncio.ensure_future(accepted(store, key="twice"))
        await asyncio.sleep(0)
        first.cancel()
        second.cancel()
        kept = await third
        assert first.cancelled()
        assert second.cancelled()
        assert (await store.health()).tasks == 1
        assert await store.read(kept.task_id) == kept


async def test_all_that_is_written_in_the_turn_in_which_the_store_closes_is_kept(root: Path) -> None:
    """More of it than shares an fsync."""
    async with opened(root) as store:
        asking = [asyncio.ensure_future(accepted(store)) for _ in range(200)]
        await asyncio.sleep(0)
        await store.aclose()
        kept = [await each for each in asking]
    async with opened(root) as store:
        assert [await store.read(task.task_id) for task in kept] == kept
        assert (await store.health()).tasks == 200


async def test_a_start_that_is_cancelled_lets_go_of_the_folder(root: Path) -> None:
    starting = asyncio.ensure_future(JsonFileStore(root).open())
    await asyncio.sleep(0.001)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    async with opened(root) as store:
        await accepted(store)


async def test_a_state_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(StoreUnusableError, match="is not a folder"):
        await JsonFileStore(tmp_path / "state").open()


async def test_a_write_that_failed_leaves_the_last_state_and_the_next_one_works(root: Path) -> None:
    async with opened(root) as store:
        task = await accepted(store)
        path = Path(store.location(task.task_id))
        before = path.read_bytes()
        in_the_way = path.with_name(path.name + ".tmp")
        in_the_way.mkdir()
        with pytest.raises(StoreUnusableError, match="Is a directory"):
            await store.append(task.task_id, [Started(at=NOW, generation=1)], expected_revision=1)
        assert await store.read(task.task_id) == task
        assert path.read_bytes() == before
        in_the_way.rmdir()
        await store.append(task.task_id, [Started(at=NOW, generation=1)], expected_revision=1)
    async with opened(root) as store:
        assert (await store.read(task.task_id)).revision == 2


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


async def test_a_task_that_was_not_taken_leaves_no_blob(root: Path) -> None:
    async with opened(root) as store:
        for shard in (root / "tasks_state").iterdir():
            shard.rmdir()
            shard.write_text("in the way")
        with pytest.raises(StoreUnusableError, match="Not a directory"):
            await accepted(store, LARGE)
        assert files(root / "blobs") == []


async def _refusals(root: Path) -> None:
    """What the child below does where the folder cannot take what it is given: says what happened."""
    # Where there is little space, no file is late whatever the pace.
    store = JsonFileStore(root, pace=Pace(at_once=0, quiet_s=3600) if "tmpfs" in sys.argv else PACE)
    try:
        await store.open()
    except StoreUnusableError as exc:
        say(f"refused: {exc}")
        return
    filler = root.parent / "filler"
    filler.write_bytes(bytes(80_000 if "tmpfs" in sys.argv else 0))
    first = await accepted(store)
    assert Path(store.location(first.task_id)).is_file()
    kept = [first]
    problem = ""
    while not problem and len(kept) < 500:
        try:
            kept.append(await accepted(store, {"prompt": "x" * 20_000}))
        except StoreFullError as exc:
            problem = str(exc)
    say(f"full: {problem}")
    with suppress(OSError), filler.open("ab", buffering=0) as rest:
        while rest.write(bytes(4096)):
            pass
    for payload in ({"prompt": "x" * 200_000}, {"prompt": "x" * 2_000_000}):
        with pytest.raises(StoreFullError):
            await accepted(store, payload, key="k")
    say(f"left: {[path.name for path in files(root) if path.suffix == '.tmp']} {files(root / 'blobs')}")
    with pytest.raises(StoreFullError):
        await store.append(
            first.task_id,
            [FeedbackReceived(at=NOW, role="qa", outcome="pass", via="rest", why="y" * 200_000)],
            expected_revision=1,
        )
    assert await store.read(first.task_id) == first
    await store.aclose()
    store = JsonFileStore(root)
    await store.open()
    say(f"health: {(await store.health()).ok}")
    assert await store.read(kept[-1].task_id) == kept[-1]
    filler.unlink(missing_ok=True)
    for task in kept[1:]:
        await store.delete((await canceled(store, task)).task_id)
    after = await store.append(first.task_id, [Started(at=NOW, generation=1)], expected_revision=1)
    await store.aclose()
    async with opened(root) as again:
        assert await again.read(first.task_id) == after
        assert (await again.health()).corrupt == 0
    say("works again")


def _child(root: Path, *before: str, on: str = "disk") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-m", __name__, str(root), on],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[2],
    )


def mounting(command: str) -> tuple[str, ...]:
    """A shell in a mount namespace of its own that runs `command`, then the rest of its arguments."""
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    prefix = ("unshare", "--mount", *user, "sh", "-c", f'{command} && exec "$@"', "sh")
    try:
        tried = subprocess.run([*prefix, "true"], check=False, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if tried.returncode != 0:
        pytest.skip(f"no mount namespace here: {tried.stderr.strip()}")
    return prefix


def test_a_disk_that_is_really_full_loses_nothing(tmp_path: Path) -> None:
    ran = _child(tmp_path / "state", *mounting(f"mount -t tmpfs -o size=400k tmpfs {tmp_path}"), on="tmpfs")
    assert "full: no space left" in ran.stdout, ran.stderr
    assert "left: [] []" in ran.stdout
    assert "health: False" in ran.stdout, ran.stderr
    assert "works again" in ran.stdout, ran.stderr


def test_a_limit_on_file_size_is_answered_like_a_full_disk(tmp_path: Path) -> None:
    ran = _child(tmp_path / "state", "sh", "-c", 'ulimit -f 20 && exec "$@"', "sh")
    assert "full: no space left" in ran.stdout, ran.stderr
    assert "left: [] []" in ran.stdout
    assert "works again" in ran.stdout, ran.stderr


def test_a_read_only_state_folder_is_refused_with_the_reason(tmp_path: Path) -> None:
    ran = _child(
        tmp_path / "state",
        *mounting(f"mkdir -p {tmp_path}/state && mount -t tmpfs -o ro tmpfs {tmp_path}/state"),
    )
    assert "refused: " in ran.stdout, ran.stderr
    assert "Read-only file system" in ran.stdout


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(_refusals(Path(sys.argv[1])))
