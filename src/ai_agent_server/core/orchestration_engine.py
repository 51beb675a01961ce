"""The orchestration engine: accepts tasks, runs their steps, records each, routes and ends them.

What happens is decided elsewhere (`next_step`, `transitions`, the balancer); here it is made to
happen, durably and one writer a task.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import assert_never

import msgspec
import structlog

from ai_agent_server.agents.base import Agent, AgentContext, Outcome, RoleSpec
from ai_agent_server.cluster.base import Leases
from ai_agent_server.core.chat import ChatUsage, JSONObject, Privacy, RouteHints
from ai_agent_server.core.exchange import Anybody, BudgetSpentError, Exchange
from ai_agent_server.core.fork import changed, fork_hash, taken_over
from ai_agent_server.core.intake import (
    PayloadCheck,
    check_feedback,
    checked_id,
    code_artifact,
    outside_report,
    request_hash,
)
from ai_agent_server.core.next_step import (
    Action,
    AskOutside,
    Decline,
    EndBadly,
    EndWell,
    Hold,
    RunStep,
    StillWaiting,
    deadline,
    next_action,
    result,
)
from ai_agent_server.core.ports import EngineStatus, EventListener, Senders
from ai_agent_server.core.readers import Readers
from ai_agent_server.core.task_packet import (
    AnyTaskEvent,
    Canceled,
    Completed,
    ErrorDetail,
    Failed,
    FeedbackDraft,
    FeedbackReceived,
    Fork,
    ForkDraft,
    InputRequired,
    Limits,
    LLMCall,
    Paused,
    Progress,
    Recovered,
    Rejected,
    Resumed,
    Sender,
    Started,
    StepFinished,
    StepStarted,
    Submitted,
    TaskDraft,
    TaskEvent,
    TaskPacket,
    TaskStatus,
    Via,
)
from ai_agent_server.core.transitions import fold
from ai_agent_server.core.workflow import Workflow
from ai_agent_server.errors import (
    AccessError,
    AgentServerError,
    EngineError,
    IntakeFullError,
    InvalidOutputError,
    InvalidPacketError,
    InvalidTransitionError,
    LimitExceededError,
    NoLLMError,
    SandboxError,
    ShuttingDownError,
    StoreError,
    TaskConflictError,
    TaskLiveError,
    TaskNotFoundError,
    UnknownRoleError,
)
from ai_agent_server.load_balancer.base import SendingLLM
from ai_agent_server.sandbox.base import Sandbox
from ai_agent_server.tasks_state.base import TaskFilter, TaskPage, TaskStore

log = structlog.get_logger(__name__)

RECONCILE_EVERY_S = 2.0
CANCEL_S = 1.0
"""How long a step that was cut off may take to let go."""
PUT_OFF_S = 120.0
"""For so long a task waits, without a worker, until its sender may use an LLM again."""

_NEVER = datetime.max.replace(tzinfo=UTC)


class Role(msgspec.Struct, frozen=True, kw_only=True):
    """A role ready to run. `agent` is None where an outside agent fills it."""

    spec: RoleSpec
    agent: Agent | None
    hints: RouteHints = RouteHints()
    limits: Limits = Limits()
    payload_schema: JSONObject | None = None


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A profile ready to run."""

    roles: Mapping[str, Role]
    workflow: Workflow = Workflow()

    @property
    def external(self) -> frozenset[str]:
        """The roles that outside agents fill."""
        return frozenset(name for name, role in self.roles.items() if role.agent is None)


def _no_callbacks(_url: str, _privacy: Privacy) -> None:
    raise InvalidPacketError("callbacks are not to be had here", pointer="/callback")


class OrchestrationEngine:
    """Implements `core.ports.Orchestration` over a store, an LLM engine, agents and a sandbox.

    Each live task is run by one of `max_running` workers; a step's outcome and the next step's start
    are one durable write, so that a crash repeats at most the call that was under way. Where servers
    share the store, a task is run by the one that took it; the others pass on what it writes, and take
    it when `leases` says that its holder is gone.
    """

    def __init__(
        self,
        *,
        profiles: Mapping[str, Profile],
        store: TaskStore,
        leases: Leases,
        llm: SendingLLM,
        senders: Senders | None = None,
        sandbox: Sandbox,
        clock: Callable[[], datetime],
        new_id: Callable[[], str],
        monotonic: Callable[[], float],
        price: Callable[[str, ChatUsage], float] = lambda _llm, _usage: 0.0,
        read_file: Callable[[str], Awaitable[bytes]],
        check_callback: Callable[[str, Privacy], None] = _no_callbacks,
        max_running: int = 4,
        max_live: int = 1000,
        shutdown_s: float = 10.0,
    ) -> None:
        self._store = store
        self._leases = leases
        self._llm = llm
        self._senders = senders or Anybody()
        self._sandbox = sandbox
        self._clock = clock
        self._new_id = new_id
        self._monotonic = monotonic
        self._price = price
        self._read_file = read_file
        self._check_callback = check_callback
        self._max_running, self._max_live = max_running, max_live
        self._shutdown_s = shutdown_s
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._queued: set[str] = set()
        self._live: set[str] = set()
        self._reserved = 0
        self._crashed: set[str] = set()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._elsewhere: dict[str, str] = {}
        """Live task -> the server that has it."""
        self._waiting_until: dict[str, datetime] = {}
        self._put_off: set[str] = set()
        """Waits for its sender's share, taken by a worker as it was."""
        self._unwritten: dict[str, StepFinished] = {}
        self._canceling: set[str] = set()
        self._cut: dict[str, StepFinished] = {}
        self._readers = Readers(store.read)
        self._listeners: list[EventListener] = []
        self._workers: list[asyncio.Task[None]] = []
        self._accepting = False
        self._draining = False
        self._durations_s: deque[float] = deque(maxlen=64)
        store.observe(self._written_elsewhere)
        self.configure(profiles)

    async def start(self) -> None:
        """Take up every task that has not ended, then accept new ones."""
        for task_id in await self._store.live():
            self._live.add(task_id)
            self._crashed.add(task_id)
            self._enqueue(task_id)
        if self._live:
            log.info("engine.recovering", tasks=len(self._live))
        self._accepting = True
        self._workers = [
            *(asyncio.create_task(self._work(), name=f"worker-{i}") for i in range(self._max_running)),
            asyncio.create_task(self._reconcile(), name="reconciler"),
        ]

    async def aclose(self) -> None:
        """Take nothing new, let running steps finish within the bound, hand back the rest.

        A step that is cut is under way in its file, and the next start takes it up again.
        """
        self._accepting, self._draining = False, True
        if self._running:
            await asyncio.wait(tuple(self._running.values()), timeout=self._shutdown_s)
        owned = (*self._workers, *self._running.values())
        for task in owned:
            task.cancel()
        if owned:
            _, left = await asyncio.wait(owned, timeout=CANCEL_S)
            if left:
                log.warning("engine.left_running", steps=sorted(task.get_name() for task in left))
        self._workers.clear()
        self._readers.close()

    def configure(self, profiles: Mapping[str, Profile]) -> None:
        """Take another configuration; running steps end as they began, but ask where it says now."""
        self._profiles = profiles
        self._external = {name: profile.external for name, profile in profiles.items()}
        self._checks = {
            (name, role_name): PayloadCheck(role.payload_schema)
            for name, profile in profiles.items()
            for role_name, role in profile.roles.items()
        }

    async def submit(
        self,
        draft: TaskDraft,
        *,
        via: Via,
        idempotency_key: str | None = None,
        sender: Sender | None = None,
    ) -> tuple[TaskPacket, bool]:
        """See `Orchestration.submit`."""
        packet = self._packet(draft, _own(idempotency_key, sender))
        submitted = Submitted(at=packet.created_at, via=via, sender=sender)
        return await self._accept(packet, (submitted,), via)

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
        origin = await self._store.read(task_id)
        if not origin.status.is_final:
            raise TaskLiveError(task_id, f"it has not ended ({origin.status}); an ended task can be forked")
        copied = taken_over(origin, draft.step)
        like_it = TaskDraft(
            payload=changed(origin.payload, draft.payload),
            task_id=draft.task_id,
            context_id=origin.context_id,
            profile=origin.profile,
            role=origin.role,
            scope=origin.scope,
            privacy="local" if "local" in {origin.privacy, draft.privacy} else "any",
            callback=draft.callback,
        )
        packet = msgspec.structs.replace(
            self._packet(like_it, _own(idempotency_key, sender)),
            limits=draft.limits.over(origin.limits) if draft.limits else origin.limits,
            request_sha256=fork_hash(origin, draft),
        )
        submitted = Submitted(
            at=packet.created_at,
            via=via,
            sender=sender,
            forked_from=Fork(task_id=task_id, step=draft.step, seq=1 + len(copied)),
        )
        return await self._accept(packet, (submitted, *copied), via)

    async def _accept(
        self, packet: TaskPacket, events: Sequence[TaskEvent], via: Via
    ) -> tuple[TaskPacket, bool]:
        if not self._accepting:
            raise ShuttingDownError
        in_use = len(self._live) + self._reserved
        if in_use >= self._max_live:
            raise IntakeFullError(in_use, self._retry_after_s())
        # Reserved before the write, so that many submissions at once cannot pass the bound together.
        self._reserved += 1
        try:
            kept, created = await self._store.create(packet, events)
        finally:
            self._reserved -= 1
        if created:
            self._live.add(kept.task_id)
            # What a fork copied happened before, to another task, and was told and counted then.
            self._tell(kept, kept.history[:1])
            self._enqueue(kept.task_id)
            log.info("task.submitted", task_id=kept.task_id, profile=kept.profile, role=kept.role, via=via)
        return kept, created

    def _packet(self, draft: TaskDraft, idempotency_key: str | None) -> TaskPacket:
        profile_name, role_name = draft.profile or "", draft.role or ""
        profile = self._profiles.get(profile_name)
        if profile is None:
            raise UnknownRoleError("profile", profile_name, tuple(self._profiles))
        role = profile.roles.get(role_name)
        if role is None:
            raise UnknownRoleError("role", role_name, tuple(profile.roles))
        self._checks[profile_name, role_name](draft.payload)
        privacy: Privacy = "local" if role.hints.privacy == "local" else draft.privacy
        if draft.callback is not None:
            # Its events have what every role wrote that its way may lead through.
            writers = (role,) if draft.scope == "role" else profile.roles.values()
            is_private = any(writer.hints.privacy == "local" for writer in writers)
            self._check_callback(draft.callback.url, "local" if is_private else privacy)
        return TaskPacket(
            task_id=checked_id(draft.task_id, "/task_id") or self._new_id(),
            context_id=checked_id(draft.context_id, "/context_id") or self._new_id(),
            profile=profile_name,
            role=role_name,
            payload=draft.payload,
            created_at=self._clock(),
            limits=draft.limits.over(role.limits) if draft.limits else role.limits,
            scope=draft.scope,
            privacy=privacy,
            callback=draft.callback,
            idempotency_key=idempotency_key,
            request_sha256=request_hash(draft),
        )

    def _retry_after_s(self) -> float:
        """About when the next place is free: the mean task's time, shared by those that run."""
        mean_s = sum(self._durations_s) / len(self._durations_s) if self._durations_s else 5.0
        return min(120.0, max(1.0, mean_s / self._max_running))

    async def read(self, task_id: str) -> TaskPacket:
        """See `Orchestration.read`."""
        return await self._store.read(task_id)

    async def list(self, where: TaskFilter, *, limit: int, cursor: str | None = None) -> TaskPage:
        """See `Orchestration.list`."""
        return await self._store.list(where, limit=limit, cursor=cursor)

    async def delete(self, task_id: str) -> None:
        """See `Orchestration.delete`."""
        await self._store.delete(task_id)
        log.info("task.deleted", task_id=task_id)

    async def cancel(self, task_id: str) -> TaskPacket:
        """See `Orchestration.cancel`. The work is stopped before this answers, and what it used counted."""

        def canceled(packet: TaskPacket) -> Sequence[TaskEvent]:
            end = Canceled(at=self._clock(), result=self._result(packet, "canceled"))
            cut = self._cut.pop(task_id, None)
            return [cut, end] if cut is not None and _still_holds(cut, packet) else [end]

        self._canceling.add(task_id)
        try:
            running = self._running.get(task_id)
            if running is not None:
                running.cancel()
                await asyncio.wait((running,), timeout=CANCEL_S)
            return await self._change(task_id, canceled)
        finally:
            self._canceling.discard(task_id)
            self._cut.pop(task_id, None)
            self._enqueue(task_id)

    async def pause(self, task_id: str, *, via: Via) -> TaskPacket:
        """See `Orchestration.pause`."""

        def paused(packet: TaskPacket) -> Sequence[TaskEvent]:
            return [] if packet.paused_at is not None else [Paused(at=self._clock(), via=via)]

        packet = await self._change(task_id, paused)
        log.info("task.paused", task_id=task_id, via=via)
        return packet

    async def resume(self, task_id: str, *, via: Via) -> TaskPacket:
        """See `Orchestration.resume`."""

        def resumed(packet: TaskPacket) -> Sequence[TaskEvent]:
            if packet.status.is_final:
                raise InvalidTransitionError(task_id, f"it has ended ({packet.status}); nothing goes on")
            return [] if packet.paused_at is None else [Resumed(at=self._clock(), via=via)]

        packet = await self._change(task_id, resumed)
        log.info("task.resumed", task_id=task_id, via=via)
        self._waiting_until.pop(task_id, None)
        self._enqueue(task_id)
        return packet

    async def feedback(
        self, task_id: str, draft: FeedbackDraft, *, via: Via, message_id: str = ""
    ) -> TaskPacket:
        """See `Orchestration.feedback`."""

        def received(packet: TaskPacket) -> Sequence[TaskEvent]:
            earlier = (e.message_id for e in packet.history if isinstance(e, FeedbackReceived))
            if message_id and message_id in earlier:
                return []
            profile = self._profiles.get(packet.profile)
            check_feedback(
                packet,
                draft,
                roles=tuple(profile.roles) if profile else (),
                workflow=profile.workflow if profile else Workflow(),
            )
            return [
                FeedbackReceived(
                    at=self._clock(),
                    role=draft.role,
                    outcome=draft.outcome,
                    via=via,
                    sender=draft.sender,
                    message_id=message_id,
                    why=draft.why,
                    output=draft.output,
                    artifact=code_artifact(draft.code) if draft.code is not None else None,
                    report=outside_report(draft),
                )
            ]

        packet = await self._change(task_id, received)
        log.info("task.feedback", task_id=task_id, role=draft.role, outcome=draft.outcome, via=via)
        self._waiting_until.pop(task_id, None)
        self._enqueue(task_id)
        return packet

    async def _change(self, task_id: str, events: Callable[[TaskPacket], Sequence[TaskEvent]]) -> TaskPacket:
        """Append what `events` makes of the newest packet; the store settles who was first."""
        while True:
            packet = await self._store.read(task_id)
            new = events(packet)
            if not new:
                return packet
            try:
                return await self._append(packet, new)
            except TaskConflictError:
                continue

    async def wait(self, task_id: str, timeout_s: float) -> TaskPacket:
        """See `Orchestration.wait`."""
        return await self._readers.wait(task_id, timeout_s)

    def follow(self, task_id: str, *, since: int = 0) -> AsyncIterator[AnyTaskEvent | Progress]:
        """See `Orchestration.follow`."""
        return self._readers.follow(task_id, since)

    def observe(self, listener: EventListener) -> None:
        """See `Orchestration.observe`."""
        self._listeners.append(listener)

    def status(self) -> EngineStatus:
        """See `Orchestration.status`."""
        return EngineStatus(
            accepting=self._accepting,
            queued=len(self._queued),
            running=len(self._running),
            live=len(self._live),
            max_running=self._max_running,
            max_live=self._max_live,
        )

    def _enqueue(self, task_id: str) -> None:
        if task_id in self._live and task_id not in self._queued and task_id not in self._canceling:
            self._queued.add(task_id)
            self._queue.put_nowait(task_id)

    async def _work(self) -> None:
        while True:
            task_id = await self._queue.get()
            if self._draining:
                return
            if task_id in self._running:
                # It is run already and will see what is new at its next write; look again after it.
                self._queued.discard(task_id)
                self._running[task_id].add_done_callback(self._again(task_id))
                continue
            self._queued.discard(task_id)
            task = asyncio.create_task(self._run(task_id), name=f"task-{task_id}")
            self._running[task_id] = task
            try:
                await asyncio.wait((task,))
            finally:
                self._running.pop(task_id, None)

    def _again(self, task_id: str) -> Callable[[asyncio.Task[None]], None]:
        return lambda _task: self._enqueue(task_id)

    async def _reconcile(self) -> None:
        """Run again what is live and forgotten: a wait that expired, a write that failed."""
        while True:
            await asyncio.sleep(RECONCILE_EVERY_S)
            # The store is asked too: a submission that was cut off during its write is in it.
            self._live.update(await self._store.live())
            now = self._clock()
            for task_id in tuple(self._live - self._queued - self._running.keys()):
                until = self._waiting_until.get(task_id)
                free = self._leases.may_take(self._elsewhere.get(task_id, ""))
                if free and (until is None or now >= until):
                    self._enqueue(task_id)

    def _written_elsewhere(self, packet: TaskPacket, since: int) -> None:
        """Another server wrote: pass it on, let go of what is not ours any more, take what is free."""
        task_id = packet.task_id
        self._readers.written(packet, packet.history[since:])
        self._waiting_until.pop(task_id, None)
        free = self._leases.may_take(packet.holder)
        if packet.status.is_final:
            self._forget(task_id)
        else:
            self._live.add(task_id)
            if free:
                self._elsewhere.pop(task_id, None)
            else:
                self._elsewhere[task_id] = packet.holder
        running = self._running.get(task_id)
        if running is not None and (packet.status.is_final or not free):
            log.warning("task.taken_away", task_id=task_id, status=str(packet.status), holder=packet.holder)
            running.cancel()
        elif free:
            self._enqueue(task_id)

    def _forget(self, task_id: str) -> None:
        """It has ended."""
        self._live.discard(task_id)
        self._crashed.discard(task_id)
        self._elsewhere.pop(task_id, None)
        self._waiting_until.pop(task_id, None)
        self._unwritten.pop(task_id, None)
        self._put_off.discard(task_id)

    async def _run(self, task_id: str) -> None:
        with structlog.contextvars.bound_contextvars(task_id=task_id):
            try:
                packet = await self._store.read(task_id)
                if not self._leases.may_take(packet.holder):
                    self._elsewhere[task_id] = packet.holder
                    return
                self._elsewhere.pop(task_id, None)
                await self._advance(packet)
            except asyncio.CancelledError:
                if task_id not in self._canceling:
                    self._cut.pop(task_id, None)
                raise
            except (TaskNotFoundError, InvalidTransitionError):
                # Canceled or deleted meanwhile: its file says all there is to say.
                self._forget(task_id)
            except StoreError as exc:
                # The reconciler comes back to it; what could not be written did not happen.
                log.warning("task.not_written", problem=str(exc))
            except Exception as exc:
                # The worker's boundary: one task must neither end the others nor be tried for ever.
                log.exception("task.broke")
                await self._give_up(task_id, type(exc).__name__)

    def _result(self, packet: TaskPacket, outcome: str) -> JSONObject | None:
        profile = self._profiles.get(packet.profile)
        return result(packet, profile.workflow, outcome=outcome) if profile else None

    async def _give_up(self, task_id: str, what: str) -> None:
        error = ErrorDetail(code="internal", message=f"the engine could not go on: {what}")

        def failed(packet: TaskPacket) -> Sequence[TaskEvent]:
            kept = self._result(packet, "failed")
            return [Failed(at=self._clock(), reason="internal", error=error, result=kept)]

        try:
            await self._change(task_id, failed)
        except AgentServerError:
            log.exception("task.not_ended")

    async def _advance(self, packet: TaskPacket) -> None:
        """Take `packet` as far as it goes: each turn decides, records and acts."""
        pending = self._taken_up(packet)
        generation = fold(packet, pending).generation
        while not packet.status.is_final:
            # What a step left is folded in before the decision, and written with what the decision
            # adds: one durable write a step.
            now = self._clock()
            profile = self._profiles.get(packet.profile)
            if profile is None:
                raise UnknownRoleError("profile", packet.profile, tuple(self._profiles))
            external = self._external[packet.profile]
            action = next_action(fold(packet, pending), profile.workflow, external=external, now=now)
            if isinstance(action, AskOutside | StillWaiting):
                self._waiting_until[packet.task_id] = action.expires_at
            if isinstance(action, Hold):
                self._waiting_until[packet.task_id] = _NEVER
            if isinstance(action, StillWaiting):
                return
            events = (*pending, *_announced(action, now))
            try:
                packet = await self._append(packet, events)
            except TaskConflictError:
                # Somebody's feedback or cancel came first: keep what the step found, decide again.
                packet = await self._store.read(packet.task_id)
                if self._lost(packet, generation):
                    log.warning("task.fenced_off", generation=generation, now=packet.generation)
                    return
                pending = tuple(event for event in pending if _still_holds(event, packet))
                continue
            except StoreError:
                # What the step found was paid for: it is kept for when the store is back.
                found = [event for event in pending if isinstance(event, StepFinished)]
                if found:
                    self._unwritten[packet.task_id] = found[-1]
                raise
            if not isinstance(action, RunStep) or self._draining:
                return
            try:
                finished = await self._step(packet, profile, action)
            except LimitExceededError as exc:
                self._wait_for_share(packet.task_id, exc.retry_after_s or 0.0)
                return
            if not self._accepting and finished.outcome in {"unavailable", "cut", "error"}:
                # The engines are stopping with us; the next start takes the step up again.
                return
            pending = (finished,)

    def _wait_for_share(self, task_id: str, wait_s: float) -> None:
        """Leave the task as it is until its sender may use an LLM again; others get the worker."""
        self._put_off.add(task_id)
        self._waiting_until[task_id] = self._clock() + timedelta(seconds=wait_s)
        log.info("task.put_off", wait_s=round(wait_s, 3))

    def _taken_up(self, packet: TaskPacket) -> tuple[TaskEvent, ...]:
        """What is to be recorded before the first decision: who works on it, what was not written."""
        held = packet.status is TaskStatus.INPUT_REQUIRED or packet.paused_at is not None
        working = not packet.status.is_final and not held
        # One that waited for its sender's share was never let go of: to take it anew each time it asks
        # would fill its history, and look like a step at which servers crash.
        ours_still = packet.task_id in self._put_off and packet.holder == self._leases.holder
        taken = (self._taken(packet),) if working and not ours_still else ()
        self._put_off.discard(packet.task_id)
        self._crashed.discard(packet.task_id)
        unwritten = self._unwritten.pop(packet.task_id, None)
        if unwritten is None or not _still_holds(unwritten, packet):
            return taken
        return (*taken, unwritten)

    def _taken(self, packet: TaskPacket) -> Started | Recovered:
        generation, us = packet.generation + 1, self._leases.holder
        if packet.holder not in {"", us}:
            why = f"the server {packet.holder} is gone"
            return Recovered(at=self._clock(), generation=generation, holder=us, why=why)
        if packet.generation and packet.task_id in self._crashed:
            return Recovered(at=self._clock(), generation=generation, holder=us, why="the server came back")
        return Started(at=self._clock(), generation=generation, holder=us)

    def _lost(self, packet: TaskPacket, generation: int) -> bool:
        """Whether another worker took the task that was to be run as `generation`."""
        theirs = packet.generation == generation and packet.holder != self._leases.holder
        return packet.generation > generation or theirs

    async def _append(self, packet: TaskPacket, events: Sequence[TaskEvent]) -> TaskPacket:
        written = await self._store.append(packet.task_id, events, expected_revision=packet.revision)
        if written.status.is_final:
            self._forget(written.task_id)
            self._durations_s.append((self._clock() - written.created_at) / timedelta(seconds=1))
            log.info(
                "task.ended",
                task_id=written.task_id,
                status=str(written.status),
                reason=written.reason,
                calls=written.usage.calls,
                tokens=written.usage.tokens,
            )
        self._tell(written, written.history[packet.revision :])
        return written

    def _tell(self, packet: TaskPacket, news: tuple[AnyTaskEvent, ...]) -> None:
        for listener in self._listeners:
            listener(packet, news)
        self._readers.written(packet, news)

    async def _step(self, packet: TaskPacket, profile: Profile, action: RunStep) -> StepFinished:
        """Run it. Raises `LimitExceededError` where its sender may soon use an LLM again."""
        role = profile.roles.get(action.role)
        began = self._monotonic()
        if role is None or role.agent is None:
            return self._finished(
                action, began, Outcome(verdict="error", why=f"the role {action.role} is gone"), None
            )
        exchange = Exchange(
            packet=packet,
            step=action.step,
            role=action.role,
            route=partial(self._route, packet, action.role, profile),
            max_tokens=role.spec.max_tokens,
            llm=self._llm,
            senders=self._senders,
            price=self._price,
            monotonic=self._monotonic,
            tell=lambda progress: self._readers.tell(packet.task_id, (progress,)),
        )
        context = AgentContext(
            packet=packet,
            spec=role.spec,
            attempt=action.attempt,
            chat=exchange.chat,
            sandbox=self._sandbox,
            read_file=self._read_file,
        )
        try:
            async with asyncio.timeout(self._remaining_s(packet)) as bound:
                outcome = await role.agent.run(context)
        except asyncio.CancelledError:
            if exchange.call is not None:
                self._cut[packet.task_id] = self._finished(
                    action, began, Outcome(verdict="canceled"), exchange.call
                )
            raise
        except LimitExceededError as exc:
            if not exc.is_quota and (exc.retry_after_s or 0.0) <= PUT_OFF_S:
                raise
            outcome = _failure(exc)
        except AgentServerError as exc:
            outcome = _failure(exc)
        except Exception as exc:
            # An agent's own fault ends its task, not the server.
            if isinstance(exc, TimeoutError) and bound.expired():
                outcome = Outcome(verdict="budget_wall")
            else:
                log.exception("step.broke", role=action.role)
                error = ErrorDetail(code="internal", message=type(exc).__name__)
                outcome = Outcome(verdict="error", error=error)
        finished = self._finished(action, began, outcome, exchange.call)
        log.info(
            "step.finished",
            role=action.role,
            outcome=finished.outcome,
            llm=exchange.call.llm if exchange.call else None,
            duration_ms=round(finished.duration_ms, 1),
        )
        return finished

    def _route(self, packet: TaskPacket, name: str, began_with: Profile) -> RouteHints:
        """Where a step's requests go: by the configuration of now, which may be another than at its begin.

        What was private at its begin is so to its end: its prompt was written then.
        """
        now = self._profiles.get(packet.profile, began_with)
        role = now.roles.get(name)
        if role is None:
            now, role = began_with, began_with.roles[name]
        privacy = _privacy(packet, now, role)
        if now is not began_with and privacy == "any":
            privacy = _privacy(packet, began_with, began_with.roles[name])
        return msgspec.structs.replace(role.hints, privacy=privacy)

    def _finished(
        self, action: RunStep, began: float, outcome: Outcome, call: LLMCall | None
    ) -> StepFinished:
        return StepFinished(
            at=self._clock(),
            step=action.step,
            role=action.role,
            outcome=outcome.verdict,
            why=outcome.why,
            output=outcome.output,
            artifact=outcome.artifact,
            report=outcome.report,
            call=call,
            error=outcome.error,
            duration_ms=(self._monotonic() - began) * 1000,
        )

    def _remaining_s(self, packet: TaskPacket) -> float:
        until = deadline(packet)
        if until is None:
            return packet.limits.wall_s
        return max(0.0, (until - self._clock()) / timedelta(seconds=1))


def _own(idempotency_key: str | None, sender: Sender | None) -> str | None:
    """The key as it is kept: two who happen on the same one must not get each other's tasks."""
    if idempotency_key is None or sender is None or not sender.key:
        return idempotency_key
    return f"{sender.key}/{idempotency_key}"


def _privacy(packet: TaskPacket, profile: Profile, role: Role) -> Privacy:
    """`local` for a private packet or role, and for all that comes after a private role's step.

    What a private role wrote stands in later prompts.
    """
    if "local" in {packet.privacy, role.hints.privacy}:
        return "local"
    private = {name for name, each in profile.roles.items() if each.hints.privacy == "local"}
    if private and any(isinstance(e, StepStarted) and e.role in private for e in packet.history):
        return "local"
    return "any"


def _announced(action: Action, now: datetime) -> tuple[TaskEvent, ...]:
    """The event that says what was decided; none for a step that was announced before a crash."""
    match action:
        case RunStep(step=step, role=role, attempt=attempt, hop=hop, resumed=resumed):
            return () if resumed else (StepStarted(at=now, step=step, role=role, attempt=attempt, hop=hop),)
        case AskOutside(role=role, question=question, expires_at=expires_at, hop=hop):
            return (InputRequired(at=now, role=role, question=question, expires_at=expires_at, hop=hop),)
        case StillWaiting() | Hold():
            return ()
        case EndWell():
            return (Completed(at=now, result=action.result),)
        case EndBadly():
            return (Failed(at=now, reason=action.reason, error=action.error, result=action.result),)
        case Decline():
            return (Rejected(at=now, reason="invalid_payload", error=action.error),)
        case _:
            assert_never(action)


def _still_holds(event: TaskEvent, packet: TaskPacket) -> bool:
    """Whether an event that was to be written still fits `packet`, which changed meanwhile."""
    match event:
        case Started() | Recovered():
            return event.generation > packet.generation
        case StepFinished():
            steps = [e for e in packet.history if isinstance(e, StepStarted | StepFinished)]
            return bool(steps) and isinstance(steps[-1], StepStarted) and steps[-1].step == event.step
        case _:
            return False


def _failure(exc: AgentServerError) -> Outcome:
    """What a step that raised `exc` ends with."""
    match exc:
        case BudgetSpentError():
            return Outcome(verdict=exc.outcome)
        case InvalidOutputError():
            verdict = "invalid"
        case InvalidPacketError():
            verdict = "rejected"
        case LimitExceededError():
            verdict = "budget_sender"
        case AccessError():
            verdict = "refused"
        case NoLLMError():
            verdict = "unavailable"
        case EngineError():
            # Nobody outside saw the tokens that came before the cut, so the step can be had again.
            verdict = "cut" if exc.retry_safe else "unavailable"
        case SandboxError():
            verdict = "no_sandbox"
        case _:
            verdict = "error"
    name = type(exc).__name__.removesuffix("Error")
    return Outcome(verdict=verdict, why=str(exc), error=ErrorDetail(code=name, message=str(exc)))
