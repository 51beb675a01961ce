"""The metrics at one moment, as values; and what the gateway tells of each request."""

from datetime import datetime
from typing import Literal

import msgspec

from ai_agent_server.channels.base import ChannelState
from ai_agent_server.core.ports import WebhookStatus
from ai_agent_server.load_balancer.base import CircuitState, Source


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """`count` and `sum` since the start; quantiles over the newest 1024, None before the first."""

    count: int = 0
    sum: float = 0.0
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class LLMState(msgspec.Struct, frozen=True, kw_only=True):
    """An LLM now. `up`: switched on, and its circuit is not open."""

    up: bool
    source: Source
    toggle: bool
    circuit: CircuitState
    in_flight: int
    waiting: int
    slots: int
    resident: bool | None
    failures: int


class AcceleratorState(msgspec.Struct, frozen=True, kw_only=True):
    """Memory that LLMs share, now."""

    memory_mb: float
    budget_mb: float
    """What of it LLMs may have."""
    used_mb: float
    external_mb: float
    """What other programs take."""
    queued: int
    """Requests that wait for a turn."""
    llms_mb: dict[str, float]
    """What each LLM holds."""


class ChannelMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """The message transport now."""

    state: ChannelState
    embedded: bool
    reconnects: int


class StoreMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """The state folder now."""

    ok: bool
    kind: str
    tasks: int
    free_bytes: int | None
    corrupt: int


class StateMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """The server now. None where a part is not there."""

    tasks: dict[str, int]
    """Tasks kept, by status."""
    queue_depth: int
    running: int
    live: int
    max_running: int
    max_live: int
    accepting: bool
    llms_up: int
    llms: dict[str, LLMState]
    accelerators: dict[str, AcceleratorState]
    nats: ChannelMetrics | None
    store: StoreMetrics | None
    webhooks: WebhookStatus | None


class TaskPerformance(msgspec.Struct, frozen=True, kw_only=True):
    """Ended tasks of a profile."""

    ended: dict[str, int]
    """By status."""
    reasons: dict[str, int]
    """By reason, for every end but `completed`."""
    duration_ms: Quantiles
    """From the packet's acceptance to its end."""
    steps: Quantiles
    feedback_hops: Quantiles
    """How often the loop went back in one task."""


class RolePerformance(msgspec.Struct, frozen=True, kw_only=True):
    """Finished steps of a role."""

    steps: int
    outcomes: dict[str, int]
    duration_ms: Quantiles


class LLMPerformance(msgspec.Struct, frozen=True, kw_only=True):
    """Calls of an LLM."""

    duration_ms: Quantiles
    time_to_first_token_ms: Quantiles
    output_tokens_per_s: Quantiles
    """After the first token."""


class PerformanceMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """How fast, since the start. Roles are named `profile/role`."""

    profiles: dict[str, TaskPerformance]
    roles: dict[str, RolePerformance]
    llms: dict[str, LLMPerformance]


class UseCount(msgspec.Struct, frozen=True, kw_only=True):
    """Calls of LLMs and what they used."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0


class UseMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """How much, since the start. Roles are named `profile/role`; sources are `local`, `api`, `unknown`."""

    total: UseCount
    llms: dict[str, UseCount]
    profiles: dict[str, UseCount]
    roles: dict[str, UseCount]
    sources: dict[str, UseCount]
    tokens_total: int
    tokens_local: int
    """Tokens that never left this machine."""
    local_share: float | None
    """Of all tokens, 0 to 1; None before the first."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """One request of the gateway, at its end. `source` and `llm` are empty where no LLM began."""

    surface: str
    tier: str
    llm: str
    source: str
    status: str
    """`ok`, `left` (the client did), or the error's code."""
    input_tokens: int
    output_tokens: int
    cost_usd: float
    duration_ms: float
    time_to_first_token_ms: float | None
    overhead_ms: float | None
    """What of the time to the first token was the server's own work."""
    is_task: bool = False
    """Its tokens were counted with the task's steps already."""
    cache: Literal["", "hit", "miss"] = ""
    """Empty where it did not use the exact cache. Of a hit no tokens are counted but those saved."""
    saved_tokens: int = 0


class ServedCount(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of the gateway that had all of this in common."""

    surface: str
    tier: str
    llm: str
    status: str
    requests: int
    input_tokens: int
    output_tokens: int


class CacheState(msgspec.Struct, frozen=True, kw_only=True):
    """What the exact cache holds now."""

    answers: int = 0
    size_bytes: int = 0


class CacheMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """The exact cache: what it holds now, and what it was good for since the start."""

    answers: int
    size_bytes: int
    hits: int
    """Answers that no LLM was asked for, also those that another request was waiting for already."""
    misses: int
    tokens_saved: int
    """Read and written once, told again for nothing."""


class GatewayMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway since the start; its tokens are in `use` too."""

    requests: tuple[ServedCount, ...]
    duration_ms: dict[str, Quantiles]
    """By surface."""
    time_to_first_token_ms: dict[str, Quantiles]
    overhead_ms: Quantiles
    """What the server itself added to the time to the first token."""
    cache: CacheMetrics


class MetricsSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The metrics at one moment. Counters run since `since`, which is the start of the process."""

    at: datetime
    since: datetime
    version: str
    state: StateMetrics
    performance: PerformanceMetrics
    use: UseMetrics
    gateway: GatewayMetrics
