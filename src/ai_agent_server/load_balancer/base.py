"""The choice port: what a strategy sees of each LLM, and what it must answer."""

from typing import Literal, Protocol

import msgspec

from ai_agent_server.core.chat import Capability, Privacy, Tier

CircuitState = Literal["closed", "open", "half_open"]
Source = Literal["local", "api"]


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
    output_tokens: int = 256
    """The most that may be written."""
    max_cost_usd: float | None = None
    exclude: frozenset[str] = frozenset()
    """LLMs that already failed this very request."""


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
