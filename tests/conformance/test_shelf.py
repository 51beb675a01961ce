"""What every shelf promises: a server's own document, found by the others when it is gone."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from ai_agent_server.cluster.alone import FileShelf
from ai_agent_server.cluster.base import Left, Shelf
from ai_agent_server.cluster.nats_shelf import NatsShelf
from ai_agent_server.cluster.nats_store import SHELVES, STREAM
from tests.conformance.test_leases import WAIT_S, Process, processes
from tests.servers.nats import NatsServer, a_nats_server


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    with a_nats_server(tmp_path / "nats") as server:
        yield server


def shelf_of(process: Process, folder: Path) -> NatsShelf:
    own = FileShelf(folder / process.leases.holder)
    return NatsShelf(process.link, process.leases, own, stream=STREAM, subject=SHELVES)


@pytest.fixture(params=["file", "nats"])
async def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Shelf]:
    if request.param == "file":
        yield FileShelf(tmp_path / "document.json")
        return
    nats = request.getfixturevalue("nats")
    async with AsyncExitStack() as stack:
        (alone,) = await stack.enter_async_context(processes(nats, "a"))
        yield shelf_of(alone, tmp_path)


async def test_what_was_put_last_is_read_and_nobody_else_left_anything(shelf: Shelf) -> None:
    assert await shelf.read() is None
    for content in (b"one", b"two"):
        await shelf.put(content)
        assert await shelf.read() == content
    assert list(await shelf.left()) == []


async def test_what_a_server_left_is_found_when_it_is_gone_and_replaced_once(
    nats: NatsServer, tmp_path: Path
) -> None:
    async with processes(nats, "a", "b", "c") as (a, b, c):
        shelves = {process: shelf_of(process, tmp_path) for process in (a, b, c)}
        await b.hears(a)
        await c.hears(a)
        await shelves[a].put(b"owed")
        assert list(await shelves[b].left()) == []
        await a.vanish()
        found: dict[Process, Left] = {}
        async with asyncio.timeout(WAIT_S):
            for process in (b, c):
                while process not in found:
                    for left in await shelves[process].left():
                        found[process] = left
        assert {(left.holder, left.content) for left in found.values()} == {(a.leases.holder, b"owed")}
        assert shelves[a].is_own(found[b].holder)
        assert not shelves[b].is_own(found[b].holder)
        assert await shelves[b].replace(found[b], b"settled")
        assert not await shelves[c].replace(found[c], b"settled twice")
        assert list(await shelves[c].left()) == []
        async with processes(nats, "a") as (again,):
            assert await shelf_of(again, tmp_path).read() == b"settled"
