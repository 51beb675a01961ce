"""Many LLMs as one: an engine that chooses for each request, waits, retries and falls back."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import structlog

from ai_agent_server.config.settings import BalancerSettings
from ai_agent_server.core.chat import ChatDelta, ChatRequest, ChatUsage, Decision
from ai_agent_server.errors import (
    AgentServerError,
    ContextOverflowError,
    EngineBusyError,
    EngineError,
    EngineProtocolError,
    EngineRequestError,
    ModelNotFoundError,
    NoLLMError,
    UnknownLLMError,
)
from ai_agent_server.llm_engines.base import ModelCard
from ai_agent_server.load_balancer import circuit, estimate
from ai_agent_server.load_balancer.base import BalancingStrategy, LLMView, Requirements
from ai_agent_server.load_balancer.load_balancer import decide, may_wait_for, refusals
from ai_agent_server.load_balancer.standing import HeldEngine, Member, Standing, same_engine

__all__ = ("BalancedEngine", "BalancerEvent", "Member")

MAX_WAITING = 256
RESIDENCY_TIMEOUT_S = 2.0

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
WARNINGS = frozenset({"llm.circuit_opened", "llm.retried", "llm.given_up", "llm.close_failed"})


class BalancerEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A fact for the log and the metrics. `why` is an error's class or a few words, never a prompt."""

    kind: EventKind
    llm: str
    why: str = ""
    wait_s: float = 0.0
    """Until a retry or a probe, or how long a request waited for a slot."""


@dataclass
class _Journey:
    """One request on its way from LLM to LLM."""

    wanted: Requirements
    attempts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    last_error: EngineError | None = None
    waited_s: float = 0.0

    def exclude(self, *names: str) -> None:
        self.wanted = msgspec.structs.replace(self.wanted, exclude=self.wanted.exclude.union(names))


@dataclass
class _Lease:
    """A request's place on an LLM, from the decision to the end of the stream."""

    standing: Standing
    held: HeldEngine
    decision: Decision
    probe: bool
    cold: bool
    started_s: float
    first_token_s: float | None = None
    shown: bool = False
    """Whether the circuit was told how it went."""


@dataclass
class _Waiter:
    """A request for which nobody has a place yet."""

    journey: _Journey
    granted: asyncio.Future[_Lease]
    target: str | None = None
    """The LLM whose slot it waits for; None while it waits for circuits."""


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
        on_event: Callable[[BalancerEvent], None] | None = None,
        keep_toggle: Callable[[str, bool], Awaitable[None]] | None = None,
        residency_interval_s: float = 5.0,
    ) -> None:
        """`clock` is monotonic, in seconds; `settings.strategy` is the name that decisions give."""
        self._standings = {name: Standing(name, member) for name, member in members.items()}
        self._strategy, self._settings = strategy, settings
        self._clock, self._rng, self._sleep = clock, rng, sleep
        self._on_event, self._keep_toggle = on_event, keep_toggle
        self._residency_interval_s = residency_interval_s
        self._waiters: list[_Waiter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._retired: set[HeldEngine] = set()
        self._watching = False
        self._closed = False
        self._log = structlog.get_logger("load_balancer")

    # The engine port

    async def stream(self, request: ChatRequest) -> AsyncIterator[ChatDelta]:
        """Answer `request`; the first delta says which LLM does, and why."""
        journey = _Journey(wanted=self.requirements(request))
        while True:
            lease = await self._lease(journey)
            try:
                async with aclosing(self._answer(lease, request)) as deltas:
                    async for delta in deltas:
                        yield delta
            except EngineError as exc:
                self._blame(lease, exc)
                if lease.first_token_s is not None or _is_the_askers(exc):
                    raise
                pause_s = self._next_step(journey, lease, exc)
            else:
                return
            finally:
                self._release(lease)
            if pause_s:
                await self._sleep(pause_s)

    async def models(self) -> tuple[ModelCard, ...]:
        """Every configured LLM by the name it has here, from what is known: no engine is asked."""
        return tuple(standing.card() for standing in self._standings.values())

    async def load(self, llm: str | None = None) -> None:
        """Bring an LLM into memory: by default the local one that a request without wishes would get."""
        if llm is None:
            llm = self.explain(Requirements(privacy="local")).chosen
            if llm is None:
                return
        standing = self._named(llm)
        await standing.held.engine.load()
        await self._look_at(standing)

    async def unload(self, llm: str | None = None) -> None:
        """Give an LLM's memory back, by default every local one's."""
        chosen = (
            [standing for standing in self._standings.values() if standing.settings.source == "local"]
            if llm is None
            else [self._named(llm)]
        )
        for standing in chosen:
            await standing.held.engine.unload()
            await self._look_at(standing)

    async def aclose(self) -> None:
        """End every wait, stop the background work, close every engine."""
        self._closed = True
        for waiter in tuple(self._waiters):
            self._end_wait(waiter, NoLLMError("the balancer is closed", refusals={}))
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for held in (*(standing.held for standing in self._standings.values()), *self._retired):
            await self._close(held)
        self._retired.clear()

    # What the server asks of it beside

    def start(self) -> None:
        """Watch residency in the background from now on: local engines only, and nothing is loaded."""
        if not self._watching and not self._closed:
            self._watching = True
            self._own(self._watch_residency())

    def requirements(self, request: ChatRequest) -> Requirements:
        """What `request` asks of an LLM; tokens are estimated."""
        return estimate.requirements(request)

    def views(self) -> tuple[LLMView, ...]:
        """Every configured LLM as it stands now."""
        return self._views(Counter(waiter.target for waiter in self._waiters))

    def explain(self, wanted: Requirements) -> Decision:
        """Which LLM would serve now, and why; nothing is called."""
        return self._decide(wanted, self.views())

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiters)

    def cost_usd(self, llm: str, usage: ChatUsage) -> float:
        """What `usage` cost on `llm`; 0 for an LLM that is configured no more."""
        standing = self._standings.get(llm)
        if standing is None:
            return 0.0
        view = standing.view(self._clock())
        return estimate.cost_usd(view, usage.input_tokens, usage.output_tokens)

    async def set_toggle(self, name: str, on: bool) -> None:
        """Switch an LLM on or off. What it is answering goes on; switching it on closes its circuit.

        Raises `UnknownLLMError`.
        """
        standing = self._named(name)
        if self._keep_toggle is not None:
            await self._keep_toggle(name, on)
        standing.toggle = on
        if on:
            standing.circuit = circuit.Circuit()
        self._tell("llm.toggled", name, why="on" if on else "off")
        self._dispatch(changed=True)

    async def replace(
        self,
        members: Mapping[str, Member],
        *,
        settings: BalancerSettings | None = None,
        strategy: BalancingStrategy | None = None,
    ) -> None:
        """Balance these from now on. Takes over the engines that are given.

        An LLM whose engine settings did not change keeps its engine, its model in memory and its
        figures; a new engine given for it is closed unused. An engine that is no longer needed is
        closed when its last stream has ended. Nobody who waits loses their place.
        """
        self._settings = settings or self._settings
        self._strategy = strategy or self._strategy
        old, self._standings = self._standings, {}
        idle: list[HeldEngine] = []
        for name, member in members.items():
            kept = old.get(name)
            same = kept is not None and (
                member.engine is kept.held.engine or same_engine(kept.settings, member.settings)
            )
            if kept is not None and same:
                kept.reconfigure(member.settings)
                self._standings[name] = kept
                if member.engine is not kept.held.engine:
                    idle.append(HeldEngine(name, member.engine))
            else:
                self._standings[name] = Standing(name, member)
        for name, standing in old.items():
            if self._standings.get(name) is standing:
                continue
            self._tell("llm.replaced", name)
            if standing.held.idle.is_set():
                idle.append(standing.held)
            else:
                self._retired.add(standing.held)
                self._own(self._close_after_last(standing.held))
        self._dispatch(changed=True)
        for held in idle:
            await self._close(held)

    async def refresh_residency(self) -> None:
        """Ask every local engine, at the same time, what it has in memory. Never loads a model."""
        local = [standing for standing in self._standings.values() if standing.settings.source == "local"]
        async with asyncio.TaskGroup() as group:
            for standing in local:
                group.create_task(self._look_at(standing))

    # One attempt

    async def _answer(self, lease: _Lease, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        """The engine's deltas. What comes before the first token is held back: it binds nobody yet."""
        standing = lease.standing
        usage, model, held_back_s, ended = ChatUsage(), "", 0.0, False
        async with aclosing(lease.held.engine.stream(request)) as deltas:
            async for delta in deltas:
                usage, model = delta.usage or usage, delta.model or model
                ended = ended or delta.finish_reason is not None
                if lease.first_token_s is not None:
                    passed_on = delta
                elif delta.text or delta.tool_calls or ended:
                    self._first_token(lease)
                    passed_on = msgspec.structs.replace(
                        delta,
                        usage=usage if delta.usage is None and usage != ChatUsage() else delta.usage,
                        model=model,
                        llm=standing.name,
                        source=standing.settings.source,
                        decision=lease.decision,
                    )
                else:
                    continue
                given_s = self._clock()
                yield passed_on
                held_back_s += self._clock() - given_s
        if not ended:
            raise EngineProtocolError("the stream ended without a finish_reason", engine=standing.name)
        writing_s = self._clock() - (lease.first_token_s or lease.started_s) - held_back_s
        standing.finished(usage, writing_s)
        lease.shown = True

    def _first_token(self, lease: _Lease) -> None:
        standing = lease.standing
        lease.first_token_s = self._clock()
        standing.first_token(
            lease.first_token_s - lease.started_s,
            cold=lease.cold,
            probe=lease.probe,
            settings=self._settings.circuit,
        )
        if lease.probe:
            lease.probe = False
            self._tell("llm.circuit_closed", standing.name)

    def _blame(self, lease: _Lease, error: EngineError) -> None:
        standing, now_s = lease.standing, self._clock()
        before = circuit.state(standing.circuit, now_s)
        standing.circuit = circuit.failed(
            standing.circuit,
            now_s,
            probe=lease.probe,
            settings=self._settings.circuit,
            blame=circuit.blame_for(error, cold=lease.cold),
            retry_after_s=error.retry_after_s if isinstance(error, EngineBusyError) else None,
        )
        lease.shown = True
        if before != "open" and circuit.state(standing.circuit, now_s) == "open":
            cooldown_s = circuit.cooldown_s(standing.circuit, now_s)
            self._tell("llm.circuit_opened", standing.name, why=type(error).__name__, wait_s=cooldown_s)

    def _next_step(self, journey: _Journey, lease: _Lease, error: EngineError) -> float:
        """Seconds to pause before the next decision, after a failure that nobody saw yet."""
        name, retry = lease.standing.name, self._settings.retry
        journey.last_error = error
        journey.failures[name] = f"{type(error).__name__}: {error.problem}"
        journey.attempts[name] += 1
        if isinstance(error, ContextOverflowError):
            # The estimate was too low: whoever has no more context than this one need not be asked.
            journey.wanted = msgspec.structs.replace(
                journey.wanted,
                input_tokens=max(journey.wanted.input_tokens, lease.standing.settings.context),
            )
        failed_probe = lease.probe and circuit.blame_for(error, cold=lease.cold) == "llm"
        if not error.retry_safe or failed_probe or journey.attempts[name] >= retry.attempts:
            journey.exclude(name)
            self._tell("llm.given_up", name, why=type(error).__name__)
            return 0.0
        if not circuit.admits(lease.standing.circuit, self._clock()):
            return 0.0
        ceiling_s = min(retry.backoff_max_s, retry.backoff_s * 2.0 ** (journey.attempts[name] - 1))
        pause_s = ceiling_s * self._rng.uniform(0.5, 1.0)
        self._tell("llm.retried", name, why=type(error).__name__, wait_s=pause_s)
        return pause_s

    # A place on an LLM

    async def _lease(self, journey: _Journey) -> _Lease:
        """A place, waited for where need be. Raises when there is none to be had."""
        started_s = self._clock()
        decision = self._decide(journey.wanted, self.views())
        hopeless = self._hopeless(journey, decision)
        if hopeless is not None:
            raise hopeless
        waiter = _Waiter(journey=journey, granted=asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        self._dispatch()
        if waiter.granted.done():
            return waiter.granted.result()
        if len(self._waiters) > MAX_WAITING:
            self._waiters.remove(waiter)
            raise NoLLMError(f"{MAX_WAITING} requests wait already", refusals=refusals(decision))
        try:
            lease = await self._wait(waiter, started_s + self._settings.max_wait_s - journey.waited_s)
        except BaseException:
            self._give_up_waiting(waiter)
            raise
        waited_s = self._clock() - started_s
        journey.waited_s += waited_s
        self._tell("llm.waited", lease.standing.name, wait_s=waited_s)
        return lease

    async def _wait(self, waiter: _Waiter, deadline_s: float) -> _Lease:
        while not waiter.granted.done():
            now_s = self._clock()
            if now_s >= deadline_s:
                return self._last_resort(waiter)
            opening_s = (
                standing.circuit.open_until_s
                for standing in self._standings.values()
                if standing.circuit.open_until_s is not None and standing.circuit.open_until_s > now_s
            )
            wake_s = min((deadline_s, *opening_s))
            sleeper: asyncio.Future[Any] = asyncio.ensure_future(self._sleep(wake_s - now_s))
            try:
                await asyncio.wait((waiter.granted, sleeper), return_when=asyncio.FIRST_COMPLETED)
            finally:
                sleeper.cancel()
                await asyncio.wait((sleeper,))
            if not waiter.granted.done():
                self._dispatch()
        return waiter.granted.result()

    def _last_resort(self, waiter: _Waiter) -> _Lease:
        """The wait is over: whoever may serve and has a place does, even one that ranks behind."""
        journey = waiter.journey
        full = [name for name, standing in self._standings.items() if not standing.has_slot]
        for name in full:
            journey.failures.setdefault(name, f"no free slot within {self._settings.max_wait_s:g} s")
        journey.exclude(*full)
        decision = self._decide(journey.wanted, self.views())
        if decision.chosen is None:
            raise self._nobody(
                journey, decision, f"no LLM had a place within {self._settings.max_wait_s:g} s"
            )
        self._waiters.remove(waiter)
        return self._grant(self._standings[decision.chosen], decision)

    def _dispatch(self, *, changed: bool = False) -> None:
        """Give places to those who wait, first come first served.

        With `changed` (toggles, configuration) those for whom there is no hope any more are told.
        """
        ahead: Counter[str | None] = Counter()
        for waiter in tuple(self._waiters):
            if not changed and not self._any_place():
                return
            decision = self._decide(waiter.journey.wanted, self._views(ahead))
            hopeless = self._hopeless(waiter.journey, decision)
            if hopeless is not None:
                self._end_wait(waiter, hopeless)
                continue
            standing = self._standings.get(decision.chosen or "")
            if standing is not None and standing.has_slot:
                self._waiters.remove(waiter)
                waiter.granted.set_result(self._grant(standing, decision))
                continue
            waiter.target = decision.chosen
            ahead[waiter.target] += 1

    def _any_place(self) -> bool:
        now_s = self._clock()
        return any(
            standing.toggle and standing.has_slot and circuit.admits(standing.circuit, now_s)
            for standing in self._standings.values()
        )

    def _grant(self, standing: Standing, decision: Decision) -> _Lease:
        now_s = self._clock()
        cold = standing.resident is False
        return _Lease(
            standing=standing,
            held=standing.held,
            decision=decision,
            probe=standing.begin(now_s),
            cold=cold,
            started_s=now_s,
        )

    def _release(self, lease: _Lease) -> None:
        standing = lease.standing
        if not lease.shown:
            standing.circuit = circuit.abandoned(standing.circuit, probe=lease.probe)
        standing.in_flight -= 1
        lease.held.leave()
        self._dispatch()

    def _give_up_waiting(self, waiter: _Waiter) -> None:
        """The asker left, perhaps in the very moment in which a place was given."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        granted = waiter.granted
        if not granted.done():
            granted.cancel()
        elif not granted.cancelled() and granted.exception() is None:
            self._release(granted.result())

    def _end_wait(self, waiter: _Waiter, error: AgentServerError) -> None:
        self._waiters.remove(waiter)
        if not waiter.granted.done():
            waiter.granted.set_exception(error)

    def _hopeless(self, journey: _Journey, decision: Decision) -> AgentServerError | None:
        """Why waiting would be in vain, None where it would not."""
        if self._closed:
            return NoLLMError("the balancer is closed", refusals={})
        if decision.chosen is not None:
            return None
        left_s = self._settings.max_wait_s - journey.waited_s
        now_s = self._clock()
        if any(
            circuit.cooldown_s(self._standings[name].circuit, now_s) <= left_s
            for name in may_wait_for(decision)
        ):
            return None
        return self._nobody(journey, decision, "no LLM may serve the request")

    def _nobody(self, journey: _Journey, decision: Decision, problem: str) -> AgentServerError:
        if isinstance(journey.last_error, EngineRequestError):
            return journey.last_error
        why = refusals(decision)
        why |= {
            name: f"{label.partition(':')[0]}: {journey.failures[name]}"
            for name, label in why.items()
            if name in journey.failures
        }
        nobody = NoLLMError(problem, refusals=why)
        nobody.__cause__ = journey.last_error
        return nobody

    def _decide(self, wanted: Requirements, views: tuple[LLMView, ...]) -> Decision:
        return decide(wanted, views, self._strategy, strategy_name=self._settings.strategy)

    def _views(self, waiting: Counter[str | None]) -> tuple[LLMView, ...]:
        now_s = self._clock()
        return tuple(
            standing.view(now_s, waiting=waiting[name]) for name, standing in self._standings.items()
        )

    def _named(self, name: str) -> Standing:
        standing = self._standings.get(name)
        if standing is None:
            raise UnknownLLMError(name, tuple(self._standings))
        return standing

    # Background work and the ends of engines

    async def _watch_residency(self) -> None:
        while True:
            await self.refresh_residency()
            await self._sleep(self._residency_interval_s)

    async def _look_at(self, standing: Standing) -> None:
        try:
            async with asyncio.timeout(RESIDENCY_TIMEOUT_S):
                cards = await standing.held.engine.models()
        except (EngineError, TimeoutError):
            standing.seen(())
        else:
            standing.seen(cards)

    async def _close_after_last(self, held: HeldEngine) -> None:
        await held.idle.wait()
        await self._close(held)
        self._retired.discard(held)

    async def _close(self, held: HeldEngine) -> None:
        try:
            await held.engine.aclose()
        except (EngineError, OSError) as exc:
            self._tell("llm.close_failed", held.name, why=type(exc).__name__)

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _tell(
        self,
        kind: EventKind,
        llm: str,
        *,
        why: str = "",
        wait_s: float = 0.0,
    ) -> None:
        tell = self._log.warning if kind in WARNINGS else self._log.info
        tell(kind, llm=llm, why=why, wait_s=round(wait_s, 3))
        if self._on_event is not None:
            self._on_event(BalancerEvent(kind=kind, llm=llm, why=why, wait_s=wait_s))


def _is_the_askers(error: EngineError) -> bool:
    """Whether the request itself was wrong, so that no other LLM need be asked."""
    elsewhere = ContextOverflowError | ModelNotFoundError
    return isinstance(error, EngineRequestError) and not isinstance(error, elsewhere)
