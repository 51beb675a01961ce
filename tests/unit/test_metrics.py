"""The metrics: what is counted, over what, and that the three forms tell the same."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ai_agent_server.channels.base import ChannelHealth
from ai_agent_server.core.metrics import KEPT, MAX_NAMES, Metrics
from ai_agent_server.core.metrics_snapshot import MetricsSnapshot
from ai_agent_server.core.ports import EngineStatus
from ai_agent_server.core.task_packet import (
    Canceled,
    Completed,
    ErrorDetail,
    Failed,
    LLMCall,
    StepFinished,
    Submitted,
    TaskEvent,
    TaskPacket,
    TaskStatus,
)
from ai_agent_server.core.transitions import fold
from ai_agent_server.load_balancer.base import LLMView
from ai_agent_server.tasks_state.base import StoreHealth

START = datetime(2026, 11, 21, tzinfo=UTC)


class World:
    """Metrics and what they look at."""

    def __init__(self) -> None:
        self.llms: tuple[LLMView, ...] = (LLMView(name="embedded", source="local", tier="small", slots=2),)
        self.nats: ChannelHealth | None = ChannelHealth(state="connected", embedded=True, reconnects=2)
        self.store: StoreHealth | None = StoreHealth(kind="json_file_store", ok=True, tasks=7, free_bytes=99)
        self.metrics = Metrics(
            now=lambda: START,
            version="1.2.3",
            engine=lambda: EngineStatus(
                accepting=True, queued=3, running=2, live=5, max_running=4, max_live=1000
            ),
            tasks=lambda: {TaskStatus.WORKING: 2},
            llms=lambda: self.llms,
            nats=lambda: self.nats,
            store=lambda: self.store,
        )

    def task(self, *events: TaskEvent, profile: str = "developer") -> None:
        """A task to which `events` happen, each told on its own."""
        packet = TaskPacket(
            task_id="t", context_id="c", profile=profile, role="planner", payload={}, created_at=START
        )
        for event in (Submitted(at=START, via="rest"), *events):
            packet = fold(packet, [event])
            self.metrics.observe(packet, packet.history[-1:])

    def samples(self) -> dict[str, float]:
        """What Prometheus reads, as `name{labels}` -> value."""
        return {
            f"{sample.name}{sorted(sample.labels.items())}": sample.value
            for family in text_string_to_metric_families(self.metrics.prometheus().decode())
            for sample in family.samples
        }


@pytest.fixture
def world() -> World:
    return World()


def call(**changes: Any) -> LLMCall:
    source: Literal["local"] = "local"
    first = LLMCall(
        llm="embedded",
        model="m",
        source=source,
        input_tokens=100,
        output_tokens=21,
        finish_reason="stop",
        time_to_first_token_ms=100,
        duration_ms=1100,
        prompt_sha256="",
    )
    return msgspec.structs.replace(first, **changes)


def step(role: str = "planner", outcome: str = "done", duration_ms: float = 1.0, **more: Any) -> StepFinished:
    return StepFinished(at=START, step=1, role=role, outcome=outcome, duration_ms=duration_ms, **more)


def test_state_is_asked_at_each_snapshot(world: World) -> None:
    before = world.metrics.snapshot().state
    world.llms = (msgspec.structs.replace(world.llms[0], circuit="open"),)
    world.nats = ChannelHealth(state="reconnecting")
    after = world.metrics.snapshot().state

    assert (before.queue_depth, before.running, before.live) == (3, 2, 5)
    assert before.tasks == {status.value: 2 * (status == "working") for status in TaskStatus}
    assert (before.llms_up, after.llms_up, after.llms["embedded"].circuit) == (1, 0, "open")
    assert before.nats is not None
    assert after.nats is not None
    assert (before.nats.state, after.nats.state) == ("connected", "reconnecting")


def test_a_part_that_is_not_there_has_no_numbers(world: World) -> None:
    world.nats = world.store = None

    state = world.metrics.snapshot().state
    assert (state.nats, state.store) == (None, None)
    assert not [name for name in world.samples() if "nats" in name or "store" in name]


def test_a_tasks_call_that_broke_is_told_as_one_that_did_not_end_well(world: World) -> None:
    world.task(step(outcome="cut", call=call(finish_reason="error")))
    told = {name: value for name, value in world.samples().items() if name.startswith("gen_ai")}
    assert {
        value for name, value in told.items() if "duration_seconds_count" in name and "'cut'" in name
    } == {1}
    assert not [name for name in told if name.startswith("gen_ai_server")]


def test_use_is_told_by_llm_profile_role_and_source(world: World) -> None:
    world.task(step(call=call()), step("qa", "fail", call=call(cost_usd=0.0)))
    world.task(
        step("summarize", call=call(llm="hosted", source="api", cost_usd=0.25)), profile="productivity"
    )
    world.task(step("qa", "unclear"))

    use = world.metrics.snapshot().use
    assert (use.total.calls, use.total.cost_usd) == (3, 0.25)
    assert {name: count.calls for name, count in use.llms.items()} == {"embedded": 2, "hosted": 1}
    assert {name: count.calls for name, count in use.profiles.items()} == {"developer": 2, "productivity": 1}
    assert use.roles["developer/qa"].output_tokens == 21
    assert use.sources["api"].input_tokens == 100
    assert (use.tokens_total, use.tokens_local) == (363, 242)
    assert use.local_share == pytest.approx(2 / 3)


def test_before_the_first_token_there_is_no_share(world: World) -> None:
    assert world.metrics.snapshot().use.local_share is None


def test_steps_are_counted_by_role_and_outcome(world: World) -> None:
    world.task(step("qa", "fail"), step("debug"), step("qa", "pass"))

    roles = world.metrics.snapshot().performance.roles
    assert roles["developer/qa"].outcomes == {"fail": 1, "pass": 1}
    assert roles["developer/debug"].steps == 1


def test_an_ended_task_is_counted_once_with_its_reason_its_steps_and_its_time(world: World) -> None:
    later = START + timedelta(seconds=3)
    world.task(step(), step("qa", "pass"), Completed(at=later, result={}))
    world.task(Canceled(at=later))
    world.task(step(), Failed(at=later, reason="max_debug", error=ErrorDetail(code="x", message="y")))
    world.task(step())

    developer = world.metrics.snapshot().performance.profiles["developer"]
    assert developer.ended == {"completed": 1, "canceled": 1, "failed": 1}
    assert developer.reasons == {"canceled_by_client": 1, "max_debug": 1}
    assert (developer.duration_ms.count, developer.duration_ms.p50) == (3, 3000)
    assert (developer.steps.sum, developer.steps.p99) == (3, 2)


def test_tokens_a_second_are_those_after_the_first(world: World) -> None:
    world.task(step(call=call()), step(call=call(output_tokens=0)), step(call=call(output_tokens=1)))

    llm = world.metrics.snapshot().performance.llms["embedded"]
    assert (llm.output_tokens_per_s.count, llm.output_tokens_per_s.p50) == (1, 20)
    assert (llm.time_to_first_token_ms.count, llm.duration_ms.count) == (2, 3)


@pytest.mark.parametrize(
    ("samples", "p50", "p95", "p99"),
    [([7.0], 7, 7, 7), ([1.0, 2.0], 1, 2, 2), ([float(n) for n in range(1, 101)], 50, 95, 99)],
)
def test_quantiles_are_values_that_were_measured(
    world: World, samples: list[float], p50: float, p95: float, p99: float
) -> None:
    world.task(*(step(duration_ms=sample) for sample in samples))

    found = world.metrics.snapshot().performance.roles["developer/planner"].duration_ms
    assert (found.p50, found.p95, found.p99) == (p50, p95, p99)


def test_quantiles_forget_what_is_old_and_counts_do_not(world: World) -> None:
    world.task(step(duration_ms=1_000_000))
    for _ in range(KEPT):
        world.metrics.observe(
            TaskPacket(task_id="t", context_id="c", profile="p", role="r", payload={}, created_at=START), ()
        )
    world.task(*(step(duration_ms=1) for _ in range(KEPT)))

    found = world.metrics.snapshot().performance.roles["developer/planner"].duration_ms
    assert (found.p99, found.count, found.sum) == (1, KEPT + 1, 1_000_000 + KEPT)


def test_a_flood_of_names_is_counted_under_other(world: World) -> None:
    world.task(*(step(f"role-{n}", call=call(llm=f"llm-{n}")) for n in range(MAX_NAMES + 10)))

    snapshot = world.metrics.snapshot()
    assert snapshot.use.llms["other"].calls == 10
    assert len(snapshot.performance.roles) == MAX_NAMES + 1


def test_json_and_snapshot_are_the_same(world: World) -> None:
    world.task(step(call=call()), Completed(at=START, result={}))

    assert msgspec.json.decode(world.metrics.encode(), type=MetricsSnapshot) == world.metrics.snapshot()


def test_prometheus_reads_the_same_numbers(world: World) -> None:
    world.task(step("qa", "fail", duration_ms=1500, call=call()), Completed(at=START, result={}))

    samples = world.samples()
    for name, value in (
        ("ai_agent_server_build_info[('version', '1.2.3')]", 1),
        ("ai_agent_server_start_time_seconds[]", START.timestamp()),
        ("ai_agent_server_queue_depth[]", 3),
        ("ai_agent_server_llm_up[('llm', 'embedded'), ('source', 'local')]", 1),
        ("ai_agent_server_llm_circuit[('llm', 'embedded'), ('state', 'closed')]", 1),
        ("ai_agent_server_llm_circuit[('llm', 'embedded'), ('state', 'open')]", 0),
        ("ai_agent_server_nats_reconnects_total[]", 2),
        ("ai_agent_server_store_free_bytes[]", 99),
        ("ai_agent_server_tasks_ended_total[('profile', 'developer'), ('status', 'completed')]", 1),
        ("ai_agent_server_steps_total[('outcome', 'fail'), ('role', 'developer/qa')]", 1),
        ("ai_agent_server_step_duration_seconds[('quantile', '0.99'), ('role', 'developer/qa')]", 1.5),
        ("ai_agent_server_step_duration_seconds_sum[('role', 'developer/qa')]", 1.5),
        ("ai_agent_server_source_input_tokens_total[('source', 'local')]", 100),
        ("ai_agent_server_tokens_local_total[]", 121),
    ):
        assert samples[name] == value, name


def test_every_family_has_a_name_that_prometheus_takes_and_a_text(world: World) -> None:
    world.task(step(call=call()), Canceled(at=START))

    families = list(text_string_to_metric_families(world.metrics.prometheus().decode()))
    assert len({family.name for family in families}) == len(families) > 30
    for family in families:
        assert re.fullmatch(r"(ai_agent_server|gen_ai)_[a-z_]+", family.name)
        assert family.documentation


def test_json_has_no_digits_that_were_not_measured(world: World) -> None:
    world.task(step(duration_ms=1.23456789, call=call()), Completed(at=START, result={}))

    assert not re.search(rb"\d\.\d{7}", world.metrics.encode().split(b'"state"')[1])
