"""Values of one exchange with an LLM: request, reply, deltas. OpenAI's words, provider-neutral."""

from typing import Any, Literal, TypeAlias

import msgspec

JSONObject: TypeAlias = dict[str, Any]
"""A JSON object whose shape is known only at run time and is checked by a JSON Schema."""

ChatRole = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
Privacy = Literal["any", "local"]
Tier = Literal["small", "main"]
Urgency = Literal["interactive", "batch", "background"]
"""Whom an accelerator serves first: someone who waits at the keyboard, work, or what has time."""
Capability = Literal["chat", "tools", "json_schema", "vision", "embeddings"]


class TextPart(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """A piece of text."""

    text: str


class ImagePart(msgspec.Struct, frozen=True, kw_only=True, tag="image"):
    """An image, whole: base64 `content` of the given media type (image/png, image/jpeg, ...)."""

    media_type: str
    content: str


Part: TypeAlias = TextPart | ImagePart


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that the LLM asks for. `arguments` is the JSON text exactly as the LLM wrote it."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn. `tool_calls` only on an assistant's, `tool_call_id` only on a tool's."""

    role: ChatRole
    parts: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """All text parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


def message(role: ChatRole, text: str) -> Message:
    """A message of one text part."""
    return Message(role=role, parts=(TextPart(text=text),))


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the LLM may call; `parameters` is a JSON Schema."""

    name: str
    description: str = ""
    parameters: JSONObject = msgspec.field(default_factory=dict)


class ChatUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens as the engine counted them."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    """Of the input: what the engine had kept from an earlier request and did not read again."""


def tokens_said(count: int | None) -> int:
    """Tokens as a server tells them: one that tells of fewer than none gives nothing back to anyone."""
    return max(0, count or 0)


class RouteHints(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the asker wants of the balancer. A single engine ignores all of it."""

    llm: str | None = None
    """Assigned to this LLM. One that is `locked` keeps the request whatever happens; another of the same
    tier may stand in for one that is not, once it cannot serve."""
    tier: Tier | None = None
    prefer: tuple[str, ...] = ()
    """LLM names in order of preference; others may still serve."""
    allowed: tuple[str, ...] = ()
    """LLM names; no other may serve. Empty: all may."""
    privacy: Privacy = "any"
    """`local`: never an LLM whose source is `api`, whatever fails."""
    max_cost_usd: float | None = None
    urgency: Urgency = "interactive"
    key: str = ""
    """Whose request it is: an accelerator shares its time between keys."""


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One exchange to be had.

    `response_schema` (JSON Schema) asks for an answer that obeys it, by grammar where the engine
    has one. `timeout` phases are the engine's own options; a request carries none.
    """

    messages: tuple[Message, ...]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    tools: tuple[Tool, ...] = ()
    tool_choice: Literal["auto", "none", "required"] = "auto"
    response_schema: JSONObject | None = None
    route: RouteHints = RouteHints()
    traceparent: str = ""
    """The trace that it belongs to (W3C Trace Context); an engine sends it along where it can."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One LLM as a decision saw it: refused by a rule, or scored (lower is better)."""

    llm: str
    refused_by: str | None = None
    """`LB-3 privacy`, say: the rule's number and name as in load_balancer_rules.md."""
    why: str = ""
    score: float | None = None
    parts: dict[str, float] = {}
    """What the score is made of, by name of the ranking rule."""


class Decision(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why an LLM serves a request: every candidate, and the one chosen (None: nobody may)."""

    chosen: str | None
    reason: str
    strategy: str
    candidates: tuple[Candidate, ...] = ()


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A fragment of the tool call number `index`; `id` and `name` come with its first fragment."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of an answer.

    The last delta of every good stream has a `finish_reason`; a stream that ends without one was
    cut, and the engine must raise instead. `usage` comes at the latest with the last delta.
    `llm`, `source`, `decision` and the times are set by the balancer on the first delta it passes on.
    """

    text: str = ""
    reasoning: str = ""
    """What the LLM thinks aloud before it answers; no part of the text."""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    finish_reason: FinishReason | None = None
    usage: ChatUsage | None = None
    model: str = ""
    llm: str = ""
    source: Literal["local", "api", ""] = ""
    decision: Decision | None = None
    engine_ms: float = 0.0
    """From sending to the first token."""
    queued_ms: float = 0.0
    """Before that: the wait for a place, and tries that failed. What is left of all the time is our own."""


class ChatReply(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, joined from its deltas. Times are measured by the one who joined them."""

    text: str
    finish_reason: FinishReason
    tool_calls: tuple[ToolCall, ...] = ()
    usage: ChatUsage = ChatUsage()
    model: str = ""
    llm: str = ""
    source: Literal["local", "api", ""] = ""
    decision: Decision | None = None
    reasoning: str = ""
    time_to_first_token_ms: float = 0.0
    duration_ms: float = 0.0
