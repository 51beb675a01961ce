"""The metrics as Prometheus's text form; times are in seconds and sizes in bytes, as is its custom."""

from collections.abc import Callable, Iterable, Iterator
from typing import get_args

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

from ai_agent_server.config.settings import MetricNames
from ai_agent_server.core.genai_metrics import GenAIMetrics
from ai_agent_server.core.metrics_snapshot import (
    AcceleratorState,
    GatewayMetrics,
    MetricsSnapshot,
    PerformanceMetrics,
    Quantiles,
    StateMetrics,
    UseMetrics,
)
from ai_agent_server.load_balancer.base import CircuitState

__all__ = ("PROMETHEUS_TEXT", "PrometheusText")

PROMETHEUS_TEXT = CONTENT_TYPE_PLAIN_0_0_4
PREFIX = "ai_agent_server"
MEGABYTE = 1024 * 1024


class PrometheusText(Collector):
    """The snapshot as Prometheus's families, and the calls under OpenTelemetry's names."""

    def __init__(
        self,
        snapshot: Callable[[], MetricsSnapshot],
        genai: GenAIMetrics,
        names: Callable[[], MetricNames],
    ) -> None:
        """`names` says which of the two are told."""
        self._snapshot, self._genai, self._names = snapshot, genai, names
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def encode(self) -> bytes:
        """Everything now, in the text form 0.0.4."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The families; the registry asks for them."""
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
