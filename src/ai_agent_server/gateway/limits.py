"""What callers have used, and whether there is room for more. Pure; the clock is passed in.

Every limit is one thing: so much of a unit in any stretch of `per_s` seconds, or in total. A window
slides and is exact on the safe side: what is used together within a 60th of it is let go together,
with the last of it. So no stretch of that length ever holds more than was allowed.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from ai_agent_server.config.settings import Allowance
from ai_agent_server.errors import LimitUnit

__all__ = (
    "MAX_RETRY_S",
    "OTHERS",
    "Amounts",
    "Bound",
    "KeptMeter",
    "Limiter",
    "Refusal",
    "Share",
    "Standing",
    "Taken",
    "bounds",
    "duration",
    "standing_headers",
)

GRAINS: Final = 60
MAX_RETRY_S: Final = 120.0
"""A client that has to wait for longer should not repeat by itself."""
MAX_SUBJECTS: Final = 1024
OTHERS: Final = "others"
"""Who comes when the table is full is counted together with all who do."""

UNITS: Final[tuple[LimitUnit, ...]] = ("requests", "tokens", "gpu_s", "usd")


class Amounts(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """So much of each unit."""

    requests: int = 0
    tokens: int = 0
    gpu_s: float = 0.0
    usd: float = 0.0


class Bound(msgspec.Struct, frozen=True, gc=False):
    """So much of one unit in any stretch of `per_s` seconds, None: in total."""

    unit: LimitUnit
    per_s: float | None
    allowed: float


class Share(msgspec.Struct, frozen=True, gc=False):
    """Under which name use is counted, and what that name is allowed."""

    subject: str
    """`key:laptop`, `address:192.0.2.7`, `project:shop`, `tier:main:key:laptop`."""
    bounds: tuple[Bound, ...]


def bounds(allowances: Iterable[Allowance]) -> tuple[Bound, ...]:
    """What `allowances` bound; of two for the same unit and window the smaller."""
    least: dict[tuple[LimitUnit, float | None], float] = {}
    for allowance in allowances:
        for unit in UNITS:
            allowed = getattr(allowance, unit)
            if allowed is not None:
                name = (unit, allowance.per_s)
                least[name] = min(allowed, least.get(name, allowed))
    return tuple(Bound(unit, per_s, allowed) for (unit, per_s), allowed in least.items())


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Which limit has no room. `retry_after_s` is when it will have, None: never."""

    subject: str
    unit: LimitUnit
    allowed: float
    per_s: float | None
    used: float
    wanted: float
    retry_after_s: float | None

    @property
    def is_quota(self) -> bool:
        """Whether a budget is spent, rather than a rate passed."""
        return self.unit == "usd" or self.retry_after_s is None

    @property
    def should_retry(self) -> bool:
        """Whether a client may repeat by itself."""
        return not self.is_quota and (self.retry_after_s or 0.0) <= MAX_RETRY_S


class Standing(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The limit of a unit that is nearest to its end. `reset_s`: until it is whole again."""

    limit: float
    remaining: float
    reset_s: float


class KeptMeter(msgspec.Struct, frozen=True, kw_only=True):
    """A meter as it is kept over a restart; times are seconds since the epoch."""

    subject: str
    unit: LimitUnit
    per_s: float | None
    used: tuple[tuple[float, float, float], ...]
    """First time, last time, amount."""


class _Grain:
    """What was used at nearly the same time. A grain that was let go holds nothing."""

    __slots__ = ("amount", "first_s", "last_s")

    def __init__(self, first_s: float, last_s: float, amount: float) -> None:
        self.first_s, self.last_s, self.amount = first_s, last_s, amount


class _Meter:
    """What was used of one unit, in a sliding window or in total."""

    __slots__ = ("_grain_s", "_grains", "_window_s", "used")

    def __init__(self, per_s: float | None) -> None:
        self._window_s = math.inf if per_s is None else per_s
        self._grain_s = self._window_s / GRAINS
        self._grains: deque[_Grain] = deque()
        self.used: float = 0

    def let_go(self, now_s: float) -> None:
        """Forget what has left the window."""
        grains = self._grains
        while grains and grains[0].last_s + self._window_s <= now_s:
            old = grains.popleft()
            self.used -= old.amount
            old.amount = 0
        if not grains:
            # Sums of fractions drift.
            self.used = 0

    def add(self, amount: float, now_s: float) -> _Grain:
        """Count `amount`; answers where it was put."""
        grains = self._grains
        if grains and now_s - grains[-1].first_s < self._grain_s:
            grain = grains[-1]
            grain.last_s = max(grain.last_s, now_s)
            grain.amount += amount
        else:
            grain = _Grain(now_s, now_s, amount)
            grains.append(grain)
        self.used += amount
        return grain

    def give_back(self, grain: _Grain, amount: float) -> None:
        """Take `amount` off `grain` again, so far as it is still there."""
        amount = min(amount, grain.amount)
        grain.amount -= amount
        self.used = max(0, self.used - amount)

    def free_in_s(self, surplus: float, now_s: float) -> float | None:
        """Seconds until `surplus` of what is used has left the window, None: never."""
        for grain in self._grains:
            surplus -= grain.amount
            if surplus <= 0:
                return None if math.isinf(self._window_s) else self._left_s(grain, now_s)
        return None

    def reset_s(self, now_s: float) -> float:
        """Seconds until nothing is in the window; 0 for a total."""
        if not self._grains or math.isinf(self._window_s):
            return 0.0
        return self._left_s(self._grains[-1], now_s)

    def _left_s(self, grain: _Grain, now_s: float) -> float:
        return min(self._window_s, max(0.0, grain.last_s + self._window_s - now_s))

    def kept(self) -> tuple[tuple[float, float, float], ...]:
        """As it is kept."""
        return tuple((grain.first_s, grain.last_s, grain.amount) for grain in self._grains if grain.amount)

    def restore(self, used: Iterable[tuple[float, float, float]], now_s: float) -> None:
        """Take up what was kept. What is from the future, as a clock that was set back has it, is of now."""
        for first_s, last_s, amount in used:
            self._grains.append(_Grain(min(first_s, now_s), min(last_s, now_s), amount))
            self.used += amount


class Taken:
    """What `Limiter.take` set aside, and where; settled once."""

    __slots__ = ("places",)

    def __init__(self) -> None:
        self.places: list[tuple[str, Bound, _Grain | None, float]] = []


class Limiter:
    """The meters of all callers."""

    def __init__(self) -> None:
        self._meters: dict[str, dict[tuple[LimitUnit, float | None], _Meter]] = {}

    def subject(self, kind: str, name: str) -> str:
        """The name under which one of many is counted: its own while there is room for it."""
        own = f"{kind}:{name}"
        return own if own in self._meters or len(self._meters) < MAX_SUBJECTS else f"{kind}:{OTHERS}"

    def take(self, shares: Sequence[Share], wanted: Amounts, now_s: float) -> Taken | Refusal:
        """Set `wanted` aside in every share, or in none and say which limit has no room.

        Of tokens, GPU time and money there must be something left though nothing is wanted: what a
        request will cost is not known before.
        """
        refusal: Refusal | None = None
        places = []
        for share in shares:
            for bound in share.bounds:
                meter = self._meter(share.subject, bound)
                meter.let_go(now_s)
                amount = getattr(wanted, bound.unit)
                is_spent = meter.used >= bound.allowed and bound.unit != "requests"
                if meter.used + amount > bound.allowed or is_spent:
                    found = _refusal(share.subject, bound, meter, wanted=amount, now_s=now_s)
                    if refusal is None or _wait(found) > _wait(refusal):
                        refusal = found
                places.append((share.subject, bound, meter, amount))
        if refusal is not None:
            return refusal
        taken = Taken()
        for subject, bound, meter, amount in places:
            grain = meter.add(amount, now_s) if amount else None
            taken.places.append((subject, bound, grain, amount))
        return taken

    def settle(self, taken: Taken, used: Amounts, now_s: float) -> None:
        """What was set aside came to `used`: give the rest back, or count what it was more.

        Requests stay counted. A hold that was settled is empty.
        """
        for subject, bound, grain, amount in taken.places:
            if bound.unit == "requests":
                continue
            more = getattr(used, bound.unit) - amount
            if more == 0:
                continue
            # Looked up again: a meter that held nothing may have been forgotten meanwhile.
            meter = self._meter(subject, bound)
            meter.let_go(now_s)
            if more > 0:
                meter.add(more, now_s)
            elif grain is not None:
                meter.give_back(grain, -more)
        taken.places.clear()

    def withdraw(self, taken: Taken, now_s: float) -> None:
        """Give back all that was set aside, requests too."""
        for subject, bound, grain, amount in taken.places:
            if grain is not None:
                meter = self._meter(subject, bound)
                meter.let_go(now_s)
                meter.give_back(grain, amount)
        taken.places.clear()

    def count(self, shares: Sequence[Share], used: Amounts, now_s: float) -> None:
        """Count what was used, whether or not there was room."""
        for share in shares:
            for bound in share.bounds:
                if amount := getattr(used, bound.unit):
                    meter = self._meter(share.subject, bound)
                    meter.let_go(now_s)
                    meter.add(amount, now_s)

    def standing(self, shares: Sequence[Share], unit: LimitUnit, now_s: float) -> Standing | None:
        """The limit of `unit` of which the least remains, None where there is none."""
        nearest: Standing | None = None
        for share in shares:
            meters = self._meters.get(share.subject, {})
            for bound in share.bounds:
                if bound.unit != unit:
                    continue
                used, reset_s = 0.0, 0.0
                if (meter := meters.get((unit, bound.per_s))) is not None:
                    meter.let_go(now_s)
                    used, reset_s = meter.used, meter.reset_s(now_s)
                remaining = max(0.0, bound.allowed - used)
                if nearest is None or remaining < nearest.remaining:
                    nearest = Standing(limit=bound.allowed, remaining=remaining, reset_s=reset_s)
        return nearest

    def prune(self, now_s: float) -> None:
        """Forget whoever has nothing left in any window."""
        for subject, meters in tuple(self._meters.items()):
            for name, meter in tuple(meters.items()):
                meter.let_go(now_s)
                if not meter.used:
                    del meters[name]
            if not meters:
                del self._meters[subject]

    def kept(self) -> tuple[KeptMeter, ...]:
        """Every meter, to be kept over a restart."""
        return tuple(
            KeptMeter(subject=subject, unit=unit, per_s=per_s, used=used)
            for subject, meters in self._meters.items()
            for (unit, per_s), meter in meters.items()
            if (used := meter.kept())
        )

    def restore(self, kept: Iterable[KeptMeter], now_s: float) -> None:
        """Take up what was kept."""
        for meter in kept:
            self._meter(meter.subject, Bound(meter.unit, meter.per_s, 0)).restore(meter.used, now_s)
        self.prune(now_s)

    def _meter(self, subject: str, bound: Bound) -> _Meter:
        meters = self._meters.get(subject)
        if meters is None:
            meters = self._meters[subject] = {}
        name = (bound.unit, bound.per_s)
        meter = meters.get(name)
        if meter is None:
            meter = meters[name] = _Meter(bound.per_s)
        return meter


def duration(seconds: float) -> str:
    """`seconds` as the rate limit headers have it: `6m0s`, `1h0m30s`, `2s`, `120ms`; rounded up."""
    milliseconds = math.ceil(round(seconds * 1000, 3))
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    whole = math.ceil(round(seconds, 6))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def standing_headers(standings: Mapping[LimitUnit, Standing | None]) -> dict[str, str]:
    """`x-ratelimit-*` of the units that have a limit."""
    headers = {}
    for unit, standing in standings.items():
        if standing is not None:
            headers[f"x-ratelimit-limit-{unit}"] = str(math.floor(standing.limit))
            headers[f"x-ratelimit-remaining-{unit}"] = str(math.floor(standing.remaining))
            headers[f"x-ratelimit-reset-{unit}"] = duration(standing.reset_s)
    return headers


def _wait(refusal: Refusal) -> float:
    return math.inf if refusal.retry_after_s is None else refusal.retry_after_s


def _refusal(subject: str, bound: Bound, meter: _Meter, *, wanted: float, now_s: float) -> Refusal:
    # Where nothing is wanted something has to be left: one, or of a fraction any crumb.
    least = 1 if bound.unit in {"requests", "tokens"} else 1e-9
    surplus = meter.used + (wanted or least) - bound.allowed
    return Refusal(
        subject=subject,
        unit=bound.unit,
        allowed=bound.allowed,
        per_s=bound.per_s,
        used=meter.used,
        wanted=wanted,
        retry_after_s=meter.free_in_s(surplus, now_s),
    )
