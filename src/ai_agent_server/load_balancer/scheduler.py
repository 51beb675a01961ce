"""The queue of one accelerator: which model is in memory, and who is served next. Pure.

Events in, effects out, the clock passed in: the server and the simulator in bench/gpu_queue drive the same
code. design.md beside this file tells the rules, the promises and the bug that each of them prevents.
"""

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import msgspec

from ai_agent_server.core.chat import Urgency
from ai_agent_server.load_balancer.memory_ledger import Footprint, MemoryLedger

State = Literal["cold", "loading", "warm", "unloading"]

RANKS: dict[Urgency, int] = {"interactive": 0, "batch": 1, "background": 2}
WEIGHT_OF_NEW = 0.2
"""Of an exponentially weighted mean."""
REGRETTED = 0.3
"""From this share on, an idle model is kept a while for the next request of its own."""
MAX_KEYS = 1024
"""Keys whose account is kept while they owe something."""
LONGEST_RETRY_S = 120.0
CONFIGURED_ANEW = "GQ-10 configured anew"
RECALLED = "GQ-12 called back"
SPILLED = "GQ-13 served elsewhere"


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """An LLM as the queue sees it. The times are first guesses: what is measured replaces them."""

    name: str
    slots: int = 1
    load_s: float = 20.0
    service_s: float = 10.0


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What the queue promises, in seconds."""

    max_wait_s: float = 60.0
    """A model that was wanted for so long while it was out of memory is the next to come in."""
    hold_s: float = 120.0
    """For so long after an interactive request background gets neither its model's memory nor many slots."""
    patience_s: float = 600.0
    """Whoever waited so long is refused."""
    turn_loads: float = 2.0
    """A model that came in keeps its memory, while it is wanted, for so many times what its load takes."""
    retry_s: float = 10.0
    """A model that would not load, or not unload, is left alone for so long."""
    max_queued: int = 256


# Events


class Arrived(msgspec.Struct, frozen=True, kw_only=True):
    """A request for `llm` came."""

    request: str
    llm: str
    key: str = ""
    urgency: Urgency = "interactive"


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """The client of `request` is gone: from the queue, or its slot is free now."""

    request: str


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """`request` was answered; its slot is free."""

    request: str


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """`llm` is in memory: it was loaded, its unload failed, or somebody else loaded it."""

    llm: str


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True):
    """`llm` did not come into memory."""

    llm: str


class Unloaded(msgspec.Struct, frozen=True, kw_only=True):
    """`llm` is out of memory: it was unloaded, or its engine ended."""

    llm: str


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """`llm` takes so much of the accelerator."""

    llm: str
    memory_mb: float


class ExternalMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Other programs take so much of the accelerator."""

    memory_mb: float


class Sized(msgspec.Struct, frozen=True, kw_only=True):
    """`llm` is estimated, from its file, to take so much."""

    llm: str
    memory_mb: float


class Configured(msgspec.Struct, frozen=True, kw_only=True):
    """These are the models from now on.

    The engines of those `replaced`, and of those left out, are going: each of them says `Retired` once.
    """

    models: dict[str, Model]
    footprints: dict[str, Footprint]
    rules: Rules
    replaced: frozenset[str] = frozenset()


class Retired(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that a `Configured` sent away is closed: what it held of `llm` is free."""

    llm: str


class Recalled(msgspec.Struct, frozen=True, kw_only=True):
    """`llm` is not to be sent those who wait for it: it was switched off, or fails too often."""

    llm: str


class Spilled(msgspec.Struct, frozen=True, kw_only=True):
    """`request` has waited for long enough: somebody else is to serve it."""

    request: str


class Dismissed(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody wants `llm` out of memory: once, as soon as its answers have ended."""

    llm: str


class Tick(msgspec.Struct, frozen=True, kw_only=True):
    """Time went by."""


Event: TypeAlias = (
    Arrived
    | Left
    | Finished
    | Loaded
    | LoadFailed
    | Unloaded
    | Measured
    | ExternalMemory
    | Sized
    | Configured
    | Retired
    | Recalled
    | Spilled
    | Dismissed
    | Tick
)

# Effects


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Bring `llm` into memory, then say `Loaded` or `LoadFailed`."""

    llm: str
    why: str


class Unload(msgspec.Struct, frozen=True, kw_only=True):
    """Take `llm` out of memory, then say `Unloaded`, or `Loaded` where it would not go."""

    llm: str
    why: str


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Send `request` to `llm`, then say `Finished` or `Left`."""

    request: str
    llm: str
    why: str


class Refuse(msgspec.Struct, frozen=True, kw_only=True):
    """Tell `request` no. It may come again after `retry_after_s`; None is never."""

    request: str
    retry_after_s: float | None
    why: str


Effect: TypeAlias = Load | Unload | Start | Refuse


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A request in the queue as it would be told: its place among those of its LLM, and an estimate."""

    request: str
    llm: str
    key: str
    urgency: Urgency
    place: int
    """1 is next."""
    waited_s: float
    wait_s: float
    """Until it starts, estimated."""


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """A model as it stands."""

    llm: str
    state: State
    draining: bool
    running: int
    queued: int
    slots: int
    load_s: float
    service_s: float


@dataclass(slots=True, eq=False)
class _Request:
    name: str
    llm: str
    key: str
    urgency: Urgency
    arrived_s: float
    number: int
    """In order of arrival."""
    queued: bool = True
    started_s: float = 0.0
    charged_s: float = 0.0


@dataclass(slots=True)
class _Line:
    """Those of one urgency who wait for one model, in order of arrival; and each key's own."""

    requests: dict[str, _Request] = field(default_factory=dict)
    by_key: dict[str, dict[str, _Request]] = field(default_factory=dict)
    arrivals_s: float = 0.0
    """The sum of their arrivals: what they waited together is `len * now - arrivals_s`."""

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, request: _Request) -> None:
        self.requests[request.name] = request
        self.by_key.setdefault(request.key, {})[request.name] = request
        self.arrivals_s += request.arrived_s

    def drop(self, request: _Request) -> None:
        del self.requests[request.name]
        own = self.by_key[request.key]
        del own[request.name]
        if not own:
            del self.by_key[request.key]
        self.arrivals_s = self.arrivals_s - request.arrived_s if self.requests else 0.0

    @property
    def oldest_s(self) -> float:
        """When the first of them arrived; never, where nobody waits."""
        first = next(iter(self.requests.values()), None)
        return math.inf if first is None else first.arrived_s

    def heads(self) -> Iterator[_Request]:
        """The first of each key."""
        return (next(iter(own.values())) for own in self.by_key.values())


@dataclass(slots=True)
class _Seat:
    model: Model
    loads_s: float = math.inf
    serves_s: float = math.inf
    """As measured; infinite before."""
    state: State = "cold"
    lines: dict[Urgency, _Line] = field(default_factory=lambda: {urgency: _Line() for urgency in RANKS})
    running: Counter[Urgency] = field(default_factory=Counter)
    since_s: float = 0.0
    """When it came to its state."""
    used_s: float = -math.inf
    interactive_s: float = -math.inf
    arrived_s: float = -math.inf
    gap_s: float = math.inf
    """Between two arrivals."""
    left_alone_until_s: float = -math.inf
    regret: float = math.inf
    """How often, of late, it was wanted again before the one that it made room for was even loaded."""
    went_for: "_Seat | None" = None
    retiring: int = 0
    """Engines of it that are being closed, each of which may hold its memory. Two reloads during one
    answer make two."""
    dismissed: bool = False
    configured: bool = True

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def load_s(self) -> float:
        return self.model.load_s if math.isinf(self.loads_s) else self.loads_s

    @property
    def service_s(self) -> float:
        return self.model.service_s if math.isinf(self.serves_s) else self.serves_s

    @property
    def busy(self) -> int:
        return self.running.total()

    @property
    def queued(self) -> int:
        return sum(map(len, self.lines.values()))

    @property
    def only_background(self) -> bool:
        return not self.lines["interactive"] and not self.lines["batch"]

    @property
    def in_front(self) -> tuple[_Line, ...]:
        """The lines that speak for the model: background's only where it is alone."""
        if self.only_background:
            return (self.lines["background"],)
        return (self.lines["interactive"], self.lines["batch"])

    @property
    def wanted_since_s(self) -> float:
        """Since when it is wanted and away: the later of its oldest arrival and its going.

        Counting from the arrival alone, two models with long lines would hand the memory to each other
        and the third, with a younger request, would never come in.
        """
        return max(min(line.oldest_s for line in self.in_front), self.since_s)

    def wanted_by(self, rank: int, aged_before_s: float) -> bool:
        """Whether anyone as urgent as `rank` is served here or waits. Batch that aged is of rank 0."""
        if self.lines["batch"].oldest_s <= aged_before_s:
            return True
        return any(
            self.lines[urgency] or self.running[urgency]
            for urgency, its_rank in RANKS.items()
            if its_rank <= rank
        )

    def expected_back_until_s(self, swap_s: float) -> float:
        """Until when its next request is worth waiting for, from the pace of those before.

        Not where the last times taught that nobody wanted it during the swap: one who asks A, then B
        with what A said, then A again, gains nothing from an A that stays while B is waited for.
        """
        if self.gap_s > swap_s or not REGRETTED <= self.regret <= 1:
            return -math.inf
        return self.arrived_s + 2 * self.gap_s


@dataclass(slots=True)
class _Claim:
    """A cold model that is next: its victims take no more requests, and go when the last has ended."""

    seat: _Seat
    victims: tuple[_Seat, ...]
    why: str


class Scheduler:
    """The state of one accelerator's queue. `handle` is all that changes it.

    Told of a request twice, or of one that it does not know, it changes nothing; an LLM that it was
    not built with is a `KeyError`.
    """

    def __init__(self, models: Mapping[str, Model], ledger: MemoryLedger, rules: Rules) -> None:
        """Every model needs a footprint in `ledger`."""
        self.ledger = ledger
        self._rules = rules
        self._seats = {name: _Seat(model) for name, model in models.items()}
        self._requests: dict[str, _Request] = {}
        self._numbers = itertools.count()
        self._queued = 0
        self._claim: _Claim | None = None
        self._yielding: set[str] = set()
        """Models that go because the memory is overdrawn."""
        self._level_s = 0.0
        """Where the account of a key starts that comes new: that of the one who was served last."""
        self._served_s: dict[str, float] = {}
        """Key -> the seconds of service that it had, on an account that nobody is ahead of by resting."""
        self._here: Counter[str] = Counter()
        """Key -> its requests, waiting and served."""
        self._now_s = 0.0
        self._wake_s = math.inf
        self._out: list[Effect] = []

    # What is asked of it

    def wait_s(self, llm: str) -> float:
        """What a request for `llm` that came now would wait, estimated."""
        seat = self._seats[llm]
        before = max(0, seat.queued + 1 + seat.busy - seat.model.slots)
        return self._ready_in_s(seat) + before / seat.model.slots * seat.service_s

    @property
    def wake_s(self) -> float:
        """When a `Tick` is due at the latest, if nothing else comes before; may be infinite."""
        return self._wake_s

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._queued

    def seat(self, llm: str) -> Seat | None:
        """How `llm` stands; None where it is not one of the models."""
        return self._shown(self._seats[llm]) if llm in self._seats else None

    def seats(self) -> tuple[Seat, ...]:
        """Every model as it stands."""
        return tuple(map(self._shown, self._seats.values()))

    def handle(self, event: Event, now_s: float) -> tuple[Effect, ...]:
        """Take `event`; what is to be done now, in this order. `now_s` is monotonic."""
        self._now_s = max(self._now_s, now_s)
        self._out, self._wake_s = [], math.inf
        match event:
            case Arrived():
                self._arrived(event)
            case Left(request=name):
                self._ended(name, answered=False)
            case Finished(request=name):
                self._ended(name, answered=True)
            case Loaded(llm=llm):
                self._loaded(self._seats[llm])
            case LoadFailed(llm=llm):
                self._load_failed(self._seats[llm])
            case Unloaded(llm=llm):
                self._unloaded(self._seats[llm])
            case Measured() | Sized() | ExternalMemory():
                self.ledger = self._learned(event)
            case Configured():
                self._configured(event)
            case Retired(llm=llm):
                self._retired(llm)
            case Recalled() | Spilled() | Dismissed():
                self._asked(event)
            case Tick():
                pass
        self._settle()
        return tuple(self._out)

    def forecast(self) -> tuple[Waiting, ...]:
        """Everybody in the queue, each LLM's in the order in which they would start."""
        told: list[Waiting] = []
        for seat in self._seats.values():
            if not seat.queued:
                continue
            ready_s, taken = self._ready_in_s(seat), seat.busy if seat.state == "warm" else 0
            for place, request in enumerate(self._order(seat), start=1):
                before = max(0, place + taken - seat.model.slots)
                told.append(
                    Waiting(
                        request=request.name,
                        llm=seat.name,
                        key=request.key,
                        urgency=request.urgency,
                        place=place,
                        waited_s=self._now_s - request.arrived_s,
                        wait_s=ready_s + before / seat.model.slots * seat.service_s,
                    )
                )
        return tuple(told)

    # Events

    def _arrived(self, event: Arrived) -> None:
        if event.request in self._requests:
            return
        seat = self._seats[event.llm]
        if not self.ledger.can_fit(event.llm):
            self._out.append(Refuse(request=event.request, retry_after_s=None, why="GQ-1 never fits"))
            return
        if seat.state == "cold" and self._now_s < seat.left_alone_until_s:
            wait_s = seat.left_alone_until_s - self._now_s
            self._out.append(
                Refuse(request=event.request, retry_after_s=_retry_s(wait_s), why="GQ-2 did not load")
            )
            return
        if seat.went_for is not None:
            seat.regret, seat.went_for = _mean(seat.regret, 1.0), None
        if seat.arrived_s > -math.inf:
            seat.gap_s = _mean(seat.gap_s, self._now_s - seat.arrived_s)
        seat.arrived_s = self._now_s
        request = _Request(
            name=event.request,
            llm=event.llm,
            key=event.key,
            urgency=event.urgency,
            arrived_s=self._now_s,
            number=next(self._numbers),
        )
        self._requests[request.name] = request
        self._queued += 1
        seat.lines[request.urgency].add(request)
        if not self._here[event.key]:
            # Who comes back after a rest has no more claim than anybody else.
            self._served_s[event.key] = max(self._level_s, self._served_s.get(event.key, 0.0))
        self._here[event.key] += 1
        if self._queued > self._rules.max_queued:
            self._turn_away()

    def _turn_away(self) -> None:
        """The queue is full: of the least urgent the key with the most in line loses its newest."""
        urgency = next(
            urgency
            for urgency in reversed(RANKS)
            if any(seat.lines[urgency] for seat in self._seats.values())
        )
        lines = [seat.lines[urgency] for seat in self._seats.values()]
        held: Counter[str] = Counter()
        for line in lines:
            held.update({key: len(own) for key, own in line.by_key.items()})
        most = max(held.values())
        newest = max(
            (
                next(reversed(own.values()))
                for line in lines
                for key, own in line.by_key.items()
                if held[key] == most
            ),
            key=lambda request: request.number,
        )
        self._refuse(newest, self._line_s(self._seats[newest.llm]), "GQ-3 full")

    def _ended(self, name: str, *, answered: bool) -> None:
        request = self._requests.get(name)
        if request is None:
            return
        if request.queued:
            self._drop(request)
            return
        self._forget(request)
        seat = self._seats[request.llm]
        seat.running[request.urgency] -= 1
        self._used(seat, request.urgency)
        took_s = self._now_s - request.started_s
        if answered:
            seat.serves_s = _mean(seat.serves_s, took_s)
        # By the guess at first; what it took is known now.
        self._charge(request.key, took_s - request.charged_s)

    def _loaded(self, seat: _Seat) -> None:
        match seat.state:
            case "warm":
                return
            case "loading":
                seat.loads_s = _mean(seat.loads_s, self._now_s - seat.since_s)
            case "unloading":
                # It would not go: not asked again at once, or the two of us would spin.
                seat.left_alone_until_s = self._now_s + self._rules.retry_s
            case "cold":
                self.ledger = self.ledger.hold(seat.name)
        self._become(seat, "warm")
        for each in self._seats.values():
            if each.went_for is seat:
                each.regret, each.went_for = _mean(each.regret, 0.0), None
        # Before anything else is decided: a model that another is to follow still serves a slotful.
        if not seat.retiring:
            self._fill(seat)

    def _load_failed(self, seat: _Seat) -> None:
        if seat.state != "loading":
            return
        self._go(seat)
        if seat.retiring:
            # Who waits by now waits for another engine.
            return
        seat.left_alone_until_s = self._now_s + self._rules.retry_s
        self._refuse_all(seat, self._rules.retry_s, "GQ-2 did not load")

    def _unloaded(self, seat: _Seat) -> None:
        # One that loads says itself how that ends: a look from before the load may come late.
        # And of one that retires, it is the new engine that says so.
        if seat.state in {"warm", "unloading"} and not seat.retiring:
            self._go(seat)

    def _learned(self, event: Measured | Sized | ExternalMemory) -> MemoryLedger:
        match event:
            case ExternalMemory(memory_mb=memory_mb):
                return self.ledger.external(memory_mb)
            case Sized(llm=llm, memory_mb=memory_mb):
                return self.ledger.estimated(llm, memory_mb)
            case Measured(llm=llm, memory_mb=memory_mb):
                # Half loaded it would look small.
                warm = self._seats[llm].state == "warm"
                return self.ledger.measured(llm, memory_mb) if warm else self.ledger

    def _configured(self, event: Configured) -> None:
        self._rules = event.rules
        for name, seat in self._seats.items():
            if seat.configured and (name not in event.models or name in event.replaced):
                self._refuse_all(seat, 0.0, CONFIGURED_ANEW)
                seat.retiring += 1
            seat.configured = name in event.models
        for name, model in event.models.items():
            if name in self._seats:
                self._seats[name].model = model
            else:
                self._seats[name] = _Seat(model, since_s=self._now_s)
        going = [name for name, seat in self._seats.items() if not seat.configured]
        self.ledger = self.ledger.configured(event.footprints, anew=event.replaced, going=going)

    def _retired(self, llm: str) -> None:
        seat = self._seats.get(llm)
        if seat is None or not seat.retiring:
            return
        seat.retiring -= 1
        if not seat.retiring and seat.state != "cold":
            self._go(seat)

    def _asked(self, event: Recalled | Spilled | Dismissed) -> None:
        match event:
            case Recalled(llm=llm):
                self._refuse_all(self._seats[llm], 0.0, RECALLED)
            case Spilled(request=name):
                request = self._requests.get(name)
                if request is not None and request.queued:
                    self._refuse(request, 0.0, SPILLED)
            case Dismissed(llm=llm):
                self._seats[llm].dismissed = self._seats[llm].state in {"loading", "warm"}

    # Decisions

    def _settle(self) -> None:
        """Every rule once."""
        for seat in tuple(self._seats.values()):
            if not seat.configured and seat.state == "cold" and not seat.busy and not seat.retiring:
                del self._seats[seat.name]
            elif seat.dismissed:
                self._unload_idle(seat, "GQ-11 asked to go")
        self._expire()
        self._relieve()
        self._advance_claim()
        if self._claim is None:
            self._choose_next()
        for seat in self._seats.values():
            if seat.state == "warm" and not self._draining(seat):
                self._fill(seat)

    def _expire(self) -> None:
        """Who waits for what cannot come, or waited beyond all patience, is told."""
        for seat in self._seats.values():
            if seat.queued and not self.ledger.can_fit(seat.name):
                self._refuse_all(seat, None, "GQ-1 never fits")
            for line in seat.lines.values():
                while line:
                    end_s = line.oldest_s + self._rules.patience_s
                    if self._now_s < end_s:
                        self._wake(end_s)
                        break
                    oldest = next(iter(line.requests.values()))
                    self._refuse(oldest, self._line_s(seat), "GQ-4 waited too long")

    def _relieve(self) -> None:
        """Where a measurement or another program overdrew the memory, who was used last stays."""
        over_mb, staying = -self.ledger.free_mb, []
        for name, held in self.ledger.held.items():
            seat = self._seats[name]
            if seat.state == "unloading" or seat.retiring or seat.dismissed or self._is_victim(seat):
                over_mb -= held.mb
            elif seat.state == "warm":
                staying.append(seat)
        yielding: set[str] = set()
        staying.sort(key=lambda each: (each.busy > 0, each.name not in self._yielding, each.used_s))
        for seat in staying:
            if over_mb <= 0:
                break
            if self._now_s < seat.left_alone_until_s:
                self._wake(seat.left_alone_until_s)
                continue
            yielding.add(seat.name)
            over_mb -= self.ledger.held[seat.name].mb
        self._yielding = yielding
        for name in yielding:
            self._unload_idle(self._seats[name], "GQ-5 memory is overdrawn")

    def _advance_claim(self) -> None:
        claim = self._claim
        if claim is None:
            return
        if not self._still_holds(claim):
            self._claim = None
            return
        if self.ledger.fits(claim.seat.name):
            self._claim = None
            self._load(claim.seat, claim.why)
            return
        if any(v.state == "warm" and self._now_s < v.left_alone_until_s for v in claim.victims):
            # It would not go: meanwhile it may as well serve.
            self._claim = None
            return
        for victim in claim.victims:
            self._unload_idle(victim, claim.why)
        if all(victim.state == "cold" for victim in claim.victims):
            # The memory that it counted on is not there: think again.
            self._claim = None

    def _still_holds(self, claim: _Claim) -> bool:
        seat = claim.seat
        if not self._may_load(seat) or self._now_s < seat.left_alone_until_s:
            return False
        if not seat.only_background:
            return True
        return not any(victim.state == "warm" and self._is_held(victim) for victim in claim.victims)

    def _choose_next(self) -> None:
        """Bring in what is wanted and away, as far as memory, and those who are in it, allow."""
        for seat in sorted(
            filter(self._may_load, self._seats.values()),
            key=self._precedence,
        ):
            if self._now_s < seat.left_alone_until_s:
                self._wake(seat.left_alone_until_s)
                continue
            aged = self._aged(seat)
            if self.ledger.fits(seat.name):
                self._load(seat, "GQ-6 there is room")
                continue
            victims = self._victims(seat, aged=aged)
            if victims:
                why = "GQ-8 waited its time" if aged else "GQ-7 in place of an idle model"
                self._claim = _Claim(seat=seat, victims=victims, why=why)
                for victim in victims:
                    victim.went_for = seat
                self._advance_claim()
                return
            if aged and victims is not None:
                # What those after it would load now, it would wait for.
                return

    def _may_load(self, seat: _Seat) -> bool:
        # Not beside an engine of its own that is still to close: that may hold what the new one loads.
        return seat.state == "cold" and seat.queued > 0 and not seat.retiring

    def _precedence(self, seat: _Seat) -> tuple[bool, bool, int, float]:
        aged = self._aged(seat)
        return (seat.only_background, not aged, 0 if aged else self._rank(seat), seat.wanted_since_s)

    def _aged(self, seat: _Seat) -> bool:
        ages_s = seat.wanted_since_s + self._rules.max_wait_s
        if self._now_s < ages_s:
            self._wake(ages_s)
        return self._now_s >= ages_s

    def _victims(self, seat: _Seat, *, aged: bool) -> tuple[_Seat, ...] | None:
        """Who goes for `seat`, as few as will do; none while they are not to go yet, None where all would
        not be enough."""
        there = [each for each in self._seats.values() if each.state in {"warm", "unloading", "loading"}]
        if not self.ledger.fits(seat.name, freed=[each.name for each in there]):
            return None
        chosen: list[_Seat] = []
        paid = self._paid(seat)
        may_go = [
            each
            for each in there
            if self._leaving(each)
            or (each.state == "warm" and self._may_go(each, seat, aged=aged, paid=paid))
        ]
        for each in sorted(
            may_go,
            key=lambda each: (
                not self._leaving(each),
                each.queued + each.busy > 0,
                each.used_s,
            ),
        ):
            if self.ledger.fits(seat.name, freed=[victim.name for victim in chosen]):
                break
            chosen.append(each)
        if not self.ledger.fits(seat.name, freed=[victim.name for victim in chosen]):
            return ()
        for each in tuple(chosen):
            others = [victim.name for victim in chosen if victim is not each]
            if self.ledger.fits(seat.name, freed=others):
                chosen.remove(each)
        return tuple(chosen)

    def _may_go(self, victim: _Seat, seat: _Seat, *, aged: bool, paid: bool) -> bool:
        """Whether `victim` may be asked to make room for `seat`; a wake is set where time will tell."""
        now_s = self._now_s
        if now_s < victim.left_alone_until_s:
            self._wake(victim.left_alone_until_s)
            return False
        if seat.only_background and self._is_held(victim):
            return False
        wanted = victim.queued + victim.busy > 0
        turn_end_s = victim.since_s + self._rules.turn_loads * victim.load_s
        if wanted and now_s < turn_end_s:
            self._wake(turn_end_s)
            return False
        if aged:
            return True
        if victim.wanted_by(self._rank(seat), now_s - self._rules.max_wait_s):
            return False
        back_s = victim.expected_back_until_s(seat.load_s + victim.load_s)
        if now_s < back_s and not paid:
            self._wake(back_s)
            return False
        return True

    def _paid(self, seat: _Seat) -> bool:
        """Whether those who wait have waited, together, as long as the swap takes: it is worth it now."""
        count = sum(map(len, seat.in_front))
        arrivals_s = sum(line.arrivals_s for line in seat.in_front)
        paid_s = (seat.load_s + arrivals_s) / count
        if self._now_s < paid_s:
            self._wake(paid_s)
        return self._now_s >= paid_s

    def _rank(self, seat: _Seat) -> int:
        """Of the most urgent who waits for it. Batch that aged counts as interactive."""
        aged_before_s = self._now_s - self._rules.max_wait_s
        if seat.lines["interactive"] or seat.lines["batch"].oldest_s <= aged_before_s:
            return 0
        return 1 if seat.lines["batch"] else 2

    def _fill(self, seat: _Seat) -> None:
        while seat.busy < seat.model.slots:
            request = self._next_in(seat)
            if request is None:
                return
            self._take_out(request)
            request.started_s, request.charged_s = self._now_s, seat.service_s
            seat.running[request.urgency] += 1
            self._used(seat, request.urgency)
            self._level_s = max(self._level_s, self._served_s.get(request.key, 0.0))
            self._charge(request.key, request.charged_s)
            self._out.append(Start(request=request.name, llm=seat.name, why="GQ-9 in memory, its turn"))

    def _next_in(self, seat: _Seat) -> _Request | None:
        """The most urgent; among them, the first of the key that was served least."""
        if self._rank(seat) == 2 and self._keeps_from_background(seat):
            return None
        heads = [head for line in seat.lines.values() for head in line.heads()]
        return min(heads, key=self._order_of, default=None)

    def _keeps_from_background(self, seat: _Seat) -> bool:
        """Who is at the keyboard finds a slot: background has a quarter of them, and leaves half free."""
        slots, its = seat.model.slots, seat.running["background"]
        if its < slots // 4 and seat.busy < slots // 2:
            return False
        return self._is_held(seat)

    def _order_of(self, request: _Request) -> tuple[int, float, int]:
        rank = RANKS[request.urgency]
        if rank == 1 and request.arrived_s <= self._now_s - self._rules.max_wait_s:
            rank = 0
        return (rank, self._served_s.get(request.key, 0.0), request.number)

    # Bookkeeping

    def _load(self, seat: _Seat, why: str) -> None:
        self.ledger = self.ledger.hold(seat.name)
        self._become(seat, "loading")
        self._out.append(Load(llm=seat.name, why=why))

    def _unload_idle(self, seat: _Seat, why: str) -> None:
        if self._now_s < seat.left_alone_until_s:
            self._wake(seat.left_alone_until_s)
        elif seat.state == "warm" and not seat.busy and not seat.retiring:
            self._become(seat, "unloading")
            self._out.append(Unload(llm=seat.name, why=why))

    def _go(self, seat: _Seat) -> None:
        self._become(seat, "cold")
        self.ledger = self.ledger.release(seat.name)

    def _become(self, seat: _Seat, state: State) -> None:
        if state == "cold" or seat.state == "unloading":
            seat.dismissed = False
        seat.state, seat.since_s = state, self._now_s

    def _used(self, seat: _Seat, urgency: Urgency) -> None:
        seat.used_s = self._now_s
        if urgency == "interactive":
            seat.interactive_s = self._now_s

    def _is_held(self, seat: _Seat) -> bool:
        """Whether it was used interactively of late, or is about to be."""
        if seat.running["interactive"] or seat.lines["interactive"]:
            return True
        end_s = seat.interactive_s + self._rules.hold_s
        if self._now_s < end_s:
            self._wake(end_s)
        return self._now_s < end_s

    def _leaving(self, seat: _Seat) -> bool:
        return seat.state == "unloading" or self._draining(seat)

    def _draining(self, seat: _Seat) -> bool:
        return seat.retiring > 0 or seat.dismissed or seat.name in self._yielding or self._is_victim(seat)

    def _is_victim(self, seat: _Seat) -> bool:
        return self._claim is not None and any(victim is seat for victim in self._claim.victims)

    def _take_out(self, request: _Request) -> None:
        request.queued = False
        self._queued -= 1
        self._seats[request.llm].lines[request.urgency].drop(request)

    def _drop(self, request: _Request) -> None:
        self._take_out(request)
        self._forget(request)

    def _forget(self, request: _Request) -> None:
        del self._requests[request.name]
        self._here[request.key] -= 1
        if not self._here[request.key]:
            del self._here[request.key]

    def _refuse(self, request: _Request, retry_after_s: float | None, why: str) -> None:
        self._drop(request)
        told_s = None if retry_after_s is None else _retry_s(retry_after_s)
        self._out.append(Refuse(request=request.name, retry_after_s=told_s, why=why))

    def _refuse_all(self, seat: _Seat, retry_after_s: float | None, why: str) -> None:
        for line in seat.lines.values():
            for request in tuple(line.requests.values()):
                self._refuse(request, retry_after_s, why)

    def _charge(self, key: str, seconds: float) -> None:
        self._served_s[key] = self._served_s.get(key, self._level_s) + seconds
        if len(self._served_s) > MAX_KEYS:
            self._forget_keys()

    def _forget_keys(self) -> None:
        """Keep the accounts of those who are here, and of those who are furthest ahead."""
        away = sorted(self._served_s.keys() - self._here.keys(), key=lambda key: (self._served_s[key], key))
        kept = self._here.keys() | set(away[-MAX_KEYS // 2 :])
        self._served_s = {key: had_s for key, had_s in self._served_s.items() if key in kept}

    def _wake(self, at_s: float) -> None:
        if at_s > self._now_s:
            self._wake_s = min(self._wake_s, at_s)

    def _shown(self, seat: _Seat) -> Seat:
        return Seat(
            llm=seat.name,
            state=seat.state,
            draining=seat.state == "warm" and self._draining(seat),
            running=seat.busy,
            queued=seat.queued,
            slots=seat.model.slots,
            load_s=seat.load_s,
            service_s=seat.service_s,
        )

    # Estimates

    def _order(self, seat: _Seat) -> Iterator[_Request]:
        """Those who wait for `seat`, as they would be served, each one charged by the guess."""
        line = sorted(
            (request for line in seat.lines.values() for request in line.requests.values()),
            key=lambda request: (self._order_of(request)[0], request.number),
        )
        served_s = dict(self._served_s)
        for _, group in itertools.groupby(line, key=lambda request: self._order_of(request)[0]):
            own: dict[str, deque[_Request]] = {}
            for request in group:
                own.setdefault(request.key, deque()).append(request)
            heap = [(served_s.get(key, 0.0), its[0].number, key) for key, its in own.items()]
            heapq.heapify(heap)
            while heap:
                had_s, _, key = heapq.heappop(heap)
                yield own[key].popleft()
                served_s[key] = had_s + seat.service_s
                if own[key]:
                    heapq.heappush(heap, (served_s[key], own[key][0].number, key))

    def _line_s(self, seat: _Seat) -> float:
        """What the last in line waits."""
        before = max(0, seat.queued + seat.busy - seat.model.slots)
        return self._ready_in_s(seat) + before / seat.model.slots * seat.service_s

    def _ready_in_s(self, seat: _Seat) -> float:
        """Until the model serves who waits for it."""
        now_s = self._now_s
        match seat.state:
            case "warm":
                if self._draining(seat):
                    return self._rules.max_wait_s + 2 * seat.load_s
                return 0.0
            case "loading":
                return max(0.0, seat.since_s + seat.load_s - now_s)
            case _:
                return self._in_the_way_s(seat) + seat.load_s

    def _in_the_way_s(self, seat: _Seat) -> float:
        """Until a model that is away can be loaded: its time has come, or those in its place are through."""
        if self.ledger.fits(seat.name):
            return 0.0
        others = [each for each in self._seats.values() if each.state in {"warm", "loading"}]
        drain_s = max((each.service_s for each in others if each.busy), default=0.0)
        if self._claim is not None and self._claim.seat is seat:
            return drain_s
        through_s = min(
            ((each.queued + each.busy) / each.model.slots * each.service_s for each in others), default=0.0
        )
        since_s = seat.wanted_since_s if seat.queued else self._now_s
        return min(through_s, max(0.0, since_s + self._rules.max_wait_s - self._now_s) + drain_s)


def _mean(old: float, new: float) -> float:
    return new if math.isinf(old) else old + WEIGHT_OF_NEW * (new - old)


def _retry_s(wait_s: float) -> float:
    return min(LONGEST_RETRY_S, max(1.0, wait_s))
