"""The fast coder: answers at once, from the task and its examples."""

from ai_agent_server.agents._prompt import request
from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.agents.developer import _history
from ai_agent_server.agents.developer._code import code_written

__all__ = ("FastCoderAgent",)


class FastCoderAgent:
    """Writes the first version. A plan is used where the prompt file names `$plan`."""

    card = AgentCard(
        name="fast-coder",
        description="Writes code at once, from the task and its examples.",
        outcomes=("done",),
        skills=("code",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Ask for code. Raises `InvalidOutputError` when the answer holds none."""
        packet = context.packet
        fields = _history.specification(packet) | {
            "plan": _history.plan(packet),
            "outline": _history.outline(packet),
            "given_code": str(packet.payload.get("code") or ""),
        }
        return code_written(packet, await context.chat(request(context, fields)))
