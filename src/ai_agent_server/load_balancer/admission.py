"""Places on LLMs: who gets one now, and the one line of those who wait, first come first served."""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ai_agent_server.config.settings import BalancerSettings
from ai_agent_server.core.chat import Decision
from ai_agent_server.errors import AgentServerError, EngineError, EngineRequestError, NoLLMError
from ai_agent_server.load_balancer import circuit
from ai_agent_server.load_balancer.accelerator import AcceleratorQueue
from ai_agent_server.load_balancer.base import BalancingStrategy, LLMView, Requirements
from ai_agent_server.load_balancer.load_balancer import decide, may_wait_for, refusals
from ai_agent_server.load_balancer.standing import HeldEngine, Standing

MAX_WAITING = 256


@dataclass
class Journey:
    """One request on its way from LLM to LLM."""

    wanted: Requirements
    attempts: dict[str, int] = field(default_factory=dict)
    """LLM -> how often it failed this request."""
    failures: dict[str, str] = field(default_factory=dict)
    """What went wrong on each LLM, for the one who is told that none is left."""
    last_error: EngineError | None = None
    waited_s: float = 0.0

    def now_overdue(self) -> None:
        """It has waited on this machine for as long as it should."""
        self.wanted = msgspec.structs.replace(self.wanted, overdue=True)

    def exclude(self, *names: str) -> None:
        """These LLMs are asked no more."""
        self.wanted = msgspec.structs.replace(self.wanted, exclude=self.wanted.exclude.union(names))


@dataclass
class Lease:
    """A request's place on an LLM, from the decision to the end of the stream."""

    standing: Standing
    held: HeldEngine
    decision: Decision
    probe: bool
    """It is the circuit's probe, until its first token came."""
    cold: bool
    """The model was not in memory when it was sent."""
    started_s: float
    waited_s: float = 0.0
    first_token_s: float | None = None
    shown: bool = False
    """Whether the circuit was told how it went."""
    answered: bool = False
    """The whole answer came."""
    queue: AcceleratorQueue | None = None
    turn: str | None = None
    """Its turn on an accelerator."""


@dataclass
class _Waiter:
    journey: Journey
    granted: asyncio.Future[Lease]
    target: str | None
    """The LLM whose slot it waits for; None while it waits for circuits."""
    sleeper: asyncio.Future[Any] | None = None
    wakes_s: float = 0.0


class Admission:
    """Gives out places by `decide`: never more than `slots` at once on a local LLM, one probe on a circuit.

    Whatever frees a place calls `dispatch`, which goes through the line in order; a place is taken in
    the same step in which it is decided on, so that no two requests see the same free slot.
    """

    def __init__(
        self,
        standings: dict[str, Standing],
        *,
        strategy: BalancingStrategy,
        settings: BalancerSettings,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self.standings, self.strategy, self.settings = standings, strategy, settings
        self._clock, self._sleep = clock, sleep
        self._waiters: list[_Waiter] = []
        self._closed = False

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._waiters)

    def views(self) -> tuple[LLMView, ...]:
        """Every LLM as it stands now."""
        return self._views(Counter(waiter.target for waiter in self._waiters) if self._waiters else {})

    def decide(self, wanted: Requirements) -> Decision:
        """Which LLM would serve now."""
        return self._decide(wanted, self.views())

    async def place(self, journey: Journey) -> Lease:
        """A place, waited for where need be, to be given back by `release`. Raises when none is to be had."""
        started_s = self._clock()
        decision = self.decide(journey.wanted)
        hopeless = self._hopeless(journey, decision)
        if hopeless is not None:
            raise hopeless
        standing = self.standings.get(decision.chosen or "")
        if standing is not None and standing.has_slot and not self._waiters:
            return self._grant(standing, decision)
        granted: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(journey=journey, granted=granted, target=decision.chosen)
        self._waiters.append(waiter)
        self.dispatch()
        if granted.done():
            return granted.result()
        if len(self._waiters) > MAX_WAITING:
            self._waiters.remove(waiter)
            raise NoLLMError(f"{MAX_WAITING} requests wait already", refusals=refusals(decision))
        try:
            lease = await self._wait(waiter, started_s + self.settings.max_wait_s - journey.waited_s)
        except BaseException:
            self._leave(waiter)
            raise
        lease.waited_s = self._clock() - started_s
        journey.waited_s += lease.waited_s
        return lease

    def spills_in_s(self, journey: Journey) -> float:
        """For how long it may wait on before an API is to serve it; infinite where none ever is."""
        bound_s = self.settings.spill_after_s
        if bound_s is None:
            return math.inf
        return 0.0 if journey.wanted.overdue else max(0.0, bound_s - journey.waited_s)

    def release(self, lease: Lease) -> None:
        """The stream ended, however it did."""
        standing = lease.standing
        if not lease.shown:
            standing.circuit = circuit.abandoned(standing.circuit, probe=lease.probe)
        standing.in_flight -= 1
        lease.held.leave()
        if lease.queue is not None and lease.turn is not None:
            lease.queue.leave(lease.turn, answered=lease.answered)
        self.dispatch(changed=circuit.state(standing.circuit, self._clock()) == "open")

    def dispatch(self, *, changed: bool = False) -> None:
        """Give places to those who wait, in order.

        With `changed` (toggles, configuration, an open circuit) those for whom there is no hope any
        more are told.
        """
        if not self._waiters:
            return
        ahead: Counter[str | None] = Counter()
        for waiter in tuple(self._waiters):
            if not changed and not self._any_place():
                break
            decision = self._decide(waiter.journey.wanted, self._views(ahead))
            hopeless = self._hopeless(waiter.journey, decision)
            if hopeless is not None:
                self._end(waiter, hopeless)
                continue
            standing = self.standings.get(decision.chosen or "")
            if standing is not None and standing.has_slot:
                self._waiters.remove(waiter)
                waiter.granted.set_result(self._grant(standing, decision))
                continue
            waiter.target = decision.chosen
            ahead[waiter.target] += 1
        self._rouse()

    def close(self) -> None:
        """End every wait and give out no more places."""
        self._closed = True
        for waiter in tuple(self._waiters):
            self._end(waiter, NoLLMError("the balancer is closed", refusals={}))

    async def _wait(self, waiter: _Waiter, deadline_s: float) -> Lease:
        journey, began_s = waiter.journey, self._clock()
        while not waiter.granted.done():
            now_s = self._clock()
            if now_s >= deadline_s:
                return self._last_resort(waiter)
            # Once it is overdue, each `dispatch` knows.
            spills_s = math.inf if journey.wanted.overdue else began_s + self.spills_in_s(journey)
            if now_s >= spills_s:
                journey.now_overdue()
                self.dispatch()
                continue
            waiter.wakes_s = min(deadline_s, spills_s, self._next_half_open_s(now_s))
            sleeper: asyncio.Future[Any] = asyncio.ensure_future(self._sleep(waiter.wakes_s - now_s))
            waiter.sleeper = sleeper
            try:
                await asyncio.wait((waiter.granted, sleeper), return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiter.sleeper = None
                sleeper.cancel()
                await asyncio.wait((sleeper,))
            if not waiter.granted.done():
                self.dispatch()
        return waiter.granted.result()

    def _rouse(self) -> None:
        """Wake who would sleep past the next half-open circuit: it opened after they lay down."""
        next_s = self._next_half_open_s(self._clock())
        for waiter in self._waiters:
            if waiter.sleeper is not None and waiter.wakes_s > next_s:
                waiter.sleeper.cancel()

    def _next_half_open_s(self, now_s: float) -> float:
        """When the first of the open circuits is half open; never, where none is open."""
        ends_s = (standing.circuit.open_until_s for standing in self.standings.values())
        return min((end_s for end_s in ends_s if end_s is not None and end_s > now_s), default=math.inf)

    def _last_resort(self, waiter: _Waiter) -> Lease:
        """The wait is over: whoever may serve and has a place does, even one that ranks behind."""
        journey, bound = waiter.journey, f"{self.settings.max_wait_s:g} s"
        full = [name for name, standing in self.standings.items() if not standing.has_slot]
        for name in full:
            journey.failures.setdefault(name, f"no free slot within {bound}")
        journey.exclude(*full)
        decision = self.decide(journey.wanted)
        if decision.chosen is None:
            raise self._nobody(journey, decision, f"no LLM had a place within {bound}")
        self._waiters.remove(waiter)
        return self._grant(self.standings[decision.chosen], decision)

    def _any_place(self) -> bool:
        now_s = self._clock()
        return any(
            standing.toggle and standing.has_slot and circuit.admits(standing.circuit, now_s)
            for standing in self.standings.values()
        )

    def _grant(self, standing: Standing, decision: Decision) -> Lease:
        now_s = self._clock()
        cold = standing.resident is False
        return Lease(
            standing=standing,
            held=standing.held,
            decision=decision,
            probe=standing.begin(now_s),
            cold=cold,
            started_s=now_s,
        )

    def _leave(self, waiter: _Waiter) -> None:
        """The asker left, perhaps in the very moment in which a place was given."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        granted = waiter.granted
        if not granted.done():
            granted.cancel()
        elif not granted.cancelled() and granted.exception() is None:
            self.release(granted.result())

    def _end(self, waiter: _Waiter, error: AgentServerError) -> None:
        self._waiters.remove(waiter)
        if not waiter.granted.done():
            waiter.granted.set_exception(error)

    def _hopeless(self, journey: Journey, decision: Decision) -> AgentServerError | None:
        """Why waiting would be in vain, None where it would not."""
        if self._closed:
            return NoLLMError("the balancer is closed", refusals={})
        if decision.chosen is not None:
            return None
        now_s, left_s = self._clock(), self.settings.max_wait_s - journey.waited_s
        circuits = (self.standings[name].circuit for name in may_wait_for(decision))
        if any(circuit.cooldown_s(each, now_s) <= left_s for each in circuits):
            return None
        return self._nobody(journey, decision, "no LLM may serve the request")

    def _nobody(self, journey: Journey, decision: Decision, problem: str) -> AgentServerError:
        if isinstance(journey.last_error, EngineRequestError):
            return journey.last_error
        why = refusals(decision)
        for name in why.keys() & journey.failures.keys():
            why[name] = f"{why[name].partition(':')[0]}: {journey.failures[name]}"
        nobody = NoLLMError(problem, refusals=why)
        nobody.__cause__ = journey.last_error
        return nobody

    def _decide(self, wanted: Requirements, views: tuple[LLMView, ...]) -> Decision:
        return decide(
            wanted,
            views,
            self.strategy,
            strategy_name=self.settings.strategy,
            spill_after_s=self.settings.spill_after_s,
        )

    def _views(self, waiting: Mapping[str | None, int]) -> tuple[LLMView, ...]:
        now_s = self._clock()
        return tuple(
            standing.view(now_s, waiting=waiting.get(name, 0)) for name, standing in self.standings.items()
        )
