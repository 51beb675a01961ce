"""The metrics: the fold of every task event since the start, and gauges asked on demand.

One snapshot, told in three forms: JSON, Prometheus text, and the same JSON on the metrics channel.
"""

import math
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from ai_agent_server.channels.base import ChannelHealth
from ai_agent_server.config.settings import MetricNames
from ai_agent_server.core.bounded_table import OTHER, entry
from ai_agent_server.core.exchange import CUT
from ai_agent_server.core.genai_metrics import GenAICall, GenAIMetrics, GenAIModel
from ai_agent_server.core.metrics_snapshot import (
    AcceleratorState,
    CacheMetrics,
    CacheState,
    ChannelMetrics,
    GatewayMetrics,
    LLMPerformance,
    LLMState,
    MetricsSnapshot,
    PerformanceMetrics,
    Quantiles,
    RolePerformance,
    Served,
    ServedCount,
    StateMetrics,
    StoreMetrics,
    TaskPerformance,
    UseCount,
    UseMetrics,
)
from ai_agent_server.core.ports import EngineStatus, WebhookStatus
from ai_agent_server.core.prometheus_text import PrometheusText
from ai_agent_server.core.task_packet import AnyTaskEvent, LLMCall, StepFinished, TaskPacket, TaskStatus
from ai_agent_server.load_balancer.base import AcceleratorView, LLMView
from ai_agent_server.tasks_state.base import StoreHealth

__all__ = ("KEPT", "MAX_NAMES", "Metrics")

KEPT = 1024
"""The newest samples that a quantile is taken of."""
MAX_NAMES = 256
"""Names kept apart in one table; what comes after them is counted as `other`."""

T = TypeVar("T")


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
        self._text = PrometheusText(self.snapshot, self._genai, names)

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
        return self._text.encode()

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
        count = entry(
            self._requests, key, lambda: [0, 0, 0], most=MAX_NAMES, other=(OTHER, OTHER, OTHER, OTHER)
        )
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
    return entry(table, name, new, most=MAX_NAMES, other=OTHER)


def _count(table: dict[str, int], name: str) -> None:
    if name not in table and len(table) >= MAX_NAMES:
        name = OTHER
    table[name] = table.get(name, 0) + 1
