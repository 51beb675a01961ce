"""A short run of `bench.disconnect`: who comes after one that left is served, by the embedded engine."""

from pathlib import Path

from bench.disconnect import measured, one_slot

from tests.servers.process import ServerProcess


async def test_who_comes_after_one_that_left_is_served(tmp_path: Path) -> None:
    async with ServerProcess(tmp_path / "state", one_slot(tmp_path)) as server:
        found, _ = await measured(server.url, seed=3, trials=1)
    assert {kind: len(times) for kind, times in found.items()} == {"streamed": 1, "whole": 1, "queued": 1}
