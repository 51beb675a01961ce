"""The rewriter: a text as told, piece by piece where it is long."""

from collections.abc import Sequence

from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.prompt import as_text
from ai_agent_server.tools._pieces import pieces
from ai_agent_server.tools.base import Ask, Room, ToolCard

__all__ = ("Rewrite",)

GROWTH = 1.5
"""How much longer than a piece its rewriting may become."""


class Rewrite:
    """Each piece is rewritten by itself; an answer that was cut off is none."""

    card = ToolCard(
        name="rewrite",
        title="Rewrite a text",
        description="Rewrite a text as told: shorter, formal, in French. A long one is rewritten part by "
        'part. Answers {"text"}.',
        answer_tokens=1500,
        parameters={
            "type": "object",
            "properties": {
                "text": {"type": "string", "minLength": 1, "maxLength": 100_000},
                "instructions": {
                    "type": "string",
                    "minLength": 1,
                    "maxLength": 10_000,
                    "description": "How: shorter, formal, in French.",
                },
            },
            "required": ["text", "instructions"],
            "additionalProperties": False,
        },
        result={
            "type": "object",
            "properties": {"text": {"type": "string"}},
            "required": ["text"],
            "additionalProperties": False,
        },
    )

    def asks(self, arguments: JSONObject, answers: Sequence[JSONObject], room: Room) -> tuple[Ask, ...]:
        """The pieces that are left."""
        size = max(1, min(room.piece_tokens, int(room.answer_tokens / GROWTH)))
        parts = pieces(as_text(arguments["text"]), size)
        instructions = as_text(arguments["instructions"])
        return tuple(
            Ask(fields={"text": part.strip() or part, "instructions": instructions})
            for part in parts[len(answers) :]
        )

    def result(self, answers: Sequence[JSONObject]) -> JSONObject:
        """The parts, a paragraph each where there are several."""
        return {"text": "\n\n".join(str(answer["text"]) for answer in answers)}
