"""Residency first: what is in memory serves, on this machine before an API, the bigger tier only at need."""

from ai_agent_server.load_balancer.base import LLMView, Requirements, Scored
from ai_agent_server.load_balancer.estimate import answer_s, busy_share, cost_usd, load_s, queue_s

__all__ = ("ResidentFirst",)

TOO_SMALL_S = 600.0
"""The tier asked for is `main` and this one is small: its answer is not what was asked."""
TOO_BIG_S = 100.0
"""The tier asked for is `small` and this one is main: it only takes longer."""
PREFERENCE_S = 60.0
"""For each place down the list of preferences."""
API_S = 300.0
"""An API serves what would wait five minutes longer here."""
COST_S_PER_USD = 3600.0
"""An hour's wait for a dollar."""
CUT_SHORT_S = 60.0
"""The whole answer would not fit the context."""


class ResidentFirst:
    """Scores in seconds of waiting: what is not time is given the wait that one would accept to avoid it."""

    def rank(self, wanted: Requirements, views: tuple[LLMView, ...]) -> tuple[Scored, ...]:
        """Least seconds first."""
        scored = [_score(wanted, view) for view in views]
        return tuple(sorted(scored, key=lambda each: each.score))


def _score(wanted: Requirements, view: LLMView) -> Scored:
    parts = {
        "tier": _tier_s(wanted, view),
        "preference": PREFERENCE_S * _place(wanted, view),
        "source": API_S if view.source == "api" else 0.0,
        "residency": load_s(view),
        "slots": busy_share(view),
        "wait": queue_s(view, wanted.output_tokens) + answer_s(view, wanted.output_tokens),
        "cost": COST_S_PER_USD * cost_usd(view, wanted.input_tokens, wanted.output_tokens),
        "room": CUT_SHORT_S if wanted.input_tokens + wanted.output_tokens > view.context_tokens else 0.0,
    }
    return Scored(llm=view.name, score=sum(parts.values()), parts=parts)


def _tier_s(wanted: Requirements, view: LLMView) -> float:
    if wanted.tier is None or wanted.tier == view.tier:
        return 0.0
    return TOO_SMALL_S if wanted.tier == "main" else TOO_BIG_S


def _place(wanted: Requirements, view: LLMView) -> int:
    return wanted.prefer.index(view.name) if view.name in wanted.prefer else len(wanted.prefer)
