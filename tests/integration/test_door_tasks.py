"""What a key may do holds for the tasks that it sends: step by step, and over a restart."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.servers.process import SCRIPT, ServerProcess, scripted, write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

REWRITE = "/api/v1/productivity/rewrite"
PAYLOAD = {"text": "Hello", "instructions": "shorter"}
LIMITS: dict[str, list[dict[str, Any]]] = {
    "laptop": [{"per_s": 3600, "tokens": 100_000}],
    "phone": [{"per_s": 3600, "tokens": 100_000}],
    "spent": [{"tokens": 200}],
    "slow": [{"per_s": 3, "tokens": 3000}],
}


def configured(folder: Path, *, delay_s: float = 0.0, **keys: dict[str, Any]) -> Path:
    """A server of two LLMs, one of them an API, with `keys` by name."""
    far = {**SCRIPT, "source": "api", "options": {"replies": ["far"], "delay_s": delay_s}}
    llms = {**scripted("near", delay_s=delay_s), "far": far}
    given = {name: {"api_key": {"env": name.upper()}, **rights} for name, rights in keys.items()}
    return write_config(folder, llms=llms, messaging={"enabled": False}, gateway={"keys": given})


def process(folder: Path, config: Path, *names: str) -> ServerProcess:
    secrets: dict[str, Any] = {name.upper(): f"sk-{name}" for name in names}
    return ServerProcess(folder / "state", config, AI_AGENT_SERVER_API_KEY="sk-admin", **secrets)


def shows(name: str, **headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{name}", **headers}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("door")
    config = configured(folder, delay_s=0.3, **{name: {"limits": limits} for name, limits in LIMITS.items()})
    async with process(folder, config, *LIMITS) as running:
        yield running


async def send(http: httpx.AsyncClient, name: str, *, key: str = "", text: str = "Hello") -> Any:
    answer = await http.post(
        REWRITE,
        params={"wait": 60},
        json={"payload": PAYLOAD | {"text": text}},
        headers=shows(name, **({"Idempotency-Key": key} if key else {})),
    )
    assert answer.status_code in {200, 202}, answer.text
    return answer.json()


async def as_chat(http: httpx.AsyncClient, name: str, key: str) -> httpx.Response:
    messages = [{"role": "user", "content": json.dumps(PAYLOAD)}]
    body = {"model": "productivity/rewrite", "messages": messages}
    return await http.post("/v1/chat/completions", json=body, headers=shows(name, **{"Idempotency-Key": key}))


async def remaining(http: httpx.AsyncClient, name: str) -> int:
    """Tokens that the key has left, as a chat that asks for far too much is told."""
    body = {"model": "scripted", "messages": [{"role": "user", "content": "x " * 200_000}]}
    answer = await http.post("/v1/chat/completions", json=body, headers=shows(name))
    return int(answer.headers["x-ratelimit-remaining-tokens"])


async def test_a_step_that_would_pass_its_keys_budget_is_not_had(server: ServerProcess) -> None:
    async with server.http() as http:
        task = await send(http, "spent", text="word " * 500)
    assert (task["status"], task["reason"]) == ("failed", "budget_sender")
    assert task["usage"]["calls"] == 0
    assert "'spent' may use 200 tokens" in task["error"]["message"]


async def test_a_task_waits_for_its_keys_share_and_then_ends_well(server: ServerProcess) -> None:
    async with server.http() as http, asyncio.timeout(90):
        # One has to wait only while the others are under way.
        while "task.put_off" not in server.log.read_text():
            tasks = await asyncio.gather(*(send(http, "slow") for _ in range(3)))
            assert {task["status"] for task in tasks} == {"completed"}


async def test_an_idempotency_key_is_the_api_keys_own(server: ServerProcess) -> None:
    async with server.http() as http:
        laptop, phone = [await send(http, name, key="mine") for name in ("laptop", "phone")]
        again = await send(http, "laptop", key="mine")
        chats = [await as_chat(http, name, "chat") for name in ("laptop", "phone")]
    assert laptop["task_id"] != phone["task_id"]
    assert again["task_id"] == laptop["task_id"]
    assert [chat.status_code for chat in chats] == [200, 200]
    assert chats[0].headers["x-task-id"] != chats[1].headers["x-task-id"]


async def test_a_role_asked_again_with_its_idempotency_key_is_charged_once(server: ServerProcess) -> None:
    async with server.http() as http:
        first = await as_chat(http, "laptop", "once")
        before = await remaining(http, "laptop")
        again = await as_chat(http, "laptop", "once")
        after = await remaining(http, "laptop")
    assert first.json()["usage"]["total_tokens"] > 0
    said = [answer.json()["choices"][0]["message"]["content"] for answer in (first, again)]
    assert said == ["near", "near"]
    assert again.headers["x-task-id"] == first.headers["x-task-id"]
    assert after == before


async def test_a_role_that_may_be_asked_for_again_goes_on_when_its_client_leaves(
    server: ServerProcess,
) -> None:
    async with server.http() as http:
        asking = asyncio.create_task(as_chat(http, "phone", "patient"))
        tasks: list[Any] = []
        async with asyncio.timeout(60):
            while not any(task["idempotency_key"] == "phone/patient" for task in tasks):
                listed = await http.get("/api/v1/tasks", headers=shows("phone"))
                tasks = listed.json()["items"]
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        again = await as_chat(http, "phone", "patient")
    assert again.json()["choices"][0]["message"]["content"] in {"near", "far"}


async def test_a_restart_finds_the_keys_as_they_are_then(tmp_path: Path) -> None:
    """A task that was under way: its key is bound otherwise now, or gone."""
    config = configured(tmp_path, delay_s=60, strict={}, other={})
    async with process(tmp_path, config, "strict", "other") as running, running.http() as http:
        ids = [
            (await http.post(REWRITE, json={"payload": PAYLOAD}, headers=shows(name))).json()["task_id"]
            for name in ("strict", "other")
        ]
        await asyncio.gather(*(until(http, task_id, "working") for task_id in ids))
        await running.kill()
    kept = "".join(path.read_text() for path in (tmp_path / "state").rglob("*.json"))
    assert '"strict"' in kept
    assert "sk-" not in kept
    config = configured(tmp_path, strict={"privacy": "local", "allowed_llms": ["scripted", "far"]})
    async with process(tmp_path, config, "strict") as running, running.http() as http:
        strict = await until(http, ids[0], "completed")
        other = await until(http, ids[1], "failed")
    (call,) = [event["call"] for event in strict["history"] if event.get("call")]
    assert call["llm"] == "scripted"
    refused = {one["llm"]: one.get("refused_by") for one in call["decision"]["candidates"]}
    assert "privacy" in refused["far"]
    assert other["reason"] == "sender_refused"


async def until(http: httpx.AsyncClient, task_id: str, status: str) -> Any:
    """The task, when it stands so."""
    async with asyncio.timeout(60):
        while True:
            task = (await http.get(f"/api/v1/tasks/{task_id}", headers=shows("admin"))).json()
            if task["status"] == status:
                return task
            await asyncio.sleep(0.05)
