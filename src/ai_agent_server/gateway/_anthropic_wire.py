"""Anthropic's messages wire, from the side of the one who answers: a request read, an answer written.

Pure. A request's unknown fields, tools and blocks are tolerated; what it says with a known name has to
have the right type. A person's attachment that no LLM here can read is refused, since the answer would
be wrong; one that a tool brought is told in words, since it stands in the history for good and a refusal
would end the conversation.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from ai_agent_server.core.chat import (
    ChatDelta,
    ChatRequest,
    ChatUsage,
    FinishReason,
    ImagePart,
    JSONObject,
    Message,
    Part,
    RouteHints,
    TextPart,
    Tool,
    ToolCall,
    ToolCallDelta,
)
from ai_agent_server.core.packet_json import MAX_DEPTH, explained, is_deeper
from ai_agent_server.errors import EngineProtocolError, InvalidPacketError, MalformedPacketError

MAX_MESSAGES = 100_000
MAX_TOOLS = 2_000
MAX_STOPS = 100
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
THOUGHTS_PER_PING = 20

_ATTRIBUTION = "x-anthropic-billing-header:"
"""Begins a block that Claude Code puts before its system prompt. It differs with each request, so that no
local engine would ever find the prompt's prefix in its cache."""
_ASIDE = "<system-reminder>\n{text}\n</system-reminder>"
"""A system message in mid-conversation: most chat templates take one at the beginning alone. The tag is
Claude Code's own for the same purpose."""
_IMAGE_TYPES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
_STOP_REASON: dict[FinishReason, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}

T = TypeVar("T")
RawObject = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "object"})]
"""An object of any shape, as it was written; `_object` and `_bounded` judge it."""
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]


_NO_OBJECT, _NO_TEXT = msgspec.Raw(b"{}"), msgspec.Raw(b'""')


# What comes in


class MessagesSource(msgspec.Struct, frozen=True, kw_only=True):
    """Of an image or a document."""

    type: str
    media_type: str = ""
    data: str = ""
    content: msgspec.Raw = msgspec.field(default_factory=lambda: _NO_TEXT)


class MessagesBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of content. What depends on its type is read when the type is known."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    title: str | None = None
    tool_use_id: str | None = None
    tool_name: str | None = None
    is_error: bool | None = None
    input: msgspec.Raw = msgspec.field(default_factory=lambda: _NO_OBJECT)
    content: msgspec.Raw = msgspec.field(default_factory=lambda: _NO_TEXT)
    source: msgspec.Raw = msgspec.field(default_factory=lambda: _NO_OBJECT)
    tool: msgspec.Raw = msgspec.field(default_factory=lambda: _NO_OBJECT)


class MessagesTurn(msgspec.Struct, frozen=True, kw_only=True):
    """One side's turn. Several of one side that follow each other are one."""

    role: Literal["user", "assistant", "system"]
    content: str | tuple[MessagesBlock, ...]


class MessagesTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that may be called. One with a `type` but `custom` is Anthropic's own, and left out."""

    type: str | None = None
    name: str = ""
    description: str | None = None
    input_schema: msgspec.Raw = msgspec.field(default_factory=lambda: _NO_OBJECT)
    defer_loading: bool | None = None


class _ToolChange(msgspec.Struct, frozen=True, kw_only=True):
    """In a block that adds a tool in mid-conversation, or takes it away: by its name, or whole."""

    name: str = ""
    definition: MessagesTool | None = None


class MessagesToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a tool may, must or must not be called; `name` with `tool`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str = ""


class MessagesThinking(msgspec.Struct, frozen=True, kw_only=True):
    """Whether what an LLM thinks aloud is shown."""

    type: str
    display: str | None = None


class MessagesFormat(msgspec.Struct, frozen=True, kw_only=True):
    """A JSON Schema that the answer has to obey."""

    type: str
    schema: RawObject = msgspec.field(default_factory=lambda: _NO_OBJECT)


class MessagesOutputConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The answer's form. `effort` is let pass."""

    format: MessagesFormat | None = None


class TokenCountDraft(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/messages/count_tokens."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    messages: Annotated[tuple[MessagesTurn, ...], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: str | tuple[MessagesBlock, ...] | None = None
    tools: Annotated[tuple[MessagesTool, ...], msgspec.Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: MessagesThinking | None = None
    output_config: MessagesOutputConfig | None = None
    output_format: MessagesFormat | None = None


class MessagesDraft(TokenCountDraft, frozen=True, kw_only=True):
    """The body of POST /v1/messages."""

    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
    stream: bool | None = None
    stop_sequences: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None

    @property
    def shows_thinking(self) -> bool:
        """Whether the client wants to see what the LLM thinks aloud."""
        asked = self.thinking
        return asked is not None and asked.type != "disabled" and asked.display != "omitted"


_messages = msgspec.json.Decoder(MessagesDraft)
_token_counts = msgspec.json.Decoder(TokenCountDraft)
_sources = msgspec.json.Decoder(MessagesSource)
_contents = msgspec.json.Decoder(str | tuple[MessagesBlock, ...])
_named_tools = msgspec.json.Decoder(_ToolChange)
_objects = msgspec.json.Decoder(dict[str, Any])


def decode_messages(raw: bytes) -> MessagesDraft:
    """The body of POST /v1/messages. Raises `InvalidPacketError` with the place."""
    return _decoded(_messages, raw)


def decode_token_count(raw: bytes) -> TokenCountDraft:
    """The body of POST /v1/messages/count_tokens. Raises `InvalidPacketError` with the place."""
    return _decoded(_token_counts, raw)


def chat_request(draft: TokenCountDraft) -> ChatRequest:
    """The same in our own values. Raises `InvalidPacketError` with the place.

    Without `stop`: which sequence ended an answer is known only to the one who finds it (`Answer`).
    """
    choice = draft.tool_choice
    tools = _tools(draft)
    if choice is not None and choice.type == "tool":
        # There is no word for it in most engines; of one tool, `required` says the same.
        tools = tuple(tool for tool in tools if tool.name == choice.name)
        if not tools:
            raise _wrong(f"there is no tool {choice.name[:80]!r} that can be called", "tool_choice", "name")
    return ChatRequest(
        messages=_joined(_conversation(draft)),
        max_tokens=draft.max_tokens if isinstance(draft, MessagesDraft) else None,
        temperature=draft.temperature if isinstance(draft, MessagesDraft) else None,
        top_p=draft.top_p if isinstance(draft, MessagesDraft) else None,
        tools=tools,
        tool_choice=_choice(choice, tools),
        response_schema=_schema(draft),
        route=RouteHints(),
    )


def _choice(
    choice: MessagesToolChoice | None, tools: tuple[Tool, ...]
) -> Literal["auto", "none", "required"]:
    match choice:
        case MessagesToolChoice(type="none"):
            return "none"
        case MessagesToolChoice(type="any" | "tool"):
            if not tools:
                raise _wrong("no tool was given that can be called", "tool_choice", "type")
            return "required"
        case _:
            return "auto"


def _tools(draft: TokenCountDraft) -> tuple[Tool, ...]:
    """The tools that the LLM may call now.

    Those that Anthropic's own servers run (they have a `type`) are none of ours. A deferred one is shown
    once the conversation refers to it, and messages may add tools and take them away.
    """
    given = {
        draft_of.name: tool
        for at, draft_of in enumerate(draft.tools or ())
        if (tool := _tool(draft_of, "tools", at)) is not None
    }
    late = {tool.name for tool in draft.tools or () if tool.defer_loading}
    shown = {name: tool for name, tool in given.items() if name not in late}
    if draft.tool_choice is not None and draft.tool_choice.name in given:
        shown[draft.tool_choice.name] = given[draft.tool_choice.name]
    for at, turn in enumerate(draft.messages):
        for index, block in enumerate(turn.content if isinstance(turn.content, tuple) else ()):
            here = ("messages", at, "content", index)
            match block.type:
                case "tool_result" if late:
                    shown |= {name: given[name] for name in _referred(block, here) if name in given}
                case "tool_addition":
                    named = _at(_named_tools, block.tool, *here, "tool")
                    added = _tool(named.definition, *here, "tool", "definition") if named.definition else None
                    added = added or given.get(named.name)
                    shown |= {added.name: added} if added is not None else {}
                case "tool_removal":
                    shown.pop(_at(_named_tools, block.tool, *here, "tool").name, None)
                case _:
                    pass
    return tuple(shown.values())


def _tool(draft: MessagesTool, *path: str | int) -> Tool | None:
    if draft.type not in {None, "custom"}:
        return None
    if not draft.name:
        raise _wrong("'name' is missing", *path, "name")
    parameters = _object(draft.input_schema, *path, "input_schema")
    return Tool(name=draft.name, description=draft.description or "", parameters=parameters)


def _referred(block: MessagesBlock, here: tuple[str | int, ...]) -> Iterator[str]:
    """The tools that a search brought."""
    if b"tool_reference" in bytes(block.content):
        for piece in _at(_contents, block.content, *here, "content"):
            if isinstance(piece, MessagesBlock) and piece.tool_name is not None:
                yield piece.tool_name


def _schema(draft: TokenCountDraft) -> JSONObject | None:
    path: tuple[str, ...] = ("output_config", "format")
    wanted = draft.output_config.format if draft.output_config is not None else None
    if wanted is None:
        path, wanted = ("output_format",), draft.output_format
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        raise _wrong("only json_schema is known", *path, "type")
    return _object(wanted.schema, *path, "schema")


def _conversation(draft: TokenCountDraft) -> Iterator[Message]:
    if system := _system_text(draft.system):
        yield Message(role="system", parts=(TextPart(text=system),))
    begun = False
    for at, turn in enumerate(draft.messages):
        if turn.role == "system":
            text = _system_text(turn.content)
            role: Literal["user", "system"] = "user" if begun else "system"
            if text:
                yield Message(role=role, parts=(TextPart(text=_ASIDE.format(text=text) if begun else text),))
            continue
        begun = True
        if isinstance(turn.content, str):
            yield Message(role=turn.role, parts=_text(turn.content))
        elif turn.role == "assistant":
            yield _assistant(turn.content, at)
        else:
            yield from _user(turn.content, at)


def _system_text(system: str | tuple[MessagesBlock, ...] | None) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    texts = (block.text for block in system if block.text)
    return "\n\n".join(text for text in texts if not text.startswith(_ATTRIBUTION))


def _joined(messages: Iterator[Message]) -> tuple[Message, ...]:
    """One turn where several of the same side follow each other, as the API has it."""
    turns: list[Message] = []
    for message in messages:
        before = turns[-1] if turns else None
        if before is not None and before.role == message.role != "tool":
            gap = _text("\n\n") if before.parts and message.parts else ()
            turns[-1] = msgspec.structs.replace(
                before,
                parts=(*before.parts, *gap, *message.parts),
                tool_calls=before.tool_calls + message.tool_calls,
            )
        elif message.parts or message.tool_calls or message.role == "tool":
            turns.append(message)
    return tuple(turns)


def _assistant(blocks: Iterable[MessagesBlock], at: int) -> Message:
    """What was said and called. Thoughts, and what Anthropic's servers did by themselves, are dropped."""
    parts: list[Part] = []
    calls = []
    for index, block in enumerate(blocks):
        here = ("messages", at, "content", index)
        if block.type == "text":
            parts += _text(_required(block.text, *here, "text"))
        elif block.type == "tool_use":
            _bounded(block.input, *here, "input")
            calls.append(
                ToolCall(
                    id=_required(block.id, *here, "id"),
                    name=_required(block.name, *here, "name"),
                    arguments=bytes(block.input).decode(),
                )
            )
    return Message(role="assistant", parts=tuple(parts), tool_calls=tuple(calls))


def _user(blocks: Iterable[MessagesBlock], at: int) -> Iterator[Message]:
    """The results of calls, and then what the user says: a result must follow its call at once."""
    parts: list[Part] = []
    for index, block in enumerate(blocks):
        here = ("messages", at, "content", index)
        if block.type == "tool_result":
            call_id = _required(block.tool_use_id, *here, "tool_use_id")
            told = [*_result(block, here)]
            text = "".join(part.text for part in told if isinstance(part, TextPart))
            yield Message(
                role="tool",
                parts=_text(f"Error: {text}" if block.is_error else text),
                tool_call_id=call_id,
            )
            # Engines take no image in a tool's message.
            parts += [part for part in told if isinstance(part, ImagePart)]
        else:
            parts += _shown(block, here)
    if parts:
        yield Message(role="user", parts=tuple(parts))


def _result(block: MessagesBlock, here: tuple[str | int, ...]) -> Iterator[Part]:
    """What a tool brought."""
    content = _at(_contents, block.content, *here, "content")
    if isinstance(content, str):
        yield from _text(content)
        return
    for index, piece in enumerate(content):
        try:
            yield from _shown(piece, (*here, "content", index))
        except _UnreadableError as exc:
            yield TextPart(text=f"[{exc.problem}]")


class _UnreadableError(InvalidPacketError):
    """An attachment that no LLM here can read."""


def _shown(block: MessagesBlock, here: tuple[str | int, ...]) -> tuple[Part, ...]:
    """A block as an LLM can take it. Raises `_UnreadableError`."""
    match block.type:
        case "text":
            return _text(_required(block.text, *here, "text"))
        case "image":
            source = _at(_sources, block.source, *here, "source")
            if source.type != "base64":
                raise _unreadable("an image has to be sent whole: this server fetches none", here)
            if source.media_type not in _IMAGE_TYPES:
                raise _wrong(f"unknown image type {source.media_type[:80]!r}", *here, "source", "media_type")
            return (ImagePart(media_type=source.media_type, content=source.data),)
        case "document":
            return _text(_document(block, here))
        case "search_result":
            content = _at(_contents, block.content, *here, "content")
            found = content if isinstance(content, str) else "\n".join(b.text or "" for b in content)
            return _text(f"{block.title or ''}\n{found}\n")
        case "tool_reference":
            return _text(f"The tool {block.tool_name} can be called now.\n")
        case "thinking" | "redacted_thinking":
            return ()
        case _ if block.text:
            return _text(block.text)
        case _:
            raise _unreadable(f"a block of the type {block.type[:80]!r} is not known here", here)


def _document(block: MessagesBlock, here: tuple[str | int, ...]) -> str:
    source = _at(_sources, block.source, *here, "source")
    match source.type:
        case "text":
            text = source.data
        case "content":
            content = _at(_contents, source.content, *here, "source", "content")
            text = content if isinstance(content, str) else "\n".join(piece.text or "" for piece in content)
        case _:
            kind = source.media_type or source.type
            raise _unreadable(f"a document of the type {kind[:80]!r} cannot be read here", here)
    return f"{block.title or 'Document'}:\n{text}\n"


def _text(text: str) -> tuple[TextPart, ...]:
    return (TextPart(text=text),) if text else ()


def _required(value: str | None, *path: str | int) -> str:
    if value is None:
        raise _wrong(f"{path[-1]!r} is missing", *path)
    return value


def _object(raw: msgspec.Raw, *path: str | int) -> JSONObject:
    _bounded(raw, *path)
    return _at(_objects, raw, *path)


def _bounded(raw: msgspec.Raw, *path: str | int) -> None:
    """What is free in shape must be an object, and not too deep for those who walk through it."""
    text = bytes(raw)
    if not text.startswith(b"{"):
        raise _wrong("Expected an object", *path)
    if text.count(b"{") + text.count(b"[") <= MAX_DEPTH:
        return
    if is_deeper(_at(_objects, raw, *path), MAX_DEPTH):
        raise _wrong(f"nested deeper than {MAX_DEPTH} levels", *path)


def _at(decoder: msgspec.json.Decoder[T], raw: msgspec.Raw, *path: str | int) -> T:
    return _decoded(decoder, bytes(raw), *path)


def _decoded(decoder: msgspec.json.Decoder[T], raw: bytes, *path: str | int) -> T:
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as exc:
        mistake = explained(exc, decoder.type)
        raise InvalidPacketError(
            mistake.problem,
            pointer=_pointer(path) + mistake.pointer,
            expected=mistake.expected,
            choices=mistake.choices,
        ) from exc
    except RecursionError as exc:
        raise MalformedPacketError("nested too deep", pointer=_pointer(path)) from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise MalformedPacketError(f"not JSON in UTF-8: {exc}", pointer=_pointer(path)) from exc


def _wrong(problem: str, *path: str | int) -> InvalidPacketError:
    return InvalidPacketError(problem, pointer=_pointer(path))


def _unreadable(problem: str, here: tuple[str | int, ...]) -> _UnreadableError:
    return _UnreadableError(problem, pointer=_pointer(here))


def _pointer(path: tuple[str | int, ...]) -> str:
    return "".join(f"/{step}" for step in path)


# What goes out


class MessageUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens. `input_tokens` is what was read; what the engine had kept from before comes beside it.
    Nothing is kept for a price of its own, so nothing is ever created."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int


class TextBlock(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """What was said."""

    text: str


class ThinkingBlock(msgspec.Struct, frozen=True, kw_only=True, tag="thinking"):
    """What was thought aloud. The signature is the message's id: nobody has to check it here."""

    thinking: str
    signature: str


class ToolUseBlock(msgspec.Struct, frozen=True, kw_only=True, tag="tool_use"):
    """A call that the client is asked for."""

    id: str
    name: str
    input: JSONObject


class MessageReply(msgspec.Struct, frozen=True, kw_only=True, tag="message"):
    """The answer of POST /v1/messages."""

    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: tuple[TextBlock | ThinkingBlock | ToolUseBlock, ...]
    stop_reason: StopReason | None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of POST /v1/messages/count_tokens."""

    input_tokens: int


class AnthropicError(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong; `type` is one of Anthropic's words for it."""

    type: str
    message: str


class AnthropicErrorBody(msgspec.Struct, frozen=True, kw_only=True, tag="error"):
    """The object that every error on this surface is, also inside a stream."""

    error: AnthropicError
    request_id: str


class StopScan:
    """Finds the first of some sequences in a text that comes piece by piece.

    What may be a sequence's beginning is held back, so that nothing of one is ever passed on.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The text that is safe to pass on. Once a sequence was found, no more is asked."""
        if not self._stops:
            return text
        text = self._held + text
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: hit[0])
            self._held = ""
            return text[:at]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back: no sequence came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class Answer:
    """Folds deltas into the events of one message; with `keep`, its blocks are there at the end too.

    Events are bytes, ready to be sent. Nothing ends well that was not said to be at its end: `end`
    raises for a stream without a reason, and for a call whose arguments are no JSON object.
    """

    def __init__(
        self,
        *,
        message_id: str,
        model: str,
        input_tokens: int,
        stops: Iterable[str] = (),
        shows_thinking: bool = False,
        keep: bool = False,
    ) -> None:
        """`input_tokens` is an estimate, told until the engine's own count is known."""
        self._id, self._model = message_id, model
        self._usage = ChatUsage(input_tokens=input_tokens)
        self._scan = StopScan(stops)
        self._shows_thinking, self._keep = shows_thinking, keep
        self._finish: FinishReason | None = None
        self._blocks: list[TextBlock | ThinkingBlock | ToolUseBlock] = []
        self._index = -1
        self._open: Literal["text", "thinking", "tool_use"] | None = None
        self._pieces: list[str] = []
        self._call = ToolCall(id="", name="", arguments="")
        self._call_number = -1
        self._written = 0
        self._thoughts = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence was met: nothing that follows belongs to the answer."""
        return self._scan.found is not None

    def start(self) -> bytes:
        """The events before anything is known."""
        return _event({"type": "message_start", "message": self._message()}) + PING

    def take(self, delta: ChatDelta) -> bytes:
        """The events of the next delta, none when it has nothing to show."""
        if self.stopped:
            return b""
        self._usage = delta.usage or self._usage
        self._finish = delta.finish_reason or self._finish
        out = b""
        if delta.reasoning:
            out += self._thought(delta.reasoning)
        if delta.text:
            self._written += 1
            out += self._said(self._scan.feed(delta.text))
        if self._scan.found is None:
            for call in delta.tool_calls:
                out += self._called(call)
        return out

    def end(self) -> bytes:
        """The last events. Raises `EngineProtocolError`."""
        out = self._said(self._scan.rest()) + self._close()
        if self._finish is None and not self.stopped:
            raise EngineProtocolError("the stream ended without a finish_reason")
        message = self._message()
        delta = {
            "stop_reason": message.stop_reason,
            "stop_sequence": message.stop_sequence,
        }
        out += _event({"type": "message_delta", "delta": delta, "usage": message.usage})
        return out + b'event: message_stop\ndata: {"type":"message_stop"}\n\n'

    def message(self) -> MessageReply:
        """The whole message, after `end`."""
        return self._message()

    def _message(self) -> MessageReply:
        reason: Any = None
        if self.stopped:
            reason = "stop_sequence"
        elif self._finish is not None:
            reason = _STOP_REASON[self._finish]
        return MessageReply(
            id=self._id,
            model=self._model,
            content=tuple(self._blocks),
            stop_reason=reason,
            stop_sequence=self._scan.found,
            usage=MessageUsage(
                input_tokens=self._usage.input_tokens - self._usage.cached_tokens,
                cache_read_input_tokens=self._usage.cached_tokens,
                # Who stops an engine does not hear its count; a delta is about a token.
                output_tokens=self._usage.output_tokens or self._written,
            ),
        )

    def _said(self, text: str) -> bytes:
        if not text:
            return b""
        out = b"" if self._open == "text" else self._begin("text", {"type": "text", "text": ""})
        if self._keep:
            self._pieces.append(text)
        return out + _delta_event(self._index, b"text_delta", b"text", text)

    def _thought(self, text: str) -> bytes:
        if not self._shows_thinking:
            # A client must hear something while the LLM thinks.
            self._thoughts += 1
            return PING if self._thoughts % THOUGHTS_PER_PING == 1 else b""
        out = b""
        if self._open != "thinking":
            out = self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
        if self._keep:
            self._pieces.append(text)
        return out + _delta_event(self._index, b"thinking_delta", b"thinking", text)

    def _called(self, call: ToolCallDelta) -> bytes:
        out = b""
        if call.index != self._call_number or self._open != "tool_use":
            if call.index <= self._call_number:
                raise EngineProtocolError("a tool call went on after it had ended")
            out += self._said(self._scan.rest())
            block = {"type": "tool_use", "id": call.id or "", "name": call.name or "", "input": {}}
            out += self._begin("tool_use", block)
            self._call_number = call.index
            self._call = ToolCall(id=call.id or "", name=call.name or "", arguments="")
        if call.arguments:
            self._written += 1
            self._pieces.append(call.arguments)
            out += _delta_event(self._index, b"input_json_delta", b"partial_json", call.arguments)
        return out

    def _begin(self, kind: Literal["text", "thinking", "tool_use"], block: JSONObject) -> bytes:
        out = self._close()
        self._open = kind
        self._index += 1
        return out + _event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _close(self) -> bytes:
        """End the open block. Raises `EngineProtocolError` for a call that nobody could make."""
        kind, self._open = self._open, None
        if kind is None:
            return b""
        text = "".join(self._pieces)
        self._pieces.clear()
        out = b""
        match kind:
            case "text":
                block: TextBlock | ThinkingBlock | ToolUseBlock = TextBlock(text=text)
            case "thinking":
                out = _delta_event(self._index, b"signature_delta", b"signature", self._id)
                block = ThinkingBlock(thinking=text, signature=self._id)
            case "tool_use":
                block = ToolUseBlock(id=self._call.id, name=self._call.name, input=_arguments(text))
        if self._keep:
            self._blocks.append(block)
        return out + b'event: content_block_stop\ndata: {"type":"content_block_stop","index":%d}\n\n' % (
            self._index
        )


def _arguments(text: str) -> JSONObject:
    try:
        return _objects.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError) as exc:
        raise EngineProtocolError("the arguments of a tool call are no JSON object") from exc


def error_event(kind: str, message: str, request_id: str) -> bytes:
    """The event that ends a stream badly."""
    return _event(
        AnthropicErrorBody(error=AnthropicError(type=kind, message=message), request_id=request_id), "error"
    )


_encoder = msgspec.json.Encoder()


def _event(body: Any, name: str = "") -> bytes:
    return b"event: %b\ndata: %b\n\n" % ((name or body["type"]).encode(), _encoder.encode(body))


def _delta_event(index: int, kind: bytes, field: bytes, text: str) -> bytes:
    return (
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":'
        b'{"type":"%b","%b":%b}}\n\n' % (index, kind, field, _encoder.encode(text))
    )
