"""A short run of `bench.disconnect`: who comes after one that left is served, by the embedded engine."""

from collections import Counter
from pathlib import Path

from bench.disconnect import Setup, Trial, figures, measured, one_slot
from bench.lines import LineFile

from tests.servers.process import ServerProcess


async def test_who_comes_after_one_that_left_is_served(tmp_path: Path) -> None:
    out = tmp_path / "trials.jsonl"
    async with ServerProcess(tmp_path / "state", one_slot(tmp_path)) as server:
        with LineFile(out, Setup(3), Trial) as lines:
            await measured(server.url, lines, seed=3, trials=1)
    with LineFile(out, Setup(3), Trial) as lines:
        assert Counter(trial.what for trial in lines.lines) == {
            "idle": 1,
            "streamed": 1,
            "whole": 1,
            "queued": 1,
        }
        assert {"streamed_p95_ms", "whole_p95_ms", "queued_p95_ms"} < {
            figure.name for figure in figures(lines.lines)
        }
