"""Short runs of `bench.under_load` and `bench.workers`: that they measure what they say, not how fast."""

from pathlib import Path

from bench.under_load import Load
from bench.under_load import figures as load_figures
from bench.under_load import measured as under_load
from bench.workers import Setup, timed


async def test_health_is_asked_while_tasks_run_readers_stall_and_the_sandbox_is_flooded(
    tmp_path: Path,
) -> None:
    load = Load(live=4, stalled=2, floods=1, long_steps=3, pieces=5)
    seen = await under_load(load, 4.0, tmp_path)
    assert seen.health_ms
    assert seen.connected >= 1
    names = {figure.name for figure in load_figures(seen, load, warm_up_s=0.0)}
    assert {"health_p95", "memory_growth", "memory_slope"} <= names


async def test_two_workers_end_the_tasks_that_they_were_given(tmp_path: Path) -> None:
    assert await timed(Setup(name="w", workers=2), tasks=4, delay_s=0.05, folder=tmp_path) > 0.1
