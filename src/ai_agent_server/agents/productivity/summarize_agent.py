"""The summariser: a long text is read piece by piece, one call a step."""

import msgspec

from ai_agent_server.agents._prompt import request
from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.core.answer import read_text
from ai_agent_server.core.prompt import as_text
from ai_agent_server.core.task_packet import StepFinished, TaskPacket
from ai_agent_server.errors import ConfigurationError

__all__ = ("SummarizeAgent",)


class SummarizeAgent:
    """Carries the summary so far from piece to piece.

    `more` means that a piece was read and others are left: the route `summarize.more -> summarize`
    brings the task back, and a restart goes on at the piece that was under way.
    """

    class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """`options` of the role. `piece_chars` has to fit the LLM's context beside the summary."""

        piece_chars: int = 6000

    card = AgentCard(
        name="summarize",
        description="Shortens a text, of any length that the task's limits allow.",
        outcomes=("done", "more"),
        skills=("summarize",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Read the next piece: output {"summary", "read_chars", "total_chars"}."""
        packet = context.packet
        text = as_text(packet.payload["text"])
        before, start = _so_far(packet, context.spec.role)
        end = _piece_end(text, start, _options(context).piece_chars)
        fields = {
            "text": text[start:end],
            "summary": before,
            "words": as_text(packet.payload.get("words")),
            "instructions": as_text(packet.payload.get("instructions")),
        }
        summary = read_text(await context.chat(request(context, fields)))
        return Outcome(
            verdict="done" if end >= len(text) else "more",
            why=f"{end} of {len(text)} characters read",
            output={"summary": summary, "read_chars": end, "total_chars": len(text)},
        )


def _so_far(packet: TaskPacket, role: str) -> tuple[str, int]:
    for event in reversed(packet.history):
        if isinstance(event, StepFinished) and event.role == role and event.output is not None:
            return str(event.output["summary"]), int(event.output["read_chars"])
    return "", 0


def _piece_end(text: str, start: int, piece_chars: int) -> int:
    """Where the piece from `start` ends: at a paragraph, a line or a word if one ends in its last fifth."""
    end = start + piece_chars
    if end >= len(text):
        return len(text)
    for mark in ("\n\n", "\n", ". ", " "):
        found = text.rfind(mark, start + piece_chars * 4 // 5, end)
        if found >= 0:
            return found + len(mark)
    return end


def _options(context: AgentContext) -> SummarizeAgent.Options:
    where = f"/profiles/{context.spec.profile}/roles/{context.spec.role}/options"
    try:
        options = msgspec.convert(context.spec.options, SummarizeAgent.Options)
    except msgspec.ValidationError as exc:
        raise ConfigurationError(str(exc), pointer=where) from exc
    if options.piece_chars < 1:
        raise ConfigurationError("piece_chars is at least 1", pointer=where)
    return options
