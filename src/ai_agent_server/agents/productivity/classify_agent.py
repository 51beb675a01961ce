"""The classifier: which of the given labels fits a text."""

from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.agents.productivity._step import step
from ai_agent_server.tools.classify import Classify

__all__ = ("ClassifyAgent",)


class ClassifyAgent:
    """The labels of the payload become the answer's schema: nothing else can be answered."""

    card = AgentCard(
        name="classify",
        description="Chooses the label that fits a text, or all that fit.",
        outcomes=("done",),
        skills=("classify",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Answer {"label"}, or {"labels"} where `multiple` is true. Raises `InvalidOutputError`."""
        return await step(context, Classify())
