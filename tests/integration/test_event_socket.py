"""A task's events over a WebSocket, with a client of its own on a real socket."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ai_agent_server.core.event_socket import PROTOCOL
from ai_agent_server.core.task_packet import Completed, Progress, Started
from tests.integration.test_api_events import now
from tests.servers.api import Parts, serving
from tests.servers.process import ServerProcess, scripted, write_config

KEY = "s3cr3t/+key=="
BODY = {"payload": {"task": "add"}}


@asynccontextmanager
async def talking(parts: Parts, **headers: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with (
        serving(parts.with_sockets) as address,
        aiohttp.ClientSession(address, headers=headers, timeout=aiohttp.ClientTimeout(60)) as http,
    ):
        yield http


async def submitted(http: aiohttp.ClientSession) -> str:
    async with http.post("/api/v1/developer/planner", json=BODY) as answer:
        task_id: str = (await answer.json())["task_id"]
        return task_id


async def the_next(socket: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
    """The next frame that does more than break a silence."""
    while (frame := await socket.receive_json())["event"] == "keep-alive":
        pass
    found: dict[str, Any] = frame
    return found


async def told(socket: aiohttp.ClientWebSocketResponse) -> list[dict[str, Any]]:
    """Every frame to the end, without those that only break a silence."""
    found: list[dict[str, Any]] = [frame.json() async for frame in socket]
    return [frame for frame in found if frame["event"] != "keep-alive"]


async def nobody_follows(parts: Parts) -> None:
    while parts.engine.followers:
        await asyncio.sleep(0.01)


def at(task_id: str, query: str = "") -> str:
    return f"/api/v1/tasks/{task_id}/events/ws{query}"


async def test_a_socket_begins_with_a_snapshot_and_is_closed_after_the_final_event() -> None:
    parts = Parts(keep_alive_s=0.05)
    async with talking(parts) as http:
        task_id = await submitted(http)
        async with http.ws_connect(at(task_id)) as socket:
            assert (await the_next(socket))["data"]["status"] == "submitted"
            assert (await the_next(socket))["id"] == 1
            assert (await socket.receive_json()) == {"event": "keep-alive"}
            parts.engine.happen(task_id, Started(at=now(), generation=1))
            parts.engine.progress(
                Progress(task_id=task_id, step=1, role="qa", llm="x", why="", output_tokens=1, elapsed_ms=1)
            )
            parts.engine.happen(task_id, Completed(at=now(), result={"n": 1}))
            rest = await told(socket)
            assert socket.close_code == 1000
        async with http.get(f"/api/v1/tasks/{task_id}/events") as stream:
            lines = (await stream.text()).splitlines()
    assert [(frame["event"], frame.get("id")) for frame in rest] == [
        ("task.started", 2), ("progress", None), ("task.completed", 3)
    ]  # fmt: skip
    assert rest[-1]["data"]["result"] == {"n": 1}
    # The same frames as the stream's.
    assert [line for line in lines if line.startswith("event:")] == [
        "event: snapshot", "event: task.submitted", "event: task.started", "event: task.completed"
    ]  # fmt: skip


async def test_a_socket_goes_on_after_the_last_event_that_was_seen() -> None:
    parts = Parts()
    async with talking(parts) as http:
        task_id = await submitted(http)
        parts.engine.happen(task_id, Started(at=now(), generation=1), Completed(at=now(), result={}))
        async with http.ws_connect(at(task_id, "?since=2")) as socket:
            assert [frame.get("id") for frame in await told(socket)] == [None, 3]


async def test_a_reader_that_is_cut_is_told_where_to_go_on() -> None:
    parts = Parts()
    async with talking(parts) as http:
        task_id = await submitted(http)
        async with http.ws_connect(at(task_id)) as socket:
            await socket.receive_json()
            await socket.receive_json()
            parts.engine.cut(task_id)
            assert await told(socket) == [{"event": "cut", "data": {"since": 1}}]
            assert socket.close_code == 1013


async def test_a_reader_that_does_not_read_is_cut_and_one_that_leaves_is_forgotten() -> None:
    parts = Parts(write_timeout_s=0.2)
    async with talking(parts) as http, asyncio.timeout(60):
        task_id = await submitted(http)
        socket = await http.ws_connect(at(task_id))
        transport = socket._conn.transport  # type: ignore[union-attr]
        assert transport is not None
        transport.pause_reading()
        while parts.engine.followers:
            parts.engine.progress(
                Progress(
                    task_id=task_id, step=1, role="qa", llm="x", why="x" * 100_000,
                    output_tokens=1, elapsed_ms=1,
                )
            )  # fmt: skip
            await asyncio.sleep(0.001)
        transport.abort()
        async with http.ws_connect(at(task_id)) as leaving:
            await leaving.receive_json()
        await nobody_follows(parts)
        assert parts.engine.tasks[task_id].status == "submitted"


@pytest.mark.parametrize(
    ("path", "status", "slug"),
    [
        (at("01936f2a-7c1e-7b3a-9d55-2f4be0a1c9d7"), 404, "task-not-found"),
        (at("x" * 80), 404, "task-not-found"),
        (at("01936f2a-7c1e-7b3a-9d55-2f4be0a1c9d7", "?since=-1"), 422, "bad-parameter"),
        (at("01936f2a-7c1e-7b3a-9d55-2f4be0a1c9d7", "?key=abc"), 422, "bad-parameter"),
        ("/api/v1/elsewhere", 404, "no-such-route"),
    ],
)
async def test_what_cannot_be_followed_is_refused_before_the_handshake(
    path: str, status: int, slug: str
) -> None:
    async with talking(Parts()) as http:
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
                   "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
        async with http.get(path, headers=upgrade) as answer:
            assert answer.status == status
            assert answer.content_type == "application/problem+json"
            assert (await answer.json())["type"] == f"/api/v1/docs#{slug}"


async def test_a_server_with_keys_takes_one_as_a_header_or_as_a_subprotocol() -> None:
    parts = Parts(api_key=KEY)
    async with talking(parts) as http:
        bearer = {"Authorization": f"Bearer {KEY}"}
        async with http.post("/api/v1/developer/planner", json=BODY, headers=bearer) as answer:
            task_id = (await answer.json())["task_id"]
        offered = base64.urlsafe_b64encode(KEY.encode()).decode().rstrip("=")
        async with http.ws_connect(at(task_id), headers=bearer) as socket:
            assert socket.protocol is None
        async with http.ws_connect(at(task_id), protocols=(PROTOCOL, f"bearer.{offered}")) as socket:
            assert socket.protocol == PROTOCOL
            assert (await socket.receive_json())["event"] == "snapshot"
        for wrong in ((), (PROTOCOL,), (PROTOCOL, "bearer.bm9wZQ"), (PROTOCOL, "bearer.***")):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await http.ws_connect(at(task_id), protocols=wrong)
            assert refused.value.status == 401


async def test_a_page_from_elsewhere_may_not_follow() -> None:
    async with talking(Parts()) as http:
        task_id = await submitted(http)
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await http.ws_connect(at(task_id), origin="https://elsewhere.example")
        assert refused.value.status == 403


async def test_a_real_servers_socket_tells_a_task_to_its_end(tmp_path: Path) -> None:
    config = write_config(tmp_path, llms=scripted("short", delay_s=0.3), messaging={"enabled": False})
    server = ServerProcess(tmp_path / "state", config)
    async with server, aiohttp.ClientSession(server.url) as http:
        async with http.post("/api/v1/productivity/summarize", json={"payload": {"text": "Long."}}) as made:
            task_id = (await made.json())["task_id"]
        async with http.ws_connect(at(task_id)) as socket:
            live = await told(socket)
        await server.stop()
        assert "bearer." not in server.log.read_text()
    ids = [frame["id"] for frame in live if "id" in frame]
    assert ids == list(range(1, ids[-1] + 1))
    assert live[-1]["event"] == "task.completed"
