"""OpenAI's chat completions wire, as llama.cpp and every compatible server speak it."""

from typing import Any, Literal, TypeAlias

import msgspec

from ai_agent_server.core.chat import (
    ChatDelta,
    ChatRequest,
    ChatUsage,
    FinishReason,
    ImagePart,
    JSONObject,
    Message,
    ToolCallDelta,
    tokens_said,
)
from ai_agent_server.errors import EngineProtocolError
from ai_agent_server.llm_engines._refusal import in_stream

MaxTokensField: TypeAlias = Literal["max_tokens", "max_completion_tokens"]

_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "length": "length",
    "max_tokens": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


class _Function(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct, frozen=True):
    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    tool_calls: tuple[_ToolCall, ...] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    index: int = 0
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = 0


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _PromptDetails | None = None


class Chunk(msgspec.Struct, frozen=True):
    """One event of a streamed answer; unknown keys are of no interest."""

    choices: tuple[_Choice, ...] | None = None
    usage: _Usage | None = None
    model: str | None = None
    error: Any = None


class ErrorBody(msgspec.Struct, frozen=True):
    """What an error says. llama.cpp's codes are integers, OpenAI's strings, some servers' bodies text."""

    message: str = ""
    code: str = ""
    status: int | None = None


_chunks = msgspec.json.Decoder(Chunk)


def payload(request: ChatRequest, model: str, *, max_tokens_field: MaxTokensField) -> JSONObject:
    """The body of POST /chat/completions for a streamed answer that ends with its usage."""
    body: JSONObject = {
        "model": model,
        "messages": [_message(message) for message in request.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.max_tokens is not None:
        body[max_tokens_field] = request.max_tokens
    for name in ("temperature", "top_p", "seed"):
        value = getattr(request, name)
        if value is not None:
            body[name] = value
    if request.stop:
        body["stop"] = list(request.stop)
    if request.tools:
        body["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                },
            }
            for tool in request.tools
        ]
        body["tool_choice"] = request.tool_choice
    if request.response_schema is not None:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": request.response_schema},
        }
    return body


def _message(message: Message) -> JSONObject:
    wire: JSONObject = {"role": message.role, "content": _content(message)}
    if message.tool_calls:
        wire["content"] = wire["content"] or None
        wire["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        wire["tool_call_id"] = message.tool_call_id
    return wire


def _content(message: Message) -> str | list[JSONObject]:
    if not any(isinstance(part, ImagePart) for part in message.parts):
        return message.text
    return [
        {"type": "image_url", "image_url": {"url": f"data:{part.media_type};base64,{part.content}"}}
        if isinstance(part, ImagePart)
        else {"type": "text", "text": part.text}
        for part in message.parts
    ]


def decode_chunk(event: bytes, *, engine: str) -> Chunk:
    """One event's JSON. Raises `EngineProtocolError`."""
    try:
        return _chunks.decode(event)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise EngineProtocolError("a chunk of the answer is malformed", engine=engine) from exc


def _counted(usage: _Usage) -> ChatUsage:
    input_tokens = tokens_said(usage.prompt_tokens)
    details = usage.prompt_tokens_details
    cached_tokens = tokens_said(details.cached_tokens) if details is not None else 0
    return ChatUsage(
        input_tokens=input_tokens,
        output_tokens=tokens_said(usage.completion_tokens),
        cached_tokens=min(cached_tokens, input_tokens),
    )


def error_body(body: Any) -> ErrorBody:
    """What an error body says: `{"error": {...}}`, `{"error": "..."}`, `{"message": ...}` or bare text."""
    inner = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(inner, dict):
        return ErrorBody(message=str(inner or ""))
    code = inner.get("code")
    return ErrorBody(
        message=str(inner.get("message") or ""),
        code=" ".join(str(word) for word in (code, inner.get("type")) if word),
        status=code if isinstance(code, int) else None,
    )


def decode_error(body: bytes) -> ErrorBody:
    """`error_body` of what was sent, JSON or not."""
    try:
        return error_body(msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ErrorBody(message=body.decode("utf-8", "replace"))


def _call(call: _ToolCall) -> ToolCallDelta:
    return ToolCallDelta(
        index=call.index,
        id=call.id or None,
        name=(call.function.name or None) if call.function else None,
        arguments=(call.function.arguments or "") if call.function else "",
    )


class Answer:
    """Folds the chunks of one answer into deltas. The last delta is held until the usage came."""

    def __init__(self, *, engine: str, secret: str | None = None) -> None:
        self._engine, self._secret = engine, secret
        self._finish: FinishReason | None = None
        self._usage: ChatUsage | None = None
        self._model = ""
        self._called = False
        self.progressed = False
        """Whether the last chunk had something that the model wrote; its thinking counts."""

    def take(self, chunk: Chunk) -> ChatDelta | None:
        """The next chunk's delta, None when it carries no answer. Raises for an error in the stream."""
        if chunk.error:
            said = error_body({"error": chunk.error})
            raise in_stream(
                said.message, engine=self._engine, code=said.code, status=said.status, secret=self._secret
            )
        self._model = chunk.model or self._model
        if chunk.usage is not None:
            self._usage = _counted(chunk.usage)
        for choice in chunk.choices or ():
            if choice.index == 0:
                break
        else:
            self.progressed = chunk.usage is not None
            return None
        if choice.finish_reason is not None:
            self._finish = self._finish_reason(choice.finish_reason)
        delta = choice.delta or _Delta()
        calls = tuple(map(_call, delta.tool_calls)) if delta.tool_calls else ()
        self._called = self._called or bool(calls)
        thought = delta.reasoning_content or delta.reasoning
        self.progressed = bool(delta.content or calls or thought or choice.finish_reason)
        if not (delta.content or calls or thought):
            return None
        return ChatDelta(
            text=delta.content or "", reasoning=thought or "", tool_calls=calls, model=self._model
        )

    def end(self) -> ChatDelta:
        """The last delta. Raises `EngineProtocolError` for a stream that was cut."""
        if self._finish is None:
            raise EngineProtocolError("the stream ended without a finish_reason", engine=self._engine)
        # Some servers say "stop" after a tool call.
        finish = "tool_calls" if self._called and self._finish == "stop" else self._finish
        return ChatDelta(finish_reason=finish, usage=self._usage, model=self._model)

    def _finish_reason(self, said: str) -> FinishReason:
        if said not in _FINISH:
            raise EngineProtocolError(f"unknown finish_reason {said!r}", engine=self._engine)
        return _FINISH[said]
