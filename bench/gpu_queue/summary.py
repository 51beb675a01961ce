"""What a run came to: swaps, time, waits, fairness; and the figures that have to hold. Pure."""

import math
from collections.abc import Iterable, Mapping

import msgspec

from bench.gpu_queue.simulator import Run

PREFILL_S = 1.0
"""From a request's start to its first token."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on one trace.

    Waits are from a request's coming to its start, of those who were promised one: background is not.
    """

    trace: str
    policy: str
    loads: int
    makespan_s: float
    wait_s_mean: float
    wait_s_p95: float
    wait_s_max: float
    fairness: float
    """Jain's index of what each key had by the time that half the work was done, as a share of what a
    max-min fair division of as much would have given it. 1 is fair."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A promise and what was measured."""

    what: str
    measured: float
    at_most: float = math.inf
    at_least: float = -math.inf
    unit: str = ""

    @property
    def holds(self) -> bool:
        """Whether it was kept."""
        return self.at_least <= self.measured <= self.at_most


def row(trace: str, policy: str, run: Run) -> Row:
    """The row of a run."""
    waits = [
        each.wait_s for each in run.served if each.wait_s is not None and each.job.urgency != "background"
    ]
    return Row(
        trace=trace,
        policy=policy,
        loads=len(run.loads),
        makespan_s=round(run.ended_s, 1),
        wait_s_mean=round(math.fsum(waits) / len(waits), 1),
        wait_s_p95=round(quantile(waits, 0.95), 1),
        wait_s_max=round(max(waits), 1),
        fairness=round(fairness(run), 3),
    )


def quantile(values: Iterable[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def fairness(run: Run) -> float:
    """See `Row.fairness`."""
    done = sorted(
        (each for each in run.served if each.wait_s is not None), key=lambda each: each.ended_s or 0
    )
    half_s = math.fsum(each.job.service_s for each in done) / 2
    at_s, had_s = 0.0, 0.0
    for each in done:
        had_s += each.job.service_s
        at_s = each.ended_s or 0.0
        if had_s >= half_s:
            break
    asked: dict[str, float] = {}
    had: dict[str, float] = {}
    for each in done:
        key, service_s = each.job.key, each.job.service_s
        if each.arrived_s <= at_s:
            asked[key] = asked.get(key, 0.0) + service_s
            began_s = each.started_s or 0.0
            had[key] = had.get(key, 0.0) + min(service_s, max(0.0, at_s - began_s))
    due = max_min(asked, math.fsum(had.values()))
    return jain(min(1.0, had[key] / due[key]) if due[key] > 0 else 1.0 for key in asked)


def max_min(asked: Mapping[str, float], total: float) -> dict[str, float]:
    """`total` divided so that nobody has more than was asked, and the rest is even."""
    due: dict[str, float] = {}
    left = total
    for number, key in enumerate(sorted(asked, key=lambda key: asked[key])):
        due[key] = min(asked[key], left / (len(asked) - number))
        left -= due[key]
    return due


def jain(shares: Iterable[float]) -> float:
    """Jain's index: 1 where all are equal, 1/n where one has all."""
    had = list(shares)
    squares = math.fsum(share**2 for share in had)
    return math.fsum(had) ** 2 / (len(had) * squares) if squares else 1.0


def first_token_p95_s(run: Run) -> float:
    """Of those at the keyboard: the wait, and the prompt's reading."""
    return PREFILL_S + quantile(
        (each.wait_s for each in run.served if each.wait_s is not None and each.job.urgency == "interactive"),
        0.95,
    )


def foretold_error(run: Run) -> float:
    """Of those who were told to wait, the median error of what they were told, as a share of the wait."""
    errors = [
        abs(each.foretold_s - each.wait_s) / each.wait_s
        for each in run.served
        if each.foretold_s is not None and each.wait_s
    ]
    return quantile(errors, 0.5)


def prediction_error(run: Run) -> float:
    """Of memory: the 95th percentile of |taken for - took| / took, over all loads."""
    return quantile((abs(said - took) / took for said, took in run.predictions), 0.95)


def markdown(rows: Iterable[Row], titles: Mapping[str, str]) -> str:
    """The table."""
    lines = [
        "| trace | policy | loads | makespan s | mean wait s | p95 wait s | longest wait s | fairness |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    before = ""
    for each in rows:
        name = "" if each.trace == before else titles[each.trace]
        before = each.trace
        lines.append(
            f"| {name} | {each.policy} | {each.loads} | {each.makespan_s:.0f} | {each.wait_s_mean:.1f} "
            f"| {each.wait_s_p95:.1f} | {each.wait_s_max:.1f} | {each.fairness:.2f} |"
        )
    return "\n".join(lines)


def figures_markdown(figures: Iterable[Figure]) -> str:
    """The promises, as a table."""
    lines = ["| figure | bound | measured |", "|---|---|--:|"]
    for each in figures:
        bound = "none set"
        if each.at_most < math.inf:
            bound = f"at most {each.at_most:g} {each.unit}"
        elif each.at_least > -math.inf:
            bound = f"at least {each.at_least:g} {each.unit}"
        lines.append(f"| {each.what} | {bound.strip()} | {each.measured:.3g} {each.unit} |")
    return "\n".join(lines)


class Behind(msgspec.Struct, frozen=True, kw_only=True):
    """Where another policy does better than ours, by more than a twentieth."""

    trace: str
    policy: str
    measures: tuple[tuple[str, float, float], ...]
    """What, theirs, ours."""


def behind(rows: Iterable[Row], ours: str) -> list[Behind]:
    """Each trace and policy in which ours is not the best in everything at once."""
    found: list[Behind] = []
    table = list(rows)
    mine = {each.trace: each for each in table if each.policy == ours}
    for each in table:
        own = mine[each.trace]
        worse = tuple(
            (name, theirs, our)
            for name, our, theirs in (
                ("loads", own.loads, each.loads),
                ("makespan", own.makespan_s, each.makespan_s),
                ("p95 wait", own.wait_s_p95, each.wait_s_p95),
                ("unfairness", 1 - own.fairness, 1 - each.fairness),
            )
            if our > 1.05 * theirs + 0.01
        )
        if each.policy != ours and worse:
            found.append(Behind(trace=each.trace, policy=each.policy, measures=worse))
    return found


def behind_markdown(found: Iterable[Behind], titles: Mapping[str, str]) -> str:
    """Where it is behind, as a table."""
    lines = ["| trace | ahead of this server | in what: theirs, ours |", "|---|---|---|"]
    for each in found:
        told = "; ".join(f"{name} {theirs:g}, {our:g}" for name, theirs, our in each.measures)
        lines.append(f"| {titles[each.trace]} | {each.policy} | {told} |")
    return "\n".join(lines)
