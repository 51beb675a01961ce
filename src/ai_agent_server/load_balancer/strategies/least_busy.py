"""Least busy: the LLM with the fewest requests for each of its slots."""

from ai_agent_server.load_balancer.base import LLMView, Requirements, Scored

__all__ = ("LeastBusy",)


class LeastBusy:
    """Requests sent or waiting, by slot; an API counts by the slots configured for it too."""

    def rank(self, wanted: Requirements, views: tuple[LLMView, ...]) -> tuple[Scored, ...]:  # noqa: ARG002 - the port
        """Fewest first."""
        return tuple(sorted((_score(view) for view in views), key=lambda each: each.score))


def _score(view: LLMView) -> Scored:
    busy = (view.in_flight + view.waiting) / max(1, view.slots)
    return Scored(llm=view.name, score=busy, parts={"busy": busy})
