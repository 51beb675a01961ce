"""The REST API's tasks, over a real socket."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from ai_agent_server.core.task_packet import Completed, Started
from tests.servers.api import Parts, serving

PLANNER = "/api/v1/developer/planner"
BODY = {"payload": {"task": "add two numbers"}}


@pytest.fixture
def parts() -> Parts:
    return Parts()


@pytest.fixture
async def http(parts: Parts) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(parts.app) as address, httpx.AsyncClient(base_url=address, timeout=30) as client:
        yield client


def end(parts: Parts, task_id: str) -> None:
    now = datetime.now(UTC)
    parts.engine.happen(task_id, Started(at=now, generation=1), Completed(at=now, result={"code": "pass"}))


async def submitted(http: httpx.AsyncClient, **more: Any) -> str:
    answer = await http.post(PLANNER, json=BODY, **more)
    assert answer.status_code in {200, 202}, answer.text
    task_id: str = answer.json()["task_id"]
    return task_id


async def test_a_submitted_task_is_accepted_and_found_where_the_answer_says(http: httpx.AsyncClient) -> None:
    answer = await http.post(PLANNER, json=BODY)

    packet = answer.json()
    assert answer.status_code == 202
    assert packet["status"] == "submitted"
    assert (packet["profile"], packet["role"]) == ("developer", "planner")
    assert answer.headers["location"] == f"/api/v1/tasks/{packet['task_id']}"
    assert packet["task_id"] in answer.headers["x-task-file"]
    assert (await http.get(answer.headers["location"])).json() == packet
