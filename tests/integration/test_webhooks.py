"""Webhooks of a real server to a real receiver: signed, in order, again after failures and restarts."""

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.servers.process import ServerProcess, scripted, write_config

SECRET = "a secret of some length"
ENDS = ("task.completed", "task.failed", "task.canceled", "task.rejected")
DEADLINE_S = 60.0


class Receiver:
    """Takes webhooks; `answers` are the statuses of the first ones, 200 after that."""

    def __init__(self) -> None:
        self.url = ""
        self.answers: list[int] = []
        self.came: list[tuple[str, dict[str, Any]]] = []
        self.taken: list[tuple[str, dict[str, Any]]] = []

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        signed = f"{request.headers['webhook-id']}.{request.headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.digest(SECRET.encode(), signed, hashlib.sha256)).decode()
        assert request.headers["webhook-signature"] == f"v1,{expected}"
        message = request.headers["webhook-id"], json.loads(body)
        self.came.append(message)
        status = self.answers.pop(0) if self.answers else 200
        if status < 300:
            self.taken.append(message)
        return web.Response(status=status, headers={"Location": f"{self.url}/elsewhere"})

    def ids(self) -> list[str]:
        return [message_id for message_id, _ in self.taken]

    async def until(self, met: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not met():
                await asyncio.sleep(0.02)


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hooks{tail:.*}", receiver.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield receiver
    finally:
        await runner.cleanup()


def server_for(folder: Path, receiver: Receiver, *, delay_s: float = 0.1, **callbacks: Any) -> ServerProcess:
    target = {"url": f"{receiver.url}/hooks", "secret": {"env": "HOOK_SECRET"}}
    config = write_config(
        folder,
        llms=scripted("short", delay_s=delay_s),
        messaging={"enabled": False},
        callbacks={"targets": {"ci": target}, "backoff_s": 0.05, **callbacks},
    )
    return ServerProcess(folder / "state", config, HOOK_SECRET=SECRET)


async def submitted(http: Any, url: str, *events: str, **more: Any) -> str:
    callback = {"url": url, **({"events": events} if events else {})}
    body = {"payload": {"text": "A long text."}, "callback": callback, **more}
    answer = await http.post("/api/v1/productivity/summarize", json=body)
    assert answer.status_code == 202, answer.text
    task_id: str = answer.json()["task_id"]
    return task_id


async def in_its_step(http: Any, task_id: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            history = (await http.get(f"/api/v1/tasks/{task_id}")).json()["history"]
            if history[-1]["type"] == "step.started":
                return
            await asyncio.sleep(0.02)


async def told(http: Any, met: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What the metrics tell of webhooks, once it is so."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found: dict[str, Any] = (await http.get("/api/v1/metrics")).json()["state"]["webhooks"]
            if met(found):
                return found
            await asyncio.sleep(0.02)


async def test_the_wanted_events_come_signed_in_order_and_are_tried_again(tmp_path: Path) -> None:
    async with receiving() as receiver:
        receiver.answers = [503, 302, 200, 500]
        server = server_for(tmp_path, receiver)
        async with server, server.http() as http:
            every = ("task.submitted", "step.started", "step.finished", "task.completed")
            task_id = await submitted(http, f"{receiver.url}/hooks/a", *every)
            counted = await told(http, lambda found: found["delivered"] == 4)
        types = [body["type"] for _, body in receiver.taken]
        assert types == list(every)
        assert receiver.ids() == [f"{task_id}:{seq}" for seq in (1, 3, 4, 5)]
        first, last = receiver.taken[0][1]["data"], receiver.taken[-1][1]["data"]
        assert (first["task_id"], first["status"], last["status"]) == (task_id, "submitted", "completed")
        assert last["event"]["result"]["output"]
        assert (counted["delivered"], counted["failed"], counted["given_up"]) == (4, 3, 0)
        assert not any("elsewhere" in body for _, body in receiver.came)
        state = (server.state_dir / "tasks_state" / task_id[-2:] / f"{task_id}.json").read_text()
        assert SECRET not in state + server.log.read_text()


async def test_what_was_not_delivered_is_delivered_after_a_kill(tmp_path: Path) -> None:
    async with receiving() as receiver:
        receiver.answers = [200, *[500] * 1000]
        server = server_for(tmp_path, receiver, backoff_max_s=0.2, attempts=1000)
        async with server, server.http() as http:
            tasks = [
                await submitted(http, f"{receiver.url}/hooks", "task.submitted", *ENDS) for _ in range(5)
            ]
            await receiver.until(lambda: len(receiver.came) > 10)
            await server.kill()
        receiver.answers = []
        async with server, server.http() as http:
            await receiver.until(lambda: len(set(receiver.ids())) == 10)
            await told(http, lambda found: found["pending"] == 0)
        async with server, server.http() as http:
            await told(http, lambda found: found["pending"] == 0)
    for task_id in tasks:
        bodies = [body for _, body in receiver.taken if body["data"]["task_id"] == task_id]
        assert [body["type"] for body in bodies][-2:] == ["task.submitted", "task.completed"]


async def test_what_was_delivered_long_ago_and_what_a_fork_copied_is_not_told_again(tmp_path: Path) -> None:
    async with receiving() as receiver:
        server = server_for(tmp_path, receiver, delay_s=8)
        wanted = ["task.paused", "step.finished", "task.completed"]
        async with server, server.http() as http:
            origin = await submitted(http, f"{receiver.url}/hooks", *wanted)
            await in_its_step(http, origin)
            paused = await http.post(f"/api/v1/tasks/{origin}/pause")
            assert paused.status_code == 200, paused.text
            await told(http, lambda found: found["delivered"] == 2 and not found["pending"])
        # As it is when a minute has passed.
        at = datetime.now(UTC) + timedelta(seconds=31)
        kept = {"until": at.isoformat(), "tasks": {}}
        (server.state_dir / "callbacks.json").write_text(json.dumps(kept))
        async with server, server.http() as http:
            await http.post(f"/api/v1/tasks/{origin}/resume")
            await told(http, lambda found: found["delivered"] == 1 and not found["pending"])
            callback = {"url": f"{receiver.url}/hooks", "events": wanted}
            made = await http.post(f"/api/v1/tasks/{origin}/fork", json={"step": 1, "callback": callback})
            await told(http, lambda found: found["delivered"] == 2 and not found["pending"])
    said = [(body["data"]["task_id"], body["type"]) for _, body in receiver.taken]
    assert said == [
        (origin, "task.paused"),
        (origin, "step.finished"),
        (origin, "task.completed"),
        (made.json()["task_id"], "task.completed"),
    ]


async def test_messages_that_nobody_takes_are_given_up_and_a_target_that_wants_none_is_left(
    tmp_path: Path,
) -> None:
    async with receiving() as receiver:
        receiver.answers = [500, 500, 500]
        server = server_for(tmp_path, receiver, attempts=3)
        async with server, server.http() as http:
            await submitted(http, f"{receiver.url}/hooks")
            await told(http, lambda found: found["given_up"] == 1)
            assert len(receiver.came) == 3
            await submitted(http, f"{receiver.url}/hooks")
            counted = await told(http, lambda found: found["delivered"] == 1 and not found["pending"])
            assert counted["given_up"] == 1
            receiver.answers = [410]
            await submitted(http, f"{receiver.url}/hooks")
            await told(http, lambda found: found["given_up"] == 2)
            await submitted(http, f"{receiver.url}/hooks", "task.submitted")
            counted = await told(http, lambda found: found["given_up"] == 3)
    assert counted["disabled_targets"] == ["ci"]
    assert len(receiver.came) == 5


async def test_a_url_that_is_no_targets_is_refused_with_those_there_are(tmp_path: Path) -> None:
    async with receiving() as receiver:
        server = server_for(tmp_path, receiver)
        async with server, server.http() as http:
            for url in ("http://169.254.169.254/latest/meta-data", f"{receiver.url}/admin", "nonsense"):
                body = {"payload": {"text": "A long text."}, "callback": {"url": url}}
                answer = await http.post("/api/v1/productivity/summarize", json=body)
                problem = answer.json()
                assert (answer.status_code, problem["pointer"]) == (422, "/callback/url")
                assert problem["choices"] == ["ci"], "a path may be a secret"
            assert (await http.get("/api/v1/tasks")).json()["items"] == []


async def test_a_server_without_targets_or_their_secret_takes_no_callback(tmp_path: Path) -> None:
    async with receiving() as receiver:
        server = server_for(tmp_path, receiver)
        server.environ.pop("HOOK_SECRET")
        async with server, server.http() as http:
            body = {"payload": {"text": "A."}, "callback": {"url": f"{receiver.url}/hooks"}}
            answer = await http.post("/api/v1/productivity/summarize", json=body)
            assert answer.status_code == 422
            assert "HOOK_SECRET" in answer.json()["expected"]
