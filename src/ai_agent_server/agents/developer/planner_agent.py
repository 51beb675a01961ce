"""The planner: a short plan, and after failures a fresh one."""

from ai_agent_server.agents._prompt import request
from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.agents.developer import _history
from ai_agent_server.core.answer import read_object, read_text

__all__ = ("PlannerAgent",)


class PlannerAgent:
    """Plans in a few steps. After failures it is told of them, and not of the plan that led there."""

    card = AgentCard(
        name="planner",
        description="Makes a short plan; after failures a fresh one that avoids them.",
        outcomes=("done",),
        skills=("plan",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Ask for a plan: output {"plan": [step, ...]}. Raises `InvalidOutputError`."""
        packet = context.packet
        schema = context.spec.result_schema
        fields = _history.specification(packet) | {
            "outline": _history.outline(packet),
            "failures": _history.failures(packet),
        }
        reply = await context.chat(request(context, fields, schema=schema))
        output = {"plan": read_text(reply)} if schema is None else read_object(reply, schema)
        return Outcome(verdict="done", output=output)
