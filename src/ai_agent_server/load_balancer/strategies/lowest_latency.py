"""Lowest latency: the LLM whose answer is expected to be whole first."""

from ai_agent_server.load_balancer.base import LLMView, Requirements, Scored
from ai_agent_server.load_balancer.estimate import answer_s, first_token_s, load_s, queue_s

__all__ = ("LowestLatency",)


class LowestLatency:
    """Scores in seconds: queue, load, first token, the rest of the answer."""

    def rank(self, wanted: Requirements, views: tuple[LLMView, ...]) -> tuple[Scored, ...]:
        """Least seconds first."""
        return tuple(sorted((_score(wanted, view) for view in views), key=lambda each: each.score))


def _score(wanted: Requirements, view: LLMView) -> Scored:
    first_s = first_token_s(view)
    parts = {
        "queue": queue_s(view, wanted.output_tokens),
        "load": load_s(view),
        "first_token": first_s,
        "answer": answer_s(view, wanted.output_tokens) - first_s,
    }
    return Scored(llm=view.name, score=sum(parts.values()), parts=parts)
