"""The extractor: an object of the form that the caller describes, out of a text."""

from collections.abc import Sequence
from typing import Any

from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.prompt import as_text
from ai_agent_server.errors import InvalidPacketError
from ai_agent_server.tools._schema import admitted
from ai_agent_server.tools.base import Ask, Room, ToolCard

__all__ = ("Extract",)

_NAME = {"minLength": 1, "maxLength": 80}
_PLAIN_FIELD: JSONObject = {
    "type": {"enum": ["string", "number", "integer", "boolean"]},
    "description": {"type": "string", "maxLength": 1000},
    "enum": {
        "type": "array",
        "minItems": 1,
        "maxItems": 100,
        "items": {"type": "string", "maxLength": 200},
    },
    "many": {"type": "boolean", "default": False, "description": "A list of such values."},
    "required": {"type": "boolean", "default": False, "description": "May not be null."},
}


class Extract:
    """The caller's `fields` or `schema` become the answer's schema.

    A field is {"type", "description"?, "enum"?, "many"?, "required"?}; the type `object` has `fields`
    of its own, one level deep. What is not `required` may be null. A `schema` is held as it is.
    """

    card = ToolCard(
        name="extract",
        title="Extract data from a text",
        description="Take data out of a text as a JSON object of the form you describe, by `fields` (short) "
        "or by `schema` (a JSON Schema of an object). Answers exactly such an object.",
        answer_tokens=800,
        parameters={
            "type": "object",
            "properties": {
                "text": {"type": "string", "minLength": 1, "maxLength": 100_000},
                "fields": {
                    "type": "object",
                    "minProperties": 1,
                    "maxProperties": 50,
                    "propertyNames": _NAME,
                    "description": "What to take: name -> {type, description?, enum?, many?, required?}; "
                    "null where the text does not say.",
                    "additionalProperties": {
                        "type": "object",
                        "properties": {
                            **_PLAIN_FIELD,
                            "type": {"enum": ["string", "number", "integer", "boolean", "object"]},
                            "fields": {
                                "type": "object",
                                "minProperties": 1,
                                "maxProperties": 50,
                                "propertyNames": _NAME,
                                "description": "Of the type object: what is in it.",
                                "additionalProperties": {
                                    "type": "object",
                                    "properties": _PLAIN_FIELD,
                                    "required": ["type"],
                                    "additionalProperties": False,
                                },
                            },
                        },
                        "required": ["type"],
                        "additionalProperties": False,
                        "if": {"properties": {"type": {"const": "object"}}, "required": ["type"]},
                        "then": {"required": ["fields"]},
                    },
                },
                "schema": {
                    "type": "object",
                    "description": "Instead of `fields`: the JSON Schema of the object; without `pattern`, "
                    "`$ref` only within itself.",
                },
                "instructions": {"type": "string", "maxLength": 10_000},
            },
            "required": ["text"],
            "additionalProperties": False,
        },
        result={"type": "object", "description": "As `fields` or `schema` say."},
    )

    def asks(self, arguments: JSONObject, answers: Sequence[JSONObject], _room: Room) -> tuple[Ask, ...]:
        """One question. Raises `InvalidPacketError` for a schema that cannot be held."""
        if answers:
            return ()
        fields, schema = arguments.get("fields"), arguments.get("schema")
        if (fields is None) == (schema is None):
            raise InvalidPacketError(
                "the form of the answer is told twice" if fields else "nothing says what to extract",
                pointer="/fields",
                expected="either `fields` or `schema`",
                choices=("fields", "schema"),
            )
        held = _object(fields) if fields is not None else admitted(schema or {}, pointer="/schema")
        described = _by_fields(fields) if fields is not None else _by_schema(held)
        return (
            Ask(
                fields={
                    "text": as_text(arguments["text"]),
                    "fields": "\n".join(described),
                    "instructions": as_text(arguments.get("instructions")),
                },
                schema=held,
            ),
        )

    def result(self, answers: Sequence[JSONObject]) -> JSONObject:
        """The object."""
        (answer,) = answers
        return dict(answer)


def _by_fields(fields: JSONObject) -> list[str]:
    return [_line(name, field.get("description")) for name, field in fields.items()]


def _by_schema(schema: JSONObject) -> list[str]:
    properties: JSONObject = schema.get("properties", {})
    return [
        _line(name, part.get("description") if isinstance(part, dict) else None)
        for name, part in properties.items()
    ]


def _line(name: str, description: Any) -> str:
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
