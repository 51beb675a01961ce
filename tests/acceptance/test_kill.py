"""kill -9 of the server at any moment: what was accepted ends, once, and no file is broken."""

import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from ai_agent_server.core.next_step import POISON_AFTER
from tests.servers.process import ServerProcess, scripted, write_config

# One more on the same step, and it would rightly be taken for what brings the server down: on a slow
# machine a step gets no further between two kills.
KILLS = POISON_AFTER
END_S = 200.0
SEED = 20261121

WRONG = "```python\ndef add(a, b):\n    return a - b\n```"
RIGHT = "```python\ndef add(a, b):\n    return a + b\n```"
REPLIES = (
    {"when": "You plan code", "say": [{"plan": ["add them"]}]},
    {"when": "You test python", "say": ["assert add(2, 2) == 4\nassert add(0, 5) == 5"]},
    {"when": "whole corrected code", "say": [RIGHT]},
    {"when": "Answer with one block", "say": [WRONG]},
)
PAYLOAD = {"task": "Add two numbers.", "entry_point": "add", "examples": ["assert add(1, 2) == 3"]}


def files(state_dir: Path) -> dict[str, Any]:
    """Every task file; a broken one fails here."""
    found = {}
    for path in (state_dir / "tasks_state").rglob("*.json"):
        found[path.stem] = json.loads(path.read_bytes())
    return found


async def submit(http: httpx.AsyncClient, key: str) -> str | None:
    """The task's id when the server said that it has it, None when it was killed meanwhile."""
    try:
        answer = await http.post(
            "/api/v1/developer/planner", json={"payload": PAYLOAD}, headers={"Idempotency-Key": key}
        )
    except httpx.TransportError:
        return None
    assert answer.status_code in {200, 202}, answer.text
    task_id: str = answer.json()["task_id"]
    return task_id


@pytest.mark.timeout(600)
async def test_nothing_accepted_is_lost_doubled_or_broken_by_kills(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    config = write_config(tmp_path, llms=scripted(*REPLIES, delay_s=0.08), limits={"calls": 16})
    state = tmp_path / "state"
    accepted: dict[str, str] = {}
    for kill in range(KILLS):
        server = await ServerProcess(state, config).start()
        async with server.http() as http:
            keys = [f"key-{kill}-{n}" for n in range(2)] + rng.sample(sorted(accepted), min(2, len(accepted)))
            pending = [asyncio.create_task(submit(http, key)) for key in keys]
            if kill % 2:
                # However slow the machine is, so many are accepted before they are killed.
                await asyncio.wait(pending)
            await asyncio.sleep(rng.uniform(0.0, 0.9))
            await server.kill()
            for key, answer in zip(keys, await asyncio.gather(*pending), strict=True):
                if answer is not None:
                    assert accepted.setdefault(key, answer) == answer, "one key became two tasks"
        files(state)
    async with ServerProcess(state, config) as server, server.http() as http, asyncio.timeout(END_S):
        for task_id in accepted.values():
            while True:
                packet = (await http.get(f"/api/v1/tasks/{task_id}")).json()
                if packet["status"] in {"completed", "failed", "canceled"}:
                    break
                await asyncio.sleep(0.5)
            assert packet["status"] == "completed", (packet["reason"], packet["error"])
    kept = files(state)
    assert len(accepted) >= KILLS
    assert set(accepted.values()) <= kept.keys()
    assert not list((state / "corrupt").glob("*")) if (state / "corrupt").exists() else True
    for packet in kept.values():
        assert [event["seq"] for event in packet["history"]] == list(range(1, packet["revision"] + 1))
        finished = Counter(event["step"] for event in packet["history"] if event["type"] == "step.finished")
        assert set(finished.values()) == {1}, "a step has two results"
        ends = [event for event in packet["history"] if event["type"].startswith("task.completed")]
        assert len(ends) == 1
