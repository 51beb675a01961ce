"""A task store of one JSON file per task, safe on disk before anyone is told. The files are the truth."""

import asyncio
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from ai_agent_server.core.task_packet import TaskEvent, TaskPacket, TaskStatus, is_task_id, summary
from ai_agent_server.errors import (
    StoreError,
    StoreUnusableError,
    TaskArchivedError,
    TaskNotFoundError,
)
from ai_agent_server.tasks_state._archive import ARCHIVE, Archive
from ai_agent_server.tasks_state._files import Written
from ai_agent_server.tasks_state._folder import Change, Stored, TaskFolder
from ai_agent_server.tasks_state._index import TaskIndex, first_state, next_state
from ai_agent_server.tasks_state.base import ForeignListener, StoreHealth, TaskFilter, TaskPage

__all__ = ("JsonFileStore",)

_T = TypeVar("_T")
_READERS = 2
_BATCH = 64
"""From so many changes on, those that wait are left to the next fsync; so many files follow at once."""
_RETRY_S = 1.0
"""How long after files could not be put in place it is tried again."""

log = structlog.get_logger(__name__)


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """When the files of tasks are written, besides the journal."""

    at_once: int = 4
    """Where no more changes than these wait, every file is in place before its change is answered."""
    quiet_s: float = 0.02
    """Where more of them wait, files follow when nothing came for so long,"""
    late_s: float = 0.25
    """and at the latest after so long."""


PACE = Pace()


class _Job(msgspec.Struct, kw_only=True, eq=False):
    """One change of one task's file: `prepare` runs in the writer, `publish` on the loop."""

    task_id: str
    key: str | None
    prepare: Callable[[bool], Change]
    publish: Callable[[Written | None], None]
    change: Change | None = None
    problem: BaseException | None = None
    waiting: "list[asyncio.Future[None]]" = msgspec.field(default_factory=list)
    """Whoever waits for its end has a future of their own: one who is cancelled takes it from nobody."""

    def ended(self) -> "asyncio.Future[None]":
        """Done when the change took place, or did not: then `problem` says why."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append(ended)
        return ended


class JsonFileStore:
    """Task files below `root`: `tasks_state/<shard>/<task_id>.json`, large objects in `blobs/`.

    One writer thread takes all changes that wait, writes each to a temporary file, then all to the
    journal with one fsync, and renames each into place; only then is the new state in memory and
    answered. Where many changes wait, their files follow a moment later (`Pace`). So the files are
    whole for who reads them, and after a kill or a power cut the journal has what they lack. At most
    one write of a task is under way, so the writer's queue is never longer than there are live tasks.
    A write belongs to the store, not to the one who waits for it: who is cancelled leaves a write
    that still ends, and that memory takes note of.

    Summaries of all tasks and the packets of live ones are in memory; ended tasks are read back from
    their files. `root` is held by a lock: one server at a time.
    """

    def __init__(self, root: Path, *, pace: Pace = PACE, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is in seconds and never goes back."""
        self._folder = TaskFolder(root)
        self._archive = Archive(root / ARCHIVE)
        self._pace = pace
        self._clock = clock
        self._files_problem = ""
        self._index = TaskIndex()
        self._live: dict[str, Stored] = {}
        self._corrupt = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._writer: threading.Thread | None = None
        self._made: list[_Job] = []
        """Changes that the writer is to get when the loop has gone round once."""
        self._jobs: queue.SimpleQueue[Sequence[_Job] | None] = queue.SimpleQueue()
        self._finished: deque[_Job] = deque()
        self._woken = False
        self._under_way: dict[str, _Job] = {}
        self._keys_under_way: dict[str, _Job] = {}

    async def open(self) -> None:
        """Take hold of the folder and read what is in it.

        What is no task is moved to `corrupt/`, never overwritten. Raises `StoreUnusableError`, or
        `StoreFullError` where there is no space even for the empty folders.
        """
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="task-reader")
        opening = asyncio.ensure_future(self._in_reader(self._folder.open))
        try:
            found = await asyncio.shield(opening)
        except BaseException:
            # A thread cannot be cancelled: left to itself it would take the lock after we let go.
            await asyncio.gather(opening, return_exceptions=True)
            self._let_go()
            raise
        self._index.fill(found.summaries)
        self._live = {live.packet.task_id: live for live in found.live}
        self._corrupt, self._files_problem = found.corrupt, found.problem
        self._loop = asyncio.get_running_loop()
        # A daemon: should the loop die without `aclose`, the process still ends, as by a kill.
        self._writer = threading.Thread(
            target=self._write_on, args=(self._loop,), name="task-writer", daemon=True
        )
        self._writer.start()
        log.info(
            "store.opened",
            root=str(self._folder.root),
            tasks=len(self._index),
            live=len(self._live),
            corrupt=self._corrupt,
        )

    async def create(self, packet: TaskPacket, events: Sequence[TaskEvent]) -> tuple[TaskPacket, bool]:
        """Keep a new task, or answer the earlier one. See the port."""
        key = packet.idempotency_key
        while True:
            earlier = self._index.earlier(packet)
            if earlier is not None:
                return await self.read(earlier), False
            rival = self._under_way.get(packet.task_id)
            if rival is None and key is not None:
                rival = self._keys_under_way.get(key)
            if rival is None:
                break
            await rival.ended()
        first = first_state(packet, events)
        await self._change(
            packet.task_id,
            lambda late: self._folder.write(first, None, late=late),
            partial(self._publish, first),
            key=key,
        )
        return first, True

    async def read(self, task_id: str) -> TaskPacket:
        """The task as it is: from memory while it lives, from its file when it has ended."""
        live = self._live.get(task_id)
        if live is not None:
            return live.packet
        await self._indexed(task_id)
        try:
            return await self._in_reader(partial(self._folder.read, task_id))
        except TaskNotFoundError:  # deleted since we looked, and memory has not heard of it
            raise await self.not_found(task_id) from None

    async def append(
        self, task_id: str, events: Sequence[TaskEvent], *, expected_revision: int
    ) -> TaskPacket:
        """Fold `events` into the task, durably and all at once. See the port."""
        await self._idle(task_id)
        live = self._live.get(task_id)
        if live is None:
            return next_state(await self.read(task_id), events, expected_revision)
        changed = next_state(live.packet, events, expected_revision)
        if changed.revision == live.packet.revision:
            return changed
        await self._change(
            task_id,
            lambda late: self._folder.write(changed, live.written, late=late),
            partial(self._publish, changed),
        )
        return changed

    async def list(self, where: TaskFilter, *, limit: int, cursor: str | None = None) -> TaskPage:
        """A page of summaries, newest first; a cursor stays good while tasks come and go."""
        return self._index.page(where, limit=limit, cursor=cursor)

    def counts(self) -> dict[TaskStatus, int]:
        """How many tasks have each status."""
        return self._index.counts()

    async def live(self) -> tuple[str, ...]:
        """The ids of the tasks that have not ended, oldest first."""
        return self._index.live()

    async def delete(self, task_id: str) -> None:
        """Remove an ended task's file, and the blobs that no other task uses."""
        await self._idle(task_id)
        await self._indexed(task_id)
        self._index.ended(task_id)
        await self._change(
            task_id,
            lambda _late: self._folder.remove(task_id),
            lambda _written: self._index.remove(task_id),
        )

    async def not_found(self, task_id: str) -> TaskNotFoundError:
        """What to raise for a task that is not here: it says where an archived one is."""
        place = await self._in_reader(partial(self._archive.place, task_id))
        return TaskArchivedError(task_id, place) if place else TaskNotFoundError(task_id)

    def location(self, task_id: str) -> str:
        """The task's file, "" for what is no task id."""
        return str(self._folder.path(task_id)) if is_task_id(task_id) else ""

    async def health(self) -> StoreHealth:
        """Whether a write would work now, found by writing."""
        detail, free_bytes = self._files_problem, None
        try:
            free_bytes = await self._in_reader(self._folder.probe)
        except StoreError as exc:
            detail = str(exc)
        return StoreHealth(
            kind="json_file_store",
            ok=not detail,
            location=str(self._folder.root),
            tasks=len(self._index),
            free_bytes=free_bytes,
            corrupt=self._corrupt,
            detail=detail,
        )

    def observe(self, listener: ForeignListener) -> None:
        """The folder is locked: nobody else writes here."""

    async def aclose(self) -> None:
        """End every write under way, make the files safe without the journal, let go of the folder."""
        self._loop = None
        while self._under_way:
            await asyncio.wait([job.ended() for job in self._under_way.values()])
        writer, self._writer = self._writer, None
        if writer is not None:
            self._jobs.put(None)
            await self._in_reader(writer.join)
            try:
                await self._in_reader(self._folder.settle)
            except StoreError as exc:  # the journal stays, and the next start has it
                log.warning("store.not_settled", problem=str(exc))
        self._let_go()

    def _let_go(self) -> None:
        if self._readers is not None:
            self._readers.shutdown(wait=False)
            self._readers = None
        self._folder.close()

    async def _in_reader(self, work: Callable[[], _T]) -> _T:
        if self._readers is None:
            raise self._closed()
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    async def _indexed(self, task_id: str) -> None:
        """Raises `TaskNotFoundError`, which says where an archived task is."""
        if task_id not in self._index:
            raise await self.not_found(task_id)

    async def _idle(self, task_id: str) -> None:
        while (job := self._under_way.get(task_id)) is not None:
            await job.ended()

    async def _change(
        self,
        task_id: str,
        prepare: Callable[[bool], Change],
        publish: Callable[[Written | None], None],
        *,
        key: str | None = None,
    ) -> None:
        if self._loop is None:
            raise self._closed()
        job = _Job(task_id=task_id, key=key, prepare=prepare, publish=publish)
        self._under_way[task_id] = job
        if key is not None:
            self._keys_under_way[key] = job
        if not self._made:
            self._loop.call_soon(self._hand_over)
        self._made.append(job)
        await job.ended()
        if job.problem is not None:
            raise job.problem

    def _hand_over(self) -> None:
        """Give the writer all that was made together.

        It would wake up for the first of many changes, and fight for the interpreter with the tasks that are
        about to make the others.
        """
        made, self._made = self._made, []
        for begin in range(0, len(made), _BATCH):
            self._jobs.put(made[begin : begin + _BATCH])

    def _drain(self) -> None:
        self._woken = False
        while self._finished:
            job = self._finished.popleft()
            del self._under_way[job.task_id]
            if job.key is not None:
                del self._keys_under_way[job.key]
            if job.problem is None and job.change is not None:
                job.publish(job.change.written)
            else:
                log.error("store.write_failed", task_id=job.task_id, problem=str(job.problem))
            for waiting in job.waiting:
                if not waiting.done():
                    waiting.set_result(None)

    def _publish(self, packet: TaskPacket, written: Written | None) -> None:
        self._index.put(summary(packet))
        if packet.status.is_final:
            self._live.pop(packet.task_id, None)
        elif written is not None:
            self._live[packet.task_id] = Stored(packet=packet, written=written)

    def _closed(self) -> StoreUnusableError:
        return StoreUnusableError(f"{self._folder.root} is not open")

    def _write_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """The writer thread's whole life."""
        due_s = self._clock() + self._pace.late_s
        while True:
            batch = _next_batch(self._jobs, wait_s=self._idle_s(due_s))
            if batch is None:
                return
            if batch:
                self._write(batch)
                self._finished.extend(batch)
                # One wake-up for all that ends before the loop gets to it.
                if not self._woken:
                    self._woken = True
                    with suppress(RuntimeError):  # the loop is closed: nobody waits
                        loop.call_soon_threadsafe(self._drain)
            due_s = self._follow(due_s, is_quiet=not batch)

    def _idle_s(self, due_s: float) -> float | None:
        """How long the writer waits for a change before it looks after late files."""
        if not self._folder.is_behind:
            return None
        left_s = max(0.0, due_s - self._clock())
        return left_s if self._files_problem else min(left_s, self._pace.quiet_s)

    def _follow(self, due_s: float, *, is_quiet: bool) -> float:
        """Put some late files in place when it is time, and answer when it is at the latest."""
        if not self._folder.is_behind:
            self._files_problem = ""
            return math.inf
        now_s = self._clock()
        due_s = min(due_s, now_s + self._pace.late_s)
        if now_s < due_s and (self._files_problem or not is_quiet):
            return due_s
        try:
            self._folder.catch_up(None if self._files_problem else _BATCH)
        except OSError as exc:
            if not self._files_problem:
                log.warning("store.files_late", problem=str(exc))
            self._files_problem = str(exc)
            return now_s + _RETRY_S
        self._files_problem = ""
        return now_s if self._folder.is_behind else math.inf

    def _write(self, batch: Sequence[_Job]) -> None:
        try:
            late = len(batch) > self._pace.at_once and not self._files_problem and self._folder.has_room()
            for job in batch:
                self._prepare(job, late=late)
            if changes := [job.change for job in batch if job.change is not None]:
                self._folder.commit(changes)
        except Exception as exc:  # noqa: BLE001  (a worker's loop: it is raised where it was asked for)
            for job in batch:
                job.problem = job.problem or exc
        for job in batch:
            if job.change is not None:
                job.problem = job.problem or job.change.problem

    def _prepare(self, job: _Job, *, late: bool) -> None:
        try:
            job.change = job.prepare(late)
        except Exception as exc:  # noqa: BLE001  (as above: this job's problem, not the batch's)
            job.problem = exc


def _next_batch(
    jobs: queue.SimpleQueue[Sequence[_Job] | None], *, wait_s: float | None
) -> Sequence[_Job] | None:
    """What waits, nothing when nothing came for `wait_s`, None when the end was put in."""
    batch: list[_Job] = []
    try:
        more = jobs.get(timeout=wait_s)
    except queue.Empty:
        return batch
    while more is not None:
        batch += more
        if len(batch) >= _BATCH or jobs.empty():
            return batch
        more = jobs.get()
    if not batch:
        return None
    jobs.put(None)
    return batch
