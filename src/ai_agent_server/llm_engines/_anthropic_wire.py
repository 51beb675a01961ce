"""Anthropic's messages wire, from the side of the one who asks: the body, and the events of the answer."""

import re
from typing import Any

import msgspec

from ai_agent_server.core.chat import (
    ChatDelta,
    ChatRequest,
    ChatUsage,
    FinishReason,
    ImagePart,
    JSONObject,
    Message,
    TextPart,
    ToolCall,
    ToolCallDelta,
    tokens_said,
)
from ai_agent_server.errors import EngineProtocolError, EngineRequestError

_CHOICE = {"auto": "auto", "none": "none", "required": "any"}
_STOP: dict[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_GRAMMAR = frozenset({"type", "enum", "const", "required", "description", "title", "default", "$ref"})
_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid"}
)
_NOT_IN_AN_ID = re.compile(r"[^a-zA-Z0-9_-]")


def payload(request: ChatRequest, model: str, *, max_tokens: int, engine: str) -> JSONObject:
    """The body of POST /v1/messages for a streamed answer.

    `max_tokens` is sent where the request sets none: the API wants a number. Raises
    `EngineRequestError` for a conversation that this wire cannot carry.
    """
    system = [message for message in request.messages if message.role == "system"]
    body: JSONObject = {
        "model": model,
        "max_tokens": request.max_tokens if request.max_tokens is not None else max_tokens,
        "messages": _turns(request.messages, engine),
        "stream": True,
    }
    if text := "\n\n".join(message.text for message in system if message.text.strip()):
        body["system"] = text
    for name in ("temperature", "top_p"):
        value = getattr(request, name)
        if value is not None:
            body[name] = value
    if request.stop:
        body["stop_sequences"] = list(request.stop)
    if request.tools:
        body["tools"] = [
            {
                "name": tool.name,
                "description": tool.description,
                "input_schema": {"type": "object", **tool.parameters},
            }
            for tool in request.tools
        ]
        body["tool_choice"] = {"type": _CHOICE[request.tool_choice]}
    if request.response_schema is not None:
        schema = _grammar(request.response_schema)
        body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    return body


def _grammar(schema: Any) -> Any:
    """`schema` of such words as the API's grammar knows. The others are told to the model in words."""
    if not isinstance(schema, dict):
        return schema
    kept: JSONObject = {}
    told: JSONObject = {}
    for word, value in schema.items():
        match value:
            case dict() if word in {"properties", "$defs"}:
                kept[word] = {name: _grammar(part) for name, part in value.items()}
            case list() if word in {"anyOf", "oneOf", "allOf"}:
                kept["anyOf" if word == "oneOf" else word] = [_grammar(part) for part in value]
            case dict() if word == "items":
                kept[word] = _grammar(value)
            case _ if word in _GRAMMAR or (word == "format" and value in _FORMATS):
                kept[word] = value
            case _ if word not in {"additionalProperties", "$schema"}:
                told[word] = value
    if kept.get("type") == "object" or "properties" in kept:
        # The grammar knows closed objects alone.
        kept["additionalProperties"] = False
    if told:
        kept["description"] = f"{kept.get('description', '')} {msgspec.json.encode(told).decode()}".lstrip()
    return kept


def _turns(messages: tuple[Message, ...], engine: str) -> list[JSONObject]:
    """The conversation without its system. The results of one turn's calls have to come in one turn."""
    turns: list[JSONObject] = []
    for message in messages:
        if message.role == "system":
            continue
        role = "assistant" if message.role == "assistant" else "user"
        blocks = _blocks(message, engine)
        if not blocks:
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    return turns


def _blocks(message: Message, engine: str) -> list[JSONObject]:
    content = [block for part in message.parts if (block := _block(part)) is not None]
    if message.role == "tool":
        result = {"type": "tool_result", "tool_use_id": _id(message.tool_call_id or ""), "content": content}
        return [result]
    return content + [_tool_use(call, engine) for call in message.tool_calls]


def _block(part: TextPart | ImagePart) -> JSONObject | None:
    match part:
        case TextPart():
            # A text of nothing but white space is refused.
            return {"type": "text", "text": part.text} if part.text.strip() else None
        case ImagePart():
            source = {"type": "base64", "media_type": part.media_type, "data": part.content}
            return {"type": "image", "source": source}


def _tool_use(call: ToolCall, engine: str) -> JSONObject:
    try:
        arguments = msgspec.json.decode(call.arguments or "{}", type=dict[str, Any])
    except msgspec.DecodeError as exc:
        raise EngineRequestError(
            f"the arguments of the call {call.id!r} in the history are no JSON object", engine=engine
        ) from exc
    return {"type": "tool_use", "id": _id(call.id), "name": call.name, "input": arguments}


def _id(call_id: str) -> str:
    """A call's id as the API takes it: the call may have been another model's."""
    return _NOT_IN_AN_ID.sub("_", call_id)


class _Usage(msgspec.Struct, frozen=True):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None


class _Message(msgspec.Struct, frozen=True):
    model: str | None = None
    usage: _Usage | None = None


class _Block(msgspec.Struct, frozen=True):
    type: str = ""
    id: str | None = None
    name: str | None = None
    text: str | None = None


class _Delta(msgspec.Struct, frozen=True):
    type: str | None = None
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    stop_reason: str | None = None


class _Error(msgspec.Struct, frozen=True):
    type: str = ""
    message: str = ""


class Event(msgspec.Struct, frozen=True):
    """One event of a streamed answer; unknown keys are of no interest."""

    type: str
    index: int = 0
    message: _Message | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: _Usage | None = None
    error: _Error | None = None


def decode_event(payload: bytes, *, engine: str) -> Event:
    """One event. Raises `EngineProtocolError`."""
    try:
        return msgspec.json.decode(payload, type=Event)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise EngineProtocolError("an event of the answer is malformed", engine=engine) from exc


class Answer:
    """Folds the events of one answer into deltas. The last delta is held until `message_stop` came."""

    def __init__(self, *, engine: str) -> None:
        self._engine = engine
        self._finish: FinishReason | None = None
        self._input: dict[str, int] = {}
        self._output_tokens: int | None = None
        self._model = ""
        self._calls: dict[int, int] = {}
        self._ended = False
        self.progressed = False
        """Whether the last event had something that the model wrote; its thinking counts."""

    def take(self, event: Event) -> ChatDelta | None:
        """The next event's delta, None when it carries no answer. Raises `EngineProtocolError`."""
        self.progressed = event.type in {"content_block_start", "content_block_delta", "message_delta"}
        match event.type:
            case "message_start" if event.message is not None:
                self._model = event.message.model or ""
                self._count(event.message.usage)
            case "content_block_start" if event.content_block is not None:
                return self._start(event.index, event.content_block)
            case "content_block_delta" if event.delta is not None:
                return self._delta(event.index, event.delta)
            case "message_delta":
                self._count(event.usage)
                if event.delta is not None and event.delta.stop_reason is not None:
                    self._finish = self._finish_reason(event.delta.stop_reason)
            case "message_stop":
                self._ended = True
            case _:
                # The API may add events at any time.
                pass
        return None

    def end(self) -> ChatDelta:
        """The last delta. Raises `EngineProtocolError` for a stream that was cut."""
        if self._finish is None or not self._ended:
            raise EngineProtocolError("the stream ended without a stop_reason", engine=self._engine)
        usage = None
        if self._output_tokens is not None:
            usage = ChatUsage(
                input_tokens=sum(self._input.values()),
                output_tokens=self._output_tokens,
                cached_tokens=self._input.get("cache_read_input_tokens", 0),
            )
        return ChatDelta(finish_reason=self._finish, usage=usage, model=self._model)

    def _start(self, index: int, block: _Block) -> ChatDelta | None:
        match block.type:
            case "text" if block.text:
                return ChatDelta(text=block.text, model=self._model)
            case "tool_use":
                if not block.id or not block.name:
                    raise EngineProtocolError("a tool call without id or name", engine=self._engine)
                number = self._calls.setdefault(index, len(self._calls))
                started = ToolCallDelta(index=number, id=block.id, name=block.name)
                return ChatDelta(tool_calls=(started,), model=self._model)
            case _:
                return None

    def _delta(self, index: int, delta: _Delta) -> ChatDelta | None:
        if delta.text:
            return ChatDelta(text=delta.text, model=self._model)
        if delta.thinking:
            return ChatDelta(reasoning=delta.thinking, model=self._model)
        if delta.partial_json and index in self._calls:
            part = ToolCallDelta(index=self._calls[index], arguments=delta.partial_json)
            return ChatDelta(tool_calls=(part,), model=self._model)
        return None

    def _count(self, usage: _Usage | None) -> None:
        """Later figures take the place of earlier ones: they are cumulative. The whole prompt is the sum."""
        if usage is None:
            return
        for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"):
            count = getattr(usage, name)
            if count is not None:
                self._input[name] = tokens_said(count)
        if usage.output_tokens is not None:
            self._output_tokens = tokens_said(usage.output_tokens)

    def _finish_reason(self, said: str) -> FinishReason:
        if said not in _STOP:
            raise EngineProtocolError(f"unknown stop_reason {said!r}", engine=self._engine)
        return _STOP[said]
