"""Rough figures that a decision needs before anything was sent: tokens, seconds, dollars. Pure."""

from collections.abc import Iterable
from typing import Protocol

import msgspec

from ai_agent_server.core.chat import Capability, ChatRequest, ImagePart, RouteHints, TextPart
from ai_agent_server.core.embedding import EmbeddingRequest
from ai_agent_server.load_balancer.base import LLMView, Requirements

BYTES_PER_TOKEN = 3.5
"""English prose has about 4.2 UTF-8 bytes a token and code about 3; Chinese, 3 bytes a character, lands
near one token a character. Off by a fifth either way is usual: an engine's own count is the truth."""
LEAST, MOST = 0.5, 3.0
"""What a prompt may really have, of its estimate: code with wide indents, and digits, base64 or Chinese for
a small vocabulary."""
MESSAGE_TOKENS = 4
"""What a chat template puts around a message."""
IMAGE_TOKENS = 1000
"""An image of about a megapixel; models count 250 to 1600."""
OUTPUT_TOKENS = 256
"""Taken for a request that sets no max_tokens, and the least room an answer must have."""

UNMEASURED_FIRST_TOKEN_S = 1.0
UNMEASURED_TOKENS_PER_S = 30.0
UNMEASURED_LOAD_S = 20.0
"""A model of a few gigabytes from disk to the memory of a consumer GPU."""


def input_tokens(request: ChatRequest) -> int:
    """The prompt's tokens, estimated."""
    size_bytes, images = 0, 0
    for message in request.messages:
        for part in message.parts:
            match part:
                case TextPart():
                    size_bytes += _size_bytes(part.text)
                case ImagePart():
                    images += 1
        for call in message.tool_calls:
            size_bytes += len(call.name) + len(call.arguments)
    if request.tools:
        size_bytes += len(msgspec.json.encode(request.tools))
    return (
        round(size_bytes / BYTES_PER_TOKEN) + MESSAGE_TOKENS * len(request.messages) + IMAGE_TOKENS * images
    )


def is_doubtful(tokens: int, limit: int) -> bool:
    """Whether so many tokens, estimated, may be on the other side of `limit`."""
    return LEAST * tokens <= limit < MOST * tokens


def answer_room(wanted: Requirements) -> int:
    """What of a context has to be left for the answer, in tokens."""
    return min(wanted.output_tokens, OUTPUT_TOKENS)


def text_tokens(text: str) -> int:
    """A text's tokens, estimated."""
    return round(_size_bytes(text) / BYTES_PER_TOKEN)


def _size_bytes(text: str) -> int:
    """Of `text` as UTF-8. A text of ASCII alone knows it, however long it is."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def requirements(request: ChatRequest) -> Requirements:
    """What `request` asks of an LLM."""
    needs: set[Capability] = {"chat"}
    if request.tools and request.tool_choice != "none":
        needs.add("tools")
    if request.response_schema is not None:
        needs.add("json_schema")
    if any(isinstance(part, ImagePart) for message in request.messages for part in message.parts):
        needs.add("vision")
    output_tokens = request.max_tokens if request.max_tokens is not None else OUTPUT_TOKENS
    return _wanted(request.route, needs, input_tokens(request), output_tokens)


def embedding_requirements(request: EmbeddingRequest) -> Requirements:
    """What `request` asks of an LLM: each input has to fit its context alone, and nothing is written."""
    longest = max(map(text_tokens, request.inputs), default=0)
    return _wanted(request.route, {"embeddings"}, longest, 0)


def _wanted(
    route: RouteHints, needs: Iterable[Capability], input_tokens: int, output_tokens: int
) -> Requirements:
    return Requirements(
        llm=route.llm,
        tier=route.tier,
        prefer=route.prefer,
        allowed=route.allowed,
        privacy=route.privacy,
        needs=frozenset(needs),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        max_cost_usd=route.max_cost_usd,
        urgency=route.urgency,
        key=route.key,
    )


class Priced(Protocol):
    """What prices are read from: an LLM's view, or its settings."""

    @property
    def cost_per_million_input_usd(self) -> float:
        """US dollars for a million tokens of prompt."""
        ...

    @property
    def cost_per_million_output_usd(self) -> float:
        """US dollars for a million tokens of answer."""
        ...


def cost_usd(llm: Priced, input_tokens: int, output_tokens: int) -> float:
    """What so many tokens cost on this LLM."""
    return (
        input_tokens * llm.cost_per_million_input_usd + output_tokens * llm.cost_per_million_output_usd
    ) / 1e6


def free_slots(view: LLMView) -> int | None:
    """Places that nobody has or waits for; None for an API, which sets its own bound."""
    return None if view.source == "api" else max(0, view.slots - view.in_flight - view.waiting)


def busy_share(view: LLMView) -> float:
    """Requests before this one for each slot; 0 for an API."""
    return 0.0 if view.source == "api" else (view.in_flight + view.waiting) / max(1, view.slots)


def first_token_s(view: LLMView) -> float:
    """From sending to the first token, the model being in memory."""
    measured_ms = view.time_to_first_token_ms
    return UNMEASURED_FIRST_TOKEN_S if measured_ms is None else measured_ms / 1000


def answer_s(view: LLMView, output_tokens: int) -> float:
    """From sending to the last token, the model being in memory."""
    return first_token_s(view) + output_tokens / (view.tokens_per_s or UNMEASURED_TOKENS_PER_S)


def load_s(view: LLMView) -> float:
    """What bringing the model into memory adds; 0 where it is there, in the wait, or nobody knows."""
    if view.resident is not False or view.wait_s is not None:
        return 0.0
    return UNMEASURED_LOAD_S if view.load_s is None else max(0.0, view.load_s - first_token_s(view))


def queue_s(view: LLMView, output_tokens: int) -> float:
    """The wait for a slot, taking those before for requests like this one."""
    if view.wait_s is not None:
        return view.wait_s
    if free_slots(view) is None or free_slots(view):
        return 0.0
    before = view.in_flight + view.waiting - view.slots + 1
    return before / max(1, view.slots) * answer_s(view, output_tokens)
