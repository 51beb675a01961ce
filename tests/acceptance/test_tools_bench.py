"""A short run of `bench.tools`, cut in two, on an LLM that says the same each time."""

import json
from pathlib import Path

import pytest
from bench import tools
from bench.lines import RefusedError

from tests.servers.process import packaged, scripted

BILLING = {"when": "charged my card twice", "say": [{"label": "billing"}]}


async def test_a_rerun_makes_the_calls_that_are_missing(tmp_path: Path) -> None:
    configuration = json.dumps(packaged(llms={**packaged()["llms"], **scripted(BILLING, "Please pay.")}))
    document, out = tools.with_one_llm(configuration.encode(), "scripted"), tmp_path / "calls.jsonl"
    (first,) = await tools.measured(document, out, numbers=1, at_once=1)
    again, second = await tools.measured(document, out, numbers=2, at_once=1)
    assert again == first
    assert [(call.tool, call.outcome, call.is_right) for call in (first, second)] == [
        ("classify", "valid", True),
        ("rewrite", "valid", None),
    ]


def test_an_llm_that_is_not_there_or_not_named_is_refused_with_those_that_are() -> None:
    configuration = json.dumps(packaged(llms={**packaged()["llms"], **scripted()})).encode()
    for llm in (None, "nobody"):
        with pytest.raises(RefusedError, match="embedded, scripted"):
            tools.with_one_llm(configuration, llm)
