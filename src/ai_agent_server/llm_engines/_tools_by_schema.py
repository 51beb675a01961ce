"""Tool calls from a model whose chat template knows none: asked for in words, held to by a JSON Schema."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec

from ai_agent_server.core.chat import (
    ChatDelta,
    ChatRequest,
    JSONObject,
    Message,
    TextPart,
    ToolCallDelta,
    message,
)
from ai_agent_server.errors import EngineProtocolError

REPLY = "reply"
"""What stands for an answer in words where no tool must be called."""


class _Written(msgspec.Struct, frozen=True):
    name: str = ""
    arguments: dict[str, Any] = {}
    reply: str = ""


async def stream(
    request: ChatRequest, ask: Callable[[ChatRequest], AsyncGenerator[ChatDelta, None]], *, engine: str
) -> AsyncGenerator[ChatDelta, None]:
    """Answer `request` by asking without its tools. The answer comes in one piece, the last delta."""
    written, last = "", ChatDelta()
    async with aclosing(ask(without_tools(request))) as deltas:
        async for delta in deltas:
            written += delta.text
            last = delta
    if last.finish_reason != "stop":
        # Cut off at max_tokens, say: half a call is no call.
        yield last
        return
    text, calls = read(written, request, engine=engine)
    yield msgspec.structs.replace(
        last, text=text, tool_calls=calls, finish_reason="tool_calls" if calls else "stop"
    )


def without_tools(request: ChatRequest) -> ChatRequest:
    """The same request in words and a schema; what comes back is read by `read`."""
    forms: list[JSONObject] = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                "arguments": tool.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in request.tools
    ]
    if request.tool_choice == "auto":
        answer: JSONObject = {
            "type": "object",
            "properties": {REPLY: {"type": "string"}},
            "required": [REPLY],
            "additionalProperties": False,
        }
        forms.append(answer)
    first, *rest = request.messages
    words = _instruction(request)
    if first.role == "system":
        told = (Message(role="system", parts=(*first.parts, TextPart(text="\n\n" + words))), *rest)
    else:
        told = (message("system", words), *request.messages)
    return msgspec.structs.replace(
        request,
        messages=tuple(_in_words(turn) for turn in told),
        tools=(),
        tool_choice="none",
        response_schema={"anyOf": forms} if len(forms) > 1 else forms[0],
    )


def read(text: str, request: ChatRequest, *, engine: str) -> tuple[str, tuple[ToolCallDelta, ...]]:
    """The words or the call in what was written. `request` is the one with the tools."""
    try:
        written = msgspec.json.decode(text, type=_Written)
    except msgspec.DecodeError as exc:
        raise EngineProtocolError("the tool call is not whole", engine=engine) from exc
    if not written.name:
        return written.reply, ()
    call = ToolCallDelta(
        index=0,
        # Unique in its conversation, which only grows.
        id=f"call-{len(request.messages)}",
        name=written.name,
        arguments=msgspec.json.encode(written.arguments).decode(),
    )
    return "", (call,)


def _instruction(request: ChatRequest) -> str:
    tools = "\n".join(msgspec.json.encode(tool).decode() for tool in request.tools)
    otherwise = (
        f' If no tool is of use, answer {{"{REPLY}": "your words"}}.' if request.tool_choice == "auto" else ""
    )
    return (
        f"You can call these tools:\n{tools}\n"
        f'To call one, answer {{"name": "its name", "arguments": {{...}}}}.{otherwise}'
    )


def _in_words(turn: Message) -> Message:
    """A turn that such a template can show: calls and their results as text."""
    if turn.role == "tool":
        return Message(role="user", parts=(TextPart(text="Result of the tool: "), *turn.parts))
    if turn.tool_calls:
        calls = "\n".join(
            f'{{"name": "{call.name}", "arguments": {call.arguments}}}' for call in turn.tool_calls
        )
        return Message(role=turn.role, parts=(*turn.parts, TextPart(text=calls)))
    return turn
