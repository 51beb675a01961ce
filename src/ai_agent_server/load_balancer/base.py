"""The choice port: what a strategy sees of each LLM, and what it must answer."""

from collections.abc import AsyncGenerator, Callable
from typing import Literal, Protocol, TypeAlias

import msgspec

from ai_agent_server.core.chat import Capability, ChatDelta, ChatRequest, Privacy, Tier, Urgency
from ai_agent_server.memory_gauges.base import Gauged

CircuitState = Literal["closed", "open", "half_open"]
Source = Literal["local", "api"]
Sent: TypeAlias = Callable[[str, Source], None]
"""Called with an LLM's name and source whenever a request is given to its engine, which then reads it."""


class LLMView(msgspec.Struct, frozen=True, kw_only=True):
    """One configured LLM as it stands now: its configuration and what was measured of it."""

    name: str
    source: Source
    tier: Tier
    toggle: bool = True
    locked: bool = False
    capabilities: frozenset[Capability] = frozenset({"chat"})
    context_tokens: int = 4096
    slots: int = 1
    cost_per_million_input_usd: float = 0.0
    cost_per_million_output_usd: float = 0.0
    circuit: CircuitState = "closed"
    probing: bool = False
    """The half-open circuit's one probe is under way."""
    cooldown_s: float = 0.0
    """Until an open circuit lets its probe through."""
    in_flight: int = 0
    waiting: int = 0
    """Requests that wait for a slot of this LLM."""
    resident: bool | None = None
    """Whether the model is in memory; None where nobody knows (an API, say)."""
    time_to_first_token_ms: float | None = None
    tokens_per_s: float | None = None
    load_s: float | None = None
    """How long a first token took when the model was not in memory."""
    failures: int = 0
    """Failures in a row."""
    wait_s: float | None = None
    """What a request would wait for an accelerator, the load included; None where there is none."""


class Requirements(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks of an LLM."""

    llm: str | None = None
    tier: Tier | None = None
    prefer: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    """LLMs that may serve; empty: all."""
    privacy: Privacy = "any"
    needs: frozenset[Capability] = frozenset({"chat"})
    input_tokens: int = 0
    """Estimated tokens of the prompt."""
    counted: dict[str, int] = {}
    """LLM -> the prompt's tokens as it counted them itself."""
    output_tokens: int = 256
    """The most that may be written."""
    max_cost_usd: float | None = None
    urgency: Urgency = "interactive"
    key: str = ""
    exclude: frozenset[str] = frozenset()
    """LLMs that already failed this very request."""
    overdue: bool = False
    """It has waited on this machine for as long as it should."""


class MemoryView(msgspec.Struct, frozen=True, kw_only=True):
    """An LLM in the books of its accelerator."""

    llm: str
    engine: str
    state: Literal["cold", "loading", "warm", "unloading"]
    draining: bool
    """It takes no more requests, and goes when the last one has ended."""
    memory_mb: float | None
    basis: Literal["measured", "declared", "estimated", "unknown"]
    held_mb: float
    """What is taken for it now."""
    slots: int
    running: int
    queued: int
    load_s: float


class QueuedView(msgspec.Struct, frozen=True, kw_only=True):
    """A request that waits for an accelerator."""

    request: str
    llm: str
    urgency: Urgency
    place: int
    """Among those of its LLM; 1 is next."""
    waited_s: float
    wait_s: float
    """Until it starts, estimated."""


class QueueDecision(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that an accelerator's queue decided, `ago_s` before it was asked."""

    what: Literal["load", "unload", "start", "refuse"]
    why: str
    """`GQ-8 waited its time`, say: the rule, as in load_balancer/design.md."""
    ago_s: float
    llm: str = ""
    request: str = ""


class AcceleratorView(msgspec.Struct, frozen=True, kw_only=True):
    """An accelerator as it stands: the books of its memory, its queue, its last decisions, newest first."""

    name: str
    memory_mb: float
    headroom_mb: float
    external_mb: float
    """What other programs take of `memory_mb`, as far as it is known."""
    budget_mb: float
    used_mb: float
    llms: tuple[MemoryView, ...]
    queue: tuple[QueuedView, ...]
    recent: tuple[QueueDecision, ...]
    device: Gauged | None = None
    """The device itself as it was last looked at; None where nobody can tell."""


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """An LLM's score (lower is better) and what it is made of."""

    llm: str
    score: float
    parts: dict[str, float]


class BalancingStrategy(Protocol):
    """Ranks the LLMs that every filter let through. Pure: the same input gives the same answer."""

    def rank(self, wanted: Requirements, views: tuple[LLMView, ...]) -> tuple[Scored, ...]:
        """Every view, best first; ties broken by the order given."""
        ...


class SendingLLM(Protocol):
    """Many LLMs as one, which says whom it asks before a token does."""

    def stream(self, request: ChatRequest, *, sent: Sent | None = None) -> AsyncGenerator[ChatDelta, None]:
        """See `LLMEngine.stream`."""
        ...


class BalancedLLM(SendingLLM, Protocol):
    """One that also counts tokens."""

    async def count(self, request: ChatRequest) -> int | None:
        """The prompt's tokens by the LLM that would serve `request`; None where it cannot tell them soon."""
        ...
