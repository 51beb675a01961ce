"""The deep coder: starts afresh, from a plan and a summary of what failed."""

from ai_agent_server.agents._prompt import request
from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.agents.developer import _history
from ai_agent_server.agents.developer._code import code_written

__all__ = ("DeepCoderAgent",)


class DeepCoderAgent:
    """Writes another version from nothing: it sees what failed, never the code that did."""

    card = AgentCard(
        name="deep-coder",
        description="Writes code afresh, from the plan and a summary of the failures so far.",
        outcomes=("done",),
        skills=("code",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Ask for code. Raises `InvalidOutputError` when the answer holds none."""
        packet = context.packet
        fields = _history.specification(packet) | {
            "plan": _history.plan(packet),
            "outline": _history.outline(packet),
            "failures": _history.failures(packet),
        }
        return code_written(packet, await context.chat(request(context, fields)))
