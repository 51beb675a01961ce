"""The architect: the parts of a larger piece of work, and what each is for."""

from ai_agent_server.agents._prompt import request
from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.agents.developer import _history
from ai_agent_server.core.answer import read_object, read_text

__all__ = ("ArchitectAgent",)


class ArchitectAgent:
    """Names the parts; the planner and the coders are given them."""

    card = AgentCard(
        name="architect",
        description="Outlines the parts of a larger piece of work and what each is for.",
        outcomes=("done",),
        skills=("design",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Ask for the parts: output {"parts": [{"name", "purpose"}, ...]}. Raises `InvalidOutputError`."""
        schema = context.spec.result_schema
        fields = _history.specification(context.packet) | {"failures": _history.failures(context.packet)}
        reply = await context.chat(request(context, fields, schema=schema))
        output = {"parts": read_text(reply)} if schema is None else read_object(reply, schema)
        return Outcome(verdict="done", output=output)
