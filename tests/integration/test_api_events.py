"""The event stream of a task, over a real socket."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from ai_agent_server.core.task_packet import Canceled, Completed, Progress, Started
from tests.servers.api import Parts, serving


@pytest.fixture
def parts() -> Parts:
    return Parts(keep_alive_s=0.05)


@pytest.fixture
async def http(parts: Parts) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(parts.app) as address, httpx.AsyncClient(base_url=address, timeout=30) as client:
        yield client


async def submitted(http: httpx.AsyncClient) -> str:
    answer = await http.post("/api/v1/developer/planner", json={"payload": {"task": "add"}})
    task_id: str = answer.json()["task_id"]
    return task_id


async def frames(answer: httpx.Response) -> AsyncIterator[dict[str, str]]:
    """Each frame's fields; a comment is the field of no name."""
    frame: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if line:
            name, _, value = line.partition(": ")
            frame[name] = value
        elif frame:
            yield frame
            frame = {}


async def told(frame: AsyncIterator[dict[str, str]]) -> dict[str, str]:
    """The next frame that is no comment."""
    async with asyncio.timeout(60):
        while "event" not in (found := await anext(frame)):
            pass
    return found


def now() -> datetime:
    return datetime.now(UTC)


async def test_a_stream_begins_with_a_snapshot_and_ends_after_the_final_event(
    parts: Parts, http: httpx.AsyncClient
) -> None:
    task_id = await submitted(http)
    async with http.stream("GET", f"/api/v1/tasks/{task_id}/events") as answer:
        coming = frames(answer)
        snapshot, first = await told(coming), await told(coming)
        parts.engine.happen(task_id, Started(at=now(), generation=1))
        second = await told(coming)
        parts.engine.progress(
            Progress(task_id=task_id, step=1, role="planner", llm="x", why="y", output_tokens=3, elapsed_ms=1)
        )
        progress = await told(coming)
        parts.engine.happen(task_id, Completed(at=now(), result={}))
        last = await told(coming)
        rest = [frame async for frame in coming if "event" in frame]

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["x-accel-buffering"], answer.headers["cache-control"]) == ("no", "no-store")
    assert (snapshot["event"], "id" in snapshot) == ("snapshot", False)
    assert json.loads(snapshot["data"])["history"] == []
    assert [(frame["id"], frame["event"]) for frame in (first, second, last)] == [
        ("1", "task.submitted"),
        ("2", "task.started"),
        ("3", "task.completed"),
    ]
    assert (progress["event"], "id" in progress) == ("progress", False)
    assert json.loads(last["data"])["seq"] == 3
    assert rest == []


@pytest.mark.parametrize(
    ("headers", "query", "ids"),
    [
        ({}, "", ["1", "2", "3"]),
        ({}, "?since=1", ["2", "3"]),
        ({"Last-Event-ID": "2"}, "", ["3"]),
        ({"Last-Event-ID": "2"}, "?since=0", ["3"]),
        ({"Last-Event-ID": "3"}, "", []),
    ],
)
async def test_a_stream_goes_on_after_the_last_event_that_was_seen(
    parts: Parts, http: httpx.AsyncClient, headers: dict[str, str], query: str, ids: list[str]
) -> None:
    task_id = await submitted(http)
    parts.engine.happen(task_id, Started(at=now(), generation=1), Canceled(at=now()))
    async with http.stream("GET", f"/api/v1/tasks/{task_id}/events{query}", headers=headers) as answer:
        seen = [frame["id"] async for frame in frames(answer) if "id" in frame]

    assert seen == ids


@pytest.mark.parametrize(
    ("headers", "query", "parameter"),
    [
        ({"Last-Event-ID": "x"}, "", "Last-Event-ID"),
        ({"Last-Event-ID": "-1"}, "", "Last-Event-ID"),
        ({}, "?since=-1", "since"),
    ],
)
async def test_an_event_id_that_is_none_is_refused(
    http: httpx.AsyncClient, headers: dict[str, str], query: str, parameter: str
) -> None:
    task_id = await submitted(http)
    answer = await http.get(f"/api/v1/tasks/{task_id}/events{query}", headers=headers)

    assert (answer.status_code, answer.json()["parameter"]) == (422, parameter)


async def test_a_silent_stream_is_kept_alive(http: httpx.AsyncClient) -> None:
    task_id = await submitted(http)
    async with http.stream("GET", f"/api/v1/tasks/{task_id}/events") as answer, asyncio.timeout(60):
        comments = 0
        async for frame in frames(answer):
            comments += "event" not in frame
            if comments == 3:
                break


async def test_a_reader_that_leaves_cancels_nothing_and_is_forgotten(
    parts: Parts, http: httpx.AsyncClient
) -> None:
    task_id = await submitted(http)
    async with http.stream("GET", f"/api/v1/tasks/{task_id}/events") as answer:
        await told(frames(answer))
        assert parts.engine.followers == 1

    async with asyncio.timeout(60):
        while parts.engine.followers:
            await asyncio.sleep(0.01)
    assert parts.engine.tasks[task_id].status == "submitted"


async def test_a_reader_that_does_not_read_is_cut() -> None:
    parts = Parts(write_timeout_s=0.2)
    async with serving(parts.app) as address, asyncio.timeout(60):
        async with httpx.AsyncClient(base_url=address) as http:
            task_id = await submitted(http)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", int(address.rpartition(":")[2]), limit=1024
        )
        writer.write(b"GET /api/v1/tasks/%s/events HTTP/1.1\r\nHost: localhost\r\n\r\n" % task_id.encode())
        await reader.readline()
        long: dict[str, Any] = {"why": "x" * 100_000}
        while parts.engine.followers:
            parts.engine.progress(
                Progress(task_id=task_id, step=1, role="qa", llm="x", output_tokens=1, elapsed_ms=1, **long)
            )
            await asyncio.sleep(0.001)
        writer.transport.abort()


async def test_a_stream_that_the_engine_cuts_says_how_to_come_back(
    parts: Parts, http: httpx.AsyncClient
) -> None:
    task_id = await submitted(http)
    async with http.stream("GET", f"/api/v1/tasks/{task_id}/events") as answer:
        coming = frames(answer)
        await told(coming)
        await told(coming)
        parts.engine.cut(task_id)
        async with asyncio.timeout(60):
            last = [frame async for frame in coming][-1]

    assert "Last-Event-ID" in last[""]
