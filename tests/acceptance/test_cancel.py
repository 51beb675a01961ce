"""A short run of `bench.cancel`: a task that is canceled ends, lets go of everything, and changes no more."""

from pathlib import Path

from bench.cancel import measured


async def test_a_cancel_closes_the_models_socket_and_kills_the_sandbox_for_good(tmp_path: Path) -> None:
    trials, grown = await measured(2, 1, tmp_path)
    assert [trial.kind for trial in trials] == ["llm", "sandbox"] * 2
    assert (sum(trial.late for trial in trials), grown) == (0, 0)
