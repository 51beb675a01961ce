"""The REST API's tasks, over a real socket."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx
import pytest

from ai_agent_server.core.chat import Decision
from ai_agent_server.core.task_packet import (
    Completed,
    Hop,
    LLMCall,
    Started,
    StepFinished,
    StepStarted,
)
from tests.servers.api import Parts, serving

PLANNER = "/api/v1/developer/planner"
BODY = {"payload": {"task": "add two numbers"}}
NOBODYS_ID = "b6aedda0-3c36-4932-96ba-069631552fe3"


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


async def test_waiting_answers_200_as_soon_as_the_task_ends(parts: Parts, http: httpx.AsyncClient) -> None:
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(http.post(PLANNER, params={"wait": 25}, json=BODY))
        task_id = await first_task(parts)
        end(parts, task_id)

    assert asking.result().status_code == 200
    assert asking.result().json()["result"] == {"code": "pass"}


async def test_waiting_that_was_too_short_answers_202_and_the_task_goes_on(http: httpx.AsyncClient) -> None:
    answer = await http.post(PLANNER, params={"wait": 0.05}, json=BODY)

    assert (answer.status_code, answer.json()["status"]) == (202, "submitted")


async def test_a_preference_to_wait_is_followed_and_said_so(parts: Parts, http: httpx.AsyncClient) -> None:
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(
            http.post(PLANNER, headers={"Prefer": "respond-async, wait=25"}, json=BODY)
        )
        end(parts, await first_task(parts))

    assert asking.result().status_code == 200
    assert asking.result().headers["preference-applied"] == "wait=25"


@pytest.mark.parametrize("wait", ["-1", "601", "soon", ""])
async def test_a_wait_that_is_none_is_refused(http: httpx.AsyncClient, parts: Parts, wait: str) -> None:
    answer = await http.post(PLANNER, params={"wait": wait}, json=BODY)

    assert (answer.status_code, answer.json()["parameter"]) == (422, "wait")
    assert not parts.engine.tasks


async def test_a_repeat_with_the_same_key_answers_the_earlier_packet(http: httpx.AsyncClient) -> None:
    first = await submitted(http, headers={"Idempotency-Key": "one"})
    again = await http.post(PLANNER, json=BODY, headers={"Idempotency-Key": "one"})

    assert (again.status_code, again.json()["task_id"]) == (200, first)


async def test_a_key_with_another_body_is_a_conflict_that_names_the_task(http: httpx.AsyncClient) -> None:
    first = await submitted(http, headers={"Idempotency-Key": "one"})
    other = await http.post(PLANNER, json={"payload": {}}, headers={"Idempotency-Key": "one"})

    assert (other.status_code, other.json()["task_id"]) == (409, first)


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "k\u00e9y"])
async def test_a_key_of_other_characters_is_refused(http: httpx.AsyncClient, key: str) -> None:
    answer = await http.post(PLANNER, json=BODY, headers={b"Idempotency-Key": key.encode()})

    assert (answer.status_code, answer.json()["parameter"]) == (422, "Idempotency-Key")


async def test_the_path_says_profile_and_role_and_the_body_may_not_differ(http: httpx.AsyncClient) -> None:
    same = await http.post(PLANNER, json={**BODY, "role": "planner"})
    other = await http.post(PLANNER, json={**BODY, "role": "qa"})

    assert same.status_code == 202
    assert (other.status_code, other.json()["pointer"]) == (422, "/role")


async def test_an_unknown_role_is_told_with_the_roles_there_are(http: httpx.AsyncClient) -> None:
    answer = await http.post("/api/v1/developer/plannr", json=BODY)

    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["choices"] == ["planner", "qa"]
    assert (await http.post("/api/v1/devel/planner", json=BODY)).json()["choices"] == [
        "developer",
        "productivity",
    ]


async def test_tasks_are_listed_newest_first_page_by_page(http: httpx.AsyncClient) -> None:
    ids = [await submitted(http) for _ in range(5)]

    first = (await http.get("/api/v1/tasks", params={"limit": 3})).json()
    second = (await http.get("/api/v1/tasks", params={"limit": 3, "cursor": first["next_cursor"]})).json()

    assert [item["task_id"] for item in (*first["items"], *second["items"])] == ids[::-1]
    assert second["next_cursor"] is None


async def test_lists_are_filtered_by_every_field(parts: Parts, http: httpx.AsyncClient) -> None:
    ended = await submitted(http)
    end(parts, ended)
    live = (await http.post("/api/v1/developer/qa", json={**BODY, "context_id": str(uuid4())})).json()

    async def found(**where: str) -> list[str]:
        items = (await http.get("/api/v1/tasks", params=where)).json()["items"]
        return [item["task_id"] for item in items]

    assert await found(status="completed") == [ended]
    assert await found(role="qa") == [live["task_id"]]
    assert await found(context_id=live["context_id"]) == [live["task_id"]]
    assert await found(profile="productivity") == []


@pytest.mark.parametrize(
    ("query", "parameter", "says"),
    [
        ("limit=0", "limit", "int >= 1"),
        ("limit=201", "limit", "int <= 200"),
        ("limit=ten", "limit", "int"),
        ("limit=1&limit=2", "limit", "twice"),
        ("status=done", "status", "input-required"),
        ("stauts=working", "stauts", "context_id"),
        ("cursor=%00%ff../../etc", "cursor", "cursor"),
    ],
)
async def test_a_wrong_query_is_told_with_what_would_be_right(
    http: httpx.AsyncClient, query: str, parameter: str, says: str
) -> None:
    answer = await http.get(f"/api/v1/tasks?{query}")

    assert (answer.status_code, answer.json()["parameter"]) == (422, parameter)
    assert says in answer.text


async def test_a_live_task_is_deleted_only_after_it_ended(parts: Parts, http: httpx.AsyncClient) -> None:
    task_id = await submitted(http)
    live = await http.delete(f"/api/v1/tasks/{task_id}")
    end(parts, task_id)
    gone = await http.delete(f"/api/v1/tasks/{task_id}")

    assert (live.status_code, live.json()["task_id"]) == (409, task_id)
    assert (gone.status_code, gone.content) == (204, b"")
    assert (await http.get(f"/api/v1/tasks/{task_id}")).status_code == 404


async def test_a_task_is_canceled_once(http: httpx.AsyncClient) -> None:
    task_id = await submitted(http)
    first = await http.post(f"/api/v1/tasks/{task_id}/cancel")
    second = await http.post(f"/api/v1/tasks/{task_id}/cancel")

    assert (first.status_code, first.json()["status"]) == (200, "canceled")
    assert second.status_code == 409


async def test_an_outside_agent_reports_for_a_role(http: httpx.AsyncClient) -> None:
    task_id = await submitted(http)
    report = {"role": "qa", "outcome": "fail", "sender": "ci", "why": "3 != 4"}
    answer = await http.post(f"/api/v1/tasks/{task_id}/feedback", json=report)

    assert answer.status_code == 202
    last = answer.json()["history"][-1]
    assert (last["type"], last["via"], last["sender"]) == ("feedback.received", "rest", "ci")


async def test_a_report_for_another_task_than_the_path_says_is_refused(http: httpx.AsyncClient) -> None:
    task_id = await submitted(http)
    report = {"role": "qa", "outcome": "fail", "task_id": str(uuid4())}
    answer = await http.post(f"/api/v1/tasks/{task_id}/feedback", json=report)

    assert (answer.status_code, answer.json()["pointer"]) == (422, "/task_id")


@pytest.mark.parametrize(
    "task_id",
    [
        "1",
        "..",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "%00",
        "A" * 3000,
        f"{{{NOBODYS_ID}}}",
        NOBODYS_ID.replace("-", ""),
        "%ff%fe",
    ],
)
async def test_an_id_that_is_no_uuid_is_no_task_and_reaches_nobody(
    parts: Parts, http: httpx.AsyncClient, task_id: str
) -> None:
    parts.engine.failing = AssertionError("the engine was asked")

    for method, tail in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/events")):
        answer = await http.request(method, f"/api/v1/tasks/{task_id}{tail}")
        assert answer.status_code in {404, 405}, answer.text
        assert answer.headers["content-type"] == "application/problem+json"


async def test_options_tell_every_method_of_a_path(http: httpx.AsyncClient) -> None:
    answer = await http.options(f"/api/v1/tasks/{uuid4()}")

    assert (answer.status_code, answer.headers["allow"]) == (204, "DELETE, GET, OPTIONS")


async def first_task(parts: Parts) -> str:
    async with asyncio.timeout(60):
        while not parts.engine.tasks or not parts.engine.followers:
            await asyncio.sleep(0.01)
    return next(iter(parts.engine.tasks))


@pytest.mark.parametrize(
    ("header", "in_body", "kept"),
    [
        ("local", "any", "local"),
        ("any", "local", "local"),
        ("any", "any", "any"),
        (None, "any", "any"),
    ],
)
async def test_a_header_makes_a_task_private_and_never_less(
    http: httpx.AsyncClient, header: str | None, in_body: str, kept: str
) -> None:
    headers = {} if header is None else {"X-Privacy": header}
    answer = await http.post(PLANNER, json={**BODY, "privacy": in_body}, headers=headers)

    assert answer.json()["privacy"] == kept


async def test_another_privacy_is_refused_with_those_there_are(parts: Parts, http: httpx.AsyncClient) -> None:
    answer = await http.post(PLANNER, json=BODY, headers={"X-Privacy": "secret"})

    assert answer.status_code == 422
    assert (answer.json()["parameter"], answer.json()["choices"]) == ("X-Privacy", ["any", "local"])
    assert not parts.engine.tasks


async def test_a_task_tells_in_headers_which_llm_answered_last_and_why(
    parts: Parts, http: httpx.AsyncClient
) -> None:
    task_id = await submitted(http)
    before = await http.get(f"/api/v1/tasks/{task_id}")
    now = datetime.now(UTC)
    call = LLMCall(
        llm="embedded",
        model="m",
        source="local",
        input_tokens=1,
        output_tokens=1,
        finish_reason="stop",
        time_to_first_token_ms=1,
        duration_ms=1,
        prompt_sha256="",
        decision=Decision(chosen="embedded", reason="état\n\0" + "x" * 5000, strategy="double"),
    )
    parts.engine.happen(
        task_id,
        Started(at=now, generation=1),
        StepStarted(at=now, step=1, role="planner", attempt=1, hop=Hop(on="entry", why="")),
        StepFinished(at=now, step=1, role="planner", outcome="done", call=call, duration_ms=1),
    )
    after = await http.get(f"/api/v1/tasks/{task_id}")

    assert "x-llm" not in before.headers
    assert after.headers["x-llm"] == "embedded"
    assert after.headers["x-routing-reason"].startswith(r"\xe9tat\n\x00xxx")
    assert len(after.headers["x-routing-reason"]) == 300
