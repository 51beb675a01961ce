"""What every kind of leases promises, on every file below cluster that is one."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from ai_agent_server.cluster.alone import Alone
from ai_agent_server.cluster.base import Leases
from ai_agent_server.cluster.nats_leases import NatsLeases, server_id
from tests.servers.nats import NatsServer, a_nats_server
from tests.servers.shared_store import a_link

LEASE_S = 3.0
WAIT_S = 60.0


class Process:
    """Leases over NATS of one process, whose clock a test sets forward."""

    def __init__(self, nats: NatsServer, server: str) -> None:
        self.ahead_s = 0.0
        self.link = a_link(nats)
        loop = asyncio.get_running_loop()
        self.leases = NatsLeases(
            self.link, server, lease_s=LEASE_S, clock=lambda: loop.time() + self.ahead_s
        ).open()

    async def hears(self, other: "Process") -> None:
        async with asyncio.timeout(WAIT_S):
            while other.leases.holder not in self.leases.peers().others:
                await asyncio.sleep(0.01)

    async def may_take(self, holder: str) -> None:
        async with asyncio.timeout(WAIT_S):
            while not self.leases.may_take(holder):
                await asyncio.sleep(0.01)

    async def vanish(self) -> None:
        """Without a goodbye."""
        await self.link.aclose()
        await self.leases.aclose()


@asynccontextmanager
async def processes(nats: NatsServer, *servers: str) -> AsyncIterator[list[Process]]:
    async with AsyncExitStack() as stack:
        made = [Process(nats, server) for server in servers]
        for process in made:
            stack.push_async_callback(process.link.aclose)
            stack.push_async_callback(process.leases.aclose)
        yield made


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    with a_nats_server(tmp_path / "nats") as server:
        yield server


def test_a_server_that_is_alone_may_take_everything() -> None:
    leases: Leases = Alone()
    assert leases.holder == ""
    assert all(leases.may_take(holder) for holder in ("", "left-over-from-a-cluster"))


async def test_nobodys_and_ones_own_tasks_may_be_taken_and_a_live_servers_not(nats: NatsServer) -> None:
    async with processes(nats, "a", "b") as (a, b):
        await a.hears(b)
        assert a.leases.may_take("")
        assert a.leases.may_take(a.leases.holder)
        for _ in range(20):
            assert not a.leases.may_take(b.leases.holder)
            await asyncio.sleep(1.3 * LEASE_S / 20)


async def test_what_a_server_held_is_free_when_it_fell_silent_and_not_before(nats: NatsServer) -> None:
    async with processes(nats, "a", "b") as (a, b):
        await a.hears(b)
        await b.vanish()
        assert not a.leases.may_take(b.leases.holder)
        await a.may_take(b.leases.holder)


async def test_what_a_server_held_is_free_at_once_when_it_says_goodbye(nats: NatsServer) -> None:
    async with processes(nats, "a", "b") as (a, b):
        await a.hears(b)
        await b.leases.aclose()
        async with asyncio.timeout(WAIT_S):
            while a.leases.peers().others:
                await asyncio.sleep(0.005)
        assert a.leases.may_take(b.leases.holder)


async def test_a_server_that_nobody_heard_of_has_a_whole_lease_to_be_heard(nats: NatsServer) -> None:
    async with processes(nats, "a") as (a,):
        async with asyncio.timeout(WAIT_S):
            while not a.leases.peers().connected:
                await asyncio.sleep(0.005)
        assert not a.leases.may_take("c.12345678")
        assert a.leases.may_take("a.12345678"), "an earlier process of this server is gone for certain"
        await a.may_take("c.12345678")


async def test_a_process_that_stood_still_takes_nobody_to_be_gone_for_it(nats: NatsServer) -> None:
    async with processes(nats, "a", "b") as (a, b):
        await a.hears(b)
        a.ahead_s += 60
        for _ in range(20):
            assert not a.leases.may_take(b.leases.holder)
            await asyncio.sleep(0.05)


async def test_while_nats_is_away_nobody_is_gone(nats: NatsServer) -> None:
    async with processes(nats, "a", "b") as (a, b):
        await a.hears(b)
        nats.kill()
        async with asyncio.timeout(WAIT_S):
            while a.leases.peers().connected:
                await asyncio.sleep(0.01)
        await asyncio.sleep(1.5 * LEASE_S)
        assert not a.leases.may_take(b.leases.holder)
        nats.start()
        await a.hears(b)
        assert not a.leases.may_take(b.leases.holder)


def test_a_server_keeps_its_id_and_no_two_have_the_same(tmp_path: Path) -> None:
    first = server_id(tmp_path / "a", "rack")
    assert first == server_id(tmp_path / "a", "rack")
    assert first.startswith("rack-")
    assert first != server_id(tmp_path / "b", "rack")
