"""A short run of `bench.tools` on the embedded model, cut in two."""

from pathlib import Path

from bench import tools

from ai_agent_server.config.settings import packaged_configuration


async def test_a_rerun_makes_the_calls_that_are_missing(tmp_path: Path) -> None:
    document, out = tools.with_one_llm(packaged_configuration(), None), tmp_path / "calls.jsonl"
    (first,) = await tools.measured(document, out, numbers=1, at_once=1)
    again, second = await tools.measured(document, out, numbers=2, at_once=1)
    assert again == first
    assert (first.tool, second.tool) == ("classify", "rewrite")
    assert {first.outcome, second.outcome} <= {"valid", "clear_error"}
