"""The index of every task's summary, and the decisions that every task store shares. In memory, no I/O."""

import base64
import binascii
import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from ai_agent_server.core.task_packet import TaskEvent, TaskPacket, TaskStatus, TaskSummary, is_task_id
from ai_agent_server.core.transitions import fold
from ai_agent_server.errors import (
    IdempotencyConflictError,
    InvalidPacketError,
    TaskConflictError,
    TaskLiveError,
    TaskNotFoundError,
)
from ai_agent_server.tasks_state.base import TaskFilter, TaskPage

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_Place = tuple[float, str]
"""Where a task stands in a list: when it was made (seconds since 1970), then its id."""


def first_state(packet: TaskPacket, events: Sequence[TaskEvent]) -> TaskPacket:
    """A new task with its first events. Raises `InvalidPacketError` when its id is not canonical."""
    if not is_task_id(packet.task_id):
        raise InvalidPacketError(
            "not a task id", pointer="/task_id", expected="a UUID in lower case with hyphens"
        )
    return fold(packet, events)


def next_state(packet: TaskPacket, events: Sequence[TaskEvent], expected_revision: int) -> TaskPacket:
    """`packet` with `events` folded in. Raises `TaskConflictError` for a revision that is not its own."""
    if packet.revision != expected_revision:
        raise TaskConflictError(packet.task_id, expected=expected_revision, actual=packet.revision)
    return fold(packet, events)


class TaskIndex:
    """Summaries of all tasks: by id, by idempotency key, and in the order of a list.

    Owned by one event loop; nothing in it waits. A page of 10,000 tasks of which a filter matches
    few is one walk over them.
    """

    def __init__(self) -> None:
        self._summaries: dict[str, TaskSummary] = {}
        self._by_key: dict[str, str] = {}
        self._order: list[_Place] = []
        self._live: set[str] = set()
        self._counts: Counter[TaskStatus] = Counter()

    def __len__(self) -> int:
        return len(self._summaries)

    def fill(self, summaries: Sequence[TaskSummary]) -> None:
        """Take many at once into an empty index."""
        for summary in summaries:
            self._note(summary)
        self._order = sorted(_place(summary) for summary in summaries)

    def put(self, summary: TaskSummary) -> None:
        """Take a new task, or the new state of one."""
        before = self._summaries.get(summary.task_id)
        if before is None:
            insort(self._order, _place(summary))
        else:
            self._counts[before.status] -= 1
        self._note(summary)

    def remove(self, task_id: str) -> None:
        """Forget a task."""
        summary = self.get(task_id)
        del self._summaries[task_id]
        del self._order[bisect_left(self._order, _place(summary))]
        self._counts[summary.status] -= 1
        self._live.discard(task_id)
        if summary.idempotency_key is not None and self._by_key.get(summary.idempotency_key) == task_id:
            del self._by_key[summary.idempotency_key]

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._summaries

    def get(self, task_id: str) -> TaskSummary:
        """The task's summary. Raises `TaskNotFoundError`, also for what is no task id at all."""
        summary = self._summaries.get(task_id)
        if summary is None:
            raise TaskNotFoundError(task_id)
        return summary

    def ended(self, task_id: str) -> TaskSummary:
        """The summary of a task that has ended. Raises `TaskNotFoundError` or `TaskLiveError`."""
        summary = self.get(task_id)
        if not summary.status.is_final:
            raise TaskLiveError(task_id, f"it has not ended ({summary.status})")
        return summary

    def earlier(self, packet: TaskPacket) -> str | None:
        """The id of the task that took this packet's key or id before, None when it is new.

        Raises `IdempotencyConflictError` when that task was asked for something else.
        """
        key = packet.idempotency_key
        found = self._by_key.get(key) if key is not None else None
        summary = self._summaries.get(found or packet.task_id)
        if summary is None:
            return None
        if summary.request_sha256 != packet.request_sha256:
            name = packet.task_id if found is None else key
            raise IdempotencyConflictError(name or "", summary.task_id)
        return summary.task_id

    def live(self) -> tuple[str, ...]:
        """The ids of the tasks that have not ended, oldest first."""
        return tuple(sorted(self._live, key=lambda task_id: _place(self._summaries[task_id])))

    def counts(self) -> dict[TaskStatus, int]:
        """How many tasks have each status; every status is there."""
        return {status: self._counts[status] for status in TaskStatus}

    def page(self, where: TaskFilter, *, limit: int, cursor: str | None) -> TaskPage:
        """A page of summaries, newest first. Raises `InvalidPacketError` for a cursor that is none."""
        end = len(self._order) if cursor is None else bisect_left(self._order, _read_cursor(cursor))
        wanted = max(limit, 1)
        items: list[TaskSummary] = []
        for position in range(end - 1, -1, -1):
            summary = self._summaries[self._order[position][1]]
            if not _matches(where, summary):
                continue
            if len(items) == wanted:
                return TaskPage(items=tuple(items), next_cursor=_cursor(_place(items[-1])))
            items.append(summary)
        return TaskPage(items=tuple(items))

    def _note(self, summary: TaskSummary) -> None:
        self._summaries[summary.task_id] = summary
        self._counts[summary.status] += 1
        if summary.status.is_final:
            self._live.discard(summary.task_id)
        else:
            self._live.add(summary.task_id)
        if summary.idempotency_key is not None:
            self._by_key.setdefault(summary.idempotency_key, summary.task_id)


def _matches(where: TaskFilter, summary: TaskSummary) -> bool:
    return (
        (where.status is None or summary.status is where.status)
        and (where.role is None or summary.role == where.role)
        and (where.profile is None or summary.profile == where.profile)
        and (where.context_id is None or summary.context_id == where.context_id)
    )


def _place(summary: TaskSummary) -> _Place:
    return (summary.created_at - _EPOCH).total_seconds(), summary.task_id


def _cursor(place: _Place) -> str:
    # The time goes along so that a page can be continued after its last task was deleted.
    return base64.urlsafe_b64encode(f"{place[0]!r}/{place[1]}".encode()).decode().rstrip("=")


def _read_cursor(cursor: str) -> _Place:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
        seconds, _, task_id = text.partition("/")
        place = float(seconds), task_id
    except (binascii.Error, ValueError) as exc:
        raise _not_a_cursor() from exc
    if not math.isfinite(place[0]) or not is_task_id(task_id) or _cursor(place) != cursor:
        raise _not_a_cursor()
    return place


def _not_a_cursor() -> InvalidPacketError:
    return InvalidPacketError("not a cursor", pointer="/cursor", expected="the next_cursor of a page")
