"""The tier of a request: small for quick jobs, main for the rest, each with its limits. Pure."""

import msgspec

from ai_agent_server.config.settings import TiersSettings
from ai_agent_server.core.chat import ChatRequest, Tier
from ai_agent_server.load_balancer import estimate

__all__ = ("TierChoice", "choose", "is_doubtful")


class TierChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The tier that a request is served as."""

    tier: Tier
    reason: str
    max_tokens: int | None
    """The most that may be written; None leaves it to the engine."""


def choose(
    request: ChatRequest,
    *,
    input_tokens: int,
    asked: Tier | None,
    llm_tier: Tier | None,
    settings: TiersSettings,
) -> TierChoice:
    """The tier of `request`, whose prompt has about `input_tokens`.

    `asked` is what the client wants (`X-Tier`, or a tier as the model). Without it a request that names
    an LLM is of that LLM's tier, `llm_tier`, and no limit is put on it: who names an LLM knows what it
    can write. Anything else is small unless it is long, wants a long answer, or offers tools.
    """
    if asked is not None:
        return _within(request, asked, "asked for", settings)
    if llm_tier is not None:
        return TierChoice(tier=llm_tier, reason="the LLM's", max_tokens=request.max_tokens)
    why = _why_main(request, input_tokens, settings)
    return _within(request, "main" if why else "small", why or "a quick job", settings)


def is_doubtful(request: ChatRequest, input_tokens: int, settings: TiersSettings) -> bool:
    """Whether the tier of a request that asks for none hangs on how well its prompt was estimated."""
    return estimate.is_doubtful(input_tokens, settings.small.max_input_tokens) and not _why_main(
        request, 0, settings
    )


def _why_main(request: ChatRequest, input_tokens: int, settings: TiersSettings) -> str:
    small = settings.small
    if request.tools and request.tool_choice != "none":
        return "it offers tools"
    if input_tokens > small.max_input_tokens:
        return f"about {input_tokens} tokens are more than {small.max_input_tokens}"
    if (request.max_tokens or 0) > small.max_output_tokens:
        return f"an answer of {request.max_tokens} tokens is more than {small.max_output_tokens}"
    return ""


def _within(request: ChatRequest, tier: Tier, reason: str, settings: TiersSettings) -> TierChoice:
    limit = (settings.small if tier == "small" else settings.main).max_output_tokens
    asked = request.max_tokens
    return TierChoice(tier=tier, reason=reason, max_tokens=limit if asked is None else min(asked, limit))
