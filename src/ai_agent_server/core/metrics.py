"""The metrics: the fold of every task event since the start, and gauges asked on demand.

One snapshot, told in three forms: JSON, Prometheus text, and the same JSON on the metrics channel.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, Literal, TypeVar, get_args

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from ai_agent_server.channels.base import ChannelHealth, ChannelState
from ai_agent_server.config.settings import MetricNames
from ai_agent_server.core.exchange import CUT
from ai_agent_server.core.genai_metrics import GenAICall, GenAIMetrics, GenAIModel
from ai_agent_server.core.ports import EngineStatus, WebhookStatus
from ai_agent_server.core.task_packet import AnyTaskEvent, LLMCall, StepFinished, TaskPacket, TaskStatus
from ai_agent_server.load_balancer.base import AcceleratorView, CircuitState, LLMView, Source
from ai_agent_server.tasks_state.base import StoreHealth

PROMETHEUS_TEXT = CONTENT_TYPE_PLAIN_0_0_4
KEPT = 1024
"""The newest samples that a quantile is taken of."""
MAX_NAMES = 256
"""Names kept apart in one table; what comes after them is counted as `other`."""
OTHER = "other"
PREFIX = "ai_agent_server"
MEGABYTE = 1024 * 1024

T = TypeVar("T")


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


class Metrics:
    """Counts what happens and answers it. Gauges come from the callables, asked at each snapshot.

    `observe` is an `EventListener`. `now` answers the time with its zone.
    """

    def __init__(
        self,
        *,
        now: Callable[[], datetime],
        version: str,
        engine: Callable[[], EngineStatus],
        tasks: Callable[[], dict[TaskStatus, int]],
        llms: Callable[[], tuple[LLMView, ...]],
        nats: Callable[[], ChannelHealth | None] = lambda: None,
        store: Callable[[], StoreHealth | None] = lambda: None,
        webhooks: Callable[[], WebhookStatus | None] = lambda: None,
        cache: Callable[[], CacheState] = CacheState,
        accelerators: Callable[[], tuple[AcceleratorView, ...]] = tuple,
        model_of: Callable[[str], GenAIModel] = lambda llm: GenAIModel(provider=OTHER, model=llm),
        names: Callable[[], MetricNames] = lambda: "both",
    ) -> None:
        """`names` says under which names Prometheus is told; `model_of` whom an LLM's name stands for."""
        self._now, self._since, self._version = now, now(), version
        self._engine, self._task_counts, self._llms, self._nats, self._store = (
            engine,
            tasks,
            llms,
            nats,
            store,
        )
        self._cache, self._accelerators, self._webhooks = cache, accelerators, webhooks
        self._genai = GenAIMetrics(model_of)
        self._profiles: dict[str, _Ends] = {}
        self._roles: dict[str, _Steps] = {}
        self._calls: dict[str, _Calls] = {}
        self._total = _Use()
        self._use_by_llm: dict[str, _Use] = {}
        self._use_by_profile: dict[str, _Use] = {}
        self._use_by_role: dict[str, _Use] = {}
        self._use_by_source: dict[str, _Use] = {}
        self._served = _Gateway()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Families(self.snapshot, self._genai, names))

    def observe(self, packet: TaskPacket, events: tuple[AnyTaskEvent, ...]) -> None:
        """Count `events`, which are new in `packet`."""
        for event in events:
            if isinstance(event, StepFinished):
                self._count_step(packet.profile, event)
        if events and packet.status.is_final:
            _of(self._profiles, packet.profile, _Ends).add(packet)

    def served(self, request: Served) -> None:
        """Count a request of the gateway."""
        self._served.add(request)
        if request.is_task or not request.llm or request.cache == "hit":
            return
        for use in (
            self._total,
            _of(self._use_by_llm, request.llm, _Use),
            _of(self._use_by_source, request.source or "unknown", _Use),
        ):
            use.add(request)
        self._genai.observe(
            GenAICall(
                operation="embeddings" if request.surface == "embeddings" else "chat",
                llm=request.llm,
                error="" if request.status == "ok" else request.status,
                input_tokens=request.input_tokens,
                output_tokens=request.output_tokens,
                duration_s=request.duration_ms / 1000,
                first_token_s=_seconds(request.time_to_first_token_ms),
            )
        )

    def _count_step(self, profile: str, step: StepFinished) -> None:
        role = f"{profile}/{step.role}"
        _of(self._roles, role, _Steps).add(step)
        call = step.call
        if call is None:
            return
        _of(self._calls, call.llm, _Calls).add(call)
        for use in (
            self._total,
            _of(self._use_by_llm, call.llm, _Use),
            _of(self._use_by_profile, profile, _Use),
            _of(self._use_by_role, role, _Use),
            _of(self._use_by_source, call.source or "unknown", _Use),
        ):
            use.add(call)
        self._genai.observe(
            GenAICall(
                llm=call.llm,
                error=step.outcome if call.finish_reason == CUT else "",
                input_tokens=call.input_tokens,
                output_tokens=call.output_tokens,
                duration_s=call.duration_ms / 1000,
                first_token_s=_seconds(call.time_to_first_token_ms) if call.output_tokens else None,
            )
        )

    def snapshot(self) -> MetricsSnapshot:
        """Everything now."""
        return MetricsSnapshot(
            at=self._now(),
            since=self._since,
            version=self._version,
            state=self._state(),
            performance=PerformanceMetrics(
                profiles={name: ends.value() for name, ends in self._profiles.items()},
                roles={name: steps.value() for name, steps in self._roles.items()},
                llms={name: calls.value() for name, calls in self._calls.items()},
            ),
            use=self._use(),
            gateway=self._served.value(self._cache()),
        )

    def encode(self) -> bytes:
        """The snapshot as JSON; numbers have 3 places, dollars 6."""
        return msgspec.json.encode(_rounded(msgspec.to_builtins(self.snapshot())))

    def prometheus(self) -> bytes:
        """The snapshot in Prometheus's text form (version 0.0.4); times in seconds, as is its custom."""
        return generate_latest(self._registry)

    def _state(self) -> StateMetrics:
        engine, nats, store = self._engine(), self._nats(), self._store()
        counts = self._task_counts()
        llms = {
            view.name: LLMState(
                up=view.toggle and view.circuit != "open",
                source=view.source,
                toggle=view.toggle,
                circuit=view.circuit,
                in_flight=view.in_flight,
                waiting=view.waiting,
                slots=view.slots,
                resident=view.resident,
                failures=view.failures,
            )
            for view in self._llms()
        }
        return StateMetrics(
            tasks={status.value: counts.get(status, 0) for status in TaskStatus},
            queue_depth=engine.queued,
            running=engine.running,
            live=engine.live,
            max_running=engine.max_running,
            max_live=engine.max_live,
            accepting=engine.accepting,
            llms_up=sum(llm.up for llm in llms.values()),
            llms=llms,
            accelerators={
                view.name: AcceleratorState(
                    memory_mb=view.memory_mb,
                    budget_mb=view.budget_mb,
                    used_mb=view.used_mb,
                    external_mb=view.external_mb,
                    queued=len(view.queue),
                    llms_mb={llm.llm: llm.held_mb for llm in view.llms},
                )
                for view in self._accelerators()
            },
            nats=None
            if nats is None
            else ChannelMetrics(state=nats.state, embedded=nats.embedded, reconnects=nats.reconnects),
            webhooks=self._webhooks(),
            store=None
            if store is None
            else StoreMetrics(
                ok=store.ok,
                kind=store.kind,
                tasks=store.tasks,
                free_bytes=store.free_bytes,
                corrupt=store.corrupt,
            ),
        )

    def _use(self) -> UseMetrics:
        local = self._use_by_source.get("local", _Use())
        return UseMetrics(
            total=self._total.value(),
            llms={name: use.value() for name, use in self._use_by_llm.items()},
            profiles={name: use.value() for name, use in self._use_by_profile.items()},
            roles={name: use.value() for name, use in self._use_by_role.items()},
            sources={name: use.value() for name, use in self._use_by_source.items()},
            tokens_total=self._total.tokens,
            tokens_local=local.tokens,
            local_share=local.tokens / self._total.tokens if self._total.tokens else None,
        )


def _seconds(time_ms: float | None) -> float | None:
    return None if time_ms is None else time_ms / 1000


def _rounded(value: Any, places: int = 3) -> Any:
    """`value` without the digits that no clock has measured; a call may cost less than 0.001 dollars."""
    match value:
        case float():
            return round(value, places)
        case dict():
            return {
                name: _rounded(part, 6 if str(name).endswith("_usd") else 3) for name, part in value.items()
            }
        case _:
            return value


class _Reservoir:
    """The newest samples of something, and the count and sum of all."""

    __slots__ = ("count", "newest", "sum")

    def __init__(self) -> None:
        self.count, self.sum = 0, 0.0
        self.newest: deque[float] = deque(maxlen=KEPT)

    def add(self, value: float) -> None:
        self.count += 1
        self.sum += value
        self.newest.append(value)

    def value(self) -> Quantiles:
        if not self.newest:
            return Quantiles()
        ordered = sorted(self.newest)

        def rank(share: float) -> float:
            # Nearest rank: a value that was really measured.
            return ordered[math.ceil(share * len(ordered)) - 1]

        return Quantiles(count=self.count, sum=self.sum, p50=rank(0.50), p95=rank(0.95), p99=rank(0.99))


class _Ends:
    def __init__(self) -> None:
        self._ended: dict[str, int] = {}
        self._reasons: dict[str, int] = {}
        self._duration, self._steps, self._hops = _Reservoir(), _Reservoir(), _Reservoir()

    def add(self, packet: TaskPacket) -> None:
        _count(self._ended, packet.status.value)
        if packet.reason is not None:
            _count(self._reasons, packet.reason)
        if packet.updated_at is not None:
            self._duration.add((packet.updated_at - packet.created_at).total_seconds() * 1000)
        self._steps.add(sum(isinstance(event, StepFinished) for event in packet.history))
        self._hops.add(packet.usage.feedback_hops)

    def value(self) -> TaskPerformance:
        return TaskPerformance(
            ended=dict(self._ended),
            reasons=dict(self._reasons),
            duration_ms=self._duration.value(),
            steps=self._steps.value(),
            feedback_hops=self._hops.value(),
        )


class _Steps:
    def __init__(self) -> None:
        self._steps = 0
        self._outcomes: dict[str, int] = {}
        self._duration = _Reservoir()

    def add(self, step: StepFinished) -> None:
        self._steps += 1
        _count(self._outcomes, step.outcome)
        self._duration.add(step.duration_ms)

    def value(self) -> RolePerformance:
        return RolePerformance(
            steps=self._steps, outcomes=dict(self._outcomes), duration_ms=self._duration.value()
        )


class _Calls:
    def __init__(self) -> None:
        self._duration, self._first_token, self._rate = _Reservoir(), _Reservoir(), _Reservoir()

    def add(self, call: LLMCall) -> None:
        self._duration.add(call.duration_ms)
        if call.output_tokens == 0:
            return
        self._first_token.add(call.time_to_first_token_ms)
        writing_ms = call.duration_ms - call.time_to_first_token_ms
        if call.output_tokens > 1 and writing_ms > 0:
            self._rate.add((call.output_tokens - 1) * 1000 / writing_ms)

    def value(self) -> LLMPerformance:
        return LLMPerformance(
            duration_ms=self._duration.value(),
            time_to_first_token_ms=self._first_token.value(),
            output_tokens_per_s=self._rate.value(),
        )


class _Use:
    def __init__(self) -> None:
        self._calls, self._input, self._output, self._cost_usd = 0, 0, 0, 0.0

    @property
    def tokens(self) -> int:
        return self._input + self._output

    def add(self, call: LLMCall | Served) -> None:
        self._calls += 1
        self._input += call.input_tokens
        self._output += call.output_tokens
        self._cost_usd += call.cost_usd

    def value(self) -> UseCount:
        return UseCount(
            calls=self._calls,
            input_tokens=self._input,
            output_tokens=self._output,
            cost_usd=self._cost_usd,
        )


class _Gateway:
    def __init__(self) -> None:
        self._requests: dict[tuple[str, str, str, str], list[int]] = {}
        self._durations: dict[str, _Reservoir] = {}
        self._first_tokens: dict[str, _Reservoir] = {}
        self._overhead = _Reservoir()
        self._hits = self._misses = self._tokens_saved = 0

    def add(self, request: Served) -> None:
        key = (request.surface, request.tier, request.llm, request.status)
        if key not in self._requests and len(self._requests) >= MAX_NAMES:
            key = (OTHER, OTHER, OTHER, OTHER)
        count = self._requests.setdefault(key, [0, 0, 0])
        count[0] += 1
        count[1] += request.input_tokens
        count[2] += request.output_tokens
        _of(self._durations, request.surface, _Reservoir).add(request.duration_ms)
        if request.time_to_first_token_ms is not None:
            _of(self._first_tokens, request.surface, _Reservoir).add(request.time_to_first_token_ms)
        if request.overhead_ms is not None:
            self._overhead.add(request.overhead_ms)
        self._hits += request.cache == "hit"
        self._misses += request.cache == "miss"
        self._tokens_saved += request.saved_tokens

    def value(self, cache: CacheState) -> GatewayMetrics:
        return GatewayMetrics(
            requests=tuple(
                ServedCount(
                    surface=surface,
                    tier=tier,
                    llm=llm,
                    status=status,
                    requests=requests,
                    input_tokens=input_tokens,
                    output_tokens=output_tokens,
                )
                for (surface, tier, llm, status), (requests, input_tokens, output_tokens) in sorted(
                    self._requests.items()
                )
            ),
            duration_ms={name: samples.value() for name, samples in self._durations.items()},
            time_to_first_token_ms={name: samples.value() for name, samples in self._first_tokens.items()},
            overhead_ms=self._overhead.value(),
            cache=CacheMetrics(
                answers=cache.answers,
                size_bytes=cache.size_bytes,
                hits=self._hits,
                misses=self._misses,
                tokens_saved=self._tokens_saved,
            ),
        )


def _of(table: dict[str, T], name: str, new: Callable[[], T]) -> T:
    """The entry of `name`, or of `other` once the table is full."""
    if name not in table and len(table) >= MAX_NAMES:
        name = OTHER
    return table.setdefault(name, new())


def _count(table: dict[str, int], name: str) -> None:
    if name not in table and len(table) >= MAX_NAMES:
        name = OTHER
    table[name] = table.get(name, 0) + 1


class _Families(Collector):
    """The snapshot as Prometheus's families, and the calls under OpenTelemetry's names."""

    def __init__(
        self,
        snapshot: Callable[[], MetricsSnapshot],
        genai: GenAIMetrics,
        names: Callable[[], MetricNames],
    ) -> None:
        self._snapshot, self._genai, self._names = snapshot, genai, names

    def collect(self) -> Iterator[Metric]:
        names = self._names()
        if names != "otel":
            yield from self._own()
        if names != "own":
            yield from self._genai.families()

    def _own(self) -> Iterator[Metric]:
        snapshot = self._snapshot()
        info = InfoMetricFamily(f"{PREFIX}_build", "The server's version.", labels=())
        info.add_metric((), {"version": snapshot.version})
        yield info
        yield _gauge("start_time_seconds", "When the counters began.", (), [((), snapshot.since.timestamp())])
        yield from _state_families(snapshot.state)
        yield from _performance_families(snapshot.performance)
        yield from _use_families(snapshot.use)
        yield from _gateway_families(snapshot.gateway)


def _state_families(state: StateMetrics) -> Iterator[Metric]:
    yield _gauge(
        "tasks", "Tasks kept, by status.", ("status",), [((s,), count) for s, count in state.tasks.items()]
    )
    for name, text, value in (
        ("queue_depth", "Tasks that wait for a worker.", state.queue_depth),
        ("tasks_running", "Tasks that a worker has.", state.running),
        ("tasks_live", "Tasks that have not ended.", state.live),
        ("tasks_running_limit", "Tasks that may run at once.", state.max_running),
        ("tasks_live_limit", "Tasks that may be live at once.", state.max_live),
        ("accepting", "1 while packets are taken.", state.accepting),
        ("llms_up", "LLMs that are switched on and whose circuit is not open.", state.llms_up),
    ):
        yield _gauge(name, text, (), [((), value)])
    llms = state.llms.items()
    yield _gauge(
        "llm_up", "1 when the LLM can be asked.", ("llm", "source"), [((n, m.source), m.up) for n, m in llms]
    )
    yield _gauge(
        "llm_circuit",
        "1 for the state that the circuit is in.",
        ("llm", "state"),
        [((n, c), m.circuit == c) for n, m in llms for c in get_args(CircuitState)],
    )
    yield _gauge(
        "llm_in_flight", "Requests at the LLM now.", ("llm",), [((n,), m.in_flight) for n, m in llms]
    )
    yield _gauge(
        "llm_waiting", "Requests that wait for a slot of it.", ("llm",), [((n,), m.waiting) for n, m in llms]
    )
    yield _gauge(
        "llm_resident",
        "1 when the model is in memory; nothing where nobody knows.",
        ("llm",),
        [((n,), m.resident) for n, m in llms if m.resident is not None],
    )
    yield from _accelerator_families(state.accelerators)
    if state.nats is not None:
        yield _gauge("nats_connected", "1 while connected.", (), [((), state.nats.state == "connected")])
        yield _counter(
            "nats_reconnects", "Connections that were made again.", (), [((), state.nats.reconnects)]
        )
    if state.webhooks is not None:
        yield _gauge("webhooks_pending", "Tasks whose webhooks wait.", (), [((), state.webhooks.pending)])
        yield _gauge(
            "webhooks_disabled_targets",
            "Targets that want no webhooks any more.",
            (),
            [((), len(state.webhooks.disabled_targets))],
        )
        for name, help_text, value in (
            ("webhooks_delivered", "Webhooks that were taken.", state.webhooks.delivered),
            ("webhooks_failed", "Attempts at webhooks that failed.", state.webhooks.failed),
            ("webhooks_given_up", "Tasks whose webhooks were given up.", state.webhooks.given_up),
        ):
            yield _counter(name, help_text, (), [((), value)])
    if state.store is not None:
        yield _gauge("store_ok", "1 while tasks can be kept.", (), [((), state.store.ok)])
        yield _gauge("store_corrupt_files", "Files moved aside.", (), [((), state.store.corrupt)])
        if state.store.free_bytes is not None:
            yield _gauge("store_free_bytes", "Space that is left.", (), [((), state.store.free_bytes)])


def _accelerator_families(accelerators: dict[str, AcceleratorState]) -> Iterator[Metric]:
    each = accelerators.items()
    for name, text, measure in (
        ("memory_bytes", "All memory of the accelerator.", "memory_mb"),
        ("budget_bytes", "What LLMs may have of it.", "budget_mb"),
        ("used_bytes", "What LLMs have of it.", "used_mb"),
        ("external_bytes", "What other programs have of it.", "external_mb"),
    ):
        yield _gauge(
            f"accelerator_{name}",
            text,
            ("accelerator",),
            [((n,), getattr(state, measure) * MEGABYTE) for n, state in each],
        )
    yield _gauge(
        "accelerator_llm_bytes",
        "What an LLM has of it.",
        ("accelerator", "llm"),
        [((n, llm), held * MEGABYTE) for n, state in each for llm, held in state.llms_mb.items()],
    )
    yield _gauge(
        "accelerator_queued",
        "Requests that wait for a turn.",
        ("accelerator",),
        [((n,), state.queued) for n, state in each],
    )


def _performance_families(performance: PerformanceMetrics) -> Iterator[Metric]:
    profiles, roles, llms = performance.profiles, performance.roles, performance.llms
    yield _counter(
        "tasks_ended",
        "Tasks that ended, by profile and status.",
        ("profile", "status"),
        [((p, s), n) for p, ends in profiles.items() for s, n in ends.ended.items()],
    )
    yield _counter(
        "tasks_ended_by_reason",
        "Tasks that ended otherwise than completed.",
        ("profile", "reason"),
        [((p, r), n) for p, ends in profiles.items() for r, n in ends.reasons.items()],
    )
    yield _counter(
        "steps",
        "Steps that finished, by role and outcome.",
        ("role", "outcome"),
        [((r, o), n) for r, steps in roles.items() for o, n in steps.outcomes.items()],
    )
    for name, text, label, per_unit, rows in (
        ("task_duration_seconds", "From acceptance to end.", "profile", 1000,
         [(p, ends.duration_ms) for p, ends in profiles.items()]),
        ("task_steps", "Steps of one task.", "profile", 1, [(p, ends.steps) for p, ends in profiles.items()]),
        ("task_feedback_hops", "Times that one task's loop went back.", "profile", 1,
         [(p, ends.feedback_hops) for p, ends in profiles.items()]),
        ("step_duration_seconds", "One step of a role.", "role", 1000,
         [(r, steps.duration_ms) for r, steps in roles.items()]),
        ("llm_call_duration_seconds", "One call.", "llm", 1000,
         [(n, calls.duration_ms) for n, calls in llms.items()]),
        ("llm_time_to_first_token_seconds", "Until the first token of a call.", "llm", 1000,
         [(n, calls.time_to_first_token_ms) for n, calls in llms.items()]),
        ("llm_output_tokens_per_second", "After the first token of a call.", "llm", 1,
         [(n, calls.output_tokens_per_s) for n, calls in llms.items()]),
    ):  # fmt: skip
        yield _summary(name, text, label, per_unit, rows)


def _use_families(use: UseMetrics) -> Iterator[Metric]:
    for label, table in (
        ("llm", use.llms),
        ("profile", use.profiles),
        ("role", use.roles),
        ("source", use.sources),
    ):
        for name, text, measure in (
            ("calls", "Calls of LLMs", "calls"),
            ("input_tokens", "Tokens read", "input_tokens"),
            ("output_tokens", "Tokens written", "output_tokens"),
            ("cost_dollars", "Cost in US dollars", "cost_usd"),
        ):
            yield _counter(
                f"{label}_{name}",
                f"{text}, by {label}.",
                (label,),
                [((key,), getattr(count, measure)) for key, count in table.items()],
            )
    yield _counter("tokens", "Tokens read and written.", (), [((), use.tokens_total)])
    yield _counter("tokens_local", "Those that never left this machine.", (), [((), use.tokens_local)])


def _gateway_families(gateway: GatewayMetrics) -> Iterator[Metric]:
    labels = ("surface", "tier", "llm", "status")
    for name, text, measure in (
        ("gateway_requests", "Requests of the gateway, at their end.", "requests"),
        ("gateway_input_tokens", "Tokens that they had read.", "input_tokens"),
        ("gateway_output_tokens", "Tokens that were written for them.", "output_tokens"),
    ):
        yield _counter(
            name,
            text,
            labels,
            [
                ((count.surface, count.tier, count.llm, count.status), getattr(count, measure))
                for count in gateway.requests
            ],
        )
    for name, text, table in (
        ("gateway_request_duration_seconds", "From a request to the end of its answer.", gateway.duration_ms),
        (
            "gateway_time_to_first_token_seconds",
            "From a request to its first token.",
            gateway.time_to_first_token_ms,
        ),
        (
            "gateway_overhead_seconds",
            "What the server itself added to the time to the first token.",
            {"all": gateway.overhead_ms},
        ),
    ):
        yield _summary(name, text, "surface", 1000, list(table.items()))
    cache = gateway.cache
    yield _gauge("gateway_cache_answers", "Answers that the exact cache holds.", (), [((), cache.answers)])
    yield _gauge("gateway_cache_bytes", "What they take.", (), [((), cache.size_bytes)])
    for name, text, count in (
        ("gateway_cache_hits", "Answers that no LLM was asked for.", cache.hits),
        (
            "gateway_cache_misses",
            "Answers that an LLM was asked for, though the cache was wanted.",
            cache.misses,
        ),
        ("gateway_cache_saved_tokens", "Tokens that hits would have taken.", cache.tokens_saved),
    ):
        yield _counter(name, text, (), [((), count)])


def _gauge(
    name: str, text: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], float]]
) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=labels)
    for values, number in rows:
        family.add_metric(values, float(number))
    return family


def _counter(
    name: str, text: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], float]]
) -> Metric:
    family = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=labels)
    for values, number in rows:
        family.add_metric(values, float(number))
    return family


def _summary(
    name: str, text: str, label: str, per_unit: int, rows: Iterable[tuple[str, Quantiles]]
) -> Metric:
    family = SummaryMetricFamily(f"{PREFIX}_{name}", text, labels=(label,))
    for value, quantiles in rows:
        for quantile, number in (("0.5", quantiles.p50), ("0.95", quantiles.p95), ("0.99", quantiles.p99)):
            if number is not None:
                family.add_sample(family.name, {label: value, "quantile": quantile}, number / per_unit)
        family.add_metric((value,), quantiles.count, quantiles.sum / per_unit)
    return family
