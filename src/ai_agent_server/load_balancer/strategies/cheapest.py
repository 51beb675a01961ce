"""Cheapest: the LLM on which the request costs least; what costs the same by the shorter wait."""

from ai_agent_server.load_balancer.base import LLMView, Requirements, Scored
from ai_agent_server.load_balancer.estimate import answer_s, cost_usd, load_s, queue_s

__all__ = ("Cheapest",)

USD_PER_S = 1e-9
"""So small that a wait never outweighs a cost."""


class Cheapest:
    """Scores in dollars."""

    def rank(self, wanted: Requirements, views: tuple[LLMView, ...]) -> tuple[Scored, ...]:
        """Least dollars first."""
        return tuple(sorted((_score(wanted, view) for view in views), key=lambda each: each.score))


def _score(wanted: Requirements, view: LLMView) -> Scored:
    wait_s = load_s(view) + queue_s(view, wanted.output_tokens) + answer_s(view, wanted.output_tokens)
    parts = {
        "cost": cost_usd(view, wanted.input_tokens, wanted.output_tokens),
        "wait": USD_PER_S * wait_s,
    }
    return Scored(llm=view.name, score=sum(parts.values()), parts=parts)
