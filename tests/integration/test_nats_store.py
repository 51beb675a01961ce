"""The store that servers share: what one writes the others know, and what NATS loses the files give back."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import msgspec
import pytest

from ai_agent_server.cluster.nats_store import STREAM
from ai_agent_server.core.task_packet import (
    Canceled,
    Completed,
    Started,
    StepFinished,
    Submitted,
    TaskEvent,
    TaskPacket,
    TaskStatus,
)
from ai_agent_server.errors import (
    IdempotencyConflictError,
    InvalidPacketError,
    StoreError,
    StoreUnusableError,
    TaskConflictError,
    TaskNotFoundError,
)
from ai_agent_server.tasks_state.base import TaskFilter, TaskPage, TaskStore
from ai_agent_server.tasks_state.json_file_store import JsonFileStore
from tests.conformance.test_task_store import NOW, accepted, packet
from tests.servers.nats import NatsServer, a_nats_server
from tests.servers.ports import holder
from tests.servers.shared_store import SharedStore

WAIT_S = 60.0


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    with a_nats_server(tmp_path / "nats") as server:
        yield server


@pytest.fixture
async def two(tmp_path: Path, nats: NatsServer) -> AsyncIterator[tuple[SharedStore, SharedStore]]:
    async with AsyncExitStack() as stack:
        stores = SharedStore(tmp_path / "a", nats), SharedStore(tmp_path / "b", nats)
        for store in stores:
            stack.push_async_callback(store.aclose)
            await store.open()
        yield stores


async def known(store: TaskStore, task_id: str, revision: int) -> TaskPacket:
    """The task, once `store` has it at `revision`."""
    async with asyncio.timeout(WAIT_S):
        while True:
            with suppress(TaskNotFoundError, StoreError):
                packet = await store.read(task_id)
                if packet.revision >= revision:
                    return packet
            await asyncio.sleep(0.01)


async def written(store: TaskStore, kept: TaskPacket, *events: TaskEvent) -> TaskPacket:
    """`kept` with `events`, which nobody else writes, once NATS is able to take them."""
    async with asyncio.timeout(3 * WAIT_S):
        while True:
            try:
                return await store.append(kept.task_id, events, expected_revision=kept.revision)
            except (StoreError, TaskNotFoundError, TaskConflictError):
                await asyncio.sleep(0.05)


async def test_what_one_server_writes_the_other_is_told_once(two: tuple[SharedStore, SharedStore]) -> None:
    here, there = two
    told: list[tuple[int, int]] = []
    own: list[int] = []
    there.observe(lambda packet, since: told.append((since, packet.revision)))
    here.observe(lambda packet, _: own.append(packet.revision))
    kept = await accepted(here, packet())
    kept = await here.append(kept.task_id, [Started(at=NOW, generation=1)], expected_revision=1)
    assert await known(there, kept.task_id, 2) == kept
    done = await there.append(kept.task_id, [Completed(at=NOW, result={})], expected_revision=2)
    assert await known(here, kept.task_id, 3) == done
    async with asyncio.timeout(WAIT_S):
        while own != [3]:
            await asyncio.sleep(0.01)
    seqs = [seq for since, revision in told for seq in range(since + 1, revision + 1)]
    assert seqs == [1, 2]


async def test_of_two_servers_that_write_at_once_one_is_refused(
    two: tuple[SharedStore, SharedStore],
) -> None:
    here, there = two
    kept = await accepted(here, packet())
    await known(there, kept.task_id, 1)
    answers = await asyncio.gather(
        *(
            store.append(kept.task_id, [Started(at=NOW, generation=1, holder=name)], expected_revision=1)
            for store, name in ((here, "a"), (there, "b"))
        ),
        return_exceptions=True,
    )
    (taken,) = [answer for answer in answers if isinstance(answer, TaskPacket)]
    (refused,) = [answer for answer in answers if not isinstance(answer, TaskPacket)]
    assert isinstance(refused, TaskConflictError)
    assert await known(here, kept.task_id, 2) == await known(there, kept.task_id, 2) == taken


async def test_one_key_at_two_servers_makes_one_task(two: tuple[SharedStore, SharedStore]) -> None:
    answers = await asyncio.gather(
        *(store.create(packet(key="k"), [Submitted(at=NOW, via="rest")]) for store in two for _ in range(10))
    )
    assert sum(created for _, created in answers) == 1
    assert len({kept.task_id for kept, _ in answers}) == 1
    with pytest.raises(IdempotencyConflictError):
        await two[1].create(packet(key="k", sha256="b" * 64), [Submitted(at=NOW, via="rest")])


async def test_a_task_that_was_deleted_is_gone_everywhere_and_its_key_is_free(
    two: tuple[SharedStore, SharedStore], tmp_path: Path
) -> None:
    here, there = two
    kept = await accepted(here, packet(key="k"))
    await known(there, kept.task_id, 1)
    await there.append(kept.task_id, [Canceled(at=NOW)], expected_revision=1)
    await known(here, kept.task_id, 2)
    await there.delete(kept.task_id)
    async with asyncio.timeout(WAIT_S):
        while here.counts()[TaskStatus.CANCELED] or list((tmp_path / "a").rglob(f"{kept.task_id}.json")):
            await asyncio.sleep(0.01)
    for store in two:
        with pytest.raises(TaskNotFoundError):
            await store.read(kept.task_id)
    again, created = await here.create(packet(key="k"), [Submitted(at=NOW, via="rest")])
    assert created
    assert again.task_id != kept.task_id
    anew = await accepted(there, packet(task_id=kept.task_id))
    assert anew.revision == 1


async def test_what_says_that_a_task_was_deleted_expires_and_its_id_and_key_serve_again(
    tmp_path: Path, nats: NatsServer
) -> None:
    async with AsyncExitStack() as stack:
        here, there = (SharedStore(tmp_path / name, nats, deleted_s=1) for name in "ab")
        for store in (here, there):
            stack.push_async_callback(store.aclose)
            await store.open()
        kept = await accepted(here, packet(key="k"))
        await here.append(kept.task_id, [Canceled(at=NOW)], expected_revision=1)
        await known(there, kept.task_id, 2)
        await here.delete(kept.task_id)
        session = await here.link.session(WAIT_S)
        async with asyncio.timeout(WAIT_S):
            while (await session.jetstream.stream_info(STREAM)).state.messages:
                await asyncio.sleep(0.1)
            while there.counts()[TaskStatus.CANCELED]:
                await asyncio.sleep(0.1)
        again, created = await there.create(
            packet(task_id=kept.task_id, key="k"), [Submitted(at=NOW, via="rest")]
        )
        assert (again.task_id, created) == (kept.task_id, True)
        assert await known(here, kept.task_id, 1) == again


class Faulty(JsonFileStore):
    """Files whose list breaks in a way that nobody has a name for."""

    is_broken = False

    async def list(self, where: TaskFilter, *, limit: int, cursor: str | None = None) -> TaskPage:
        if self.is_broken:
            raise RuntimeError("unheard of")
        return await super().list(where, limit=limit, cursor=cursor)


async def test_a_server_that_cannot_follow_the_others_says_so_and_goes_on_when_it_can(
    tmp_path: Path, nats: NatsServer
) -> None:
    copies = Faulty(tmp_path / "a")
    store = SharedStore(tmp_path / "a", nats, copies=copies)
    try:
        await store.open()
        kept = await accepted(store, packet())
        copies.is_broken = True
        nats.kill()
        nats.lose_files()
        nats.start()
        async with asyncio.timeout(WAIT_S):
            while "RuntimeError" not in (found := await store.health()).detail:
                await asyncio.sleep(0.02)
        assert not found.ok
        copies.is_broken = False
        async with asyncio.timeout(WAIT_S):
            while not (await store.health()).ok:
                await asyncio.sleep(0.02)
        assert await known(store, kept.task_id, 1) == kept
        assert (await written(store, kept, Started(at=NOW, generation=1))).revision == 2
    finally:
        await store.aclose()


async def test_a_copy_follows_the_server_that_goes_on_with_its_task(
    two: tuple[SharedStore, SharedStore], tmp_path: Path
) -> None:
    here, there = two
    kept = await accepted(here, packet())
    await known(there, kept.task_id, 1)
    done = await there.append(kept.task_id, [Completed(at=NOW, result={"x": 1})], expected_revision=1)
    path = Path(here.location(kept.task_id))
    async with asyncio.timeout(WAIT_S):
        while msgspec.json.decode(path.read_bytes(), type=TaskPacket) != done:
            await asyncio.sleep(0.02)
    assert Path(there.location(kept.task_id)).is_file()


async def test_a_server_brings_its_tasks_along_when_it_joins(tmp_path: Path, nats: NatsServer) -> None:
    alone = JsonFileStore(tmp_path / "a")
    await alone.open()
    live = await accepted(alone, packet(key="k"))
    over = await accepted(alone, packet())
    over = await alone.append(over.task_id, [Completed(at=NOW, result={})], expected_revision=1)
    await alone.aclose()
    first, second = SharedStore(tmp_path / "a", nats), SharedStore(tmp_path / "b", nats)
    try:
        await first.open()
        await second.open()
        for task in (live, over):
            assert await second.read(task.task_id) == task
        assert await second.create(packet(key="k"), [Submitted(at=NOW, via="rest")]) == (live, False)
    finally:
        await first.aclose()
        await second.aclose()


async def test_a_nats_that_lost_its_disk_gets_the_tasks_back_from_the_newest_copy(
    tmp_path: Path, nats: NatsServer, two: tuple[SharedStore, SharedStore]
) -> None:
    here, there = two
    kept = await accepted(here, packet(key="k"))
    await known(there, kept.task_id, 1)
    nats.kill()
    nats.lose_files()
    nats.start()
    for store in two:
        assert await known(store, kept.task_id, 1) == kept
    news = [Started(at=NOW, generation=1), StepFinished(at=NOW, step=1, role="qa", outcome="done")]
    after = await written(there, kept, *news)
    assert await known(here, kept.task_id, 3) == after


async def test_a_write_waits_for_a_nats_that_comes_back(
    nats: NatsServer, two: tuple[SharedStore, SharedStore]
) -> None:
    here, there = two
    kept = await accepted(here, packet())
    nats.kill()
    writing = asyncio.create_task(
        here.append(kept.task_id, [Started(at=NOW, generation=1)], expected_revision=1)
    )
    await asyncio.sleep(0.3)
    assert not writing.done()
    assert (await here.health()).ok is False
    nats.start()
    assert (await writing).revision == 2
    assert (await known(there, kept.task_id, 2)).generation == 1


async def test_a_packet_that_nats_cannot_carry_is_refused_with_the_bound(
    two: tuple[SharedStore, SharedStore],
) -> None:
    import random

    noise = random.Random(1).randbytes(1_500_000).hex()
    with pytest.raises(InvalidPacketError, match="1048576 bytes"):
        await two[0].create(
            msgspec.structs.replace(packet(), payload={"noise": noise}), [Submitted(at=NOW, via="rest")]
        )
    large = msgspec.structs.replace(packet(), payload={"code": "x = 1\n" * 500_000})
    kept = await accepted(two[0], large)
    assert (await known(two[1], kept.task_id, 1)).payload == large.payload


async def test_a_server_without_nats_does_not_start(tmp_path: Path) -> None:
    from ai_agent_server.cluster import nats_store

    store = SharedStore(tmp_path / "a", NatsServer(tmp_path / "nats"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nats_store, "OPEN_TIMEOUT_S", 0.2)
        with pytest.raises(StoreUnusableError, match="NATS"):
            await store.open()
    await store.aclose()


async def test_a_nats_of_three_servers_goes_on_without_one(tmp_path: Path) -> None:
    servers = [NatsServer(tmp_path / f"nats-{n}") for n in range(3)]
    held = [holder() for _ in servers]
    routes = [each.getsockname()[1] for each in held]
    for n, server in enumerate(servers):
        server.start(
            server_name=f"n{n}",
            cluster={
                "name": "three",
                "host": "127.0.0.1",
                "port": routes[n],
                "routes": [f"nats-route://127.0.0.1:{port}" for port in routes],
            },
        )
    url = ",".join(server.url for server in servers)
    stores = [SharedStore(tmp_path / name, servers[0], url=url, replicas=3) for name in "ab"]
    try:
        for store in stores:
            await store.open()
        kept = await accepted(stores[0], packet())
        revision = 1
        for lost in servers[:2]:
            lost.kill()
            for store in stores:
                await known(store, kept.task_id, revision)
                kept = await written(store, kept, Started(at=NOW, generation=revision))
                revision += 1
            lost.start_again()
        for store in stores:
            assert await known(store, kept.task_id, 5) == kept
        assert len((await stores[1].list(TaskFilter(), limit=10)).items) == 1
    finally:
        for store in stores:
            await store.aclose()
        for server in servers:
            server.kill()
        for each in held:
            each.close()
