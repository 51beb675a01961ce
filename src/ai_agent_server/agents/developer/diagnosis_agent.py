"""The diagnosis: what kind of work it is, whether it can be checked by running, whether it is clear."""

from ai_agent_server.agents._prompt import request
from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.agents.developer import _history
from ai_agent_server.core.answer import read_object
from ai_agent_server.core.chat import JSONObject

__all__ = ("DiagnosisAgent",)

LEAST: JSONObject = {
    "type": "object",
    "properties": {"clear": {"type": "boolean"}, "question": {"type": "string"}},
    "required": ["clear", "question"],
}
"""What is read here; `result_schema` may ask for more, and has to ask for this."""


class DiagnosisAgent:
    """Looks at the task before anybody works on it.

    It asks a person at most once, and never about a task that has runnable examples: those say what
    is wanted, and small models find fault with everything.
    """

    card = AgentCard(
        name="diagnosis",
        description="Says what kind of work it is, whether running can check it, whether it is clear.",
        outcomes=("done", "unclear"),
        skills=("triage",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Ask for the diagnosis; `unclear` has the question as its why. Raises `InvalidOutputError`."""
        packet = context.packet
        schema = context.spec.result_schema or LEAST
        reply = await context.chat(request(context, _history.specification(packet), schema=schema))
        found = read_object(reply, schema)
        question = str(found.get("question", "")).strip()
        settled = bool(_history.anchors(packet) or _history.answers(packet))
        if found.get("clear") is False and question and not settled:
            return Outcome(verdict="unclear", why=question, output=found)
        return Outcome(verdict="done", output=found)
