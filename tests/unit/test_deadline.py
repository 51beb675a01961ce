"""A deadline that moves on."""

import asyncio

from ai_agent_server.deadline import Deadline

FAR_S = 3600.0


async def test_it_passes_once_when_its_time_is_over() -> None:
    passed: list[str] = []
    event = asyncio.Event()

    def tell() -> None:
        passed.append("passed")
        event.set()

    deadline = Deadline(asyncio.get_running_loop(), tell)
    deadline.start(0.01)
    async with asyncio.timeout(30):
        await event.wait()
    await asyncio.sleep(0.05)
    assert passed == ["passed"]


async def test_what_was_moved_on_or_stopped_does_not_pass() -> None:
    passed: list[str] = []
    moved = Deadline(asyncio.get_running_loop(), lambda: passed.append("moved"))
    stopped = Deadline(asyncio.get_running_loop(), lambda: passed.append("stopped"))
    closed = Deadline(asyncio.get_running_loop(), lambda: passed.append("closed"))
    for deadline in (moved, stopped, closed):
        deadline.start(0.01)
    moved.start(FAR_S)
    stopped.stop()
    closed.close()
    await asyncio.sleep(0.2)
    moved.close()
    assert not passed


async def test_it_comes_nearer_and_serves_again() -> None:
    event = asyncio.Event()
    deadline = Deadline(asyncio.get_running_loop(), event.set)
    for _ in range(2):
        event.clear()
        deadline.start(FAR_S)
        deadline.stop()
        deadline.start(0.01)
        async with asyncio.timeout(30):
            await event.wait()
    deadline.close()
