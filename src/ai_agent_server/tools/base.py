"""The text tool port: a job on a text told as exchanges with an LLM, whoever has them.

An agent has one exchange a step and keeps the answers in its task's history; the gateway has them all at
once. Both ask what `asks` says until it says nothing more.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from ai_agent_server.core.answer import read_object, read_text
from ai_agent_server.core.chat import ChatReply, JSONObject
from ai_agent_server.errors import InvalidOutputError
from ai_agent_server.tools._pieces import whole_sentences


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What one exchange may hold, in estimated tokens."""

    piece_tokens: int = 1500
    """Of the text."""
    answer_tokens: int = 400


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One exchange that is needed: the fields for the tool's prompt file, and the answer's form."""

    fields: dict[str, str]
    schema: JSONObject | None = None
    """None asks for text."""
    may_be_cut: bool = False
    """Whether text that reached its bound is of use up to its last sentence."""


class ToolCard(msgspec.Struct, frozen=True, kw_only=True):
    """A tool described by itself. `parameters` and `result` are JSON Schemas."""

    name: str
    title: str
    description: str
    parameters: JSONObject
    result: JSONObject
    answer_tokens: int
    """How much an answer usually needs at most."""


class TextTool(Protocol):
    """A job on a text. Arguments obey the card's `parameters`; answers are what `read` made of replies."""

    @property
    def card(self) -> ToolCard:
        """Which job it is."""
        ...

    def asks(self, arguments: JSONObject, answers: Sequence[JSONObject], room: Room, /) -> tuple[Ask, ...]:
        """Every exchange that can be had now, in the order in which their answers are to be appended.

        Empty when there is nothing more to ask. The same for the same arguments, answers and room.
        Raises `InvalidPacketError` for arguments whose mistake no schema can say.
        """
        ...

    def result(self, answers: Sequence[JSONObject], /) -> JSONObject:
        """What came of it; it obeys the card's `result`."""
        ...


def read(reply: ChatReply, ask: Ask) -> JSONObject:
    """The answer in `reply`: the object asked for, or {"text", "complete"}.

    Raises `InvalidOutputError` for one of another form, an empty one, one that was refused, and one that
    was cut off where that is of no use.
    """
    if reply.finish_reason == "content_filter":
        raise InvalidOutputError("the provider's content filter held the answer back")
    if ask.schema is not None:
        return read_object(reply, ask.schema)
    text = read_text(reply)
    if reply.finish_reason != "length":
        return {"text": text, "complete": True}
    if not ask.may_be_cut:
        raise InvalidOutputError("the answer was cut off before its end")
    return {"text": whole_sentences(text), "complete": False}
