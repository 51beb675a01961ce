"""An answer told as OpenAI's Responses object, whole and event by event. Pure."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec

from ai_agent_server.core.chat import (
    ChatDelta,
    ChatReply,
    ChatUsage,
    FinishReason,
    JSONObject,
    ToolCallDelta,
)
from ai_agent_server.gateway._responses_wire import ResponsesDraft, Translated

Status = Literal["in_progress", "completed", "incomplete", "failed"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]
ErrorCode = Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]


class OutputText(msgspec.Struct, frozen=True, kw_only=True, tag="output_text"):
    """The text of a message."""

    text: str
    annotations: tuple[JSONObject, ...] = ()
    logprobs: tuple[JSONObject, ...] = ()


class ReasoningText(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning_text"):
    """What the LLM thought aloud."""

    text: str


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True, tag="message"):
    """What the LLM says."""

    id: str
    status: ItemStatus
    content: tuple[OutputText, ...]
    role: Literal["assistant"] = "assistant"


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True, tag="function_call"):
    """A function that the caller is to call; `arguments` is the LLM's JSON text."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str
    namespace: str | msgspec.UnsetType = msgspec.UNSET


class CustomCall(msgspec.Struct, frozen=True, kw_only=True, tag="custom_tool_call"):
    """A tool of free text that the caller is to call."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    input: str
    namespace: str | msgspec.UnsetType = msgspec.UNSET


class ReasoningItem(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning"):
    """What the LLM thought aloud before it answered; no summary is made of it."""

    id: str
    status: ItemStatus
    content: tuple[ReasoningText, ...]
    summary: tuple[JSONObject, ...] = ()
    encrypted_content: str | None = None


Item: TypeAlias = OutputMessage | FunctionCall | CustomCall | ReasoningItem


class InputDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of the input, what the engine had kept from an earlier request; 0 where it does not tell."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True, kw_only=True):
    """No engine counts its thinking apart."""

    reasoning_tokens: int = 0


class ResponsesUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens as the engine counted them."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens_details: OutputDetails = OutputDetails()


class ResponsesFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why an answer that had begun could not be finished."""

    code: ErrorCode
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens", "content_filter"]


class ResponsesBody(msgspec.Struct, frozen=True, kw_only=True):
    """The Responses object, with every field that its published schema asks for."""

    id: str
    created_at: int
    """Unix time in seconds."""
    status: Status
    model: str
    object: Literal["response"] = "response"
    completed_at: int | None = None
    output: tuple[Item, ...] = ()
    usage: ResponsesUsage | None = None
    error: ResponsesFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    reasoning: JSONObject = msgspec.field(default_factory=dict)
    store: bool = False
    background: bool = False
    service_tier: Literal["default"] = "default"
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int = 0
    text: JSONObject = msgspec.field(default_factory=dict)
    tool_choice: Any = "auto"
    tools: tuple[JSONObject, ...] = ()
    truncation: Literal["disabled"] = "disabled"
    """What is too long for an LLM is refused, not cut."""
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Something that happened to an answer, in order."""

    sequence_number: int


class _OfResponse(_Event, frozen=True, kw_only=True):
    response: ResponsesBody


class Created(_OfResponse, frozen=True, kw_only=True, tag="response.created"):
    """The first event."""


class InProgress(_OfResponse, frozen=True, kw_only=True, tag="response.in_progress"):
    """The second."""


class Completed(_OfResponse, frozen=True, kw_only=True, tag="response.completed"):
    """The last event of a whole answer."""


class Incompleted(_OfResponse, frozen=True, kw_only=True, tag="response.incomplete"):
    """The last event of an answer that met a limit."""


class Failed(_OfResponse, frozen=True, kw_only=True, tag="response.failed"):
    """The last event of an answer that broke off."""


class _OfItem(_Event, frozen=True, kw_only=True):
    output_index: int
    item: Item


class ItemAdded(_OfItem, frozen=True, kw_only=True, tag="response.output_item.added"):
    """An item begins."""


class ItemDone(_OfItem, frozen=True, kw_only=True, tag="response.output_item.done"):
    """An item is whole."""


class _InItem(_Event, frozen=True, kw_only=True):
    item_id: str
    output_index: int


class _OfPart(_InItem, frozen=True, kw_only=True):
    part: OutputText | ReasoningText
    content_index: int = 0


class PartAdded(_OfPart, frozen=True, kw_only=True, tag="response.content_part.added"):
    """A part of an item's content begins."""


class PartDone(_OfPart, frozen=True, kw_only=True, tag="response.content_part.done"):
    """A part of an item's content is whole."""


class TextDelta(_InItem, frozen=True, kw_only=True, tag="response.output_text.delta"):
    """A piece of a message."""

    delta: str
    content_index: int = 0
    logprobs: tuple[JSONObject, ...] = ()


class TextDone(_InItem, frozen=True, kw_only=True, tag="response.output_text.done"):
    """The whole of a message."""

    text: str
    content_index: int = 0
    logprobs: tuple[JSONObject, ...] = ()


class ReasoningDelta(_InItem, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    """A piece of a thought."""

    delta: str
    content_index: int = 0


class ReasoningDone(_InItem, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    """The whole of a thought."""

    text: str
    content_index: int = 0


class ArgumentsDelta(_InItem, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    """A piece of a call's arguments."""

    delta: str


class ArgumentsDone(_InItem, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    """The whole of a call's arguments."""

    name: str
    arguments: str


class InputDelta(_InItem, frozen=True, kw_only=True, tag="response.custom_tool_call_input.delta"):
    """A piece of a custom call's text."""

    delta: str


class InputDone(_InItem, frozen=True, kw_only=True, tag="response.custom_tool_call_input.done"):
    """The whole of a custom call's text."""

    input: str


_encoder = msgspec.json.Encoder()


def frame(event: _Event) -> bytes:
    """The event as a server-sent event with its name."""
    name = str(event.__struct_config__.tag).encode()
    return b"event: " + name + b"\ndata: " + _encoder.encode(event) + b"\n\n"


class _OpenText:
    """A message or a thought that is being written."""

    def __init__(self, item_id: str, output_index: int, *, aloud: bool) -> None:
        self.item_id, self.output_index, self.aloud = item_id, output_index, aloud
        self.pieces: list[str] = []

    def part(self, text: str) -> OutputText | ReasoningText:
        return ReasoningText(text=text) if self.aloud else OutputText(text=text)

    def item(self, status: ItemStatus, part: OutputText | ReasoningText | None = None) -> Item:
        match part:
            case ReasoningText():
                return ReasoningItem(id=self.item_id, status=status, content=(part,))
            case OutputText():
                return OutputMessage(id=self.item_id, status=status, content=(part,))
            case _ if self.aloud:
                return ReasoningItem(id=self.item_id, status=status, content=())
            case _:
                return OutputMessage(id=self.item_id, status=status, content=())


class _OpenCall:
    """A call whose arguments are being written."""

    def __init__(
        self, item_id: str, output_index: int, *, call_id: str, name: str, namespace: str | None, custom: bool
    ) -> None:
        self.item_id, self.output_index, self.name, self.custom = item_id, output_index, name, custom
        self._call_id, self._namespace = call_id, namespace or msgspec.UNSET
        self.pieces: list[str] = []

    def item(self, status: ItemStatus, text: str = "") -> Item:
        if self.custom:
            return CustomCall(
                id=self.item_id,
                status=status,
                call_id=self._call_id,
                name=self.name,
                input=text,
                namespace=self._namespace,
            )
        return FunctionCall(
            id=self.item_id,
            status=status,
            call_id=self._call_id,
            name=self.name,
            arguments=text,
            namespace=self._namespace,
        )


class Answer:
    """Folds the deltas of one answer into events, and into the object that the last of them carries."""

    def __init__(
        self,
        draft: ResponsesDraft,
        asked: Translated,
        *,
        model: Callable[[], str],
        new_id: Callable[[], str],
        now: Callable[[], float],
    ) -> None:
        """`model` answers who writes, as far as it is known; `now` is Unix time in seconds."""
        self._asked = asked
        self._model, self._new_id, self._now = model, new_id, now
        self._one_call_only = draft.parallel_tool_calls is False
        self._sequence = 0
        self._outputs = 0
        self._text: _OpenText | None = None
        self._calls: dict[int, _OpenCall] = {}
        self._done: list[tuple[int, Item]] = []
        self._finish: FinishReason | None = None
        self._usage = ChatUsage()
        self._base = ResponsesBody(
            id=f"resp_{self._id()}",
            created_at=int(now()),
            status="in_progress",
            model=model(),
            instructions=draft.instructions,
            max_output_tokens=draft.max_output_tokens,
            metadata=draft.metadata or {},
            parallel_tool_calls=not self._one_call_only,
            reasoning={
                "effort": draft.reasoning.effort if draft.reasoning else None,
                "summary": None,
            },
            temperature=1.0 if draft.temperature is None else draft.temperature,
            top_p=1.0 if draft.top_p is None else draft.top_p,
            text=_text_shown(draft),
            tool_choice=draft.tool_choice
            if isinstance(draft.tool_choice, str)
            else asked.request.tool_choice,
            tools=asked.echoed_tools,
            prompt_cache_key=draft.prompt_cache_key,
            safety_identifier=draft.safety_identifier,
            user=draft.user,
        )

    def whole(self, reply: ChatReply) -> ResponsesBody:
        """The object for an answer that is there already."""
        calls = enumerate(reply.tool_calls)
        self.take(
            ChatDelta(
                reasoning=reply.reasoning,
                text=reply.text,
                tool_calls=tuple(
                    ToolCallDelta(index=index, id=call.id, name=call.name, arguments=call.arguments)
                    for index, call in calls
                ),
                finish_reason=reply.finish_reason,
                usage=reply.usage,
            )
        )
        return self.ending()[1]

    def opening(self) -> list[_Event]:
        """Before the first delta."""
        begun = msgspec.structs.replace(self._base, model=self._model())
        return [
            Created(sequence_number=self._next(), response=begun),
            InProgress(sequence_number=self._next(), response=begun),
        ]

    def take(self, delta: ChatDelta) -> list[_Event]:
        """What the next delta adds."""
        events: list[_Event] = []
        if delta.reasoning:
            self._write(events, delta.reasoning, aloud=True)
        if delta.text:
            self._write(events, delta.text, aloud=False)
        for call in delta.tool_calls:
            self._call(events, call)
        self._finish = delta.finish_reason or self._finish
        self._usage = delta.usage or self._usage
        return events

    def ending(self) -> tuple[list[_Event], ResponsesBody]:
        """After the last delta, which had a finish_reason."""
        cut = self._finish in {"length", "content_filter"}
        status: ItemStatus = "incomplete" if cut else "completed"
        events: list[_Event] = []
        self._close_text(events, status)
        for call in self._calls.values():
            self._close_call(events, call, status)
        usage = self._usage
        response = msgspec.structs.replace(
            self._base,
            status=status,
            model=self._model(),
            completed_at=None if cut else int(self._now()),
            output=self._output(),
            incomplete_details=IncompleteDetails(
                reason="max_output_tokens" if self._finish == "length" else "content_filter"
            )
            if cut
            else None,
            usage=ResponsesUsage(
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
                total_tokens=usage.input_tokens + usage.output_tokens,
                input_tokens_details=InputDetails(cached_tokens=usage.cached_tokens),
            ),
        )
        last = (Incompleted if cut else Completed)(sequence_number=self._next(), response=response)
        return [*events, last], response

    def failing(self, code: ErrorCode, message: str) -> _Event:
        """Instead of the rest: the answer broke off. What was whole by then is in the output."""
        response = msgspec.structs.replace(
            self._base,
            status="failed",
            model=self._model(),
            output=self._output(),
            error=ResponsesFailure(code=code, message=message),
        )
        return Failed(sequence_number=self._next(), response=response)

    def _write(self, events: list[_Event], text: str, *, aloud: bool) -> None:
        if self._text is not None and self._text.aloud is not aloud:
            self._close_text(events, "completed")
        if self._text is None:
            prefix = "rs" if aloud else "msg"
            self._text = _OpenText(f"{prefix}_{self._id()}", self._outputs, aloud=aloud)
            self._outputs += 1
            self._added(events, self._text)
            events.append(
                PartAdded(
                    sequence_number=self._next(),
                    item_id=self._text.item_id,
                    output_index=self._text.output_index,
                    part=self._text.part(""),
                )
            )
        self._text.pieces.append(text)
        events.append(
            (ReasoningDelta if aloud else TextDelta)(
                sequence_number=self._next(),
                item_id=self._text.item_id,
                output_index=self._text.output_index,
                delta=text,
            )
        )

    def _close_text(self, events: list[_Event], status: ItemStatus) -> None:
        if self._text is None:
            return
        closing, self._text = self._text, None
        whole = "".join(closing.pieces)
        item_id, output_index = closing.item_id, closing.output_index
        part = closing.part(whole)
        events += (
            (ReasoningDone if closing.aloud else TextDone)(
                sequence_number=self._next(), item_id=item_id, output_index=output_index, text=whole
            ),
            PartDone(sequence_number=self._next(), item_id=item_id, output_index=output_index, part=part),
        )
        self._finished(events, output_index, closing.item(status, part))

    def _call(self, events: list[_Event], delta: ToolCallDelta) -> None:
        call = self._calls.get(delta.index)
        if call is None:
            if self._calls and self._one_call_only:
                return
            self._close_text(events, "completed")
            call = self._calls[delta.index] = self._opened(delta)
            self._added(events, call)
        if delta.arguments:
            call.pieces.append(delta.arguments)
            if not call.custom:
                events.append(
                    ArgumentsDelta(
                        sequence_number=self._next(),
                        item_id=call.item_id,
                        output_index=call.output_index,
                        delta=delta.arguments,
                    )
                )

    def _opened(self, delta: ToolCallDelta) -> _OpenCall:
        name = delta.name or ""
        offered = self._asked.offered.get(name)
        custom = offered is not None and offered.kind == "custom"
        call = _OpenCall(
            f"{'ctc' if custom else 'fc'}_{self._id()}",
            self._outputs,
            call_id=delta.id or f"call_{self._id()}",
            name=offered.name if offered else name,
            namespace=offered.namespace if offered else None,
            custom=custom,
        )
        self._outputs += 1
        return call

    def _close_call(self, events: list[_Event], call: _OpenCall, status: ItemStatus) -> None:
        whole = "".join(call.pieces)
        item_id, output_index = call.item_id, call.output_index
        if call.custom:
            # The LLM wrote it inside a JSON string, which can be read as a whole only.
            whole = _free_text(whole)
            events += (
                InputDelta(
                    sequence_number=self._next(), item_id=item_id, output_index=output_index, delta=whole
                ),
                InputDone(
                    sequence_number=self._next(), item_id=item_id, output_index=output_index, input=whole
                ),
            )
        else:
            events.append(
                ArgumentsDone(
                    sequence_number=self._next(),
                    item_id=item_id,
                    output_index=output_index,
                    name=call.name,
                    arguments=whole,
                )
            )
        self._finished(events, output_index, call.item(status, whole))

    def _added(self, events: list[_Event], opened: _OpenText | _OpenCall) -> None:
        events.append(
            ItemAdded(
                sequence_number=self._next(),
                output_index=opened.output_index,
                item=opened.item("in_progress"),
            )
        )

    def _finished(self, events: list[_Event], output_index: int, item: Item) -> None:
        self._done.append((output_index, item))
        events.append(ItemDone(sequence_number=self._next(), output_index=output_index, item=item))

    def _output(self) -> tuple[Item, ...]:
        return tuple(item for _, item in sorted(self._done, key=lambda done: done[0]))

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence - 1

    def _id(self) -> str:
        return self._new_id().replace("-", "")


def _free_text(arguments: str) -> str:
    try:
        return msgspec.json.decode(arguments, type=_Input).input
    except msgspec.DecodeError:
        return arguments


class _Input(msgspec.Struct, frozen=True):
    input: str


def _text_shown(draft: ResponsesDraft) -> JSONObject:
    asked = draft.text.format if draft.text else None
    shown: JSONObject = {"type": asked.type if asked else "text"}
    if asked is not None and asked.type == "json_schema":
        shown |= {
            "name": asked.name or "answer",
            "schema": asked.schema,
            "strict": asked.strict,
        }
        if asked.description is not None:
            shown["description"] = asked.description
    verbosity = draft.text.verbosity if draft.text else None
    return {"format": shown, "verbosity": verbosity or "medium"}
