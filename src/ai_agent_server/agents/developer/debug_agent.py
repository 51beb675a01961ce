"""The debugger: mends the best version so far from its first failing test."""

from ai_agent_server.agents._prompt import request
from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.agents.developer import _history
from ai_agent_server.agents.developer._code import code_written

__all__ = ("DebugAgent",)


class DebugAgent:
    """Answers with the whole code, mended.

    It works on the version with the most anchors and tests passed, so a fix that broke what passed
    is left behind. What an outside agent reported counts as a failure like any other.
    """

    card = AgentCard(
        name="debug",
        description="Mends code from its first failing test, with the actual and the expected value.",
        outcomes=("done",),
        skills=("code", "debug"),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Ask for the mended code. Raises `InvalidOutputError` when the answer holds none."""
        packet = context.packet
        fields = _history.specification(packet)
        draft = _history.version_to_mend(packet)
        if draft is not None:
            found = _history.failure(packet, draft)
            fields |= {"code": draft.artifact.content, "test": found.test, "detail": found.detail}
        return code_written(packet, await context.chat(request(context, fields)))
