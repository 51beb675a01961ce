"""Retention: which tasks leave the store, where they are then; a kill neither loses nor doubles one."""

import asyncio
import gzip
import json
import os
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
import uuid_utils

from ai_agent_server.cli.folder import everyone
from ai_agent_server.core.task_packet import Canceled, Started, Submitted, TaskPacket, TaskSummary, summary
from ai_agent_server.core.transitions import unfolded
from ai_agent_server.errors import StoreError, TaskArchivedError, TaskNotFoundError
from ai_agent_server.tasks_state._archive import ARCHIVE, Archive
from ai_agent_server.tasks_state._retention import Housekeeper, due
from ai_agent_server.tasks_state._verify import TaskFiles, verify
from ai_agent_server.tasks_state.base import Retention, TaskFilter
from ai_agent_server.tasks_state.json_file_store import JsonFileStore
from tests.acceptance.test_cli import cli
from tests.servers.process import ServerProcess, write_config

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
ALL = Retention(max_tasks=0)


async def opened(root: Path) -> JsonFileStore:
    store = JsonFileStore(root)
    await store.open()
    return store


async def ended(store: JsonFileStore, *ages_days: float, live: bool = False) -> list[str]:
    """Tasks that began and ended so long before `NOW`, the ids."""
    task_ids = []
    for age in ages_days:
        at, task_id = NOW - timedelta(days=age), str(uuid_utils.uuid7())
        packet, _ = await store.create(
            TaskPacket(
                task_id=task_id, context_id=task_id, profile="developer", role="planner",
                payload={"task": "add"}, created_at=at,
            ),
            [Submitted(at=at, via="rest"), Started(at=at, generation=1)],
        )  # fmt: skip
        if not live:
            await store.append(task_id, [Canceled(at=at)], expected_revision=packet.revision)
        task_ids.append(task_id)
    return task_ids


def keeper(store: JsonFileStore, root: Path, retention: Retention = ALL) -> Housekeeper:
    return Housekeeper(store, Archive(root / ARCHIVE), retention, clock=lambda: NOW)


async def summaries(store: JsonFileStore) -> list[TaskSummary]:
    return list((await store.list(TaskFilter(), limit=1000)).items)


@pytest.mark.parametrize(
    ("retention", "kept_days"),
    [
        (Retention(), [0.5, 2, 20, 40]),
        (Retention(max_age_days=30), [0.5, 2, 20]),
        (Retention(max_age_days=0), [0.5]),
        (Retention(max_tasks=2), [0.5, 2]),
        (Retention(max_tasks=0), [0.5]),
        (Retention(max_tasks=3, max_age_days=10), [0.5, 2]),
    ],
)
async def test_the_oldest_go_by_age_and_by_count_and_a_day_is_kept(
    tmp_path: Path, retention: Retention, kept_days: list[float]
) -> None:
    store = await opened(tmp_path)
    await ended(store, 40, 0.5, 20, 2)
    everyone = await summaries(store)
    await store.aclose()
    gone = due(everyone, retention, NOW)
    left = [(NOW - task.created_at) / timedelta(days=1) for task in everyone if task.task_id not in gone]
    assert sorted(left) == kept_days


async def test_archived_tasks_are_whole_and_are_said_to_be_gone_and_where(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    old = await ended(store, 40, 39, 2)
    (live,) = await ended(store, 50, live=True)
    packets = {task_id: await store.read(task_id) for task_id in old}

    assert await keeper(store, tmp_path).tidy() == 3

    assert [task.task_id for task in await summaries(store)] == [live]
    assert {packet.task_id: packet for packet in Archive(tmp_path / ARCHIVE).packets()} == packets
    months = {path.name for path in (tmp_path / ARCHIVE).glob("*.gz")}
    assert months == {"2026-01.jsonl.gz", "2026-03.jsonl.gz"}
    lines = gzip.decompress((tmp_path / ARCHIVE / "2026-03.jsonl.gz").read_bytes()).splitlines()
    assert [json.loads(line)["task_id"] for line in lines] == [old[2]]
    for ask in (store.read, store.delete):
        with pytest.raises(TaskArchivedError, match=r"2026-01\.jsonl\.gz"):
            await ask(old[0])
    with pytest.raises(TaskNotFoundError) as unknown:
        await store.read(live.replace(live[-4:], "0000"))
    assert not isinstance(unknown.value, TaskArchivedError)
    for none in ("none", "x" * 36, "-" * 36):
        with pytest.raises(TaskNotFoundError):
            await store.read(none)
    await store.aclose()


def stand_still_until_gone(file: Path) -> None:
    """Nothing else runs on the loop meanwhile."""
    deadline_s = time.monotonic() + 30
    while file.exists() and time.monotonic() < deadline_s:
        time.sleep(0.001)


async def test_who_reads_a_task_while_it_is_deleted_is_told_where_it_is(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    (old,) = await ended(store, 40)
    Archive(tmp_path / ARCHIVE).add([await store.read(old)])
    deleting = asyncio.create_task(store.delete(old))
    for _ in range(2):  # it is made in one turn of the loop, and handed to the writer in the next
        await asyncio.sleep(0)
    stand_still_until_gone(Path(store.location(old)))  # and the store's memory does not know it
    with pytest.raises(TaskArchivedError, match=r"2026-01\.jsonl\.gz"):
        await store.read(old)
    await deleting
    await store.aclose()


async def test_an_index_that_did_not_change_is_not_read_for_a_task_that_it_has_not(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    old = await ended(store, 40, 39)
    archive = Archive(tmp_path / ARCHIVE)
    archive.add([await store.read(old[0])])
    assert (bool(archive.place(old[0])), archive.place(old[1])) == (True, "")
    (index,) = (tmp_path / ARCHIVE).glob("*.index")
    before = index.stat()
    # Only who reads it can see the difference.
    index.write_bytes(index.read_bytes().replace(old[0].encode(), old[1].encode()))
    os.utime(index, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert archive.place(old[1]) == ""
    os.utime(index)
    assert archive.place(old[1])
    archive.add([await store.read(old[0])])
    assert archive.place(old[0])
    await store.aclose()


class Asked(JsonFileStore):
    """A store that knows which tasks it was asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []

    async def read(self, task_id: str) -> TaskPacket:
        self.asked.append(task_id)
        return await super().read(task_id)


async def test_what_is_gone_is_not_asked_for_again(tmp_path: Path) -> None:
    store = Asked(tmp_path)
    await store.open()
    await ended(store, 70, 40, 2)
    housekeeper = keeper(store, tmp_path)
    await housekeeper.tidy()
    store.asked.clear()
    assert await housekeeper.tidy() == 0
    assert store.asked == []
    await store.aclose()


async def test_an_export_has_what_was_archived_while_it_read(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    first = await ended(store, 40)
    await keeper(store, tmp_path).tidy()
    meanwhile = await ended(store, 5, 6)
    exported = everyone(Archive(tmp_path / ARCHIVE), TaskFiles(tmp_path))
    found = [next(exported).task_id]
    await keeper(store, tmp_path).tidy()
    found += [packet.task_id for packet in exported]
    assert Counter(found) == Counter([*first, *meanwhile])
    await store.aclose()


async def test_without_an_archive_they_are_deleted(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await ended(store, 5, 6)
    assert await keeper(store, tmp_path, Retention(max_tasks=1, archive=False)).tidy() == 1
    assert len(await summaries(store)) == 1
    assert not (tmp_path / ARCHIVE).exists()
    await store.aclose()


@pytest.mark.parametrize("left", ["half a member", "a member without its line", "half a line", "both"])
async def test_what_a_kill_left_behind_is_made_good(tmp_path: Path, left: str) -> None:
    store = await opened(tmp_path)
    archive = Archive(tmp_path / ARCHIVE)
    first = await ended(store, 5, 5)
    assert await keeper(store, tmp_path).tidy() == 2
    second = await ended(store, 4, 4)
    packets = [await store.read(task_id) for task_id in second]
    text, index = (tmp_path / ARCHIVE / f"2026-03{suffix}" for suffix in (".jsonl.gz", ".index"))
    before = text.stat().st_size, index.stat().st_size
    archive.add(packets)  # and then it was killed: nothing was deleted
    if left != "both":
        cut = text.stat().st_size - 7 if left == "half a member" else text.stat().st_size
        os.truncate(text, cut)
        os.truncate(index, before[1] + (5 if left == "half a line" else 0))

    assert await keeper(store, tmp_path).tidy() == 2

    assert Counter(packet.task_id for packet in archive.packets()) == Counter([*first, *second])
    assert await summaries(store) == []
    await store.aclose()
    assert verify(tmp_path).archived == 4


async def test_a_task_whose_id_was_used_again_is_not_taken_for_the_archived_one(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    (task_id,) = await ended(store, 5)
    packet = await store.read(task_id)
    await keeper(store, tmp_path).tidy()
    again = msgspec.structs.replace(unfolded(packet), created_at=NOW)
    created, _ = await store.create(again, [Submitted(at=NOW, via="rest")])
    await store.append(task_id, [Canceled(at=NOW)], expected_revision=created.revision)
    assert await keeper(store, tmp_path).tidy() == 0
    assert [task.created_at for task in await summaries(store)] == [NOW]
    await store.aclose()


async def test_an_archive_that_was_cut_is_found_and_not_written_over(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    await ended(store, 5, 5)
    await keeper(store, tmp_path).tidy()
    text = tmp_path / ARCHIVE / "2026-03.jsonl.gz"
    os.truncate(text, text.stat().st_size - 1)
    await ended(store, 4)
    with pytest.raises(StoreError):
        await keeper(store, tmp_path).tidy()
    assert len(await summaries(store)) == 1
    await store.aclose()
    (fault,) = verify(tmp_path).faults
    assert "2026-03.jsonl.gz at byte 0" in fault.problem


async def test_kills_while_archiving_lose_and_double_no_task(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    task_ids = await ended(store, *[5.0] * 200)
    await store.aclose()
    archive = Archive(tmp_path / ARCHIVE)
    for kill_at in (1, 60, 130):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ai_agent_server", "tasks", "archive",
            "--max-tasks", "0", "--state-dir", str(tmp_path),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        async with asyncio.timeout(60):
            while child.returncode is None and sum(month.tasks for month in archive.months()) < kill_at:
                await asyncio.sleep(0.002)
        if child.returncode is None:
            child.kill()
        await child.wait()
        found = verify(tmp_path)
        assert found.faults == ()
    ran = await cli(
        "tasks", "archive", "--max-tasks", "0", "--state-dir", str(tmp_path), "--json", cwd=tmp_path
    )
    assert ran.code == 0, ran
    assert sum(month["tasks"] for month in ran.json["items"]) == 200
    assert Counter(packet.task_id for packet in archive.packets()) == Counter(task_ids)
    assert verify(tmp_path).tasks == 0


async def test_a_server_archives_by_its_configuration_and_answers_410(tmp_path: Path) -> None:
    state = tmp_path / "state"
    store = await opened(state)
    now = datetime.now(UTC)
    old, young = await ended(store, (NOW - now) / timedelta(days=1) + 40, (NOW - now) / timedelta(days=1) + 2)
    await store.aclose()
    config = write_config(tmp_path, store={"retention": {"max_age_days": 30}}, messaging={"enabled": False})
    async with ServerProcess(state, config) as server, server.http() as http:
        async with asyncio.timeout(60):
            while (answer := await http.get(f"/api/v1/tasks/{old}")).status_code == 200:
                await asyncio.sleep(0.05)
        assert answer.status_code == 410
        assert answer.json()["type"] == "/api/v1/docs#task-archived"
        assert "jsonl.gz" in answer.json()["detail"]
        assert (await http.get(f"/api/v1/tasks/{young}")).status_code == 200
        async with asyncio.timeout(60):
            # Where it is, is known a moment before it is off the list.
            while old in (
                listed := [task["task_id"] for task in (await http.get("/api/v1/tasks")).json()["items"]]
            ):
                await asyncio.sleep(0.05)
        assert listed == [young]
        shown = await cli("tasks", "archive", old, "--state-dir", str(state), cwd=tmp_path)
        assert shown.json["status"] == "canceled"
        file = tmp_path / "all.jsonl"
        exported = await cli(
            "tasks", "export", str(file), "--archived", "--state-dir", str(state), cwd=tmp_path
        )
    assert exported.code == 0, exported
    packets = [msgspec.json.decode(line, type=TaskPacket) for line in file.read_bytes().splitlines()]
    assert [summary(packet).task_id for packet in packets] == [old, young]
