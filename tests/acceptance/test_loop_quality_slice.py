"""A small fixed slice of the measure: the command on the real model, and every arm on a known script."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bench.lines import RefusedError
from bench.loop_quality import problems
from bench.loop_quality.__main__ import measure, parsed
from bench.loop_quality.lines import Line, Setup
from bench.loop_quality.problems import Problem
from bench.loop_quality.score import Score
from bench.loop_quality.summary import Summary
from rich.progress import Progress

from ai_agent_server.errors import NoLLMError
from ai_agent_server.sandbox._choose import choose_sandbox
from ai_agent_server.sandbox.base import SandboxLimits
from tests.servers.process import scripted, write_config

ROOT = Path(__file__).parents[2]
SLICE, CALLS = slice(101, 103), 2

RIGHT = "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n"
BY_HEART = "def is_not_prime(n):\n    return False\n"
WRONG = "def heap_queue_largest(nums, n):\n    return []\n"
SCRIPT = (
    {"when": "similar_elements", "say": [RIGHT]},
    {"when": "is_not_prime", "say": [BY_HEART]},
    {"when": "heap_queue_largest", "say": [WRONG]},
)
"""The first three problems: one solved, one whose visible example alone holds, one that is wrong."""


def command(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """`python -m bench.loop_quality` on the slice and the embedded model."""
    positions = f"{SLICE.start}:{SLICE.stop}"
    given = ["--problems", positions, "--calls", str(CALLS), "--out", str(out), *more]
    return subprocess.run(
        [sys.executable, "-m", "bench.loop_quality", *given],
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


async def measured(out: Path, config: Path, *more: str) -> Summary:
    """The first three problems, in this process."""
    arguments = ["--problems", "0:3", "--out", str(out), "--config", str(config), *more]
    return await measure(parsed(arguments), Progress(disable=True))


def lines_of(out: Path) -> list[Line]:
    return [msgspec.json.decode(line, type=Line) for line in out.read_bytes().splitlines()[1:]]


@pytest.mark.timeout(600)
def test_a_slice_is_measured_once_and_not_mixed_with_another(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    first = command(out)
    assert first.returncode in {0, 1}, first.stderr
    assert "| | one_call | best_of_n | loop |" in first.stdout

    text = out.read_bytes()
    limits = msgspec.json.decode(text.splitlines()[0], type=Setup).limits
    assert limits.calls == CALLS
    ids = [problem.task_id for problem in problems.load()[SLICE]]
    assert [line.problem for line in lines_of(out) if line.arm == "one_call"] == ids
    assert [line.problem for line in lines_of(out) if line.arm == "loop"] == ids
    for line in lines_of(out):
        assert not line.past_limit
        assert 1 <= line.calls <= CALLS
        assert line.tokens > 0
        if line.arm == "loop":
            assert line.path[0].startswith("fast-coder.")

    found: dict[str, Any] = json.loads(out.with_suffix(".summary.json").read_bytes())
    assert found["problems"] == 2
    assert list(found["arms"]) == ["one_call", "best_of_n", "loop"]
    assert found["past_limit"] == 0
    assert out.with_suffix(".svg").read_text().startswith("<svg")

    again = command(out)
    assert again.returncode == first.returncode, again.stderr
    assert again.stdout == first.stdout
    other = command(out, "--seed", "1")
    assert other.returncode == 2
    assert "seed was 0" in other.stderr
    assert out.read_bytes() == text


async def test_every_arm_is_told_as_what_it_is(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    found = await measured(out, write_config(tmp_path, llms=scripted(*SCRIPT)))

    one, best, loop = (found.arms[arm] for arm in ("one_call", "best_of_n", "loop"))
    assert (one.solved, one.calls, one.completed) == (1, 1.0, None)
    assert (best.solved, best.completed, best.false_accepts) == (1, 2, 1)
    assert (loop.solved, loop.completed, loop.false_accepts) == (1, 2, 1)
    assert (found.first_right, found.got_worse, found.right_but_failed, found.past_limit) == (1, 0, 0, 0)
    # Only the problem that no draw solves is drawn again, and for no more than the loop's tokens.
    draws = [line.problem for line in lines_of(out) if line.arm == "best_of_n"]
    assert set(draws) == {4}
    each = next(line.tokens for line in lines_of(out) if line.problem == 4 and line.arm == "one_call")
    assert abs(3 * best.tokens - 3 * loop.tokens) <= each


async def test_a_first_version_that_was_right_and_got_worse_is_told(tmp_path: Path) -> None:
    # A wrong test, derived twice to the same, makes the debugger break what was right.
    replies = (
        {"when": "Answer with assert statements only", "say": ["assert is_not_prime(35) == False"]},
        {"when": "This code is wrong", "say": [BY_HEART]},
        {"when": "is_not_prime", "say": [problems.load()[1].code]},
        *SCRIPT,
    )
    config = write_config(tmp_path, llms=scripted(*replies))
    found = await measured(tmp_path / "lines.jsonl", config)
    assert found.arms["one_call"].solved == 2
    loop = found.arms["loop"]
    assert (loop.solved, loop.completed, loop.false_accepts) == (1, 2, 1)
    assert (found.first_right, found.got_worse) == (2, 1)


async def test_a_run_that_was_ended_in_the_middle_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, llms=scripted(*SCRIPT))
    whole = await measured(tmp_path / "whole.jsonl", config)
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (2, 5, len(lines) - 2):
        out = tmp_path / f"{kept}.jsonl"
        out.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        found = await measured(out, config)
        assert out.read_bytes().startswith(b"".join(lines[:kept]))
        assert len(lines_of(out)) == len(lines) - 1
        for arm, known in whole.arms.items():
            assert found.arms[arm].solved == known.solved
            assert found.arms[arm].tokens == known.tokens


async def test_an_llm_that_fails_is_no_result(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    for arm in ("one_call", "loop"):
        config = write_config(tmp_path, llms=scripted({"fail": "auth"}))
        with pytest.raises((NoLLMError, RefusedError)):
            await measured(out, config, "--arms", arm)
        assert lines_of(out) == []


async def test_best_of_n_is_not_measured_without_the_loops_tokens(tmp_path: Path) -> None:
    config = write_config(tmp_path, llms=scripted(*SCRIPT))
    with pytest.raises(RefusedError, match="needs the lines of one_call and loop"):
        await measured(tmp_path / "lines.jsonl", config, "--arms", "best_of_n")


async def test_code_is_right_when_the_hidden_assertions_hold_too() -> None:
    sandbox, probe = await choose_sandbox("auto")
    assert probe.works
    score = Score(sandbox, SandboxLimits())
    tests = ("assert f(1) == 2", "assert f(2) == 3")
    problem = Problem(task_id=1, prompt="", code="", test_list=tests)
    assert await score(problem, "def f(x):\n    return x + 1\n") == (True, True)
    assert await score(problem, "def f(x):\n    return 2\n") == (True, False)
    assert await score(problem, "def f(x):\n    return 3\n") == (False, False)
    assert await score(problem, "") == (False, False)
    person = problems.load()[0]
    assert await score(person, person.code) == (True, True)
