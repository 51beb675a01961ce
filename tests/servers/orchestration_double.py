"""An orchestration that keeps tasks in memory and does as it is told: no agents, no LLM, no files."""

import asyncio
import hashlib
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import msgspec

from ai_agent_server.core.fork import changed, taken_over
from ai_agent_server.core.ports import EngineStatus, EventListener
from ai_agent_server.core.task_packet import (
    AnyTaskEvent,
    Canceled,
    FeedbackDraft,
    FeedbackReceived,
    ForkDraft,
    Limits,
    Paused,
    Progress,
    Resumed,
    Sender,
    Submitted,
    TaskDraft,
    TaskEvent,
    TaskPacket,
    Via,
    is_task_id,
    summary,
)
from ai_agent_server.core.transitions import fold
from ai_agent_server.errors import (
    IdempotencyConflictError,
    InvalidPacketError,
    InvalidTransitionError,
    TaskLiveError,
    TaskNotFoundError,
    UnknownRoleError,
)
from ai_agent_server.tasks_state.base import TaskFilter, TaskPage


class OrchestrationDouble:
    """An `Orchestration` whose tasks move only when a test calls `happen` or `progress`.

    `failing`: the next call of any kind raises it. `roles`: the profiles and roles that there are.
    """

    def __init__(self, roles: dict[str, tuple[str, ...]] | None = None) -> None:
        self.roles = roles or {"developer": ("planner", "qa"), "productivity": ("summarize",)}
        self.tasks: dict[str, TaskPacket] = {}
        self.failing: Exception | None = None
        self.followers = 0
        self._keys: dict[str, tuple[str, str]] = {}
        self._listeners: list[EventListener] = []
        self._queues: dict[str, set[asyncio.Queue[AnyTaskEvent | Progress | None]]] = defaultdict(set)

    def happen(self, task_id: str, *events: TaskEvent) -> TaskPacket:
        """Let `events` happen to the task."""
        before = self.tasks[task_id]
        packet = fold(before, events)
        self.tasks[task_id] = packet
        new = packet.history[before.revision :]
        for listener in self._listeners:
            listener(packet, new)
        for event in new:
            self._tell(task_id, event)
        return packet

    def progress(self, progress: Progress) -> None:
        """Tell who follows how far a step is."""
        self._tell(progress.task_id, progress)

    def cut(self, task_id: str) -> None:
        """End every stream of the task early, as for readers that are too slow."""
        for queue in self._queues[task_id]:
            queue.put_nowait(None)

    def _tell(self, task_id: str, event: AnyTaskEvent | Progress) -> None:
        for queue in self._queues[task_id]:
            queue.put_nowait(event)

    def _fail(self) -> None:
        if self.failing is not None:
            failing, self.failing = self.failing, None
            raise failing

    async def submit(
        self,
        draft: TaskDraft,
        *,
        via: Via,
        idempotency_key: str | None = None,
        sender: Sender | None = None,
    ) -> tuple[TaskPacket, bool]:
        """See `Orchestration.submit`."""
        self._fail()
        profile, role = draft.profile or "", draft.role or ""
        if profile not in self.roles:
            raise UnknownRoleError("profile", profile, tuple(self.roles))
        if role not in self.roles[profile]:
            raise UnknownRoleError("role", role, self.roles[profile])
        task_id = draft.task_id or str(uuid.uuid4())
        if not is_task_id(task_id):
            raise InvalidPacketError("not a UUID", pointer="/task_id", expected="a UUID")
        same = msgspec.json.encode(msgspec.structs.replace(draft, task_id=None, status=None))
        digest = hashlib.sha256(same).hexdigest()
        for key in filter(None, (idempotency_key, draft.task_id)):
            if key in self._keys:
                earlier, earlier_digest = self._keys[key]
                if earlier_digest != digest:
                    raise IdempotencyConflictError(key, earlier)
                return self.tasks[earlier], False
            self._keys[key] = (task_id, digest)
        self.tasks[task_id] = TaskPacket(
            task_id=task_id,
            context_id=draft.context_id or str(uuid.uuid4()),
            profile=profile,
            role=role,
            payload=draft.payload,
            created_at=datetime.now(UTC),
            limits=draft.limits.over(Limits()) if draft.limits else Limits(),
            scope=draft.scope,
            privacy=draft.privacy,
            idempotency_key=idempotency_key,
            request_sha256=digest,
        )
        return self.happen(task_id, Submitted(at=datetime.now(UTC), via=via)), True

    async def read(self, task_id: str) -> TaskPacket:
        """See `Orchestration.read`."""
        self._fail()
        if task_id not in self.tasks:
            raise TaskNotFoundError(task_id)
        return self.tasks[task_id]

    async def list(self, where: TaskFilter, *, limit: int, cursor: str | None = None) -> TaskPage:
        """See `Orchestration.list`."""
        self._fail()
        found = [
            summary(packet)
            for packet in reversed(self.tasks.values())
            if where.profile in (None, packet.profile)
            and where.role in (None, packet.role)
            and where.status in (None, packet.status)
            and where.context_id in (None, packet.context_id)
        ]
        start = 0
        if cursor is not None:
            if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 10):
                raise InvalidPacketError("not a cursor of ours", pointer="/cursor")
            start = int(cursor)
        end = start + limit
        return TaskPage(items=tuple(found[start:end]), next_cursor=str(end) if end < len(found) else None)

    async def cancel(self, task_id: str) -> TaskPacket:
        """See `Orchestration.cancel`."""
        await self.read(task_id)
        return self.happen(task_id, Canceled(at=datetime.now(UTC)))

    async def fork(
        self,
        task_id: str,
        draft: ForkDraft,
        *,
        via: Via,
        idempotency_key: str | None = None,
        sender: Sender | None = None,
    ) -> tuple[TaskPacket, bool]:
        """See `Orchestration.fork`."""
        origin = await self.read(task_id)
        if not origin.status.is_final:
            raise TaskLiveError(task_id, "it has not ended")
        like_it = TaskDraft(
            payload=changed(origin.payload, draft.payload),
            task_id=draft.task_id,
            context_id=origin.context_id,
            profile=origin.profile,
            role=origin.role,
        )
        taken_over(origin, draft.step)
        return await self.submit(like_it, via=via, idempotency_key=idempotency_key, sender=sender)

    async def pause(self, task_id: str, *, via: Via) -> TaskPacket:
        """See `Orchestration.pause`."""
        packet = await self.read(task_id)
        if packet.paused_at is not None:
            return packet
        return self.happen(task_id, Paused(at=datetime.now(UTC), via=via))

    async def resume(self, task_id: str, *, via: Via) -> TaskPacket:
        """See `Orchestration.resume`."""
        packet = await self.read(task_id)
        if packet.status.is_final:
            raise InvalidTransitionError(task_id, "it has ended")
        return (
            packet
            if packet.paused_at is None
            else self.happen(task_id, Resumed(at=datetime.now(UTC), via=via))
        )

    async def feedback(
        self, task_id: str, draft: FeedbackDraft, *, via: Via, message_id: str = ""
    ) -> TaskPacket:
        """See `Orchestration.feedback`."""
        packet = await self.read(task_id)
        earlier = (event.message_id for event in packet.history if isinstance(event, FeedbackReceived))
        if message_id and message_id in earlier:
            return packet
        if draft.role not in self.roles[packet.profile]:
            raise InvalidPacketError(f"no role {draft.role!r}", pointer="/role")
        return self.happen(
            task_id,
            FeedbackReceived(
                at=datetime.now(UTC),
                role=draft.role,
                outcome=draft.outcome,
                via=via,
                sender=draft.sender,
                message_id=message_id,
                why=draft.why,
                output=draft.output,
            ),
        )

    async def delete(self, task_id: str) -> None:
        """See `Orchestration.delete`."""
        packet = await self.read(task_id)
        if not packet.status.is_final:
            raise TaskLiveError(task_id, f"it is {packet.status}; cancel it first")
        del self.tasks[task_id]

    async def wait(self, task_id: str, timeout_s: float) -> TaskPacket:
        """See `Orchestration.wait`."""
        try:
            async with asyncio.timeout(timeout_s):
                async for _ in self.follow(task_id):
                    pass
        except TimeoutError:
            pass
        return await self.read(task_id)

    async def follow(self, task_id: str, *, since: int = 0) -> AsyncIterator[AnyTaskEvent | Progress]:
        """See `Orchestration.follow`."""
        packet = await self.read(task_id)
        queue: asyncio.Queue[AnyTaskEvent | Progress | None] = asyncio.Queue()
        self._queues[task_id].add(queue)
        self.followers += 1
        try:
            for event in packet.history[since:]:
                yield event
            while not self.tasks[task_id].status.is_final or not queue.empty():
                if (event_or_end := await queue.get()) is None:
                    return
                yield event_or_end
        finally:
            self._queues[task_id].discard(queue)
            self.followers -= 1

    def observe(self, listener: EventListener) -> None:
        """See `Orchestration.observe`."""
        self._listeners.append(listener)

    def status(self) -> EngineStatus:
        """See `Orchestration.status`."""
        live = sum(not packet.status.is_final for packet in self.tasks.values())
        return EngineStatus(accepting=True, queued=live, running=0, live=live, max_running=4, max_live=1000)
