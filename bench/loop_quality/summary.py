"""The summary: what the lines say, with 95 % intervals by paired bootstrap. Pure."""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from bench.figures import Figure, Machine, at_least, at_most
from bench.loop_quality.lines import ARMS, Arm, Line, Setup

RESAMPLES = 10_000


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """A value with its 95 % interval. None where the number below the line is 0."""

    value: float | None
    low: float | None
    high: float | None


class ArmSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One arm over all problems. Tokens, calls and seconds are means over the problems."""

    solved: int
    """Ended with code that is right by every assertion, whatever the arm says of it."""
    share: Interval
    tokens: float
    calls: float
    most_calls: int
    seconds: float
    completed: int | None
    """How many it stood by: the loop's `completed`, a draw for which the visible example holds."""
    false_accepts: int | None
    """Those of them that a hidden assertion refutes."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """All that is told at the end."""

    setup: Setup
    machine: Machine
    problems: int
    arms: dict[Arm, ArmSummary]
    loop_to_one_call: Interval | None = None
    loop_to_best_of_n: Interval | None = None
    first_right: int | None = None
    """First versions of the loop that were right,"""
    got_worse: int | None = None
    """those of them whose task ended with one that is not,"""
    right_but_failed: int | None = None
    """and tasks that ended with a right one, called failed."""
    past_limit: int | None = None
    ended: dict[str, int] = {}
    """How the loop's tasks ended, and how many so."""
    figures: tuple[Figure, ...] = ()


def summarise(
    setup: Setup, machine: Machine, outcomes: Mapping[Arm, Sequence[Line]], *, resamples: int = RESAMPLES
) -> Summary:
    """The summary of arms that have one line a problem each, for the same problems in the same order."""
    measured: tuple[Arm, ...] = tuple(arm for arm in ARMS if arm in outcomes)
    rows = list(zip(*([line.right for line in outcomes[arm]] for arm in measured), strict=True))
    counts = _resampled(rows, random.Random(setup.seed), resamples)
    arms = {arm: _arm(arm, outcomes[arm], _column(counts, measured.index(arm))) for arm in measured}

    def ratio(below: Arm) -> Interval | None:
        if "loop" not in arms or below not in arms:
            return None
        pairs = zip(
            _column(counts, measured.index("loop")), _column(counts, measured.index(below)), strict=True
        )
        return _ratio(arms["loop"].solved, arms[below].solved, pairs)

    found = Summary(
        setup=setup,
        machine=machine,
        problems=len(rows),
        arms=arms,
        loop_to_one_call=ratio("one_call"),
        loop_to_best_of_n=ratio("best_of_n"),
    )
    return _with_targets(_of_the_loop(found, outcomes["loop"])) if "loop" in outcomes else found


def _resampled(rows: Sequence[tuple[bool, ...]], rng: random.Random, times: int) -> list[tuple[int, ...]]:
    """Solved per arm in each of `times` draws, with replacement, of as many problems.

    Paired: a problem is drawn with what all arms made of it.
    """
    found = []
    for _ in range(times):
        drawn = Counter(rng.choices(rows, k=len(rows)))
        found.append(tuple(sum(n for row, n in drawn.items() if row[arm]) for arm in range(len(rows[0]))))
    return found


def _column(counts: Sequence[tuple[int, ...]], arm: int) -> list[int]:
    return [row[arm] for row in counts]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 %, by nearest rank."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[math.floor(0.025 * last)], ordered[math.ceil(0.975 * last)]


def _ratio(above: int, below: int, counts: "zip[tuple[int, int]]") -> Interval:
    """`above` / `below`. A resample with 0 / 0 says nothing and is left out; n / 0 is without end."""
    values = [a / b if b else math.inf for a, b in counts if a or b]
    low, high = _interval(values) if values else (math.inf, math.inf)
    return Interval(value=_finite(above / below if below else math.inf), low=_finite(low), high=_finite(high))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _arm(arm: Arm, lines: Sequence[Line], counts: Sequence[int]) -> ArmSummary:
    count = len(lines)
    low, high = _interval([n / count for n in counts])
    right = sum(line.right for line in lines)
    stood_by = [line for line in lines if line.completed]
    claims = arm != "one_call"
    return ArmSummary(
        solved=right,
        share=Interval(value=right / count, low=low, high=high),
        tokens=sum(line.tokens for line in lines) / count,
        calls=sum(line.calls for line in lines) / count,
        most_calls=max(line.calls for line in lines),
        seconds=sum(line.seconds for line in lines) / count,
        completed=len(stood_by) if claims else None,
        false_accepts=sum(not line.right for line in stood_by) if claims else None,
    )


def _of_the_loop(found: Summary, lines: Sequence[Line]) -> Summary:
    first_right = [line for line in lines if line.first_right]
    return msgspec.structs.replace(
        found,
        first_right=len(first_right),
        got_worse=sum(not line.right for line in first_right),
        right_but_failed=sum(line.right and not line.completed for line in lines),
        past_limit=sum(line.past_limit for line in lines),
        ended=dict(Counter(line.ended for line in lines).most_common()),
    )


def _with_targets(found: Summary) -> Summary:
    """The figures that have a target. One that cannot be computed is left out."""
    loop, figures = found.arms["loop"], []
    one, best = found.loop_to_one_call, found.loop_to_best_of_n
    if one is not None and one.value is not None:
        figures.append(at_least("loop_to_one_call", one.value, "x", 1.5, "solved by the loop to one call"))
    if best is not None and best.value is not None:
        more = loop.solved > found.arms["best_of_n"].solved
        figures.append(
            Figure(
                name="loop_to_best_of_n",
                value=best.value,
                unit="x",
                what="solved by the loop to best-of-n at equal tokens",
                target="> 1 x",
                kept=more,
            )
        )
    if loop.completed:
        share = 100 * (loop.false_accepts or 0) / loop.completed
        figures.append(at_most("false_accepts", share, "%", 10, "of what the loop calls completed"))
    if found.first_right:
        share = 100 * (found.got_worse or 0) / found.first_right
        figures.append(at_most("got_worse", share, "%", 1, "of first versions that were right"))
    figures.append(at_most("mean_calls", loop.calls, "calls", 16, "a task of the loop"))
    figures.append(at_most("past_limit", found.past_limit or 0, "tasks", 0, "past a limit"))
    return msgspec.structs.replace(found, figures=tuple(figures))


def table(found: Summary) -> str:
    """The summary as Markdown."""
    arms = found.arms
    rows: list[tuple[str, list[str]]] = [
        ("solved", [f"{a.solved} of {found.problems}" for a in arms.values()]),
        ("solved, 95 % interval", [_percent(a.share) for a in arms.values()]),
        ("tokens a problem", [f"{a.tokens:.0f}" for a in arms.values()]),
        ("calls a problem (most)", [f"{a.calls:.1f} ({a.most_calls})" for a in arms.values()]),
        ("seconds a problem", [f"{a.seconds:.1f}" for a in arms.values()]),
        ("stood by", ["" if a.completed is None else str(a.completed) for a in arms.values()]),
        ("false accepts", [_of(a.false_accepts, a.completed) for a in arms.values()]),
    ]
    only = {
        "right first versions that got worse": _of(found.got_worse, found.first_right),
        "right, called failed": str(found.right_but_failed),
        "past a limit": str(found.past_limit),
        "ended": ", ".join(f"{reason} {count}" for reason, count in found.ended.items()),
    }
    if "loop" in arms:
        rows += [(name, [value if arm == "loop" else "" for arm in arms]) for name, value in only.items()]
    setup, machine = found.setup, found.machine
    where = (
        f"MBPP sanitized {setup.problems}, {setup.llm} ({setup.model}), seed {setup.seed}; "
        f"{machine.cores} cores of {machine.cpu}, Python {machine.python}."
    )
    lines = [
        f"| | {' | '.join(arms)} |",
        "|---" * (len(arms) + 1) + "|",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
        "",
        *(
            f"- loop to {name}: {_times(ratio)}"
            for name, ratio in (("one_call", found.loop_to_one_call), ("best_of_n", found.loop_to_best_of_n))
            if ratio is not None
        ),
        *(
            f"- {figure.what}: {figure.value:.3g} {figure.unit}, target {figure.target}: "
            f"{'kept' if figure.kept else 'missed'}"
            for figure in found.figures
        ),
        "",
        where,
    ]
    return "\n".join(lines)


def _percent(share: Interval) -> str:
    return f"{100 * (share.value or 0):.1f} % ({100 * (share.low or 0):.1f} to {100 * (share.high or 0):.1f})"


def _of(part: int | None, whole: int | None) -> str:
    if part is None or whole is None:
        return ""
    return f"{part} of {whole}" + (f" ({100 * part / whole:.1f} %)" if whole else "")


def _times(ratio: Interval) -> str:
    if ratio.value is None:
        return "nothing to compare with"
    low = "-" if ratio.low is None else f"{ratio.low:.2f}"
    high = "no end" if ratio.high is None else f"{ratio.high:.2f}"
    return f"{ratio.value:.2f} x (95 % interval {low} to {high}, paired bootstrap)"
