"""OpenAI's chat completions on the wire: requests as our values, our answers as clients read them. Pure."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from ai_agent_server.core.chat import (
    ChatDelta,
    ChatReply,
    ChatRequest,
    ChatRole,
    ChatUsage,
    FinishReason,
    ImagePart,
    JSONObject,
    Message,
    Part,
    TextPart,
    Tool,
    ToolCall,
)
from ai_agent_server.core.packet_json import MAX_DEPTH, decode
from ai_agent_server.errors import InvalidPacketError
from ai_agent_server.gateway._images import image_part

__all__ = ("Asked", "Chunks", "ask", "completion")

MAX_MESSAGES = 10_000
MAX_TOOLS = 1_000
MAX_STOPS = 16
MAX_IMAGES = 64

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class ChatImageURL(msgspec.Struct, frozen=True):
    """An image's place: a data URL."""

    url: str


class ChatPart(msgspec.Struct, frozen=True):
    """A piece of a message: `text`, `image_url` or `refusal`."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: ChatImageURL | str | None = None


class ChatCalledFunction(msgspec.Struct, frozen=True):
    """The function that was called; `arguments` is JSON text."""

    name: str
    arguments: str = ""


class ChatCall(msgspec.Struct, frozen=True):
    """A call that the LLM asked for."""

    id: str
    function: ChatCalledFunction | None = None
    type: str = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ChatPart] | None = None
    refusal: str | None = None
    tool_calls: list[ChatCall] | None = None
    tool_call_id: str | None = None


class ChatFunction(msgspec.Struct, frozen=True):
    """A function; `parameters` is a JSON Schema."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: JSONObject | None = None


class ChatTool(msgspec.Struct, frozen=True):
    """A tool. Others than functions are tolerated, and left out."""

    type: str = "function"
    function: ChatFunction | None = None


class ChatNamedFunction(msgspec.Struct, frozen=True):
    """A function by its name."""

    name: str


class ChatAllowedTool(msgspec.Struct, frozen=True):
    """A tool by its name."""

    type: str = "function"
    function: ChatNamedFunction | None = None


class ChatAllowedTools(msgspec.Struct, frozen=True):
    """The tools that may be called this time."""

    mode: Literal["auto", "required"] = "auto"
    tools: list[ChatAllowedTool] = []


class ChatToolChoice(msgspec.Struct, frozen=True):
    """Which tool has to be called, or which may be."""

    type: str = "function"
    function: ChatNamedFunction | None = None
    allowed_tools: ChatAllowedTools | None = None


class ChatJSONSchema(msgspec.Struct, frozen=True):
    """The schema that the answer has to obey."""

    name: str = "answer"
    schema: JSONObject | None = None


class ChatResponseFormat(msgspec.Struct, frozen=True):
    """The answer's form."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: ChatJSONSchema | None = None


class ChatStreamOptions(msgspec.Struct, frozen=True):
    """Whether the usage is told at the stream's end."""

    include_usage: bool | None = False


class ChatCompletionRequest(msgspec.Struct, frozen=True):
    """Body of POST /v1/chat/completions. Keys that are not here are tolerated and have no effect."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=300)]
    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = False
    stream_options: ChatStreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], msgspec.Meta(max_length=MAX_STOPS)] | None = None
    tools: Annotated[list[ChatTool], msgspec.Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ChatToolChoice | None = None
    response_format: ChatResponseFormat | None = None
    n: int | None = 1
    logprobs: bool | None = None
    modalities: list[str] | None = None
    functions: list[Any] | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asked for."""

    model: str
    request: ChatRequest
    stream: bool
    include_usage: bool


_requests = msgspec.json.Decoder(ChatCompletionRequest)


def ask(raw: bytes) -> Asked:
    """The request in `raw`. Raises `InvalidPacketError` with a JSON pointer."""
    body = _decoded(raw)
    _refuse_unsupported(body)
    tools, tool_choice = _tools(body)
    options = body.stream_options
    return Asked(
        model=body.model,
        request=ChatRequest(
            messages=_messages(body.messages),
            max_tokens=body.max_completion_tokens or body.max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
            tools=tools,
            tool_choice=tool_choice,
            response_schema=_response_schema(body.response_format),
        ),
        stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
    )


def _decoded(raw: bytes) -> ChatCompletionRequest:
    try:
        return _requests.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # The slow decoder knows to say what is wrong, and where.
        return decode(raw, ChatCompletionRequest)


def _refuse_unsupported(body: ChatCompletionRequest) -> None:
    for is_wrong, name, problem in (
        (body.n not in {None, 1}, "n", "one choice is all that is given"),
        (bool(body.logprobs), "logprobs", "log probabilities are not given"),
        ("audio" in (body.modalities or ()), "modalities", "audio is not spoken"),
        (bool(body.functions), "functions", "these were replaced by `tools`, which are taken"),
    ):
        if is_wrong:
            raise InvalidPacketError(problem, pointer=f"/{name}")


def _messages(messages: list[ChatMessage]) -> tuple[Message, ...]:
    images = 0
    made = []
    for at, message in enumerate(messages):
        here = f"/messages/{at}"
        parts = _parts(message, here)
        images += sum(isinstance(part, ImagePart) for part in parts)
        calls = tuple(_calls(message, here))
        if message.role == "tool" and message.tool_call_id is None:
            raise InvalidPacketError("'tool_call_id' is missing", pointer=f"{here}/tool_call_id")
        if message.role in {"user", "tool"} and message.content is None:
            raise InvalidPacketError(
                "'content' is missing", pointer=f"{here}/content", expected="a string or parts"
            )
        made.append(
            Message(
                role=_ROLES[message.role],
                parts=parts,
                tool_calls=calls,
                tool_call_id=message.tool_call_id if message.role == "tool" else None,
            )
        )
    if images > MAX_IMAGES:
        raise InvalidPacketError(f"{images} images", pointer="/messages", expected=f"at most {MAX_IMAGES}")
    return tuple(made)


_ROLES: dict[str, ChatRole] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "user",
}


def _parts(message: ChatMessage, here: str) -> tuple[Part, ...]:
    content = message.content
    if content is None:
        return (TextPart(text=message.refusal),) if message.refusal else ()
    if isinstance(content, str):
        return (TextPart(text=content),)
    return tuple(_part(part, f"{here}/content/{at}") for at, part in enumerate(content))


def _part(part: ChatPart, here: str) -> Part:
    match part.type:
        case "text" | "input_text" | "output_text":
            if part.text is None:
                raise InvalidPacketError("'text' is missing", pointer=f"{here}/text", expected="a string")
            return TextPart(text=part.text)
        case "refusal":
            return TextPart(text=part.refusal or "")
        case "image_url" | "input_image":
            url = part.image_url.url if isinstance(part.image_url, ChatImageURL) else part.image_url
            return image_part(url or "", f"{here}/image_url/url")
        case _:
            raise InvalidPacketError(
                f"parts of type {part.type[:60]!r} are not taken",
                pointer=f"{here}/type",
                choices=("text", "image_url", "refusal"),
            )


def _calls(message: ChatMessage, here: str) -> Iterator[ToolCall]:
    for at, call in enumerate(message.tool_calls or ()):
        if call.function is None:
            raise InvalidPacketError(
                "'function' is missing", pointer=f"{here}/tool_calls/{at}/function", expected="an object"
            )
        yield ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)


_Choice: TypeAlias = Literal["auto", "none", "required"]


def _tools(body: ChatCompletionRequest) -> tuple[tuple[Tool, ...], _Choice]:
    """The functions; tools of other types are tolerated, and left out."""
    tools = tuple(
        Tool(
            name=tool.function.name,
            description=tool.function.description or "",
            parameters=_shallow(tool.function.parameters, f"/tools/{at}/function/parameters") or {},
        )
        for at, tool in enumerate(body.tools or ())
        if tool.function is not None
    )
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        if choice == "required" and not tools:
            raise InvalidPacketError("a tool is required, and none is given", pointer="/tool_choice")
        return tools, choice or "auto"
    if choice.allowed_tools is not None:
        names = {tool.function.name for tool in choice.allowed_tools.tools if tool.function is not None}
        return tuple(tool for tool in tools if tool.name in names), choice.allowed_tools.mode
    if choice.function is None:
        return tools, "auto"
    named = tuple(tool for tool in tools if tool.name == choice.function.name)
    if not named:
        raise InvalidPacketError(
            f"no tool is called {choice.function.name[:60]!r}",
            pointer="/tool_choice/function/name",
            choices=tuple(tool.name for tool in tools[:50]),
        )
    return named, "required"


def _response_schema(wanted: ChatResponseFormat | None) -> JSONObject | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    here = "/response_format/json_schema"
    if wanted.json_schema is None:
        raise InvalidPacketError("'json_schema' is missing", pointer=here, expected="an object")
    return _shallow(wanted.json_schema.schema, f"{here}/schema") or {}


def _shallow(schema: JSONObject | None, pointer: str) -> JSONObject | None:
    """`schema`, which is no deeper than every reader behind this one can take."""
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
            if isinstance(child, (dict, list))
        ]
        if not level:
            return schema
    raise InvalidPacketError("nested too deep", pointer=pointer, expected=f"at most {MAX_DEPTH} levels")


class PromptDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of the prompt, what the engine had kept from an earlier request; 0 where it does not tell."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens as the engine counted them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """`arguments` is the JSON text as the LLM wrote it."""

    name: str
    arguments: str


class CompletionToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that the LLM asks for."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class CompletionMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer. `reasoning_content` is what the LLM thought before it."""

    role: str
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    tool_calls: tuple[CompletionToolCall, ...] = ()


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The one choice."""

    index: int
    message: CompletionMessage
    logprobs: None
    finish_reason: FinishReason


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer. `model` is the LLM that answered, or the role."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage
    system_fingerprint: str | None = None


def completion(reply: ChatReply, *, request_id: str, model: str, created: int) -> ChatCompletion:
    """The whole answer. `created` is in seconds since 1970."""
    return ChatCompletion(
        id=f"chatcmpl-{request_id}",
        created=created,
        model=model,
        choices=(
            CompletionChoice(
                index=0,
                message=CompletionMessage(
                    role="assistant",
                    content=None if reply.tool_calls and not reply.text else reply.text,
                    refusal=None,
                    reasoning_content=reply.reasoning or None,
                    tool_calls=tuple(
                        CompletionToolCall(
                            id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments)
                        )
                        for call in reply.tool_calls
                    ),
                ),
                logprobs=None,
                finish_reason=reply.finish_reason,
            ),
        ),
        usage=_usage(reply.usage),
    )


def _usage(usage: ChatUsage) -> Usage:
    return Usage(
        prompt_tokens=usage.input_tokens,
        completion_tokens=usage.output_tokens,
        total_tokens=usage.input_tokens + usage.output_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=usage.cached_tokens),
    )


class _FunctionDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str | None = None
    arguments: str


class _CallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    index: int
    id: str | None = None
    type: str | None = None
    function: _FunctionDelta


class _Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[_CallDelta, ...] = ()


class Chunks:
    """The frames of one streamed answer: what they have in common is encoded once."""

    def __init__(self, *, request_id: str, model: str, created: int, include_usage: bool) -> None:
        head = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
        }
        self._head = b"data: " + msgspec.json.encode(head)[:-1]
        self._include_usage = include_usage
        # Who asked for the usage is told in each chunk that it is not there yet.
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"

    def first(self) -> bytes:
        """Who speaks."""
        return self._chunk(b'{"role":"assistant","content":"","refusal":null}', None)

    def frames(self, delta: ChatDelta) -> bytes:
        """A delta's chunks; one with a finish_reason ends the answer."""
        written = b""
        if delta.text or delta.reasoning or delta.tool_calls:
            written = self._chunk(msgspec.json.encode(_delta(delta)), None)
        if delta.finish_reason is not None:
            written += self._chunk(b"{}", delta.finish_reason)
        return written

    def end(self, usage: ChatUsage) -> bytes:
        """After the last delta: the usage where it was asked for, and that this was all."""
        if not self._include_usage:
            return b"data: [DONE]\n\n"
        counted = msgspec.json.encode(_usage(usage))
        return self._head + b',"choices":[],"usage":' + counted + b"}\n\ndata: [DONE]\n\n"

    def _chunk(self, delta: bytes, finish_reason: FinishReason | None) -> bytes:
        finish = b"null" if finish_reason is None else b'"' + finish_reason.encode() + b'"'
        return (
            self._head
            + b',"choices":[{"index":0,"delta":'
            + delta
            + b',"logprobs":null,"finish_reason":'
            + finish
            + b"}]"
            + self._tail
        )


def _delta(delta: ChatDelta) -> _Delta:
    return _Delta(
        content=delta.text or None,
        reasoning_content=delta.reasoning or None,
        tool_calls=tuple(
            _CallDelta(
                index=call.index,
                id=call.id,
                type="function" if call.id is not None else None,
                function=_FunctionDelta(name=call.name, arguments=call.arguments),
            )
            for call in delta.tool_calls
        ),
    )
