"""Likenesses of what others do, with the effects of our own scheduler, so that one simulator plays all.

Made from their public sources as of 2026, simplified towards their favour: they know every model's true
size, and a model that is unloaded gives its memory back at once when it says so.
"""

import math
from collections import Counter, deque

from ai_agent_server.load_balancer.memory_ledger import MemoryLedger
from ai_agent_server.load_balancer.scheduler import (
    Arrived,
    Effect,
    Event,
    ExternalMemory,
    Finished,
    Left,
    Load,
    Loaded,
    LoadFailed,
    Measured,
    Start,
    Tick,
    Unload,
    Unloaded,
)
from bench.gpu_queue.simulator import ledger_of
from bench.gpu_queue.traces import Trace


class _Peer:
    """What all have: engines with slots and a line of their own before them."""

    def __init__(self, trace: Trace) -> None:
        self.slots = {model.name: model.slots for model in trace.models}
        self.ledger: MemoryLedger = ledger_of(trace)
        self.state = dict.fromkeys(self.slots, "cold")
        self.lines: dict[str, deque[str]] = {name: deque() for name in self.slots}
        """Given to the engine, and not begun."""
        self.busy: Counter[str] = Counter()
        self.llms: dict[str, str] = {}
        self.used_s = dict.fromkeys(self.slots, -math.inf)
        self.now_s = 0.0
        self.out: list[Effect] = []

    @property
    def wake_s(self) -> float:
        """None of them acts on time alone, while memory is wanted."""
        return math.inf

    def handle(self, event: Event, now_s: float) -> tuple[Effect, ...]:
        """As in `Scheduler`."""
        self.now_s, self.out = now_s, []
        match event:
            case Arrived(request=request, llm=llm):
                self.llms[request] = llm
                self.arrived(request)
            case Finished(request=request):
                llm = self.llms.pop(request)
                self.busy[llm] -= 1
                self.used_s[llm] = now_s
            case Left(request=request):
                self.left(request)
            case Loaded(llm=llm):
                self.state[llm] = "warm"
                self.loaded(llm)
            case Unloaded(llm=llm):
                self.state[llm] = "cold"
                self.ledger = self.ledger.release(llm)
            case Measured(llm=llm, memory_mb=memory_mb):
                self.ledger = self.ledger.measured(llm, memory_mb)
            case ExternalMemory(memory_mb=memory_mb):
                self.ledger = self.ledger.external(memory_mb)
            case Tick() | LoadFailed():
                pass
        self.advance()
        for llm, line in self.lines.items():
            while line and self.state[llm] == "warm" and self.busy[llm] < self.slots[llm]:
                self.busy[llm] += 1
                self.used_s[llm] = now_s
                self.out.append(Start(request=line.popleft(), llm=llm, why=""))
        return tuple(self.out)

    def arrived(self, request: str) -> None:
        """A request came."""
        raise NotImplementedError

    def advance(self) -> None:
        """Decide what can be decided."""
        raise NotImplementedError

    def loaded(self, llm: str) -> None:
        """`llm` is in memory."""

    def left(self, request: str) -> None:
        """The client of a request that has not begun is gone."""
        llm = self.llms.pop(request, None)
        if llm is not None and request in self.lines[llm]:
            self.lines[llm].remove(request)

    def in_flight(self, llm: str) -> int:
        """Given to the engine, and not ended."""
        return self.busy[llm] + len(self.lines[llm])

    def load(self, llm: str) -> None:
        """Begin to load."""
        self.state[llm] = "loading"
        self.ledger = self.ledger.hold(llm)
        self.out.append(Load(llm=llm, why=""))

    def unload(self, llm: str) -> None:
        """Begin to unload."""
        self.state[llm] = "unloading"
        self.out.append(Unload(llm=llm, why=""))


class Fifo(_Peer):
    """Strictly in order of arrival: the first in line is served before anybody else is looked at."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.pending: deque[str] = deque()

    def arrived(self, request: str) -> None:
        """To the end of the line."""
        self.pending.append(request)

    def left(self, request: str) -> None:
        """Out of the line."""
        if request in self.pending:
            self.pending.remove(request)
        super().left(request)

    def advance(self) -> None:
        """Serve from the front for as long as the front can be served."""
        while self.pending:
            llm = self.llms[self.pending[0]]
            if self.state[llm] == "warm" and self.in_flight(llm) < self.slots[llm]:
                self.lines[llm].append(self.pending.popleft())
                continue
            if self.state[llm] == "cold":
                self.make_room(llm)
            return

    def make_room(self, llm: str) -> None:
        """Load `llm`, or unload what is idle, the longest unused first."""
        if self.ledger.fits(llm):
            self.load(llm)
            return
        if "unloading" in self.state.values():
            return
        idle = [name for name, state in self.state.items() if state == "warm" and not self.in_flight(name)]
        if idle:
            self.unload(min(idle, key=lambda name: self.used_s[name]))


class OllamaLike(_Peer):
    """One pending loop: a request whose model is not there blocks it until a runner went and one came.

    Requests for a model that is there pass to its runner's own line. The runner to go is an idle one
    before a busy one, then by the length of its keep-alive, which is one for all, then by name.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.pending: deque[str] = deque()
        self.going: str | None = None

    def arrived(self, request: str) -> None:
        """To the end of the channel."""
        self.pending.append(request)

    def left(self, request: str) -> None:
        """The loop skips it."""
        if request in self.pending:
            self.pending.remove(request)
        super().left(request)

    def advance(self) -> None:
        """The pending loop."""
        if self.going is not None:
            if self.state[self.going] == "warm" and not self.in_flight(self.going):
                self.unload(self.going)
            if self.state[self.going] != "cold":
                return
            self.going = None
        while self.pending:
            llm = self.llms[self.pending[0]]
            if "loading" in self.state.values():
                return
            if self.state[llm] == "warm":
                self.lines[llm].append(self.pending.popleft())
            elif self.state[llm] == "cold" and self.ledger.fits(llm):
                self.load(llm)
            else:
                self.expire()
                return

    def expire(self) -> None:
        """Choose who goes."""
        warm = sorted(name for name, state in self.state.items() if state == "warm")
        if warm:
            self.going = next((name for name in warm if not self.in_flight(name)), warm[0])
            if not self.in_flight(self.going):
                self.unload(self.going)


class LlamaSwapLike(_Peer):
    """A collating queue without ageing: what is loaded is served at once, past those who wait for a swap.

    A swap begins once none of those that it would stop is in flight, and all that wait for the same
    model join it. What is stopped is the longest unused that makes room, as a matrix of sets would say.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.queued: list[str] = []
        self.evicting: dict[str, list[str]] = {}
        """Model that comes -> models that go for it."""
        self.joined: dict[str, list[str]] = {}

    def arrived(self, request: str) -> None:
        """Looked at with the rest."""
        self.queued.append(request)

    def left(self, request: str) -> None:
        """Pruned from the queue, and from the swap that it joined."""
        for line in (self.queued, *self.joined.values()):
            if request in line:
                line.remove(request)
        super().left(request)

    def loaded(self, llm: str) -> None:
        """All that joined the swap are granted."""
        self.lines[llm].extend(self.joined.pop(llm, ()))

    def advance(self) -> None:
        """Continue the swaps under way, then go through the queue in order."""
        for llm, going in tuple(self.evicting.items()):
            if all(self.state[name] == "cold" for name in going) and self.ledger.fits(llm):
                del self.evicting[llm]
                self.load(llm)
        waiting, self.queued = self.queued, []
        for request in waiting:
            llm = self.llms[request]
            stopped = {name for going in self.evicting.values() for name in going}
            if llm in self.joined:
                self.joined[llm].append(request)
            elif self.state[llm] == "warm" and llm not in stopped:
                self.lines[llm].append(request)
            elif self.state[llm] != "cold" or not self.swap(llm, stopped):
                self.queued.append(request)
            else:
                self.joined[llm] = [request]

    def swap(self, llm: str, stopped: set[str]) -> bool:
        """Begin a swap to `llm`, if nobody in flight would be stopped and no swap under way collides."""
        going: list[str] = []
        if self.evicting:
            return False
        warm = sorted(
            (name for name, state in self.state.items() if state == "warm" and name not in stopped),
            key=lambda name: self.used_s[name],
        )
        for name in warm:
            if self.ledger.fits(llm, freed=going):
                break
            going.append(name)
        if not self.ledger.fits(llm, freed=going) or any(self.in_flight(name) for name in going):
            return False
        if not going:
            self.load(llm)
            return True
        self.evicting[llm] = going
        for name in going:
            self.unload(name)
        return True
