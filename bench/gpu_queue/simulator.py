"""Discrete events: a card, engines that take their time, and a policy that decides. Deterministic."""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Protocol, TypeAlias

import msgspec

from ai_agent_server.load_balancer.memory_ledger import Footprint, MemoryLedger
from ai_agent_server.load_balancer.scheduler import (
    Arrived,
    Effect,
    Event,
    ExternalMemory,
    Finished,
    Left,
    Load,
    Loaded,
    Measured,
    Model,
    Refuse,
    Rules,
    Scheduler,
    Start,
    Tick,
    Unload,
    Unloaded,
)
from bench.gpu_queue.traces import CARD_MB, HEADROOM_MB, Job, SimulatedModel, Trace

MAX_EVENTS = 1_000_000


class Policy(Protocol):
    """What decides: the server's `Scheduler`, or a likeness of another's."""

    @property
    def wake_s(self) -> float:
        """When a `Tick` is due."""
        ...

    def handle(self, event: Event, now_s: float) -> tuple[Effect, ...]:
        """What is to be done."""
        ...


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """How one request fared. Seconds since the start of the trace."""

    job: Job
    arrived_s: float
    started_s: float | None = None
    ended_s: float | None = None
    refused: str = ""
    foretold_s: float | None = None
    """The wait that was estimated when it came."""

    @property
    def wait_s(self) -> float | None:
        """From its coming to its start."""
        return None if self.started_s is None else self.started_s - self.arrived_s


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a trace under a policy."""

    served: tuple[Served, ...]
    loads: tuple[tuple[float, str], ...]
    """When each load began, and of what."""
    peak_mb: float
    """The most that our models truly took at once, less what the budget was then: never over 0."""
    predictions: tuple[tuple[float, float], ...]
    """Of each load, what it was taken for and what it took, in megabytes."""
    ended_s: float


class SimulationError(Exception):
    """A policy did what no engine can do, or forgot a request."""


Happening: TypeAlias = Event | Job


class World:
    """The card and its engines. Checks each effect against what an engine can do."""

    def __init__(
        self,
        trace: Trace,
        policy: Policy,
        *,
        watch: Callable[["World"], None] | None = None,
        foretell: bool = False,
    ) -> None:
        """`watch` sees the world after each event; with `foretell` each newcomer's wait is estimated."""
        self.trace, self.policy, self.now_s = trace, policy, 0.0
        self.models: dict[str, SimulatedModel] = {model.name: model for model in trace.models}
        self.state = dict.fromkeys(self.models, "cold")
        self.running: dict[str, str] = {}
        self.busy: Counter[str] = Counter()
        self.served: dict[str, Served] = {}
        self.external_mb = 0.0
        self.loads: list[tuple[float, str]] = []
        self.predictions: list[tuple[float, float]] = []
        self.over_mb = -math.inf
        self._followers: dict[str, list[Job]] = {}
        self._heap: list[tuple[float, int, Happening]] = []
        self._number = itertools.count()
        self._watch, self._foretell = watch, foretell

    def run(self) -> Run:
        """Play the trace to its end."""
        for job in self.trace.jobs:
            if job.after is None:
                self._at(job.arrives_s, job)
            else:
                self._followers.setdefault(job.after, []).append(job)
        for at_s, memory_mb in self.trace.external_mb:
            self._at(at_s, ExternalMemory(memory_mb=memory_mb))
        for _ in range(MAX_EVENTS):
            tick_s = self.policy.wake_s if self._waiting else math.inf
            if not self._heap and math.isinf(tick_s):
                break
            if self._heap and self._heap[0][0] <= tick_s:
                self.now_s, _, happening = heapq.heappop(self._heap)
                self._happen(happening)
            else:
                self.now_s = tick_s
                self._tell(Tick())
        else:
            raise SimulationError("it does not end")
        forgotten = [each.job.request for each in self.served.values() if each.ended_s is None]
        if forgotten:
            raise SimulationError(f"neither served nor refused: {forgotten[:5]}")
        return Run(
            served=tuple(self.served.values()),
            loads=tuple(self.loads),
            peak_mb=self.over_mb,
            predictions=tuple(self.predictions),
            ended_s=max((each.ended_s or 0.0 for each in self.served.values()), default=0.0),
        )

    @property
    def held_mb(self) -> float:
        """What our models truly take, those that come and go too."""
        return sum(self.models[name].memory_mb for name, state in self.state.items() if state != "cold")

    @property
    def budget_mb(self) -> float:
        """What they may take."""
        return CARD_MB - HEADROOM_MB - self.external_mb

    @property
    def _waiting(self) -> bool:
        return any(each.ended_s is None for each in self.served.values())

    def _at(self, at_s: float, happening: Happening) -> None:
        heapq.heappush(self._heap, (at_s, next(self._number), happening))

    def _happen(self, happening: Happening) -> None:
        match happening:
            case Job():
                self._come(happening)
                return
            case Left(request=request):
                if request in self.running or self.served[request].ended_s is not None:
                    return
                self._end(request, refused="left")
            case Finished(request=request):
                llm = self.running.pop(request)
                self.busy[llm] -= 1
                self._end(request)
            case Loaded(llm=llm):
                self.state[llm] = "warm"
            case Unloaded(llm=llm):
                self.state[llm] = "cold"
            case ExternalMemory(memory_mb=memory_mb):
                self.external_mb = memory_mb
            case _:
                pass
        self._tell(happening)
        if isinstance(happening, Loaded):
            self._tell(Measured(llm=happening.llm, memory_mb=self.models[happening.llm].memory_mb))

    def _come(self, job: Job) -> None:
        self.served[job.request] = Served(job=job, arrived_s=self.now_s)
        if job.leaves_s is not None:
            self._at(self.now_s + job.leaves_s, Left(request=job.request))
        self._tell(Arrived(request=job.request, llm=job.llm, key=job.key, urgency=job.urgency))
        if self._foretell and isinstance(self.policy, Scheduler):
            for waiting in self.policy.forecast():
                if waiting.request == job.request:
                    self._note(job.request, foretold_s=waiting.wait_s)

    def _tell(self, event: Event) -> None:
        for effect in self.policy.handle(event, self.now_s):
            self._do(effect)
        if self._watch is not None:
            self._watch(self)

    def _do(self, effect: Effect) -> None:
        match effect:
            case Load(llm=llm):
                self._must(self.state[llm] == "cold", f"{llm} is loaded while {self.state[llm]}")
                self.state[llm] = "loading"
                self.loads.append((self.now_s, llm))
                if isinstance(self.policy, Scheduler):
                    held = self.policy.ledger.held[llm]
                    self.predictions.append((held.predicted_mb, self.models[llm].memory_mb))
                self.over_mb = max(self.over_mb, self.held_mb - self.budget_mb)
                self._at(self.now_s + self.models[llm].load_s, Loaded(llm=llm))
            case Unload(llm=llm):
                self._must(self.state[llm] == "warm", f"{llm} is unloaded while {self.state[llm]}")
                self._must(not self.busy[llm], f"{llm} is unloaded while it serves")
                self.state[llm] = "unloading"
                self._at(self.now_s + self.models[llm].unload_s, Unloaded(llm=llm))
            case Start(request=request, llm=llm):
                served = self.served[request]
                self._must(served.started_s is None and served.ended_s is None, f"{request} is started twice")
                self._must(served.job.llm == llm, f"{request} is started on another model")
                self._must(self.state[llm] == "warm", f"{request} is started on a model that is not there")
                self.busy[llm] += 1
                self._must(self.busy[llm] <= self.models[llm].slots, f"{llm} has no slot for {request}")
                self.running[request] = llm
                self._note(request, started_s=self.now_s)
                self._at(self.now_s + served.job.service_s, Finished(request=request))
            case Refuse(request=request, why=why):
                self._must(self.served[request].ended_s is None, f"{request} is refused after its end")
                self._end(request, refused=why)

    def _end(self, request: str, *, refused: str = "") -> None:
        self._note(request, ended_s=self.now_s, refused=refused)
        for job in self._followers.pop(request, ()):
            self._at(self.now_s + job.arrives_s, job)

    def _note(self, request: str, **facts: float | str) -> None:
        self.served[request] = msgspec.structs.replace(self.served[request], **facts)

    def _must(self, holds: bool, problem: str) -> None:
        if not holds:
            raise SimulationError(f"at {self.now_s:.3f} s: {problem}")


def ledger_of(trace: Trace) -> MemoryLedger:
    """The books as they are before anything was measured."""
    return MemoryLedger(
        memory_mb=CARD_MB,
        headroom_mb=HEADROOM_MB,
        footprints={
            model.name: Footprint(llm=model.name, engine=model.engine, declared_mb=model.declared_mb)
            for model in trace.models
        },
    )


def ours(trace: Trace, rules: Rules | None = None) -> Scheduler:
    """The server's scheduler, that knows of load and service times what a fresh start knows: nothing."""
    return Scheduler(
        {model.name: Model(name=model.name, slots=model.slots) for model in trace.models},
        ledger_of(trace),
        rules or Rules(max_queued=4096, patience_s=86_400),
    )


def simulate(
    trace: Trace,
    policy: Policy,
    *,
    watch: Callable[[World], None] | None = None,
    foretell: bool = False,
) -> Run:
    """What comes of `trace` under `policy`. Raises `SimulationError` for what no engine can do."""
    return World(trace, policy, watch=watch, foretell=foretell).run()
