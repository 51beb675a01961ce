"""Best-of-n: who is drawn again, and which draw is chosen. Pure.

It is made as strong as it can be: a problem whose visible example holds is drawn no more, since no
later draw would be chosen, and the tokens that this saves go to the other problems. All problems
together get the tokens that the loop used on them, so that the means are equal.
"""

from collections.abc import Mapping, Sequence

import msgspec

from bench.loop_quality.lines import Line

MAX_DRAWS = 256
"""Of one problem: where nearly all are done, the tokens of many would go to a few."""


def chosen(draws: Sequence[Line]) -> Line:
    """The first draw for which the visible example holds, else the first of all.

    Its tokens, calls and seconds are those of every draw.
    """
    best = next((draw for draw in draws if draw.visible), draws[0])
    return msgspec.structs.replace(
        best,
        arm="best_of_n",
        completed=best.visible,
        calls=sum(draw.calls for draw in draws),
        tokens=sum(draw.tokens for draw in draws),
        seconds=sum(draw.seconds for draw in draws),
        ended="completed" if best.visible else "no draw holds",
    )


def next_round(draws: Mapping[int, Sequence[Line]], budget_tokens: int) -> tuple[int, ...]:
    """The problems that are drawn once more now; none when the tokens are spent as nearly as can be.

    A round that was cut short is finished first.
    """
    open_ = [problem for problem, drawn in draws.items() if not any(draw.visible for draw in drawn)]
    rounds = max((len(drawn) for drawn in draws.values()), default=0)
    behind = tuple(problem for problem in open_ if len(draws[problem]) < rounds)
    if behind or not open_ or rounds >= MAX_DRAWS:
        return behind
    every = [draw for drawn in draws.values() for draw in drawn]
    spent = sum(draw.tokens for draw in every)
    expected = len(open_) * spent / len(every)
    return tuple(open_) if 0 < spent + expected / 2 <= budget_tokens else ()
