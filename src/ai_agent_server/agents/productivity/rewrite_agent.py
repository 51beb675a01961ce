"""The rewriter: a text as told, a long one part by part."""

from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.agents.productivity._step import step
from ai_agent_server.tools.rewrite import Rewrite

__all__ = ("RewriteAgent",)


class RewriteAgent:
    """`more` means that parts are left: the route `rewrite.more -> rewrite` brings the task back."""

    card = AgentCard(
        name="rewrite",
        description="Rewrites a text as told.",
        outcomes=("done", "more"),
        skills=("rewrite",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Rewrite the next part. Raises `InvalidOutputError`."""
        return await step(context, Rewrite())
