"""The orchestration engine: accepts tasks, runs their steps, records each, routes and ends them.

What happens is decided elsewhere (`next_step`, `transitions`, the balancer); here it is made to
happen, durably and one writer a task.
"""

import asyncio
import hashlib
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime, timedelta
from typing import Literal, assert_never

import msgspec
import structlog
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from ai_agent_server.agents.base import Agent, AgentContext, Outcome, RoleSpec
from ai_agent_server.core.chat import ChatReply, ChatRequest, ChatUsage, JSONObject, RouteHints
from ai_agent_server.core.next_step import (
    AskOutside,
    Decline,
    EndBadly,
    EndWell,
    RunStep,
    StillWaiting,
    next_action,
    result,
)
from ai_agent_server.core.ports import EngineStatus, EventListener
from ai_agent_server.core.task_packet import (
    AnyTaskEvent,
    Artifact,
    Canceled,
    Completed,
    ErrorDetail,
    Failed,
    FeedbackDraft,
    FeedbackReceived,
    InputRequired,
    Limits,
    LLMCall,
    Progress,
    Recovered,
    Rejected,
    Started,
    StepFinished,
    StepStarted,
    Submitted,
    TaskDraft,
    TaskEvent,
    TaskPacket,
    TaskStatus,
    TestReport,
    Usage,
    Via,
)
from ai_agent_server.core.transitions import fold
from ai_agent_server.core.workflow import Workflow
from ai_agent_server.errors import (
    AgentServerError,
    EngineError,
    IntakeFullError,
    InvalidOutputError,
    InvalidPacketError,
    InvalidTransitionError,
    NoLLMError,
    SandboxError,
    ShuttingDownError,
    StoreError,
    TaskConflictError,
    TaskNotFoundError,
    UnknownRoleError,
)
from ai_agent_server.llm_engines.base import JoinedStream, LLMEngine
from ai_agent_server.sandbox.base import Sandbox
from ai_agent_server.tasks_state.base import TaskFilter, TaskPage, TaskStore

log = structlog.get_logger(__name__)

PROGRESS_EVERY_S = 0.25
RECONCILE_EVERY_S = 2.0
READER_BACKLOG = 1024
"""How many events a reader may be behind before it is cut; it comes back with its last seq."""


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


class _BudgetSpentError(AgentServerError):
    """A limit is used up; the step ends with this outcome."""

    def __init__(self, outcome: str) -> None:
        self.outcome = outcome
        super().__init__(outcome)


class _Reader:
    """One who follows a task; cut when it falls too far behind."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[AnyTaskEvent | Progress | None] = asyncio.Queue(READER_BACKLOG)
        self.cut = False

    def tell(self, item: AnyTaskEvent | Progress) -> None:
        if isinstance(item, Progress) and self.queue.qsize() > READER_BACKLOG // 2:
            return
        if self.cut or self.queue.full():
            self.cut = True
            return
        self.queue.put_nowait(item)


class OrchestrationEngine:
    """Implements `core.ports.Orchestration` over a store, an LLM engine, agents and a sandbox.

    Each live task is run by one of `max_running` workers; a step's outcome and the next step's start
    are one durable write, so that a crash repeats at most the call that was under way.
    """

    def __init__(
        self,
        *,
        profiles: Mapping[str, Profile],
        store: TaskStore,
        llm: LLMEngine,
        sandbox: Sandbox,
        clock: Callable[[], datetime],
        new_id: Callable[[], str],
        monotonic: Callable[[], float],
        price: Callable[[str, ChatUsage], float] = lambda _llm, _usage: 0.0,
        read_file: Callable[[str], Awaitable[bytes]],
        max_running: int = 4,
        max_live: int = 1000,
        shutdown_s: float = 10.0,
    ) -> None:
        self._profiles = profiles
        self._store = store
        self._llm = llm
        self._sandbox = sandbox
        self._clock = clock
        self._new_id = new_id
        self._monotonic = monotonic
        self._price = price
        self._read_file = read_file
        self._max_running, self._max_live = max_running, max_live
        self._shutdown_s = shutdown_s
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._queued: set[str] = set()
        self._live: set[str] = set()
        self._reserved = 0
        self._crashed: set[str] = set()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._readers: dict[str, set[_Reader]] = {}
        self._listeners: list[EventListener] = []
        self._workers: list[asyncio.Task[None]] = []
        self._accepting = False
        self._draining = False
        self._durations_s: deque[float] = deque(maxlen=64)

    # --- life ---

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
        owned = [*self._workers, *self._running.values()]
        for task in owned:
            task.cancel()
        await asyncio.gather(*owned, return_exceptions=True)
        self._workers.clear()
        for readers in self._readers.values():
            for reader in readers:
                reader.cut = True
                if not reader.queue.full():
                    reader.queue.put_nowait(None)

    def configure(self, profiles: Mapping[str, Profile]) -> None:
        """Take another configuration; running steps end as they began."""
        self._profiles = profiles

    # --- intake ---

    async def submit(
        self, draft: TaskDraft, *, via: Via, idempotency_key: str | None = None
    ) -> tuple[TaskPacket, bool]:
        """See `Orchestration.submit`."""
        if not self._accepting:
            raise ShuttingDownError
        packet = self._packet(draft, idempotency_key)
        in_use = len(self._live) + self._reserved
        if in_use >= self._max_live and not await self._known(packet.task_id):
            raise IntakeFullError(in_use, self._retry_after_s())
        # Reserved before the write, so that many submissions at once cannot pass the bound together.
        self._reserved += 1
        try:
            kept, created = await self._store.create(packet, [Submitted(at=packet.created_at, via=via)])
        finally:
            self._reserved -= 1
        if created:
            self._live.add(kept.task_id)
            self._tell(kept, 0)
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
        _check_payload(draft.payload, role.payload_schema)
        privacy: Literal["any", "local"] = "local" if role.hints.privacy == "local" else draft.privacy
        return TaskPacket(
            task_id=_canonical(draft.task_id, "/task_id") or self._new_id(),
            context_id=_canonical(draft.context_id, "/context_id") or self._new_id(),
            profile=profile_name,
            role=role_name,
            payload=draft.payload,
            created_at=self._clock(),
            limits=draft.limits.over(role.limits) if draft.limits else role.limits,
            scope=draft.scope,
            privacy=privacy,
            idempotency_key=idempotency_key,
            request_sha256=_request_hash(draft),
        )

    async def _known(self, task_id: str) -> bool:
        try:
            await self._store.read(task_id)
        except TaskNotFoundError:
            return False
        return True

    def _retry_after_s(self) -> float:
        mean_s = sum(self._durations_s) / len(self._durations_s) if self._durations_s else 5.0
        waiting = max(1, len(self._live) - self._max_live + 1)
        return min(120.0, max(1.0, mean_s * waiting / self._max_running))

    # --- what callers ask of a task ---

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
        """See `Orchestration.cancel`. The work is stopped before this answers."""

        def canceled(packet: TaskPacket) -> Sequence[TaskEvent]:
            profile = self._profiles.get(packet.profile)
            kept = result(packet, profile.workflow, outcome="canceled") if profile else None
            return [Canceled(at=self._clock(), result=kept)]

        packet = await self._change(task_id, canceled)
        running = self._running.get(task_id)
        if running is not None:
            running.cancel()
            await asyncio.wait((running,), timeout=self._shutdown_s)
        return packet

    async def feedback(self, task_id: str, draft: FeedbackDraft, *, via: Via) -> TaskPacket:
        """See `Orchestration.feedback`."""

        def received(packet: TaskPacket) -> Sequence[TaskEvent]:
            if packet.status.is_final:
                raise InvalidTransitionError(
                    task_id, f"it has ended ({packet.status}); feedback came too late"
                )
            self._check_feedback(packet, draft)
            return [
                FeedbackReceived(
                    at=self._clock(),
                    role=draft.role,
                    outcome=draft.outcome,
                    via=via,
                    sender=draft.sender,
                    why=draft.why,
                    output=draft.output,
                    artifact=_code(draft.code) if draft.code is not None else None,
                    report=_outside_report(draft),
                )
            ]

        packet = await self._change(task_id, received)
        log.info("task.feedback", task_id=task_id, role=draft.role, outcome=draft.outcome, via=via)
        self._enqueue(task_id)
        return packet

    def _check_feedback(self, packet: TaskPacket, draft: FeedbackDraft) -> None:
        profile = self._profiles.get(packet.profile)
        roles = tuple(profile.roles) if profile else ()
        if draft.role == "user":
            outcomes: tuple[str, ...] = ("answer",)
        elif profile is not None and draft.role in profile.roles:
            routed = (on.partition(".") for on in profile.workflow.routes)
            own = tuple(outcome for role, _, outcome in routed if role == draft.role)
            outcomes = own or ("done", "pass", "fail")
        else:
            raise InvalidPacketError(
                f"the profile {packet.profile!r} has no role {draft.role!r}",
                pointer="/role",
                expected=f"one of: {', '.join((*roles, 'user'))}",
            )
        if draft.outcome not in outcomes:
            raise InvalidPacketError(
                f"{draft.role} cannot report {draft.outcome!r}",
                pointer="/outcome",
                expected=f"one of: {', '.join(outcomes)}",
            )

    async def _change(self, task_id: str, events: Callable[[TaskPacket], Sequence[TaskEvent]]) -> TaskPacket:
        """Append what `events` makes of the newest packet; the store settles who was first."""
        while True:
            packet = await self._store.read(task_id)
            try:
                return await self._append(packet, events(packet))
            except TaskConflictError:
                continue

    async def wait(self, task_id: str, timeout_s: float) -> TaskPacket:
        """See `Orchestration.wait`."""
        reader = _Reader()
        self._readers.setdefault(task_id, set()).add(reader)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    packet = await self._store.read(task_id)
                    if packet.status.is_final or packet.status is TaskStatus.INPUT_REQUIRED or reader.cut:
                        return packet
                    await reader.queue.get()
        except TimeoutError:
            return await self._store.read(task_id)
        finally:
            self._forget(task_id, reader)

    async def follow(self, task_id: str, *, since: int = 0) -> AsyncIterator[AnyTaskEvent | Progress]:
        """See `Orchestration.follow`."""
        reader = _Reader()
        self._readers.setdefault(task_id, set()).add(reader)
        try:
            packet = await self._store.read(task_id)
            for event in packet.history[since:]:
                yield event
            seen, ended = max(since, packet.revision), packet.status.is_final
            while not ended and not (reader.cut and reader.queue.empty()):
                item = await reader.queue.get()
                if item is None:
                    return
                if isinstance(item, Progress):
                    yield item
                elif item.seq > seen:
                    seen = item.seq
                    yield item
                    ended = isinstance(item, Completed | Failed | Canceled | Rejected)
        finally:
            self._forget(task_id, reader)

    def _forget(self, task_id: str, reader: _Reader) -> None:
        readers = self._readers.get(task_id)
        if readers is not None:
            readers.discard(reader)
            if not readers:
                del self._readers[task_id]

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

    # --- the loop ---

    def _enqueue(self, task_id: str) -> None:
        if task_id not in self._queued and task_id in self._live:
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
            for task_id in tuple(self._live - self._queued - self._running.keys()):
                self._enqueue(task_id)

    async def _run(self, task_id: str) -> None:
        with structlog.contextvars.bound_contextvars(task_id=task_id):
            try:
                await self._advance(await self._store.read(task_id))
            except asyncio.CancelledError:
                raise
            except (TaskNotFoundError, InvalidTransitionError):
                # Canceled or deleted meanwhile: its file says all there is to say.
                self._live.discard(task_id)
            except StoreError:
                # The reconciler comes back to it; what could not be written did not happen.
                log.exception("task.not_written")
            except Exception as exc:
                # The worker's boundary: one task must neither end the others nor be tried for ever.
                log.exception("task.broke")
                await self._give_up(task_id, type(exc).__name__)

    async def _give_up(self, task_id: str, what: str) -> None:
        error = ErrorDetail(code="internal", message=f"the engine could not go on: {what}")

        def failed(_packet: TaskPacket) -> Sequence[TaskEvent]:
            return [Failed(at=self._clock(), reason="internal", error=error)]

        try:
            await self._change(task_id, failed)
        except AgentServerError:
            log.exception("task.not_ended")

    async def _advance(self, packet: TaskPacket) -> None:
        """Take `packet` as far as it goes: each turn decides, acts and records."""
        pending: list[TaskEvent] = []
        if not packet.status.is_final and packet.status is not TaskStatus.INPUT_REQUIRED:
            pending.append(self._taken(packet))
        self._crashed.discard(packet.task_id)
        while not packet.status.is_final:
            # Events that a step left are folded in before the decision, and written with what the
            # decision adds: one durable write a step.
            now = self._clock()
            ahead = fold(packet, pending)
            profile = self._profiles.get(packet.profile)
            if profile is None:
                raise UnknownRoleError("profile", packet.profile, tuple(self._profiles))
            action = next_action(ahead, profile.workflow, external=profile.external, now=now)
            match action:
                case RunStep():
                    if not action.resumed:
                        pending.append(
                            StepStarted(
                                at=now,
                                step=action.step,
                                role=action.role,
                                attempt=action.attempt,
                                hop=action.hop,
                            )
                        )
                case AskOutside():
                    pending.append(
                        InputRequired(
                            at=now,
                            role=action.role,
                            question=action.question,
                            expires_at=action.expires_at,
                        )
                    )
                case StillWaiting():
                    return
                case EndWell():
                    pending.append(Completed(at=now, result=action.result))
                case EndBadly():
                    pending.append(
                        Failed(at=now, reason=action.reason, error=action.error, result=action.result)
                    )
                case Decline():
                    pending.append(Rejected(at=now, reason="invalid_payload", error=action.error))
                case _:
                    assert_never(action)
            try:
                packet = await self._append(packet, pending)
            except TaskConflictError:
                # Somebody's feedback or cancel came first: keep what the step found, decide again.
                packet = await self._store.read(packet.task_id)
                pending = [e for e in pending if isinstance(e, StepFinished | Started | Recovered)]
                pending = [
                    e for e in pending if not isinstance(e, Started | Recovered) or _follows(e, packet)
                ]
                continue
            pending = []
            if not isinstance(action, RunStep) or self._draining:
                return
            finished = await self._step(packet, profile, action)
            if not self._accepting and finished.outcome in {"unavailable", "error"}:
                # The engines are stopping with us; the next start takes the step up again.
                return
            pending = [finished]

    def _taken(self, packet: TaskPacket) -> Started | Recovered:
        generation = packet.generation + 1
        if packet.generation and packet.task_id in self._crashed:
            return Recovered(at=self._clock(), generation=generation, why="the server came back")
        return Started(at=self._clock(), generation=generation)

    async def _append(self, packet: TaskPacket, events: Sequence[TaskEvent]) -> TaskPacket:
        written = await self._store.append(packet.task_id, events, expected_revision=packet.revision)
        if written.status.is_final:
            self._live.discard(written.task_id)
            self._durations_s.append((self._clock() - written.created_at) / timedelta(seconds=1))
            log.info(
                "task.ended",
                task_id=written.task_id,
                status=str(written.status),
                reason=written.reason,
                calls=written.usage.calls,
                tokens=written.usage.tokens,
            )
        self._tell(written, packet.revision)
        return written

    def _tell(self, packet: TaskPacket, since: int) -> None:
        news = packet.history[since:]
        for listener in self._listeners:
            listener(packet, news)
        for reader in tuple(self._readers.get(packet.task_id, ())):
            for event in news:
                reader.tell(event)

    # --- one step ---

    async def _step(self, packet: TaskPacket, profile: Profile, action: RunStep) -> StepFinished:
        role = profile.roles.get(action.role)
        began = self._monotonic()
        if role is None or role.agent is None:
            return self._finished(
                action, began, Outcome(verdict="error", why=f"the role {action.role} is gone"), None
            )
        exchange = _Exchange(self, packet, role, action)
        context = AgentContext(
            packet=packet,
            spec=role.spec,
            attempt=action.attempt,
            chat=exchange.chat,
            sandbox=self._sandbox,
            read_file=self._read_file,
        )
        try:
            async with asyncio.timeout(self._remaining_s(packet)):
                outcome = await role.agent.run(context)
        except _BudgetSpentError as exc:
            outcome = Outcome(verdict=exc.outcome)
        except TimeoutError:
            outcome = Outcome(verdict="budget_wall")
        except InvalidOutputError as exc:
            outcome = _failure("invalid", exc)
        except InvalidPacketError as exc:
            outcome = _failure("rejected", exc)
        except (NoLLMError, EngineError) as exc:
            outcome = _failure("unavailable", exc)
        except SandboxError as exc:
            outcome = _failure("no_sandbox", exc)
        except AgentServerError as exc:
            outcome = _failure("error", exc)
        except Exception as exc:
            # An agent's own fault ends its task, not the server.
            log.exception("step.broke", role=action.role)
            outcome = Outcome(verdict="error", error=ErrorDetail(code="internal", message=type(exc).__name__))
        finished = self._finished(action, began, outcome, exchange.call)
        log.info(
            "step.finished",
            role=action.role,
            outcome=finished.outcome,
            llm=exchange.call.llm if exchange.call else None,
            duration_ms=round(finished.duration_ms, 1),
        )
        return finished

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
        started_at = packet.started_at or self._clock()
        left = started_at + timedelta(seconds=packet.limits.wall_s) - self._clock()
        return max(0.0, left / timedelta(seconds=1))


class _Exchange:
    """The one exchange with an LLM that a step may have: routed, bounded, counted, told of."""

    def __init__(self, engine: OrchestrationEngine, packet: TaskPacket, role: Role, action: RunStep) -> None:
        self._engine, self._packet, self._role, self._action = engine, packet, role, action
        self._used = False
        self.call: LLMCall | None = None

    async def chat(self, request: ChatRequest) -> ChatReply:
        if self._used:
            raise RuntimeError("an agent may talk to an LLM once a step")
        self._used = True
        self._check_budget()
        request = self._bounded(request)
        digest = hashlib.sha256(msgspec.json.encode(request.messages)).hexdigest()
        engine = self._engine
        began = engine._monotonic()
        first_token_ms = 0.0
        told = 0.0
        joined, pieces = JoinedStream(), 0
        llm, why = "", ""
        usage = ChatUsage()
        async with aclosing(engine._llm.stream(request)) as deltas:
            async for delta in deltas:
                joined.add(delta)
                llm = delta.llm or llm
                why = delta.decision.reason if delta.decision else why
                usage = delta.usage or usage
                if delta.text or delta.tool_calls:
                    pieces += 1
                    first_token_ms = first_token_ms or (engine._monotonic() - began) * 1000
                elapsed = engine._monotonic() - began
                if elapsed - told >= PROGRESS_EVERY_S:
                    told = elapsed
                    self._tell(llm, why, pieces, elapsed)
        duration_ms = (engine._monotonic() - began) * 1000
        reply = joined.reply(time_to_first_token_ms=first_token_ms, duration_ms=duration_ms)
        self.call = LLMCall(
            llm=reply.llm,
            model=reply.model,
            source=reply.source,
            input_tokens=reply.usage.input_tokens,
            output_tokens=reply.usage.output_tokens,
            finish_reason=reply.finish_reason,
            time_to_first_token_ms=round(first_token_ms, 3),
            duration_ms=round(duration_ms, 3),
            prompt_sha256=digest,
            cost_usd=engine._price(reply.llm, reply.usage),
            decision=reply.decision,
        )
        return reply

    def _check_budget(self) -> None:
        used: Usage = self._packet.usage
        limits = self._packet.limits
        if used.calls >= limits.calls:
            raise _BudgetSpentError("budget_calls")
        if used.tokens >= limits.tokens:
            raise _BudgetSpentError("budget_tokens")
        if limits.cost_usd is not None and used.cost_usd >= limits.cost_usd > 0:
            raise _BudgetSpentError("budget_cost")

    def _bounded(self, request: ChatRequest) -> ChatRequest:
        limits, used, hints = self._packet.limits, self._packet.usage, self._role.hints
        left = limits.tokens - used.tokens
        privacy: Literal["any", "local"] = (
            "local" if "local" in (self._packet.privacy, hints.privacy) else "any"
        )
        max_cost = None if limits.cost_usd is None else max(0.0, limits.cost_usd - used.cost_usd)
        return msgspec.structs.replace(
            request,
            max_tokens=max(1, min(request.max_tokens or self._role.spec.max_tokens, left)),
            route=msgspec.structs.replace(hints, privacy=privacy, max_cost_usd=max_cost),
        )

    def _tell(self, llm: str, why: str, tokens: int, elapsed_s: float) -> None:
        progress = Progress(
            task_id=self._packet.task_id,
            step=self._action.step,
            role=self._action.role,
            llm=llm,
            why=why,
            output_tokens=tokens,
            elapsed_ms=elapsed_s * 1000,
        )
        for reader in tuple(self._engine._readers.get(self._packet.task_id, ())):
            reader.tell(progress)


def _follows(event: Started | Recovered, packet: TaskPacket) -> bool:
    return event.generation > packet.generation


def _failure(verdict: str, exc: AgentServerError) -> Outcome:
    name = type(exc).__name__.removesuffix("Error")
    return Outcome(verdict=verdict, why=str(exc), error=ErrorDetail(code=name, message=str(exc)))


def _code(content: str) -> Artifact:
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    return Artifact(artifact_id=digest, kind="code", content=content)


def _outside_report(draft: FeedbackDraft) -> TestReport | None:
    if draft.outcome not in {"pass", "fail"}:
        return None
    return TestReport(
        verdict="pass" if draft.outcome == "pass" else "fail",
        tier="outside",
        failing=draft.failing,
        detail=draft.why,
    )


def _canonical(given: str | None, pointer: str) -> str | None:
    """`given` as a canonical UUID; ids become file names and subjects, so nothing else is one."""
    if given is None:
        return None
    try:
        parsed = uuid.UUID(given)
    except ValueError:
        parsed = None
    if parsed is None or str(parsed) != given:
        raise InvalidPacketError(
            f"{given[:80]!r} is not a UUID", pointer=pointer, expected="a UUID in lower case, with hyphens"
        )
    return given


def _request_hash(draft: TaskDraft) -> str:
    same = msgspec.structs.replace(draft, task_id=None, status=None)
    return hashlib.sha256(msgspec.json.encode(same, order="deterministic")).hexdigest()


def _check_payload(payload: JSONObject, schema: JSONObject | None) -> None:
    if schema is None:
        return
    mistake = best_match(Draft202012Validator(schema).iter_errors(payload))
    if mistake is None:
        return
    pointer = "".join(f"/{part}" for part in ("payload", *mistake.absolute_path))
    if mistake.validator == "required":
        missing = [key for key in mistake.validator_value if key not in mistake.instance]
        raise InvalidPacketError(
            f"{missing[0]!r} is missing",
            pointer=f"{pointer}/{missing[0]}",
            expected=_expected(schema, missing[0]),
        )
    if mistake.validator == "additionalProperties":
        known = tuple(mistake.schema.get("properties", {}))
        unknown = [key for key in mistake.instance if key not in known]
        raise InvalidPacketError(
            f"unknown key {unknown[0][:80]!r}",
            pointer=f"{pointer}/{unknown[0][:80]}",
            expected=f"one of: {', '.join(known)}",
        )
    raise InvalidPacketError(
        f"{mistake.message[:300]}",
        pointer=pointer,
        expected=f"{mistake.validator}: {mistake.validator_value}",
    )


def _expected(schema: JSONObject, key: str) -> str:
    prop = schema.get("properties", {}).get(key, {})
    return f"{prop.get('type', 'a value')}{': ' + prop['description'] if 'description' in prop else ''}"
