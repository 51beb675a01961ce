"""The extractor: named fields out of a text, null where the text does not say."""

from ai_agent_server.agents._prompt import request
from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.core.answer import read_object
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.prompt import as_text

__all__ = ("ExtractAgent",)


class ExtractAgent:
    """The fields of the payload become the answer's schema.

    A field is {"type", "description"?, "enum"?, "many"?, "required"?}; the type `object` has `fields`
    of its own, one level deep. What is not `required` may be null.
    """

    card = AgentCard(
        name="extract",
        description="Takes named fields out of a text.",
        outcomes=("done",),
        skills=("extract",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Ask for one object with every field. Raises `InvalidOutputError`."""
        payload = context.packet.payload
        wanted: JSONObject = payload["fields"]
        schema = _object(wanted)
        fields = {
            "text": as_text(payload["text"]),
            "fields": "\n".join(_described(name, field) for name, field in wanted.items()),
            "instructions": as_text(payload.get("instructions")),
        }
        reply = await context.chat(request(context, fields, schema=schema))
        return Outcome(verdict="done", output=read_object(reply, schema))


def _described(name: str, field: JSONObject) -> str:
    description = as_text(field.get("description"))
    return f"- {name}: {description}" if description else f"- {name}"


def _object(fields: JSONObject) -> JSONObject:
    return {
        "type": "object",
        "properties": {name: _field(field) for name, field in fields.items()},
        "required": list(fields),
        "additionalProperties": False,
    }


def _field(field: JSONObject) -> JSONObject:
    value = _value(field)
    if field.get("many"):
        return {"type": "array", "items": value, "maxItems": 100}
    return value if field.get("required") else {"anyOf": [value, {"type": "null"}]}


def _value(field: JSONObject) -> JSONObject:
    if "enum" in field:
        return {"enum": list(field["enum"])}
    if field["type"] == "object":
        return _object(field.get("fields", {}))
    return {"type": field["type"]}
