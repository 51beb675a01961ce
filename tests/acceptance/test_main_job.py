"""The main job on real parts: the embedded model, a real nats-server, real files, a real process."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import nats
import pytest

from tests.servers.nats import NatsServer, a_nats_server
from tests.servers.process import ServerProcess, packaged, write_config

TASK = {
    "task": "Write a function that returns the sum of two numbers.",
    "entry_point": "add",
    "examples": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"],
}
FINAL = {"completed", "failed", "canceled", "rejected"}


async def ended(http: httpx.AsyncClient, task_id: str, timeout_s: float = 200) -> dict[str, Any]:
    async with asyncio.timeout(timeout_s):
        while True:
            packet: dict[str, Any] = (await http.get(f"/api/v1/tasks/{task_id}")).json()
            if packet["status"] in FINAL:
                return packet
            await asyncio.sleep(0.2)


async def test_a_packet_by_rest_is_planned_coded_tested_and_kept(tmp_path: Path) -> None:
    """Whether the 135M model solves it is its own affair; that the loop is whole is ours."""
    async with ServerProcess(tmp_path / "state") as server, server.http() as http:
        answer = await http.post("/api/v1/developer/planner", json={"payload": TASK})
        assert answer.status_code == 202, answer.text
        packet = await ended(http, answer.json()["task_id"])
        used = packet["usage"]["calls"]
        async with asyncio.timeout(60):
            while (metrics := (await http.get("/api/v1/metrics")).json())["use"]["total"]["calls"] < used:
                await asyncio.sleep(0.05)
        health = (await http.get("/health")).json()
        file = Path(answer.headers["X-Task-File"])
        kept = json.loads(file.read_bytes())
    roles = [event["role"] for event in packet["history"] if event["type"] == "step.finished"]
    assert roles[:3] == ["planner", "fast-coder", "qa"]
    calls = [event["call"] for event in packet["history"] if event.get("call")]
    assert calls
    assert {call["llm"] for call in calls} == {"embedded"}
    assert all(call["output_tokens"] > 0 and call["decision"]["reason"] for call in calls)
    reports = [event["report"] for event in packet["history"] if event.get("report")]
    assert reports
    assert {report["tier"] for report in reports} <= {"bubblewrap", "landlock"}
    assert kept["status"] == packet["status"]
    assert kept["history"] == packet["history"]
    assert packet["status"] == "completed" or packet["reason"], packet
    assert metrics["use"]["total"]["calls"] == used
    assert health["components"]["nats"]["status"] == "ok"
    assert health["components"]["sandbox"]["status"] == "ok"


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[NatsServer]:
    with a_nats_server(tmp_path / "nats") as server:
        yield server


async def test_a_packet_by_nats_waits_for_an_outside_qas_verdict(tmp_path: Path, bus: NatsServer) -> None:
    document = packaged()
    document["profiles"]["developer"]["roles"]["qa"]["agent"] = "external"
    config = write_config(
        tmp_path,
        profiles=document["profiles"],
        messaging={"url": bus.url, "credentials": {"env": "BUS_LOGIN"}, "metrics_interval_s": 0.5},
    )
    user, _, password = bus.credentials.partition(":")
    client = await nats.connect(bus.url, user=user, password=password)
    try:
        async with (
            ServerProcess(tmp_path / "state", config, BUS_LOGIN=bus.credentials) as server,
            server.http() as http,
        ):
            seen: list[dict[str, Any]] = []
            metrics = asyncio.Event()
            js = client.jetstream()

            async def on_feedback(message: Any) -> None:
                seen.append(json.loads(message.data))

            async def on_metrics(_message: Any) -> None:
                metrics.set()

            await client.subscribe("ai-agent-server.tasks.feedback", cb=on_feedback)
            await client.subscribe("ai-agent-server.metrics", cb=on_metrics)
            task_id = "0197a000-0000-7000-8000-00000000a001"
            draft = {"task_id": task_id, "profile": "developer", "role": "planner", "payload": TASK}
            await js.publish("ai-agent-server.tasks.inbound", json.dumps(draft).encode())
            async with asyncio.timeout(120):
                while not any(e.get("event", {}).get("type") == "input.required" for e in seen):
                    await asyncio.sleep(0.1)
            verdict = {
                "kind": "feedback",
                "task_id": task_id,
                "role": "qa",
                "outcome": "pass",
                "sender": "me",
            }
            await js.publish("ai-agent-server.tasks.feedback", json.dumps(verdict).encode())
            packet = await ended(http, task_id)
            async with asyncio.timeout(60):
                await metrics.wait()
                while not any(e.get("event", {}).get("type") == "task.completed" for e in seen):
                    await asyncio.sleep(0.1)
        seqs = [e["event"]["seq"] for e in seen if e.get("kind") == "event" and e["task_id"] == task_id]
        assert packet["status"] == "completed"
        assert seqs == list(range(1, packet["revision"] + 1))
        assert any(event["type"] == "feedback.received" for event in packet["history"])
    finally:
        await client.close()
