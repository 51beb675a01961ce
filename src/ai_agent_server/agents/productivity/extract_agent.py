"""The extractor: named fields out of a text, null where the text does not say."""

from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.agents.productivity._step import step
from ai_agent_server.tools.extract import Extract

__all__ = ("ExtractAgent",)


class ExtractAgent:
    """The `fields` or the `schema` of the payload become the answer's schema."""

    card = AgentCard(
        name="extract",
        description="Takes named fields out of a text.",
        outcomes=("done",),
        skills=("extract",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Answer one object of that form. Raises `InvalidOutputError`."""
        return await step(context, Extract())
