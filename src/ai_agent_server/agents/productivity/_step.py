"""One step of a text tool: an agent has one exchange a step, and its history keeps the answers."""

import msgspec

from ai_agent_server.agents._prompt import request
from ai_agent_server.agents.base import AgentContext, Outcome
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.task_packet import StepFinished
from ai_agent_server.errors import ConfigurationError
from ai_agent_server.tools.base import Room, TextTool, read

MORE = "more"
"""The outcome of a step after which the tool has more to ask: a route brings the task back."""


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`options` of the role. A piece has to fit the LLM's context beside its answer."""

    piece_tokens: int = Room().piece_tokens


async def step(context: AgentContext, tool: TextTool) -> Outcome:
    """Ask what is next: {"text", "complete"} while there is more, what came of it at the end.

    Raises `InvalidOutputError`, and `InvalidPacketError` for a payload that the tool cannot take.
    """
    spec, payload = context.spec, context.packet.payload
    room = Room(piece_tokens=_piece_tokens(context), answer_tokens=spec.max_tokens)
    answers = _answers(context)
    asks = tool.asks(payload, answers, room)
    ask = asks[0]
    answer = read(await context.chat(request(context, ask.fields, schema=ask.schema)), ask)
    answers.append(answer)
    if tool.asks(payload, answers, room):
        return Outcome(verdict=MORE, why=f"{len(answers)} read", output=answer)
    return Outcome(verdict="done", output=tool.result(answers))


def _answers(context: AgentContext) -> list[JSONObject]:
    return [
        event.output
        for event in context.packet.history
        if isinstance(event, StepFinished)
        and event.role == context.spec.role
        and event.outcome == MORE
        and event.output is not None
    ]


def _piece_tokens(context: AgentContext) -> int:
    where = f"/profiles/{context.spec.profile}/roles/{context.spec.role}/options"
    try:
        options = msgspec.convert(context.spec.options, Options)
    except msgspec.ValidationError as exc:
        raise ConfigurationError(str(exc), pointer=where) from exc
    if options.piece_tokens < 1:
        raise ConfigurationError("piece_tokens is at least 1", pointer=where)
    return options.piece_tokens
