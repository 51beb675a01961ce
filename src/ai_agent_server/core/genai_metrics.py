"""Calls of LLMs under the names of OpenTelemetry's conventions for generative AI, as Prometheus spells them.

The conventions: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/ (version 1.41). The
buckets are those that they advise; a dot is an underscore here, and a unit stands in the name.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Literal

import msgspec
from prometheus_client.metrics_core import HistogramMetricFamily, Metric

from ai_agent_server.core.bounded_table import OTHER, entry

__all__ = ("GenAICall", "GenAIMetrics", "GenAIModel")

MAX_ROWS = 512
"""Combinations of labels in one histogram; what comes after them is counted as `other`."""

DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS = tuple(4.0**power for power in range(14))
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)

LABELS = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")


class GenAIModel(msgspec.Struct, frozen=True, kw_only=True):
    """Whom an LLM's name stands for: `gen_ai.provider.name` and `gen_ai.request.model`."""

    provider: str
    model: str


class GenAICall(msgspec.Struct, frozen=True, kw_only=True):
    """One call at its end. Times are None where they were not measured."""

    operation: Literal["chat", "embeddings"] = "chat"
    llm: str
    """The LLM's name in the configuration."""
    error: str = ""
    """What it ended with, empty where it ended well."""
    input_tokens: int
    output_tokens: int
    duration_s: float
    first_token_s: float | None


class GenAIMetrics:
    """Counts calls."""

    def __init__(self, model_of: Callable[[str], GenAIModel]) -> None:
        """`model_of` answers for every LLM's name, also one that is configured no more."""
        self._model_of = model_of
        self._durations = _Histogram(
            "client_operation_duration_seconds",
            "From asking an LLM to the end of its answer.",
            (*LABELS, "error_type"),
            DURATION_S,
        )
        self._tokens = _Histogram(
            "client_token_usage",
            "Tokens read and written in one call.",
            (*LABELS, "gen_ai_token_type"),
            TOKENS,
        )
        self._first_tokens = _Histogram(
            "server_time_to_first_token_seconds",
            "From asking to the first token, of calls that ended well.",
            LABELS,
            FIRST_TOKEN_S,
        )
        self._per_token = _Histogram(
            "server_time_per_output_token_seconds",
            "For each token after the first, of calls that ended well.",
            LABELS,
            PER_TOKEN_S,
        )

    def observe(self, call: GenAICall) -> None:
        """Count a call."""
        asked = self._model_of(call.llm)
        labels = (call.operation, asked.provider, asked.model)
        self._durations.add((*labels, call.error), call.duration_s)
        if call.input_tokens:
            self._tokens.add((*labels, "input"), call.input_tokens)
        if call.output_tokens:
            self._tokens.add((*labels, "output"), call.output_tokens)
        if call.error or call.first_token_s is None:
            return
        self._first_tokens.add(labels, call.first_token_s)
        if call.output_tokens > 1:
            writing_s = max(0.0, call.duration_s - call.first_token_s)
            self._per_token.add(labels, writing_s / (call.output_tokens - 1))

    def families(self) -> Iterator[Metric]:
        """The histograms."""
        for histogram in (self._durations, self._tokens, self._first_tokens, self._per_token):
            yield histogram.family()


class _Histogram:
    """Counts by bucket, for each combination of labels."""

    def __init__(self, name: str, text: str, labels: tuple[str, ...], bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._labels, self._bounds = f"gen_ai_{name}", text, labels, bounds
        self._rows: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}

    def add(self, labels: tuple[str, ...], value: float) -> None:
        counts, total = entry(self._rows, labels, self._new_row, most=MAX_ROWS, other=(OTHER,) * len(labels))
        counts[bisect_left(self._bounds, value)] += 1
        total[0] += value

    def _new_row(self) -> tuple[list[int], list[float]]:
        return [0] * (len(self._bounds) + 1), [0.0]

    def family(self) -> Metric:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        bounds = [*map(str, self._bounds), "+Inf"]
        for labels, (counts, (total,)) in self._rows.items():
            cumulative = map(float, accumulate(counts))
            family.add_metric(labels, list(zip(bounds, cumulative, strict=True)), total)
        return family
