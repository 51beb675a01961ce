"""OpenAI's Responses requests as chat requests: items, tools of every kind, formats. Pure.

What is known has to have its type; what is unknown (fields, items, tools) is let pass, since clients send
more with every version. What was asked for and cannot be had is refused, not forgotten.
"""

import hashlib
from collections.abc import Iterable
from itertools import takewhile
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec

from ai_agent_server.core.chat import (
    ChatRequest,
    ChatRole,
    JSONObject,
    Message,
    Part,
    TextPart,
    Tool,
    ToolCall,
)
from ai_agent_server.core.packet_json import MAX_DEPTH, explained, is_deeper
from ai_agent_server.errors import InvalidPacketError, MalformedPacketError
from ai_agent_server.gateway._images import image_part

MAX_ITEMS = 4096
MAX_TOOLS = 512
NAME_CHARS = 64
"""As long as OpenAI lets a function's name be; engines hold themselves to it."""

T = TypeVar("T")

_ASIDE = "<system-reminder>\n{text}\n</system-reminder>"
_ROLES: dict[str, ChatRole] = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}


class _Kind(msgspec.Struct, frozen=True):
    type: str | None = None


class _Part(msgspec.Struct, frozen=True):
    """A piece of a message's content, whatever its kind."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None


Content: TypeAlias = str | tuple[_Part, ...]


class _Message(msgspec.Struct, frozen=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class _FunctionCall(msgspec.Struct, frozen=True):
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class _CustomCall(msgspec.Struct, frozen=True):
    call_id: str
    name: str
    input: str
    namespace: str | None = None


class _CallOutput(msgspec.Struct, frozen=True):
    call_id: str
    output: Content


class _Function(msgspec.Struct, frozen=True):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    description: str | None = None
    parameters: JSONObject | None = None


class _Custom(msgspec.Struct, frozen=True):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    description: str | None = None
    format: JSONObject | None = None


class _Namespace(msgspec.Struct, frozen=True):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    tools: tuple[msgspec.Raw, ...]
    description: str | None = None


class ResponsesToolChoice(msgspec.Struct, frozen=True):
    """A tool that has to be called, or (`allowed_tools`) those that may be."""

    type: str
    name: str | None = None
    namespace: str | None = None
    mode: Literal["auto", "required"] = "auto"
    tools: tuple["ResponsesToolChoice", ...] = ()


class ResponsesFormat(msgspec.Struct, frozen=True):
    """The form that the answer has to have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: JSONObject | None = None
    strict: bool | None = None
    description: str | None = None


class ResponsesText(msgspec.Struct, frozen=True):
    """How the answer is written."""

    format: ResponsesFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesReasoning(msgspec.Struct, frozen=True):
    """How much the LLM should think; no engine is told."""

    effort: str | None = None
    summary: str | None = None


class ResponsesDraft(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/responses. Unknown fields are let pass."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    input: str | tuple[msgspec.Raw, ...] = ()
    """The conversation: a text, or messages, calls and their outputs in order."""
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1, le=2_147_483_647)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    tools: tuple[msgspec.Raw, ...] | None = None
    """`function`, `namespace` and `custom` tools are given to the LLM; hosted ones are left out."""
    tool_choice: Literal["auto", "none", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: ResponsesText | None = None
    """`format`: text, json_object or json_schema."""
    reasoning: ResponsesReasoning | None = None
    store: bool | None = None
    """Nothing is stored, whatever is asked; the answer says so."""
    metadata: dict[str, str] | None = None
    previous_response_id: str | None = None
    """Refused: nothing is stored, so the whole conversation has to be sent."""
    conversation: Any = None
    """Refused, for the same reason."""
    prompt: Any = None
    """Refused: prompt templates are kept at OpenAI."""
    background: bool | None = None
    """Refused when true; POST /api/v1/{profile}/{role} takes work that goes on by itself."""
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None


class Offered(msgspec.Struct, frozen=True, kw_only=True):
    """A tool under the name that the LLM knows it by, and what its caller calls it."""

    tool: Tool
    name: str
    kind: Literal["function", "custom"] = "function"
    namespace: str | None = None


class Translated(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the engines take it, and what its answer has to be told with."""

    request: ChatRequest
    offered: dict[str, Offered]
    """By the name that the LLM knows."""
    echoed_tools: tuple[JSONObject, ...]
    """The tools in force, as the answer shows them."""


_drafts = msgspec.json.Decoder(ResponsesDraft)


def decode(body: bytes) -> ResponsesDraft:
    """`body` as a request. Raises `InvalidPacketError`, with a pointer, or `MalformedPacketError`."""
    try:
        return _drafts.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise _mistake(exc, ResponsesDraft, "") from exc


def translate(draft: ResponsesDraft) -> Translated:
    """`draft` as a chat request; `route` is left for who knows what its `model` means."""
    _refuse_what_is_stored(draft)
    offered, echoed = _tools(draft.tools or ())
    tools, choice = _chosen(draft.tool_choice, offered)
    return Translated(
        request=ChatRequest(
            messages=_messages(draft, offered),
            max_tokens=draft.max_output_tokens,
            temperature=draft.temperature,
            top_p=draft.top_p,
            tools=tools,
            tool_choice=choice,
            response_schema=_schema(draft.text.format if draft.text else None),
        ),
        offered=offered,
        echoed_tools=echoed,
    )


def _refuse_what_is_stored(draft: ResponsesDraft) -> None:
    if draft.previous_response_id is not None:
        raise InvalidPacketError(
            "this server keeps no responses: send the whole conversation in `input`",
            pointer="/previous_response_id",
        )
    for name in ("conversation", "prompt"):
        if getattr(draft, name) is not None:
            raise InvalidPacketError(f"this server keeps no {name}s", pointer=f"/{name}")
    if draft.background:
        raise InvalidPacketError(
            "no response is made in the background: POST /api/v1/{profile}/{role} takes a task that is",
            pointer="/background",
        )


# The conversation


def _messages(draft: ResponsesDraft, offered: dict[str, Offered]) -> tuple[Message, ...]:
    messages: list[Message] = []
    if draft.instructions:
        messages.append(_text_message("system", draft.instructions))
    if isinstance(draft.input, str):
        messages.append(_text_message("user", draft.input))
    else:
        if len(draft.input) > MAX_ITEMS:
            raise InvalidPacketError(f"more than {MAX_ITEMS} items", pointer="/input")
        known = {(each.namespace, each.name): name for name, each in offered.items()}
        for index, raw in enumerate(draft.input):
            _add_item(messages, raw, f"/input/{index}", known)
    if not messages:
        raise InvalidPacketError("there is nothing to answer", pointer="/input", expected="text or items")
    return _one_system_message(messages)


def _one_system_message(messages: list[Message]) -> tuple[Message, ...]:
    """What stands before the conversation as one message; what stands in it, told by the user.

    Most chat templates take one system message, at the beginning, and want somebody to answer to.
    """
    leading = list(takewhile(lambda message: message.role == "system", messages[:-1]))
    text = "\n\n".join(message.text for message in leading if message.text)
    rest = messages[len(leading) :]
    first = (_text_message("system", text),) if text else ()
    if len(rest) == 1 and rest[0].role == "system":
        return (*first, msgspec.structs.replace(rest[0], role="user"))
    return (
        *first,
        *(
            _text_message("user", _ASIDE.format(text=message.text)) if message.role == "system" else message
            for message in rest
        ),
    )


def _add_item(
    messages: list[Message], raw: msgspec.Raw, at: str, known: dict[tuple[str | None, str], str]
) -> None:
    """Put the item behind what came before it. One that carries nothing for an LLM is left out."""
    match _decoded(raw, _Kind, at).type:
        case "message" | None:
            item = _decoded(raw, _Message, at)
            messages.append(Message(role=_ROLES[item.role], parts=_parts(item.content, f"{at}/content")))
        case "function_call":
            call = _decoded(raw, _FunctionCall, at)
            _add_call(messages, call.call_id, _known_as(call.namespace, call.name, known), call.arguments)
        case "custom_tool_call":
            custom = _decoded(raw, _CustomCall, at)
            arguments = msgspec.json.encode({"input": custom.input}).decode()
            _add_call(messages, custom.call_id, _known_as(custom.namespace, custom.name, known), arguments)
        case "function_call_output" | "custom_tool_call_output":
            output = _decoded(raw, _CallOutput, at)
            parts = _parts(output.output, f"{at}/output")
            messages.append(Message(role="tool", parts=parts, tool_call_id=output.call_id))
        case "item_reference" | "compaction" as kind:
            raise InvalidPacketError(
                f"what this {kind} stands for is not kept here: send the items themselves", pointer=at
            )
        case _:
            pass


def _add_call(messages: list[Message], call_id: str, name: str, arguments: str) -> None:
    """A call belongs to the assistant's turn that it follows: calls made at once are one turn."""
    call = ToolCall(id=call_id, name=name, arguments=arguments)
    if messages and messages[-1].role == "assistant":
        turn = messages[-1]
        messages[-1] = msgspec.structs.replace(turn, tool_calls=(*turn.tool_calls, call))
    else:
        messages.append(Message(role="assistant", parts=(), tool_calls=(call,)))


def _parts(content: Content, at: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (TextPart(text=content),) if content else ()
    return tuple(_part(part, f"{at}/{index}") for index, part in enumerate(content))


def _part(part: _Part, at: str) -> Part:
    if part.type == "input_image":
        return image_part(part.image_url or "", f"{at}/image_url")
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        raise InvalidPacketError(
            f"content of the type {part.type[:80]!r} cannot be given to an LLM here",
            pointer=f"{at}/type",
            choices=("input_text", "input_image", "output_text"),
        )
    return TextPart(text=text)


def _text_message(role: ChatRole, text: str) -> Message:
    return Message(role=role, parts=(TextPart(text=text),))


# Tools


def _tools(raws: Iterable[msgspec.Raw]) -> tuple[dict[str, Offered], tuple[JSONObject, ...]]:
    """What can be called by the name that the LLM is given, and how the answer shows it."""
    offered: dict[str, Offered] = {}
    echoed: list[JSONObject] = []
    for index, raw in enumerate(raws):
        at = f"/tools/{index}"
        shown = _offer(raw, at, None, offered)
        if shown is None and _decoded(raw, _Kind, at).type == "namespace":
            space = _decoded(raw, _Namespace, at)
            inner = [
                each
                for place, nested in enumerate(space.tools)
                if (each := _offer(nested, f"{at}/tools/{place}", space.name, offered)) is not None
            ]
            if inner:
                shown = {
                    "type": "namespace",
                    "name": space.name,
                    "description": space.description or "",
                    "tools": inner,
                }
        if shown is not None:
            echoed.append(shown)
        if len(offered) > MAX_TOOLS:
            raise InvalidPacketError(f"more than {MAX_TOOLS} tools", pointer="/tools")
    return offered, tuple(echoed)


def _offer(
    raw: msgspec.Raw, at: str, namespace: str | None, offered: dict[str, Offered]
) -> JSONObject | None:
    """Add the tool to `offered` and say how it is shown; None for one that is not the LLM's to call."""
    match _decoded(raw, _Kind, at).type:
        case "function":
            function = _decoded(raw, _Function, at)
            parameters = _bounded(function.parameters or {}, f"{at}/parameters")
            each = Offered(
                tool=Tool(
                    name=_flat(namespace, function.name),
                    description=function.description or "",
                    parameters=parameters or {"type": "object", "properties": {}},
                ),
                name=function.name,
                namespace=namespace,
            )
            shown: JSONObject = {
                "type": "function",
                "name": function.name,
                "description": function.description,
                "parameters": function.parameters,
                "strict": False,
            }
        case "custom":
            custom = _decoded(raw, _Custom, at)
            each = Offered(
                tool=Tool(
                    name=_flat(namespace, custom.name),
                    description=_described(custom),
                    parameters={
                        "type": "object",
                        "properties": {"input": {"type": "string"}},
                        "required": ["input"],
                        "additionalProperties": False,
                    },
                ),
                name=custom.name,
                kind="custom",
                namespace=namespace,
            )
            shown = {"type": "custom", "name": custom.name, "description": custom.description}
        case _:
            return None
    if each.tool.name in offered:
        raise InvalidPacketError(f"two tools have the name {each.name[:80]!r}", pointer=f"{at}/name")
    offered[each.tool.name] = each
    return shown


def _described(custom: _Custom) -> str:
    """A tool of free text, told to an LLM that only knows functions; a grammar is told as it is written."""
    grammar = (custom.format or {}).get("definition")
    parts = [custom.description or "", f"`input` must follow this grammar:\n{grammar}" if grammar else ""]
    return "\n\n".join(part for part in parts if part)


def _flat(namespace: str | None, name: str) -> str:
    """A nested function's name for an LLM, which knows no nesting; the same each time."""
    if namespace is None:
        return name
    joined = f"{namespace}{'' if namespace.endswith('_') else '__'}{name}"
    if len(joined) <= NAME_CHARS:
        return joined
    mark = hashlib.sha256(joined.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{mark}_{joined[-(NAME_CHARS - len(mark) - 1) :]}"


def _known_as(namespace: str | None, name: str, known: dict[tuple[str | None, str], str]) -> str:
    """The name under which a call of earlier turns is known now, even where its tool is offered no more."""
    return known.get((namespace, name)) or _flat(namespace, name)


def _chosen(
    choice: Literal["auto", "none", "required"] | ResponsesToolChoice | None, offered: dict[str, Offered]
) -> tuple[tuple[Tool, ...], Literal["auto", "none", "required"]]:
    """The tools that may be called now, and whether one must be."""
    tools = tuple(each.tool for each in offered.values())
    if choice is None or isinstance(choice, str):
        if choice == "required" and not tools:
            raise InvalidPacketError("there is no tool that could be called", pointer="/tool_choice")
        return tools, choice or "auto"
    named = choice.tools if choice.type == "allowed_tools" else (choice,)
    allowed = tuple(
        each.tool
        for each in offered.values()
        if any(
            one.type == each.kind and one.name == each.name and one.namespace in {None, each.namespace}
            for one in named
        )
    )
    if choice.type == "allowed_tools":
        return (allowed, choice.mode) if allowed else (tools, "none")
    if not allowed:
        raise InvalidPacketError(
            f"no tool of the type {choice.type[:80]!r} with this name is offered",
            pointer="/tool_choice",
            choices=tuple(each.name for each in offered.values())[:20],
        )
    return allowed, "required"


def _schema(asked: ResponsesFormat | None) -> JSONObject | None:
    match asked:
        case ResponsesFormat(type="json_schema", schema=schema):
            if schema is None:
                raise InvalidPacketError("'schema' is missing", pointer="/text/format/schema")
            return _bounded(schema, "/text/format/schema")
        case ResponsesFormat(type="json_object"):
            return {"type": "object"}
        case _:
            return None


def _bounded(schema: JSONObject, at: str) -> JSONObject:
    if is_deeper(schema, MAX_DEPTH):
        raise MalformedPacketError("nested too deep", pointer=at, expected=f"at most {MAX_DEPTH} levels")
    return schema


# Decoding


def _decoded(raw: msgspec.Raw, kind: type[T], at: str) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise _mistake(exc, kind, at) from exc


def _mistake(exc: Exception, kind: type[Any], at: str) -> InvalidPacketError:
    match exc:
        case msgspec.ValidationError():
            found = explained(exc, kind)
            return InvalidPacketError(
                found.problem, pointer=at + found.pointer, expected=found.expected, choices=found.choices
            )
        case RecursionError():
            return MalformedPacketError("nested too deep", expected=f"at most {MAX_DEPTH} levels")
        case UnicodeDecodeError():
            return MalformedPacketError("not UTF-8", expected="JSON in UTF-8")
        case _:
            return MalformedPacketError(f"not JSON: {exc}", expected="one JSON object in UTF-8")
