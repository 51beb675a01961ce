"""The summarizer: a text of any length, read in pieces and merged level by level."""

from collections.abc import Sequence

from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.prompt import as_text
from ai_agent_server.tools._pieces import pieces, tokens
from ai_agent_server.tools.base import Ask, Room, ToolCard

__all__ = ("Summarize",)

WORDS_PER_TOKEN = 0.5
"""How long a summary of a piece may be told to be, so that it ends before its bound."""


class Summarize:
    """Nothing is left out in silence: every piece of the text is read, then what was written of them.

    The answers of a level are merged by twos at least, so there are never more levels than halvings.
    """

    card = ToolCard(
        name="summarize",
        title="Summarize a text",
        description="Shorten a text of any length. A long one is read in pieces and merged, never cut. "
        'Answers {"summary", "pieces", "complete"}.',
        answer_tokens=400,
        parameters={
            "type": "object",
            "properties": {
                "text": {"type": "string", "minLength": 1, "maxLength": 300_000},
                "words": {
                    "type": "integer",
                    "minimum": 1,
                    "maximum": 2000,
                    "description": "About how long at most.",
                },
                "instructions": {
                    "type": "string",
                    "maxLength": 10_000,
                    "description": "What matters to the reader.",
                },
            },
            "required": ["text"],
            "additionalProperties": False,
        },
        result={
            "type": "object",
            "properties": {
                "summary": {"type": "string"},
                "pieces": {"type": "integer", "description": "How many exchanges with the LLM it took."},
                "complete": {
                    "type": "boolean",
                    "description": "false: the LLM reached the bound of an answer, which then ends with its "
                    "last whole sentence.",
                },
            },
            "required": ["summary", "pieces", "complete"],
            "additionalProperties": False,
        },
    )

    def asks(self, arguments: JSONObject, answers: Sequence[JSONObject], room: Room) -> tuple[Ask, ...]:
        """The pieces that nobody has read yet, then the groups of summaries to merge, to the last."""
        level = pieces(as_text(arguments["text"]), room.piece_tokens)
        several = ""
        read = 0
        while True:
            done = answers[read : read + len(level)]
            read += len(level)
            if len(done) < len(level):
                is_last = len(level) == 1
                return tuple(
                    Ask(fields=_fields(arguments, text, several, is_last, room), may_be_cut=True)
                    for text in level[len(done) :]
                )
            if len(level) == 1:
                return ()
            several = "what was written of its parts, in their order"
            level = _groups([str(answer["text"]) for answer in done], room.piece_tokens)

    def result(self, answers: Sequence[JSONObject]) -> JSONObject:
        """The last merge's summary."""
        return {
            "summary": answers[-1]["text"],
            "pieces": len(answers),
            "complete": all(answer["complete"] for answer in answers),
        }


def _fields(arguments: JSONObject, text: str, several: str, is_last: bool, room: Room) -> dict[str, str]:
    wanted = arguments.get("words") if is_last else None
    bound = int(room.answer_tokens * WORDS_PER_TOKEN)
    return {
        "text": text.strip() or text,
        "several": several,
        "words": str(min(wanted, bound) if wanted else bound) if wanted or not is_last else "",
        "instructions": as_text(arguments.get("instructions")),
    }


def _groups(summaries: list[str], piece_tokens: int) -> tuple[str, ...]:
    """Neighbours put together, two at least, while they fit a piece."""
    groups: list[list[str]] = []
    size = 0
    for summary in summaries:
        size += tokens(summary)
        if groups and (len(groups[-1]) < 2 or size <= piece_tokens):
            groups[-1].append(summary)
        else:
            groups.append([summary])
            size = tokens(summary)
    if len(groups) > 1 and len(groups[-1]) == 1:
        alone = groups.pop()
        groups[-1] += alone
    return tuple("\n\n".join(group) for group in groups)
