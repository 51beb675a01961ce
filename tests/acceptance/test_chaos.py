"""A short chaos; `python -m bench.chaos` runs longer ones. And its judge, which has to find what is wrong."""

from pathlib import Path
from typing import Any

import pytest
from bench.chaos import Plan, Told, measure, problems


async def test_one_kill_among_many_tasks_breaks_no_promise(tmp_path: Path) -> None:
    wrong, figures = await measure(Plan(tasks=8, kills=1, seed=3, others=0.0), tmp_path)
    assert wrong == []
    assert figures["completed"] == 8
    assert figures["faults"] == {"server killed": 1}


def ended(**changes: Any) -> dict[str, Any]:
    """A task's file in which nothing is wrong."""
    kinds = ("task.submitted", "task.started", "step.started", "step.finished", "task.completed")
    history: list[dict[str, Any]] = [{"seq": n + 1, "type": kind} for n, kind in enumerate(kinds)]
    history[1]["generation"] = 1
    history[2]["step"] = history[3]["step"] = 1
    whole = {"status": "completed", "revision": 5, "idempotency_key": "k", "history": history}
    return whole | changes


def one_more(event: dict[str, Any]) -> dict[str, Any]:
    """The file with `event` before its last one."""
    history = [*ended()["history"][:-1], event, ended()["history"][-1]]
    return ended(revision=6, history=[{**e, "seq": n + 1} for n, e in enumerate(history)])


@pytest.mark.parametrize(
    ("packet", "found"),
    [
        (ended(), ""),
        (ended(history=[*ended()["history"][:2], *ended()["history"][3:]], revision=5), "hole"),
        (ended(status="working"), "has not ended"),
        (one_more({"type": "step.finished", "step": 1}), "2 results"),
        (one_more({"type": "task.failed"}), "ended twice"),
        (one_more({"type": "task.recovered", "generation": 1}), "do not rise"),
    ],
)
def test_the_judge_finds_what_is_wrong_with_a_file(packet: dict[str, Any], found: str) -> None:
    told = Told(accepted={"k": {"t"}}, read={"t": list(range(1, packet["revision"] + 1))})
    wrong = problems({"t": packet}, told)
    assert len(wrong) == bool(found)
    assert all(found in line for line in wrong)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        (Told(accepted={"k": {"t", "u"}}), "became 2 tasks"),
        (Told(accepted={"k": {"t"}, "l": {"u"}}), "is lost"),
        (Told(accepted={"k": {"t"}}, read={"t": [1, 2, 2, 3, 4, 5]}), "was told"),
        (Told(accepted={"k": {"t"}}, read={"t": [1, 2, 4, 5]}), "was told"),
    ],
)
def test_the_judge_finds_what_clients_were_told_wrong(told: Told, found: str) -> None:
    assert any(found in line for line in problems({"t": ended()}, told))
