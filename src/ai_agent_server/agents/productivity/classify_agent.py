"""The classifier: which of the given labels fits a text."""

from ai_agent_server.agents._prompt import request
from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.core.answer import read_object
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.prompt import as_text

__all__ = ("ClassifyAgent",)


class ClassifyAgent:
    """The labels of the payload become the answer's schema: nothing else can be answered."""

    card = AgentCard(
        name="classify",
        description="Chooses the label that fits a text, or all that fit.",
        outcomes=("done",),
        skills=("classify",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Ask for {"label": one of them}, or {"labels": [...]} where `multiple` is true."""
        payload = context.packet.payload
        labels = [str(label) for label in payload["labels"]]
        schema = _several(labels) if payload.get("multiple") else _one(labels)
        fields = {
            "text": as_text(payload["text"]),
            "labels": "\n".join(f"- {label}" for label in labels),
            "instructions": as_text(payload.get("instructions")),
        }
        reply = await context.chat(request(context, fields, schema=schema))
        return Outcome(verdict="done", output=read_object(reply, schema))


def _one(labels: list[str]) -> JSONObject:
    return {
        "type": "object",
        "properties": {"label": {"enum": labels}},
        "required": ["label"],
        "additionalProperties": False,
    }


def _several(labels: list[str]) -> JSONObject:
    return {
        "type": "object",
        "properties": {
            "labels": {
                "type": "array",
                "items": {"enum": labels},
                "maxItems": len(labels),
                "uniqueItems": True,
            }
        },
        "required": ["labels"],
        "additionalProperties": False,
    }
