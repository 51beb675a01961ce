"""Many LLMs as one: an engine that chooses for each request, waits, retries and falls back."""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from functools import partial
from types import TracebackType
from typing import Literal

import msgspec
import structlog

from ai_agent_server.config.settings import Accelerator, BalancerSettings
from ai_agent_server.core.chat import ChatDelta, ChatRequest, ChatUsage, Decision
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.errors import (
    ContextOverflowError,
    EngineBusyError,
    EngineError,
    EngineRequestError,
    ModelNotFoundError,
    UnknownLLMError,
)
from ai_agent_server.llm_engines.base import CountingEngine, EmbeddingEngine, ModelCard
from ai_agent_server.load_balancer import circuit, estimate
from ai_agent_server.load_balancer._call import Call
from ai_agent_server.load_balancer.accelerator import AcceleratorQueue
from ai_agent_server.load_balancer.admission import Admission, Journey, Lease
from ai_agent_server.load_balancer.base import (
    AcceleratorView,
    BalancingStrategy,
    LLMView,
    Requirements,
    Sent,
)
from ai_agent_server.load_balancer.scheduler import CONFIGURED_ANEW, RECALLED, SPILLED, Refuse, Start
from ai_agent_server.load_balancer.standing import HeldEngine, Member, Standing, same_engine
from ai_agent_server.memory_gauges.base import MemoryGauge
from ai_agent_server.tracing.base import Tracer

__all__ = ("BalancedEngine", "Member")

log = structlog.get_logger(__name__)

RESIDENCY_TIMEOUT_S = 2.0
COUNT_TIMEOUT_S = 0.5
"""After this the estimate has to do."""
A_WAIT_S = 0.001
"""What is shorter was no wait."""

EventKind = Literal[
    "llm.circuit_opened",
    "llm.circuit_closed",
    "llm.retried",
    "llm.given_up",
    "llm.waited",
    "llm.toggled",
    "llm.replaced",
    "llm.close_failed",
]
KeepToggle = Callable[[str, bool, bool], Awaitable[None]]
"""Called with an LLM's name, whether it is on, and what the configuration said then."""
WARNINGS = frozenset({"llm.circuit_opened", "llm.retried", "llm.given_up", "llm.close_failed"})


class BalancedEngine:
    """An `LLMEngine` over many: agents cannot tell one LLM from ten.

    A request goes where `decide` says. Local LLMs get no more than `slots` at once; the others wait
    in one line, first come first served, `max_wait_s` at most. A failure before the first token is
    repeated with jittered back-off and then falls back; one after it goes through to the asker.
    Raises `NoLLMError` with every LLM's refusal, the engine's `EngineRequestError` when the request
    itself was wrong, and any `EngineError` after the first token.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        *,
        strategy: BalancingStrategy,
        settings: BalancerSettings,
        clock: Callable[[], float],
        rng: random.Random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        keep_toggle: KeepToggle | None = None,
        residency_interval_s: float = 5.0,
        accelerators: Mapping[str, Accelerator] | None = None,
        gauges: Mapping[str, MemoryGauge] | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """`clock` is monotonic, in seconds; `settings.strategy` is the name that decisions give.

        `keep_toggle` makes a switch survive a restart before it counts. LLMs whose settings name one
        of `accelerators` share its memory and its queue; `gauges` tell what other programs take of it.
        Every try of a chat is a span of `tracer`.
        """
        self._queues = {
            name: AcceleratorQueue(
                name, each, settings, clock=clock, sleep=sleep, gauge=(gauges or {}).get(name)
            )
            for name, each in (accelerators or {}).items()
        }
        self._admission = Admission(
            {name: Standing(name, member, self._queue_of(member)) for name, member in members.items()},
            strategy=strategy,
            settings=settings,
            clock=clock,
            sleep=sleep,
        )
        self._clock, self._rng, self._sleep = clock, rng, sleep
        self._tracer = tracer
        self._keep_toggle = keep_toggle
        self._residency_interval_s = residency_interval_s
        self._watch: asyncio.Task[None] | None = None
        self._retired: dict[HeldEngine, asyncio.Task[None]] = {}
        self._configure_queues()

    # The engine port

    async def stream(
        self, request: ChatRequest, *, sent: Sent | None = None
    ) -> AsyncGenerator[ChatDelta, None]:
        """Answer `request`; the first delta says which LLM does, and why."""
        wanted, began_s = self.requirements(request), self._clock()
        doubtful = self._doubtful(wanted)
        if doubtful:
            wanted = msgspec.structs.replace(wanted, counted=await self._counts(request, doubtful))
        journey = Journey(wanted=wanted)
        while True:
            async with _Attempt(self, journey) as lease:
                queued_s = lease.started_s - began_s if lease.waited_s or journey.attempts else 0.0
                if sent is not None:
                    sent(lease.standing.name, lease.standing.settings.source)
                with Call(
                    lease,
                    request,
                    queued_s=queued_s,
                    clock=self._clock,
                    first_token=self._first_token,
                    tracer=self._tracer,
                ) as call:
                    async with aclosing(lease.held.engine.stream(call.request)) as deltas:
                        async for delta in deltas:
                            passed_on = call.take(delta)
                            if passed_on is not None:
                                yield passed_on
                                call.given()
                    call.finish()
                return

    async def embed(self, request: EmbeddingRequest) -> EmbeddingReply:
        """The vectors of the inputs; the reply says which LLM made them, and why that one."""
        journey = Journey(wanted=estimate.embedding_requirements(request))
        while True:
            async with _Attempt(self, journey) as lease:
                return await self._vectors(lease, request)

    async def models(self) -> tuple[ModelCard, ...]:
        """Every configured LLM by the name it has here, from what is known: no engine is asked."""
        return tuple(standing.card() for standing in self._admission.standings.values())

    async def load(self, llm: str | None = None) -> None:
        """Bring an LLM into memory: by default the local one that a request without wishes would get."""
        if llm is None:
            llm = self.explain(Requirements(privacy="local")).chosen
            if llm is None:
                return
        standing = self._named(llm)
        if standing.accelerator is None:
            await standing.held.engine.load()
        else:
            await self._load_in_turn(standing, standing.accelerator)
        await self._look_at(standing)

    async def unload(self, llm: str | None = None) -> None:
        """Give an LLM's memory back, by default every local one's.

        On an accelerator its answers end first; `EngineBusyError` where they took too long, or it stayed.
        """
        for standing in self._local() if llm is None else (self._named(llm),):
            if standing.accelerator is None:
                await standing.held.engine.unload()
            else:
                await self._unload_in_turn(standing, standing.accelerator)
            await self._look_at(standing)

    async def aclose(self) -> None:
        """End every wait, stop the background work, close every engine."""
        self._admission.close()
        for queue in self._queues.values():
            await queue.aclose()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait((self._watch,))
        for held in self._retired:
            held.idle.set()  # its streams are waited for no longer
        async with asyncio.TaskGroup() as group:
            for standing in self._admission.standings.values():
                group.create_task(self._close(standing.held))
        while self._retired:
            await asyncio.wait(tuple(self._retired.values()))

    # What the server asks of it beside

    def start(self) -> None:
        """Watch residency in the background from now on: local engines only, and nothing is loaded."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._watch_residency(), name="residency-watch")

    def requirements(self, request: ChatRequest) -> Requirements:
        """What `request` asks of an LLM; tokens are estimated."""
        return estimate.requirements(request)

    async def count(self, request: ChatRequest) -> int | None:
        """The prompt's tokens by the LLM that would serve `request` if it had room for any; None where that
        one cannot tell them soon, or they are too many for it in any case."""
        wanted = self.requirements(request)
        chosen = self.explain(_of_any_length(wanted)).chosen
        if chosen is None:
            return None
        standing = self._named(chosen)
        if estimate.LEAST * wanted.input_tokens > standing.settings.context:
            return None  # megabytes, which nobody pays the counting of
        return (await self._counts(request, (standing,))).get(chosen)

    def views(self) -> tuple[LLMView, ...]:
        """Every configured LLM as it stands now."""
        return self._admission.views()

    def explain(self, wanted: Requirements) -> Decision:
        """Which LLM would serve now, and why; nothing is called."""
        return self._admission.decide(wanted)

    def accelerators(self) -> tuple[AcceleratorView, ...]:
        """Every accelerator: its memory, its queue, its last decisions."""
        return tuple(queue.view() for queue in self._queues.values())

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return self._admission.waiting + sum(queue.queued for queue in self._queues.values())

    def cost_usd(self, llm: str, usage: ChatUsage) -> float:
        """What `usage` cost on `llm`; 0 for an LLM that is configured no more."""
        standing = self._admission.standings.get(llm)
        if standing is None:
            return 0.0
        return estimate.cost_usd(standing.settings, usage.input_tokens, usage.output_tokens)

    async def set_toggle(self, name: str, on: bool) -> None:
        """Switch an LLM on or off. What it is answering goes on; switching it on closes its circuit.

        One that is switched off leaves the memory of its accelerator. Raises `UnknownLLMError`.
        """
        standing = self._named(name)
        over: bool | None = None
        while self._keep_toggle is not None and over != standing.settings.toggle:
            over = standing.settings.toggle
            await self._keep_toggle(name, on, over)
            standing = self._named(name)  # another, where a reload came between
        standing.toggle = on
        if on:
            standing.circuit = circuit.Circuit()
        else:
            _clear(standing)
        self._tell("llm.toggled", name, why="on" if on else "off")
        self._admission.dispatch(changed=True)

    def replace(
        self,
        members: Mapping[str, Member],
        *,
        settings: BalancerSettings | None = None,
        strategy: BalancingStrategy | None = None,
    ) -> None:
        """Balance these from now on, at once. Takes over the engines that are given.

        An LLM whose engine settings did not change keeps its engine, its model in memory and its
        figures; a new engine given for it is closed unused. An engine that is no longer needed is
        closed in the background when its last stream has ended. Nobody who waits loses their place.
        """
        admission = self._admission
        admission.settings = settings or admission.settings
        admission.strategy = strategy or admission.strategy
        old, admission.standings = admission.standings, {}
        switched_off: list[Standing] = []
        for name, member in members.items():
            kept = old.get(name)
            if kept is not None and (
                member.engine is kept.held.engine or same_engine(kept.settings, member.settings)
            ):
                was_on = kept.toggle
                kept.reconfigure(member.settings)
                admission.standings[name] = kept
                if was_on and not kept.toggle:
                    switched_off.append(kept)
                if member.engine is not kept.held.engine:
                    self._retire(HeldEngine(name, member.engine))
            else:
                admission.standings[name] = Standing(name, member, self._queue_of(member))
        replaced = frozenset(
            name for name, standing in old.items() if admission.standings.get(name) is not standing
        )
        # First, so that those who wait for an engine let go of it.
        self._configure_queues(replaced)
        for standing in switched_off:
            _clear(standing)
        for name in old:
            if name in replaced:
                self._tell("llm.replaced", name)
                self._retire(old[name].held, old[name].accelerator)
        admission.dispatch(changed=True)

    async def refresh_residency(self) -> None:
        """Ask every local engine, at the same time, what it has in memory. Never loads a model.

        Then each accelerator's gauge, what is left: what an engine has is not taken for another's.
        """
        async with asyncio.TaskGroup() as group:
            for standing in self._local():
                group.create_task(self._look_at(standing))
        async with asyncio.TaskGroup() as group:
            for queue in self._queues.values():
                group.create_task(queue.look_outside())

    # The prompt's length

    def _doubtful(self, wanted: Requirements) -> tuple[Standing, ...]:
        """The LLMs that may serve, and whose context the prompt may fit or not for all that is estimated."""
        near = [
            standing
            for standing in self._admission.standings.values()
            if estimate.is_doubtful(
                wanted.input_tokens, standing.settings.context - estimate.answer_room(wanted)
            )
        ]
        if not near:
            return ()
        candidates = self.explain(_of_any_length(wanted)).candidates
        allowed = {candidate.llm for candidate in candidates if candidate.refused_by is None}
        return tuple(standing for standing in near if standing.name in allowed)

    async def _counts(self, request: ChatRequest, standings: tuple[Standing, ...]) -> dict[str, int]:
        """LLM -> the prompt's tokens, of those that can count them and do so at once."""
        counts: dict[str, int] = {}

        async def ask(name: str, engine: CountingEngine) -> None:
            try:
                tokens = await engine.count(request)
            except EngineError as exc:
                log.info("llm.not_counted", llm=name, why=type(exc).__name__)
            else:
                if tokens is not None and tokens > 0:
                    counts[name] = tokens

        with suppress(TimeoutError):
            async with asyncio.timeout(COUNT_TIMEOUT_S), asyncio.TaskGroup() as group:
                for standing in standings:
                    engine = standing.held.engine
                    # Nobody else is told a prompt that may never come to them.
                    if standing.settings.source == "local" and isinstance(engine, CountingEngine):
                        group.create_task(ask(standing.name, engine))
        return counts

    # One attempt

    def _failed(self, journey: Journey, lease: Lease, error: EngineError) -> float | None:
        """Seconds to pause before another try; None where the failure is the asker's to know of."""
        self._blame(lease, error)
        if lease.first_token_s is not None or _is_the_askers(error):
            return None
        return self._next_step(journey, lease, error)

    async def _place(self, journey: Journey) -> Lease:
        """A place, and where the LLM is on an accelerator a turn there."""
        while True:
            lease = await self._admission.place(journey)
            lease.queue = lease.standing.accelerator
            if lease.queue is None:
                return lease
            if not self._stands(lease.standing):
                # A reload came between: its engine is to be closed, which would wait for this very request.
                self._admission.release(lease)
                continue
            asked_s = self._clock()
            try:
                turn = await lease.queue.turn(
                    lease.standing.name,
                    key=journey.wanted.key,
                    urgency=journey.wanted.urgency,
                    spill_after_s=self._admission.spills_in_s(journey),
                    spills=partial(self._spills, journey),
                )
            except BaseException:
                self._admission.release(lease)
                raise
            lease.started_s = self._clock()
            waited_s = lease.started_s - asked_s
            if waited_s >= A_WAIT_S:
                lease.waited_s += waited_s
                journey.waited_s += waited_s
            if isinstance(turn, Start):
                lease.turn, lease.cold = turn.request, False
                return lease
            self._admission.release(lease)
            _note_refusal(journey, lease.standing.name, turn)

    def _spills(self, journey: Journey) -> bool:
        """It waited here for as long as it should: whether an API is to serve it now."""
        journey.now_overdue()
        chosen = self._admission.decide(journey.wanted).chosen
        return chosen is not None and self._named(chosen).settings.source == "api"

    async def _load_in_turn(self, standing: Standing, queue: AcceleratorQueue) -> None:
        turn = await queue.turn(standing.name, key="", urgency="interactive")
        if isinstance(turn, Refuse):
            raise EngineBusyError(turn.why, engine=standing.name, retry_after_s=turn.retry_after_s)
        queue.leave(turn.request, answered=False)

    async def _unload_in_turn(self, standing: Standing, queue: AcceleratorQueue) -> None:
        try:
            async with asyncio.timeout(self._admission.settings.max_wait_s):
                # Shielded: another may wait for the same.
                gone = await asyncio.shield(queue.dismiss(standing.name))
        except TimeoutError as exc:
            raise EngineBusyError("its answers have not ended", engine=standing.name) from exc
        if not gone:
            raise EngineBusyError("it kept its model in memory", engine=standing.name)

    async def _vectors(self, lease: Lease, request: EmbeddingRequest) -> EmbeddingReply:
        standing, engine = lease.standing, lease.held.engine
        if not isinstance(engine, EmbeddingEngine):
            raise EngineRequestError("this engine cannot embed", engine=standing.name)
        reply = await engine.embed(request)
        self._first_token(lease)
        standing.finished(reply.usage, 0.0)
        lease.shown = lease.answered = True
        return msgspec.structs.replace(
            reply, llm=standing.name, source=standing.settings.source, decision=lease.decision
        )

    def _first_token(self, lease: Lease) -> None:
        standing = lease.standing
        lease.first_token_s = self._clock()
        standing.first_token(
            lease.first_token_s - lease.started_s,
            cold=lease.cold,
            probe=lease.probe,
            settings=self._admission.settings.circuit,
        )
        if lease.probe:
            lease.probe = False
            self._tell("llm.circuit_closed", standing.name)

    def _blame(self, lease: Lease, error: EngineError) -> None:
        standing, now_s = lease.standing, self._clock()
        before = circuit.state(standing.circuit, now_s)
        standing.circuit = circuit.failed(
            standing.circuit,
            now_s,
            probe=lease.probe,
            settings=self._admission.settings.circuit,
            blame=circuit.blame_for(error, cold=lease.cold),
            retry_after_s=error.retry_after_s if isinstance(error, EngineBusyError) else None,
        )
        lease.shown = True
        if before != "open" and circuit.state(standing.circuit, now_s) == "open":
            cooldown_s = circuit.cooldown_s(standing.circuit, now_s)
            self._tell("llm.circuit_opened", standing.name, why=type(error).__name__, wait_s=cooldown_s)
            if standing.accelerator is not None and self._stands(standing):
                standing.accelerator.recall(standing.name)

    def _next_step(self, journey: Journey, lease: Lease, error: EngineError) -> float:
        """Seconds to pause before the next decision, after a failure that nobody saw yet."""
        name, retry = lease.standing.name, self._admission.settings.retry
        journey.last_error = error
        journey.failures[name] = f"{type(error).__name__}: {error.problem}"
        attempt = journey.attempts[name] = journey.attempts.get(name, 0) + 1
        if isinstance(error, ContextOverflowError):
            # The estimate was too low: whoever has no more context than this one need not be asked.
            journey.wanted = msgspec.structs.replace(
                journey.wanted,
                input_tokens=max(journey.wanted.input_tokens, lease.standing.settings.context),
            )
        failed_probe = lease.probe and circuit.blame_for(error, cold=lease.cold) == "llm"
        if not error.retry_safe or failed_probe or attempt >= retry.attempts:
            journey.exclude(name)
            self._tell("llm.given_up", name, why=type(error).__name__)
            return 0.0
        if not circuit.admits(lease.standing.circuit, self._clock()):
            return 0.0
        ceiling_s = min(retry.backoff_max_s, retry.backoff_s * 2.0 ** (attempt - 1))
        pause_s = ceiling_s * self._rng.uniform(0.5, 1.0)
        self._tell("llm.retried", name, why=type(error).__name__, wait_s=pause_s)
        return pause_s

    def _local(self) -> tuple[Standing, ...]:
        standings = self._admission.standings.values()
        return tuple(standing for standing in standings if standing.settings.source == "local")

    def _stands(self, standing: Standing) -> bool:
        """Whether it is configured still."""
        return self._admission.standings.get(standing.name) is standing

    def _named(self, name: str) -> Standing:
        standing = self._admission.standings.get(name)
        if standing is None:
            raise UnknownLLMError(name, tuple(self._admission.standings))
        return standing

    # Background work and the ends of engines

    async def _watch_residency(self) -> None:
        while True:
            await self.refresh_residency()
            await self._sleep(self._residency_interval_s)

    async def _look_at(self, standing: Standing) -> None:
        cards: tuple[ModelCard, ...] = ()
        began_s = self._clock()
        try:
            async with asyncio.timeout(RESIDENCY_TIMEOUT_S):
                cards = await standing.held.engine.models()
        except (EngineError, TimeoutError):
            pass  # a request will tell, if there is one
        except Exception:
            # A fault in one engine must not end the watch over the others.
            log.exception("llm.residency_unknown", llm=standing.name)
        standing.seen(cards, began_s)

    def _retire(self, held: HeldEngine, queue: AcceleratorQueue | None = None) -> None:
        """Close it after its last stream, then tell `queue`, which holds memory for it."""
        self._retired[held] = asyncio.create_task(
            self._close_after_last(held, queue), name=f"close {held.name}"
        )

    async def _close_after_last(self, held: HeldEngine, queue: AcceleratorQueue | None) -> None:
        try:
            await held.idle.wait()
            await self._close(held)
        finally:
            del self._retired[held]
            if queue is not None:
                queue.retired(held.name)

    def _queue_of(self, member: Member) -> AcceleratorQueue | None:
        return self._queues.get(member.settings.accelerator or "")

    def _configure_queues(self, replaced: frozenset[str] = frozenset()) -> None:
        for queue in self._queues.values():
            queue.configure(
                {
                    name: standing.engined
                    for name, standing in self._admission.standings.items()
                    if standing.accelerator is queue
                },
                self._admission.settings,
                replaced=replaced,
            )

    async def _close(self, held: HeldEngine) -> None:
        try:
            await held.engine.aclose()
        except (EngineError, OSError) as exc:
            self._tell("llm.close_failed", held.name, why=type(exc).__name__)
        except Exception:
            # A fault in one engine must not leave the others open.
            log.exception("llm.close_failed", llm=held.name)

    def _tell(
        self,
        kind: EventKind,
        llm: str,
        *,
        why: str = "",
        wait_s: float = 0.0,
    ) -> None:
        """Log a fact. `why` is an error's class or a few words, never a prompt.

        `wait_s` is until a retry or a probe, or how long a request waited for a slot.
        """
        tell = log.warning if kind in WARNINGS else log.info
        tell(kind, llm=llm, why=why, wait_s=round(wait_s, 3))


class _Attempt:
    """A place for one try. A failure that another try may make good ends here, after its pause.

    No generator: the event loop notes the begin and the end of each.
    """

    def __init__(self, balancer: BalancedEngine, journey: Journey) -> None:
        self._balancer, self._journey = balancer, journey

    async def __aenter__(self) -> Lease:
        self._lease = lease = await self._balancer._place(self._journey)
        try:
            if lease.waited_s:
                self._balancer._tell("llm.waited", lease.standing.name, wait_s=lease.waited_s)
        except BaseException:
            self._balancer._admission.release(lease)
            raise
        return lease

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        balancer, pause_s = self._balancer, None
        try:
            if isinstance(error, EngineError):
                pause_s = balancer._failed(self._journey, self._lease, error)
        finally:
            balancer._admission.release(self._lease)
        if pause_s:
            await balancer._sleep(pause_s)
        return pause_s is not None


def _clear(standing: Standing) -> None:
    """It was switched off: those who wait for it are placed again, and its memory is for others."""
    if standing.accelerator is not None:
        standing.accelerator.recall(standing.name)
        standing.accelerator.dismiss(standing.name)


def _of_any_length(wanted: Requirements) -> Requirements:
    return msgspec.structs.replace(wanted, input_tokens=0)


def _is_the_askers(error: EngineError) -> bool:
    """Whether the request itself was wrong, so that no other LLM need be asked."""
    elsewhere = ContextOverflowError | ModelNotFoundError
    return isinstance(error, EngineRequestError) and not isinstance(error, elsewhere)


def _note_refusal(journey: Journey, name: str, refusal: Refuse) -> None:
    """An accelerator's queue said no: the request goes elsewhere, or ends with when to come again."""
    if refusal.why in {CONFIGURED_ANEW, RECALLED, SPILLED}:
        return  # to be placed again
    journey.failures[name] = refusal.why
    journey.exclude(name)
    if refusal.retry_after_s is not None:
        journey.last_error = EngineBusyError(refusal.why, engine=name, retry_after_s=refusal.retry_after_s)
