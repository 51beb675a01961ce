"""Two engines on one store: a task has one worker, and one that lost it writes nothing more."""

import asyncio
from pathlib import Path

from ai_agent_server.cluster.base import Peers
from ai_agent_server.core.task_packet import Recovered, Started, StepFinished, TaskStatus
from ai_agent_server.tasks_state.memory_store import MemoryStore
from tests.integration.test_orchestration_engine import Words, draft, running


class Told:
    """Leases that a test settles: who is gone is in `gone`."""

    def __init__(self, holder: str, gone: set[str]) -> None:
        self.holder = holder
        self._gone = gone

    def may_take(self, holder: str) -> bool:
        return holder in {"", self.holder} or holder in self._gone

    def peers(self) -> Peers:
        return Peers(holder=self.holder)

    async def aclose(self) -> None: ...


async def test_a_task_of_a_live_server_is_left_to_it(tmp_path: Path) -> None:
    store, gone, slow, idle = MemoryStore(), set[str](), Words(), Words()
    slow.gate.clear()
    async with running(tmp_path, slow, store=store, leases=Told("a", gone)) as first:
        packet, _ = await first.submit(draft(), via="rest")
        while not slow.asked:
            await asyncio.sleep(0.01)
        async with running(tmp_path, idle, store=store, leases=Told("b", gone)):
            slow.gate.set()
            done = await first.wait(packet.task_id, 60)
    assert done.status is TaskStatus.COMPLETED
    assert idle.asked == []
    assert done.holder == "a"


async def test_a_server_that_comes_back_too_late_is_fenced_off(tmp_path: Path) -> None:
    store, gone, slow, quick = MemoryStore(), set[str](), Words(), Words()
    slow.gate.clear()
    async with running(tmp_path, slow, store=store, leases=Told("a", gone)) as first:
        packet, _ = await first.submit(draft(), via="rest")
        while not slow.asked:
            await asyncio.sleep(0.01)
        gone.add("a")
        async with running(tmp_path, quick, store=store, leases=Told("b", gone)) as second:
            done = await second.wait(packet.task_id, 60)
            gone.clear()
            slow.gate.set()
            while first.status().running:
                await asyncio.sleep(0.01)
            assert await second.read(packet.task_id) == done
    assert done.status is TaskStatus.COMPLETED
    assert len(slow.asked) == 1
    taken = [(e.generation, e.holder) for e in done.history if isinstance(e, Started | Recovered)]
    assert taken == [(1, "a"), (2, "b")]
    steps = [e.step for e in done.history if isinstance(e, StepFinished)]
    assert steps == sorted(set(steps))


async def test_a_server_whose_task_was_taken_in_mid_step_asks_no_llm_again(tmp_path: Path) -> None:
    store, gone, slow, stuck = MemoryStore(), set[str](), Words(), Words()
    slow.gate.clear()
    stuck.gate.clear()
    async with running(tmp_path, slow, store=store, leases=Told("a", gone)) as first:
        packet, _ = await first.submit(draft(), via="rest")
        while not slow.asked:
            await asyncio.sleep(0.01)
        gone.add("a")
        async with running(tmp_path, stuck, store=store, leases=Told("b", gone)) as second:
            while not stuck.asked:
                await asyncio.sleep(0.01)
            gone.clear()
            slow.gate.set()
            while first.status().running:
                await asyncio.sleep(0.01)
            assert (await second.read(packet.task_id)).generation == 2
            assert len(slow.asked) == 1
            stuck.gate.set()
            done = await second.wait(packet.task_id, 60)
    assert done.status is TaskStatus.COMPLETED
    assert done.holder == "b"
