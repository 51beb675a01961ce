"""The classifier: which of the given labels fits a text, or which of them do."""

from collections.abc import Sequence

from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.prompt import as_text
from ai_agent_server.tools.base import Ask, Room, ToolCard

__all__ = ("Classify",)


class Classify:
    """The labels become the answer's schema: nothing else can be answered."""

    card = ToolCard(
        name="classify",
        title="Classify a text",
        description="Choose which of your labels fits a text, or with `multiple` all that fit. Answers "
        '{"label": ...} or {"labels": [...]}, never a label that you did not give.',
        answer_tokens=200,
        parameters={
            "type": "object",
            "properties": {
                "text": {"type": "string", "minLength": 1, "maxLength": 100_000},
                "labels": {
                    "type": "array",
                    "minItems": 2,
                    "maxItems": 100,
                    "uniqueItems": True,
                    "items": {"type": "string", "minLength": 1, "maxLength": 200},
                    "description": "The labels to choose from.",
                },
                "multiple": {
                    "type": "boolean",
                    "default": False,
                    "description": "Every label that fits, also none.",
                },
                "instructions": {
                    "type": "string",
                    "maxLength": 10_000,
                    "description": "What the labels mean.",
                },
            },
            "required": ["text", "labels"],
            "additionalProperties": False,
        },
        result={
            "type": "object",
            "properties": {
                "label": {"type": "string", "description": "The one that fits best."},
                "labels": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "With `multiple`: all that fit.",
                },
            },
        },
    )

    def asks(self, arguments: JSONObject, answers: Sequence[JSONObject], _room: Room) -> tuple[Ask, ...]:
        """One question."""
        if answers:
            return ()
        labels: list[str] = arguments["labels"]
        multiple = bool(arguments.get("multiple"))
        fields = {
            "text": as_text(arguments["text"]),
            "labels": "\n".join(f"- {label}" for label in labels),
            "instructions": as_text(arguments.get("instructions")),
            "multiple": "yes" if multiple else "",
        }
        return (Ask(fields=fields, schema=_several(labels) if multiple else _one(labels)),)

    def result(self, answers: Sequence[JSONObject]) -> JSONObject:
        """{"label"} or {"labels"}; each label once, as no grammar can say that."""
        (answer,) = answers
        if "labels" in answer:
            return {"labels": list(dict.fromkeys(answer["labels"]))}
        return dict(answer)


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
        "properties": {"labels": {"type": "array", "items": {"enum": labels}, "maxItems": len(labels)}},
        "required": ["labels"],
        "additionalProperties": False,
    }
