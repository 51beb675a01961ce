"""The summarizer: a long text is read piece by piece, one call a step."""

from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.agents.productivity._step import step
from ai_agent_server.tools.summarize import Summarize

__all__ = ("SummarizeAgent",)


class SummarizeAgent:
    """`more` means that pieces or merges are left: the route `summarize.more -> summarize` brings the task
    back, and a restart goes on at the piece that was under way.
    """

    card = AgentCard(
        name="summarize",
        description="Shortens a text, of any length that the task's limits allow.",
        outcomes=("done", "more"),
        skills=("summarize",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Read the next piece, or merge. Raises `InvalidOutputError`."""
        return await step(context, Summarize())
