"""The metrics under OpenTelemetry's names: which there are, of what, in which buckets, and the switch."""

from datetime import UTC, datetime
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ai_agent_server.config.settings import MetricNames
from ai_agent_server.core import genai_metrics
from ai_agent_server.core.genai_metrics import MAX_ROWS, GenAIModel
from ai_agent_server.core.metrics import Metrics
from ai_agent_server.core.metrics_snapshot import Served
from ai_agent_server.core.ports import EngineStatus


class World:
    """Metrics whose names can be switched."""

    def __init__(self) -> None:
        self.names: MetricNames = "both"
        self.metrics = Metrics(
            now=lambda: datetime(2026, 11, 21, tzinfo=UTC),
            version="1.2.3",
            engine=lambda: EngineStatus(
                accepting=True, queued=0, running=0, live=0, max_running=4, max_live=1000
            ),
            tasks=dict,
            llms=tuple,
            model_of=lambda llm: GenAIModel(provider="ollama", model=f"{llm}:8b"),
            names=lambda: self.names,
        )

    def served(self, **changes: Any) -> None:
        """A chat of the gateway: 0.2 s until the first of 11 tokens, 1.2 s in all."""
        request: dict[str, Any] = {
            "surface": "chat", "tier": "small", "llm": "coder", "source": "local", "status": "ok",
            "input_tokens": 100, "output_tokens": 11, "cost_usd": 0.0,
            "duration_ms": 1200.0, "time_to_first_token_ms": 200.0, "overhead_ms": 1.0,
        }  # fmt: skip
        self.metrics.served(Served(**{**request, **changes}))

    def samples(self) -> dict[str, float]:
        """Name and the labels that say something -> value."""
        return {
            " ".join(
                [sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()) if v)]
            ): sample.value
            for family in text_string_to_metric_families(self.metrics.prometheus().decode())
            for sample in family.samples
        }

    def buckets(self, name: str) -> dict[str, float]:
        """Bound -> how many are not above it."""
        return {
            sample.labels["le"]: sample.value
            for family in text_string_to_metric_families(self.metrics.prometheus().decode())
            for sample in family.samples
            if sample.name == f"{name}_bucket"
        }


WHO = "gen_ai_operation_name=chat gen_ai_provider_name=ollama gen_ai_request_model=coder:8b"


@pytest.fixture
def world() -> World:
    return World()


def test_a_call_is_told_with_its_operation_its_provider_and_its_model(world: World) -> None:
    world.served()
    samples = world.samples()
    assert samples[f"gen_ai_client_operation_duration_seconds_sum {WHO}"] == pytest.approx(1.2)
    assert samples[f"gen_ai_server_time_to_first_token_seconds_sum {WHO}"] == pytest.approx(0.2)
    assert samples[f"gen_ai_server_time_per_output_token_seconds_sum {WHO}"] == pytest.approx(0.1)
    assert samples[f"gen_ai_client_token_usage_sum {WHO} gen_ai_token_type=input"] == 100
    assert samples[f"gen_ai_client_token_usage_sum {WHO} gen_ai_token_type=output"] == 11


def test_a_value_is_in_every_bucket_that_reaches_it(world: World) -> None:
    world.served(duration_ms=160.0)
    world.served(duration_ms=161.0)
    world.served(duration_ms=1e6)
    buckets = world.buckets("gen_ai_client_operation_duration_seconds")
    assert [buckets[bound] for bound in ("0.08", "0.16", "0.32", "81.92", "+Inf")] == [0, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("gen_ai_client_operation_duration_seconds", genai_metrics.DURATION_S),
        ("gen_ai_client_token_usage", genai_metrics.TOKENS),
        ("gen_ai_server_time_to_first_token_seconds", genai_metrics.FIRST_TOKEN_S),
        ("gen_ai_server_time_per_output_token_seconds", genai_metrics.PER_TOKEN_S),
    ],
)
def test_the_buckets_grow_and_end_with_all(world: World, name: str, bounds: tuple[float, ...]) -> None:
    world.served()
    told = [float(bound) for bound in world.buckets(name)]
    assert told == [*bounds, float("inf")]
    assert told == sorted(set(told))


def test_a_failure_has_its_type_and_no_pace(world: World) -> None:
    world.served(status="engine_timeout")
    samples = world.samples()
    assert samples[f"gen_ai_client_operation_duration_seconds_count error_type=engine_timeout {WHO}"] == 1
    assert not [name for name in samples if name.startswith("gen_ai_server")]


@pytest.mark.parametrize("nobody", [{"llm": ""}, {"is_task": True}, {"cache": "hit"}])
def test_what_asked_no_llm_is_no_call(world: World, nobody: dict[str, Any]) -> None:
    world.served(**nobody)
    assert not [name for name in world.samples() if name.startswith("gen_ai")]


def test_embeddings_are_an_operation_of_their_own(world: World) -> None:
    world.served(surface="embeddings", output_tokens=0, time_to_first_token_ms=None)
    told = [name for name in world.samples() if name.startswith("gen_ai_client_token_usage_count")]
    assert told == [
        f"gen_ai_client_token_usage_count {WHO} gen_ai_token_type=input".replace("chat", "embeddings")
    ]


def test_names_are_bounded(world: World) -> None:
    for number in range(MAX_ROWS + 5):
        world.served(llm=f"llm-{number}")
    counts = [
        name for name in world.samples() if name.startswith("gen_ai_client_operation_duration_seconds_c")
    ]
    assert len(counts) == MAX_ROWS + 1


def test_prometheus_is_told_under_the_names_that_were_chosen(world: World) -> None:
    world.served()
    told = {}
    for names in ("own", "otel", "both"):
        world.names = names
        told[names] = {name.split("_")[0] for name in world.samples()}
    assert told == {"own": {"ai"}, "otel": {"gen"}, "both": {"ai", "gen"}}
