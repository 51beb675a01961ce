"""The task store port: every task's state, durable before anyone is told."""

from collections.abc import Callable, Sequence
from typing import Annotated, Protocol

import msgspec

from ai_agent_server.core.task_packet import TaskEvent, TaskPacket, TaskStatus, TaskSummary
from ai_agent_server.errors import TaskNotFoundError


class TaskFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which tasks to list; None means any."""

    profile: str | None = None
    role: str | None = None
    status: TaskStatus | None = None
    context_id: str | None = None


class TaskPage(msgspec.Struct, frozen=True, kw_only=True):
    """Newest first. `next_cursor` is None on the last page."""

    items: tuple[TaskSummary, ...]
    next_cursor: str | None = None


class Retention(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long ended tasks are kept. None: for ever. A task is never let go within a day of its start."""

    max_age_days: Annotated[float, msgspec.Meta(ge=0, le=36_500)] | None = None
    """Since its end."""
    max_tasks: Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)] | None = None
    """So many ended ones; those that ended first go first."""
    archive: bool = True
    """They go to `archive/YYYY-MM.jsonl.gz` in the state folder; false: they are deleted."""


class StoreHealth(msgspec.Struct, frozen=True, kw_only=True):
    """What `/health` and `doctor` show of the store."""

    kind: str
    ok: bool
    location: str = ""
    tasks: int = 0
    free_bytes: int | None = None
    corrupt: int = 0
    detail: str = ""


ForeignListener = Callable[[TaskPacket, int], None]
"""Called with a packet that somebody else changed and the revision last known here. Must not block."""


class TaskStore(Protocol):
    """Keeps task packets.

    Promises, tested on every implementation by tests/conformance/test_task_store.py: what `create`
    or `append` returned from survives a kill (where the store is durable at all); the events' `seq`
    is 1, 2, 3, ...; a stale revision is a `TaskConflictError`; two tasks never share an id or an
    idempotency key; a failed write leaves the last state whole.
    """

    async def open(self) -> None:
        """Take hold of the storage and read the index. Raises `StoreUnusableError`."""
        ...

    async def create(self, packet: TaskPacket, events: Sequence[TaskEvent]) -> tuple[TaskPacket, bool]:
        """Keep a new task with its first events.

        Answers (packet, True); or (the earlier packet, False) when the same `task_id` or
        `idempotency_key` came before with the same `request_sha256`. With another one it raises
        `IdempotencyConflictError`.
        """
        ...

    async def read(self, task_id: str) -> TaskPacket:
        """The task as it is. Raises `TaskNotFoundError` by `not_found`."""
        ...

    async def append(
        self, task_id: str, events: Sequence[TaskEvent], *, expected_revision: int
    ) -> TaskPacket:
        """Fold `events` into the task, durably and all at once, and answer the new packet."""
        ...

    async def list(self, where: TaskFilter, *, limit: int, cursor: str | None = None) -> TaskPage:
        """A page of summaries, newest first."""
        ...

    def counts(self) -> dict[TaskStatus, int]:
        """How many tasks have each status."""
        ...

    async def live(self) -> tuple[str, ...]:
        """The ids of the tasks that have not ended, oldest first."""
        ...

    async def delete(self, task_id: str) -> None:
        """Remove an ended task. Raises `TaskLiveError` when it is live."""
        ...

    async def not_found(self, task_id: str) -> TaskNotFoundError:
        """What is raised for a task that is not here: a `TaskArchivedError` where the archive has it."""
        ...

    def location(self, task_id: str) -> str:
        """Where a person finds the task's state (a file path), "" if nowhere."""
        ...

    async def health(self) -> StoreHealth:
        """Whether a write would work now."""
        ...

    def observe(self, listener: ForeignListener) -> None:
        """Be told, from now on, of what other processes write."""
        ...

    async def aclose(self) -> None:
        """Finish writing and let go of the storage."""
        ...
