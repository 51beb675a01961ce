"""Those who follow a task on a server that knows less of it than they do."""

import asyncio
from datetime import UTC, datetime

import pytest

from ai_agent_server.core.readers import Readers
from ai_agent_server.core.task_packet import Completed, Progress, Started, Submitted, TaskPacket
from ai_agent_server.core.transitions import fold
from ai_agent_server.errors import TaskNotFoundError

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NEW = TaskPacket(task_id="t", context_id="c", profile="p", role="r", payload={}, created_at=NOW)
WHOLE = fold(
    NEW,
    [
        Submitted(at=NOW, via="rest"),
        *(Started(at=NOW, generation=n) for n in (1, 2, 3)),
        Completed(at=NOW, result={}),
    ],
)


async def test_who_comes_from_a_server_that_knew_more_is_told_nothing_twice() -> None:
    async def read(_task_id: str) -> TaskPacket:
        return fold(NEW, WHOLE.history[:2])

    readers = Readers(read)
    seen: list[int] = []

    async def follow() -> None:
        seen.extend([e.seq async for e in readers.follow("t", 4) if not isinstance(e, Progress)])

    following = asyncio.create_task(follow())
    while not readers._of:
        await asyncio.sleep(0)
    readers.tell("t", WHOLE.history[2:])
    async with asyncio.timeout(60):
        await following
    assert seen == [5]


async def test_a_long_past_is_read_in_parts_and_ends_where_its_task_was_deleted() -> None:
    past = fold(
        NEW,
        [
            Submitted(at=NOW, via="rest"),
            *(Started(at=NOW, generation=n) for n in range(1, 99)),
            Completed(at=NOW, result={}),
        ],
    )
    there = {"t": past}

    async def read(task_id: str) -> TaskPacket:
        if task_id not in there:
            raise TaskNotFoundError(task_id)
        return there[task_id]

    readers = Readers(read)
    assert [e.seq async for e in readers.follow("t", 7) if not isinstance(e, Progress)] == [*range(8, 101)]
    seen = []
    async for event in readers.follow("t", 0):
        assert not isinstance(event, Progress)
        seen.append(event.seq)
        there.clear()
    assert seen == [*range(1, len(seen) + 1)]
    assert 0 < len(seen) < 20
    with pytest.raises(TaskNotFoundError):
        await anext(aiter(readers.follow("t", 0)))
