"""The fast coder: answers at once, from the task and its examples."""

from ai_agent_server.agents._prompt import answers_of, request
from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.agents.developer import _history
from ai_agent_server.agents.developer._code import code_written
from ai_agent_server.core.prompt import has_section

__all__ = ("FastCoderAgent",)

WRITE, COMPLETE = "write", "complete"


class FastCoderAgent:
    """Writes the first version, and another each time it comes round again.

    A plan is used where the prompt file names `$plan`. Every second answer is asked for in the prompt
    file's section `complete`, where there is one: as a function that has been begun (`$opening`), for
    other words bring other code.
    """

    card = AgentCard(
        name="fast-coder",
        description="Writes code at once, from the task and its examples.",
        outcomes=("done",),
        skills=("code",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Ask for code. Raises `InvalidOutputError` when the answer holds none."""
        packet, spec = context.packet, context.spec
        fields = _history.specification(packet) | {
            "plan": _history.plan(packet),
            "outline": _history.outline(packet),
            "given_code": str(packet.payload.get("code") or ""),
            "opening": _history.opening(packet),
        }
        section = WRITE if has_section(spec.prompt, WRITE) else None
        again = answers_of(packet, spec.role) % 2 == 1
        if again and fields["opening"] and not fields["given_code"] and has_section(spec.prompt, COMPLETE):
            section = COMPLETE
        return code_written(packet, await context.chat(request(context, fields, section=section)))
