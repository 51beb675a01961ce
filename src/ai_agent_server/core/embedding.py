"""Values of texts turned into vectors: the request and the reply."""

from typing import Literal

import msgspec

from ai_agent_server.core.chat import ChatUsage, Decision, RouteHints


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Texts to be embedded; at least one, none of them empty."""

    inputs: tuple[str, ...]
    dimensions: int | None = None
    """Shorter vectors than the model's own, where the engine can cut them."""
    route: RouteHints = RouteHints()


class EmbeddingReply(msgspec.Struct, frozen=True, kw_only=True):
    """A vector for each input, in their order. `llm`, `source` and `decision` are set by the balancer."""

    vectors: tuple[bytes, ...]
    """Float32, little-endian, without a head: what OpenAI's base64 form encodes. All of one length."""
    usage: ChatUsage = ChatUsage()
    model: str = ""
    llm: str = ""
    source: Literal["local", "api", ""] = ""
    decision: Decision | None = None
