"""Retention: ended tasks leave the store by age and by count, into the archive or for good."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Self

import structlog

from ai_agent_server.core.task_packet import TaskPacket, TaskSummary
from ai_agent_server.errors import CorruptTaskError, StoreError, TaskStateError
from ai_agent_server.tasks_state._archive import Archive
from ai_agent_server.tasks_state.base import Retention, TaskFilter, TaskStore

EVERY_S = 300.0
KEPT_AT_LEAST = timedelta(days=1)
"""A repeated submission is known for so long, whatever is configured: it is found by its task."""
_BATCH = 32
_PAGE = 200
_PAUSE_S = 0.02
"""Between batches and pages, so that the server's own work goes before."""

log = structlog.get_logger(__name__)


def due(ended: Iterable[TaskSummary], retention: Retention, now: datetime) -> tuple[str, ...]:
    """Which of all ended tasks are to go, the one that ended first first. Pure."""
    oldest_first = sorted(ended, key=lambda task: (task.updated_at or task.created_at, task.task_id))
    surplus = len(oldest_first) - retention.max_tasks if retention.max_tasks is not None else 0
    max_age = timedelta(days=retention.max_age_days) if retention.max_age_days is not None else None
    return tuple(
        task.task_id
        for place, task in enumerate(oldest_first)
        if task.created_at <= now - KEPT_AT_LEAST
        and (place < surplus or (max_age is not None and (task.updated_at or now) <= now - max_age))
    )


class Housekeeper:
    """Keeps the store within `retention`, as long as it is entered.

    A task is deleted when it is safe in the archive. A kill between the two is made good at the next
    start, from what the archive took last: nothing is lost, and nothing archived twice.
    """

    def __init__(
        self,
        store: TaskStore,
        archive: Archive,
        retention: Retention,
        *,
        clock: Callable[[], datetime],
        every_s: float = EVERY_S,
    ) -> None:
        self._store, self._archive, self._retention = store, archive, retention
        self._clock, self._every_s = clock, every_s
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="retention")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def tidy(self) -> int:
        """Let go of what is due, and answer how many tasks that were. Raises `StoreError` children."""
        ended = await self._ended()
        left = await self._finish({task.task_id for task in ended}) if self._retention.archive else set()
        gone = len(left)
        task_ids = due((task for task in ended if task.task_id not in left), self._retention, self._clock())
        for start in range(0, len(task_ids), _BATCH):
            packets = await self._read(task_ids[start : start + _BATCH])
            if self._retention.archive:
                await _whole(self._archive.add, packets)
            gone += await self._delete(packets)
            await asyncio.sleep(_PAUSE_S)
        if gone:
            log.info("retention.tidied", tasks=gone, archived=self._retention.archive)
        return gone

    async def _run(self) -> None:
        while True:
            try:
                await self.tidy()
            except StoreError as exc:
                log.warning("retention.failed", problem=str(exc), again_s=self._every_s)
            except Exception:
                # Nobody waits for this job: what went wrong is told here or nowhere.
                log.exception("retention.broke")
            await asyncio.sleep(self._every_s)

    async def _finish(self, ended: Collection[str]) -> set[str]:
        """Delete what an earlier run archived and could not delete any more; answers what that was.

        Asked for is only what is among the `ended`: for each task that is gone the store reads the
        indexes of the whole archive.
        """
        archived = await asyncio.to_thread(
            lambda: [packet for packet in self._archive.last_batches() if packet.task_id in ended]
        )
        there = {packet.task_id: packet for packet in await self._read([p.task_id for p in archived])}
        # The same id may have been used again since: that is another task.
        left = [packet for packet in archived if there.get(packet.task_id) == packet]
        await self._delete(left)
        return {packet.task_id for packet in left}

    async def _ended(self) -> list[TaskSummary]:
        ended: list[TaskSummary] = []
        cursor: str | None = None
        while True:
            page = await self._store.list(TaskFilter(), limit=_PAGE, cursor=cursor)
            ended += (task for task in page.items if task.status.is_final)
            cursor = page.next_cursor
            if cursor is None:
                return ended
            await asyncio.sleep(_PAUSE_S)

    async def _read(self, task_ids: Iterable[str]) -> list[TaskPacket]:
        found = []
        for task_id in task_ids:
            try:
                found.append(await self._store.read(task_id))
            except TaskStateError:
                continue  # deleted meanwhile
            except CorruptTaskError as exc:
                log.warning("retention.unreadable", task_id=task_id, problem=str(exc))
        return found

    async def _delete(self, packets: Sequence[TaskPacket]) -> int:
        for packet in packets:
            with suppress(TaskStateError):  # somebody was first
                await self._store.delete(packet.task_id)
        return len(packets)


async def _whole(work: Callable[[Sequence[TaskPacket]], None], packets: Sequence[TaskPacket]) -> None:
    """Run it in a thread to its end, also when we are cancelled: the folder may be another's after that."""
    running = asyncio.ensure_future(asyncio.to_thread(work, packets))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.gather(running, return_exceptions=True)
        raise
