"""The promises of the task store port, kept by every kind that discovery finds."""

import asyncio
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
import uuid_utils

from ai_agent_server import tasks_state
from ai_agent_server.core.task_packet import (
    Canceled,
    Completed,
    Started,
    Submitted,
    TaskPacket,
    TaskStatus,
    summary,
)
from ai_agent_server.discovery import implementation, kinds
from ai_agent_server.errors import (
    IdempotencyConflictError,
    InvalidPacketError,
    InvalidTransitionError,
    StoreUnusableError,
    TaskConflictError,
    TaskLiveError,
    TaskNotFoundError,
)
from ai_agent_server.tasks_state.base import TaskFilter, TaskStore
from tests.servers.nats import NatsServer
from tests.servers.shared_store import SharedStore, forget_tasks

Open = Callable[[Path], TaskStore]

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
ANY = TaskFilter()


def _from_folder(kind: str) -> Open:
    def build(folder: Path) -> TaskStore:
        store: TaskStore = implementation(tasks_state, kind)(folder)
        return store

    return build


NATS = NatsServer()


@pytest.fixture(scope="module", autouse=True)
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    NATS.folder = tmp_path_factory.mktemp("nats")
    NATS.start()
    yield
    NATS.kill()


@pytest.fixture(autouse=True)
async def nothing_kept_on_nats() -> None:
    await forget_tasks(NATS)


BUILD: dict[str, Open] = {kind: _from_folder(kind) for kind in sorted(kinds(tasks_state))}
BUILD["nats_store"] = lambda folder: SharedStore(folder, NATS)
DURABLE = sorted(set(BUILD) - {"memory_store"})


@pytest.fixture(params=sorted(BUILD))
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TaskStore]:
    made = BUILD[request.param](tmp_path / "state")
    await made.open()
    yield made
    await made.aclose()


def packet(
    *,
    task_id: str | None = None,
    key: str | None = None,
    sha256: str = "a" * 64,
    profile: str = "developer",
    role: str = "planner",
    context_id: str = "c",
    created_at: datetime = NOW,
) -> TaskPacket:
    return TaskPacket(
        task_id=task_id or str(uuid_utils.uuid7()),
        context_id=context_id,
        profile=profile,
        role=role,
        payload={"prompt": "add \u00e9 \u0000 \U0001f680"},
        created_at=created_at,
        idempotency_key=key,
        request_sha256=sha256,
    )


async def accepted(store: TaskStore, asked: TaskPacket) -> TaskPacket:
    kept, created = await store.create(asked, [Submitted(at=NOW, via="rest")])
    assert created
    return kept


async def ended(store: TaskStore, asked: TaskPacket) -> TaskPacket:
    kept = await accepted(store, asked)
    return await store.append(
        kept.task_id, [Completed(at=NOW, result={"code": "x"})], expected_revision=kept.revision
    )


def test_every_kind_is_under_test() -> None:
    assert {"json_file_store", "memory_store"} <= set(BUILD)


async def test_what_was_created_is_read_back(store: TaskStore) -> None:
    kept = await accepted(store, packet())
    assert kept.revision == 1
    assert kept.history == (Submitted(at=NOW, via="rest", seq=1),)
    assert await store.read(kept.task_id) == kept


async def test_events_are_numbered_in_order_without_a_gap(store: TaskStore) -> None:
    kept = await accepted(store, packet())
    kept = await store.append(
        kept.task_id,
        [Started(at=NOW, generation=1), Started(at=NOW, generation=2)],
        expected_revision=1,
    )
    kept = await store.append(kept.task_id, [Canceled(at=NOW)], expected_revision=3)
    assert [event.seq for event in kept.history] == [1, 2, 3, 4]
    assert await store.read(kept.task_id) == kept


async def test_a_stale_revision_is_a_conflict_and_changes_nothing(store: TaskStore) -> None:
    kept = await accepted(store, packet())
    with pytest.raises(TaskConflictError) as caught:
        await store.append(kept.task_id, [Canceled(at=NOW)], expected_revision=0)
    assert (caught.value.expected, caught.value.actual) == (0, 1)
    assert await store.read(kept.task_id) == kept


async def test_of_many_writers_with_one_revision_exactly_one_wins(store: TaskStore) -> None:
    kept = await accepted(store, packet())
    outcomes = await asyncio.gather(
        *(
            store.append(kept.task_id, [Started(at=NOW, generation=n)], expected_revision=1)
            for n in range(1, 9)
        ),
        return_exceptions=True,
    )
    assert sum(isinstance(outcome, TaskPacket) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, TaskConflictError) for outcome in outcomes) == 7
    assert (await store.read(kept.task_id)).revision == 2


async def test_an_event_that_cannot_follow_is_refused_with_all_that_came_with_it(store: TaskStore) -> None:
    kept = await accepted(store, packet())
    with pytest.raises(InvalidTransitionError):
        await store.append(
            kept.task_id,
            [Started(at=NOW, generation=1), Started(at=NOW, generation=1)],
            expected_revision=1,
        )
    assert await store.read(kept.task_id) == kept


async def test_nothing_follows_the_end(store: TaskStore) -> None:
    kept = await ended(store, packet())
    with pytest.raises(InvalidTransitionError):
        await store.append(kept.task_id, [Canceled(at=NOW)], expected_revision=kept.revision)
    with pytest.raises(TaskConflictError):
        await store.append(kept.task_id, [Canceled(at=NOW)], expected_revision=0)
    assert await store.read(kept.task_id) == kept


@pytest.mark.parametrize("with_key", [True, False], ids=["key", "id"])
async def test_the_same_packet_again_answers_the_first(store: TaskStore, with_key: bool) -> None:
    first = packet(key="k" if with_key else None)
    kept = await accepted(store, first)
    again = packet(key="k") if with_key else first
    assert await store.create(again, [Submitted(at=NOW, via="nats")]) == (kept, False)
    await store.append(kept.task_id, [Canceled(at=NOW)], expected_revision=1)
    answer, created = await store.create(again, [Submitted(at=NOW, via="nats")])
    assert (answer.status, created) == (TaskStatus.CANCELED, False)


@pytest.mark.parametrize("with_key", [True, False], ids=["key", "id"])
async def test_another_body_under_the_same_name_is_a_conflict(store: TaskStore, with_key: bool) -> None:
    kept = await accepted(store, packet(key="k"))
    other = packet(key="k", sha256="b" * 64) if with_key else packet(task_id=kept.task_id, sha256="b" * 64)
    with pytest.raises(IdempotencyConflictError) as caught:
        await store.create(other, [Submitted(at=NOW, via="rest")])
    assert caught.value.task_id == kept.task_id
    assert caught.value.key == ("k" if with_key else kept.task_id)


async def test_one_key_at_the_same_time_makes_one_task(store: TaskStore) -> None:
    answers = await asyncio.gather(
        *(store.create(packet(key="k"), [Submitted(at=NOW, via="rest")]) for _ in range(8))
    )
    assert sum(created for _, created in answers) == 1
    assert len({kept.task_id for kept, _ in answers}) == 1
    assert store.counts()[TaskStatus.SUBMITTED] == 1


@pytest.mark.parametrize(
    "name", ["", "x", "../../etc/passwd", "a/b", "0" * 36, "01A1FD83-F29C-768E-86E5-3823C59A788B"]
)
async def test_what_is_no_task_id_is_not_found(store: TaskStore, name: str) -> None:
    for refused in (
        store.read(name),
        store.append(name, [Canceled(at=NOW)], expected_revision=0),
        store.delete(name),
    ):
        with pytest.raises(TaskNotFoundError):
            await refused
    assert store.location(name) == ""


async def test_a_packet_whose_id_is_no_uuid_is_refused(store: TaskStore) -> None:
    with pytest.raises(InvalidPacketError) as caught:
        await store.create(packet(task_id="../x"), [Submitted(at=NOW, via="rest")])
    assert caught.value.pointer == "/task_id"
    assert (await store.list(ANY, limit=10)).items == ()


async def test_a_deleted_task_is_gone_and_its_names_are_free(store: TaskStore) -> None:
    kept = await ended(store, packet(key="k"))
    await store.delete(kept.task_id)
    with pytest.raises(TaskNotFoundError):
        await store.read(kept.task_id)
    with pytest.raises(TaskNotFoundError):
        await store.delete(kept.task_id)
    assert (await store.list(ANY, limit=10)).items == ()
    await accepted(store, packet(task_id=kept.task_id, sha256="c" * 64))
    anew = await accepted(store, packet(key="k", sha256="c" * 64))
    assert await store.create(packet(key="k", sha256="c" * 64), [Submitted(at=NOW, via="rest")]) == (
        anew,
        False,
    )


async def test_a_live_task_is_not_deleted(store: TaskStore) -> None:
    kept = await accepted(store, packet())
    with pytest.raises(TaskLiveError):
        await store.delete(kept.task_id)
    assert await store.read(kept.task_id) == kept


async def test_lists_are_newest_first_and_hold_plain_summaries(store: TaskStore) -> None:
    kept = [
        await accepted(store, packet(created_at=NOW + timedelta(seconds=seconds))) for seconds in (2, 0, 1)
    ]
    page = await store.list(ANY, limit=10)
    assert page.items == tuple(summary(kept[place]) for place in (0, 2, 1))
    assert msgspec.json.encode(page.items[0]) == msgspec.json.encode(summary(kept[0]))
    assert page.next_cursor is None


async def test_pages_join_to_the_whole_while_tasks_come_and_go(store: TaskStore) -> None:
    kept = [await ended(store, packet(created_at=NOW + timedelta(seconds=n))) for n in range(7)]
    newest_first = [task.task_id for task in reversed(kept)]
    page = await store.list(ANY, limit=3)
    seen = [item.task_id for item in page.items]
    await accepted(store, packet(created_at=NOW + timedelta(hours=1)))
    await store.delete(seen[-1])
    while page.next_cursor is not None:
        page = await store.list(ANY, limit=3, cursor=page.next_cursor)
        seen += [item.task_id for item in page.items]
    assert seen == newest_first


async def test_a_page_that_is_full_with_nothing_behind_it_is_the_last(store: TaskStore) -> None:
    for _ in range(2):
        await accepted(store, packet())
    assert (await store.list(ANY, limit=2)).next_cursor is None
    assert (await store.list(ANY, limit=1)).next_cursor is not None


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (TaskFilter(profile="trading"), ["t"]),
        (TaskFilter(role="qa"), ["q"]),
        (TaskFilter(status=TaskStatus.COMPLETED), ["e"]),
        (TaskFilter(context_id="mine"), ["c"]),
        (TaskFilter(profile="developer", role="qa", status=TaskStatus.SUBMITTED), ["q"]),
        (TaskFilter(profile="trading", role="qa"), []),
    ],
)
async def test_a_filter_lets_through_what_it_names(
    store: TaskStore, where: TaskFilter, expected: list[str]
) -> None:
    names = {
        (await accepted(store, packet(profile="trading"))).task_id: "t",
        (await accepted(store, packet(role="qa"))).task_id: "q",
        (await ended(store, packet())).task_id: "e",
        (await accepted(store, packet(context_id="mine"))).task_id: "c",
    }
    page = await store.list(where, limit=10)
    assert [names[item.task_id] for item in page.items] == expected


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "!",
        "AAAA",
        "e30",
        "MS4wLy4uLy4u",
        "bmFuLzAxOTljMGRlLTAwMDAtNzAwMC04MDAwLTAwMDAwMDAwMDAwYQ",
        "\u00e9",
    ],
)
async def test_what_is_no_cursor_is_refused(store: TaskStore, cursor: str) -> None:
    with pytest.raises(InvalidPacketError) as caught:
        await store.list(ANY, limit=10, cursor=cursor)
    assert caught.value.pointer == "/cursor"


async def test_counts_and_live_follow_every_change(store: TaskStore) -> None:
    older = await accepted(store, packet(created_at=NOW))
    newer = await accepted(store, packet(created_at=NOW + timedelta(seconds=1)))
    over = await ended(store, packet())
    assert await store.live() == (older.task_id, newer.task_id)
    await store.append(older.task_id, [Started(at=NOW, generation=1)], expected_revision=1)
    assert {status: number for status, number in store.counts().items() if number} == {
        TaskStatus.SUBMITTED: 1,
        TaskStatus.WORKING: 1,
        TaskStatus.COMPLETED: 1,
    }
    await store.delete(over.task_id)
    assert store.counts()[TaskStatus.COMPLETED] == 0
    await store.append(newer.task_id, [Canceled(at=NOW)], expected_revision=1)
    assert await store.live() == (older.task_id,)


async def test_health_says_that_a_write_would_work(store: TaskStore) -> None:
    await accepted(store, packet())
    health = await store.health()
    assert health.ok
    assert (health.tasks, health.corrupt, health.detail) == (1, 0, "")


async def test_who_stops_waiting_tears_nothing(store: TaskStore) -> None:
    kept = await accepted(store, packet())
    asking = asyncio.ensure_future(
        store.append(kept.task_id, [Started(at=NOW, generation=1)], expected_revision=1)
    )
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    with pytest.raises(TaskConflictError):
        await store.append(kept.task_id, [Started(at=NOW, generation=1)], expected_revision=1)
    after = await store.append(kept.task_id, [Canceled(at=NOW)], expected_revision=2)
    assert [event.seq for event in after.history] == [1, 2, 3]
    assert await store.read(kept.task_id) == after


async def test_closing_twice_is_closing_once(store: TaskStore) -> None:
    await accepted(store, packet())
    await store.aclose()
    await store.aclose()


@pytest.mark.parametrize("kind", DURABLE)
async def test_everything_is_there_after_a_reopen(kind: str, tmp_path: Path) -> None:
    first = BUILD[kind](tmp_path / "state")
    await first.open()
    live = await accepted(first, packet(key="k"))
    over = await ended(first, packet(role="qa"))
    page = await first.list(ANY, limit=10)
    counts = first.counts()
    await first.aclose()

    second = BUILD[kind](tmp_path / "state")
    await second.open()
    assert await second.read(live.task_id) == live
    assert await second.read(over.task_id) == over
    assert await second.list(ANY, limit=10) == page
    assert msgspec.json.encode(await second.list(ANY, limit=10)) == msgspec.json.encode(page)
    assert second.counts() == counts
    assert await second.live() == (live.task_id,)
    assert await second.create(packet(key="k"), [Submitted(at=NOW, via="rest")]) == (live, False)
    after = await second.append(live.task_id, [Canceled(at=NOW)], expected_revision=1)
    assert after.history[:1] == live.history
    await second.aclose()


@pytest.mark.parametrize("kind", DURABLE)
async def test_two_servers_do_not_share_a_folder(kind: str, tmp_path: Path) -> None:
    first = BUILD[kind](tmp_path / "state")
    await first.open()
    with pytest.raises(StoreUnusableError):
        await BUILD[kind](tmp_path / "state").open()
    await accepted(first, packet())
    await first.aclose()
    second = BUILD[kind](tmp_path / "state")
    await second.open()
    await second.aclose()


@pytest.mark.parametrize("kind", DURABLE)
async def test_a_closed_store_takes_nothing(kind: str, tmp_path: Path) -> None:
    store = BUILD[kind](tmp_path / "state")
    await store.open()
    kept = await accepted(store, packet())
    await store.aclose()
    with pytest.raises(StoreUnusableError):
        await store.create(packet(), [Submitted(at=NOW, via="rest")])
    with pytest.raises(StoreUnusableError):
        await store.append(kept.task_id, [Canceled(at=NOW)], expected_revision=1)


@pytest.mark.parametrize("kind", DURABLE)
async def test_what_a_person_finds_is_one_json_file_that_only_they_may_read(
    kind: str, tmp_path: Path
) -> None:
    store = BUILD[kind](tmp_path / "state")
    await store.open()
    kept = await ended(store, packet())
    file = Path(store.location(kept.task_id))
    document = msgspec.json.decode(file.read_bytes(), type=dict[str, object])
    assert document["task_id"] == kept.task_id
    assert document["status"] == "completed"
    assert document["payload"] == kept.payload
    assert msgspec.convert(document["history"], list[dict[str, object]])[-1]["type"] == "task.completed"
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    await store.aclose()
