"""A task store that forgets with its process: the file store's promises, all but the durable one."""

from collections.abc import Sequence
from pathlib import Path

from ai_agent_server.core.task_packet import TaskEvent, TaskPacket, TaskStatus, summary
from ai_agent_server.errors import TaskNotFoundError
from ai_agent_server.tasks_state._index import TaskIndex, first_state, next_state
from ai_agent_server.tasks_state.base import ForeignListener, StoreHealth, TaskFilter, TaskPage

__all__ = ("MemoryStore",)


class MemoryStore:
    """Keeps every packet whole in memory. The state folder is taken like by every kind, and left alone."""

    def __init__(self, _state_dir: Path | None = None) -> None:
        self._index = TaskIndex()
        self._packets: dict[str, TaskPacket] = {}

    async def open(self) -> None:
        """Nothing to take hold of."""

    async def create(self, packet: TaskPacket, events: Sequence[TaskEvent]) -> tuple[TaskPacket, bool]:
        """Keep a new task, or answer the earlier one."""
        earlier = self._index.earlier(packet)
        if earlier is not None:
            return self._packets[earlier], False
        return self._publish(first_state(packet, events)), True

    async def read(self, task_id: str) -> TaskPacket:
        """The task as it is."""
        return self._packet(task_id)

    async def append(
        self, task_id: str, events: Sequence[TaskEvent], *, expected_revision: int
    ) -> TaskPacket:
        """Fold `events` into the task."""
        return self._publish(next_state(self._packet(task_id), events, expected_revision))

    async def list(self, where: TaskFilter, *, limit: int, cursor: str | None = None) -> TaskPage:
        """A page of summaries, newest first."""
        return self._index.page(where, limit=limit, cursor=cursor)

    def counts(self) -> dict[TaskStatus, int]:
        """How many tasks have each status."""
        return self._index.counts()

    async def live(self) -> tuple[str, ...]:
        """The ids of the tasks that have not ended, oldest first."""
        return self._index.live()

    async def delete(self, task_id: str) -> None:
        """Remove an ended task."""
        self._index.ended(task_id)
        self._index.remove(task_id)
        del self._packets[task_id]

    async def not_found(self, task_id: str) -> TaskNotFoundError:
        """Nothing is archived."""
        return TaskNotFoundError(task_id)

    def location(self, task_id: str) -> str:  # noqa: ARG002  (the port's name)
        """Nowhere."""
        return ""

    async def health(self) -> StoreHealth:
        """Always well."""
        return StoreHealth(kind="memory_store", ok=True, tasks=len(self._index))

    def observe(self, listener: ForeignListener) -> None:
        """Nobody else writes here."""

    async def aclose(self) -> None:
        """Nothing to let go of."""

    def _packet(self, task_id: str) -> TaskPacket:
        packet = self._packets.get(task_id)
        if packet is None:
            raise TaskNotFoundError(task_id)
        return packet

    def _publish(self, packet: TaskPacket) -> TaskPacket:
        self._packets[packet.task_id] = packet
        self._index.put(summary(packet))
        return packet
