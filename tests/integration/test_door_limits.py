"""The door on a real server: rates, budgets, projects and tiers, and that counters outlive the process."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.servers.process import ServerProcess, scripted, write_config

LAPTOP, PHONE = "sk-the-laptop", "sk-the-phone"
REWRITE = "/api/v1/productivity/rewrite"
TASK: dict[str, Any] = {"payload": {"text": "Hello", "instructions": "shorter"}}
HOUR = {"per_s": 3600}


def chat(text: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": text}], "max_tokens": 20, **more}


@asynccontextmanager
async def server(
    folder: Path, *, laptop: list[dict[str, Any]] | None = None, **changes: Any
) -> AsyncIterator[tuple[ServerProcess, httpx.AsyncClient]]:
    """A server with two keys; `laptop` are the first one's limits."""
    keys = {
        "laptop": {"api_key": {"env": "LAPTOP"}, "limits": laptop or []},
        "phone": {"api_key": {"env": "PHONE"}, "limits": laptop or []},
    }
    gateway = {"keys": keys, **changes.pop("gateway", {})}
    whole = {"llms": scripted("hi"), "messaging": {"enabled": False}, "gateway": gateway, **changes}
    config = write_config(folder, **whole)
    given: dict[str, Any] = {"AI_AGENT_SERVER_API_KEY": "", "LAPTOP": LAPTOP, "PHONE": PHONE}
    async with ServerProcess(folder / "state", config, **given) as running, running.http() as http:
        yield running, http


def shows(key: str, **headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", **headers}


async def say(
    http: httpx.AsyncClient, key: str = LAPTOP, /, text: str = "Hello", **headers: str
) -> httpx.Response:
    return await http.post("/v1/chat/completions", json=chat(text), headers=shows(key, **headers))


async def test_the_last_request_is_served_and_the_next_is_told_when_to_come_again(tmp_path: Path) -> None:
    async with server(tmp_path, laptop=[{**HOUR, "requests": 2}]) as (_, http):
        good = [await say(http) for _ in range(2)]
        refused = await say(http)
        task = await http.post(REWRITE, json=TASK, headers=shows(LAPTOP))
        looked = await http.get("/api/v1/tasks", headers=shows(LAPTOP))
        other = await say(http, PHONE)

    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in good] == ["1", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in good} == {"2"}
    assert (refused.status_code, task.status_code) == (429, 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert 3500 < int(refused.headers["retry-after"]) <= 3600
    assert refused.headers["x-ratelimit-reset-requests"] in {"1h0m0s", *(f"59m{s}s" for s in range(60))}
    # An hour is not waited for: a client that repeats by itself would only be a nuisance.
    assert refused.headers["x-should-retry"] == "false"
    assert task.json()["type"].endswith("#limit-reached")
    assert task.headers["content-type"] == "application/problem+json"
    assert looked.status_code == 200
    assert (other.status_code, other.headers["x-ratelimit-remaining-requests"]) == (200, "1")


async def test_tokens_are_set_aside_by_estimate_and_counted_as_used(tmp_path: Path) -> None:
    async with server(tmp_path, laptop=[{**HOUR, "tokens": 100}]) as (_, http):
        good = await say(http)
        used = good.json()["usage"]["total_tokens"]
        models = await http.post("/v1/chat/completions", json=chat("x " * 500), headers=shows(LAPTOP))
        again = await say(http)

    assert 0 < used < 30
    assert models.status_code == 429
    assert models.headers["x-should-retry"] == "false"
    assert "retry-after" not in models.headers
    assert models.headers["x-ratelimit-remaining-tokens"] == str(100 - used)
    assert again.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_who_leaves_before_the_first_token_pays_for_the_prompt(tmp_path: Path, stream: bool) -> None:
    """The engine has read it; what might have been written goes back."""
    limits = [{**HOUR, "tokens": 10_000}, {**HOUR, "gpu_s": 1000}]
    llms = scripted("hi", delay_s=60)
    async with server(tmp_path, laptop=limits, llms=llms) as (_, http):
        body = chat("word " * 400, stream=stream)
        leaving = asyncio.create_task(
            http.post("/v1/chat/completions", json=body, headers=shows(LAPTOP), timeout=60)
        )
        async with asyncio.timeout(60):
            while not await in_flight(http):
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.3)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            while await in_flight(http):
                await asyncio.sleep(0.05)
    assert 400 <= used(tmp_path, "tokens") <= 1000
    assert 0.3 <= used(tmp_path, "gpu_s") < 60


async def test_who_leaves_while_waiting_for_a_slot_pays_nothing(tmp_path: Path) -> None:
    llms = {"scripted": {**scripted("hi", delay_s=60)["scripted"], "slots": 1}}
    async with server(tmp_path, laptop=[{**HOUR, "tokens": 10_000}], llms=llms) as (_, http):

        def asking(key: str) -> asyncio.Task[httpx.Response]:
            body = chat("word " * 400)
            return asyncio.create_task(
                http.post("/v1/chat/completions", json=body, headers=shows(key), timeout=60)
            )

        async with asyncio.timeout(60):
            first = asking(PHONE)
            while not await in_flight(http):
                await asyncio.sleep(0.05)
            second = asking(LAPTOP)
            while not await waiting(http):
                await asyncio.sleep(0.05)
            for leaving in (second, first):
                leaving.cancel()
                await asyncio.gather(leaving, return_exceptions=True)
            while await in_flight(http):
                await asyncio.sleep(0.05)
    kept = json.loads((tmp_path / "state" / "limits.json").read_text())["meters"]
    assert {meter["subject"] for meter in kept if meter["used"]} == {"key:phone"}


def used(folder: Path, unit: str) -> float:
    """What the file of counters says of all keys together."""
    kept = json.loads((folder / "state" / "limits.json").read_text())["meters"]
    amounts: list[float] = [
        amount for meter in kept if meter["unit"] == unit for _, _, amount in meter["used"]
    ]
    return sum(amounts)


async def in_flight(http: httpx.AsyncClient) -> bool:
    (llm,) = (await http.get("/api/v1/llms", headers=shows(PHONE))).json()["items"]
    return bool(llm["in_flight"])


async def waiting(http: httpx.AsyncClient) -> bool:
    told = (await http.get("/api/v1/metrics", headers=shows(PHONE))).json()
    return bool(told["state"]["llms"]["scripted"]["waiting"])


async def test_a_rate_is_waited_for_by_the_sdk_and_then_served(tmp_path: Path) -> None:
    messages: Any = chat()["messages"]
    async with (
        server(tmp_path, laptop=[{"per_s": 2, "requests": 1}]) as (running, _),
        openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=LAPTOP, max_retries=3) as client,
    ):
        answers = [
            await client.chat.completions.create(model="scripted", messages=messages) for _ in range(3)
        ]
    assert [answer.choices[0].message.content for answer in answers] == ["hi"] * 3


async def test_a_budget_in_total_is_an_error_that_no_sdk_repeats(tmp_path: Path) -> None:
    llms = {"scripted": {**scripted("hi")["scripted"], "cost_per_million_output_usd": 1_000_000}}
    async with server(tmp_path, laptop=[{"usd": 1.5}], llms=llms) as (running, http):
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=LAPTOP, max_retries=5) as client:
            messages: Any = chat()["messages"]
            for _ in range(10):
                try:
                    await client.chat.completions.create(model="scripted", messages=messages)
                except openai.RateLimitError as exc:
                    refused = exc
                    break
            else:
                pytest.fail("the budget was never spent")
        models = await http.get("/v1/models", headers=shows(LAPTOP))
    assert refused.code == "insufficient_quota"
    assert refused.response.headers["x-should-retry"] == "false"
    assert models.status_code == 200


async def test_counters_survive_a_restart_and_a_kill(tmp_path: Path) -> None:
    limits = [{**HOUR, "requests": 3, "tokens": 10_000}]
    async with server(tmp_path, laptop=limits) as (_, http):
        first = await say(http)
    async with server(tmp_path, laptop=limits) as (running, http):
        second = await say(http)
        async with asyncio.timeout(60):
            while used(tmp_path, "requests") < 2:
                await asyncio.sleep(0.2)
        await running.kill()
    async with server(tmp_path, laptop=limits) as (_, http):
        third, fourth = await say(http), await say(http)

    remaining = [answer.headers["x-ratelimit-remaining-requests"] for answer in (first, second, third)]
    assert remaining == ["2", "1", "0"]
    tokens = [int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in (first, second, third)]
    assert tokens == sorted(tokens, reverse=True)
    assert len(set(tokens)) == 3
    assert fourth.status_code == 429


async def test_a_file_of_counters_that_is_broken_is_told_and_begun_again(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "limits.json").write_text('{"meters": [{"subject": 7}]}')
    async with server(tmp_path, laptop=[{**HOUR, "requests": 3}]) as (running, http):
        assert (await say(http)).headers["x-ratelimit-remaining-requests"] == "2"
        assert "limits.unreadable" in running.log.read_text()
    kept = json.loads((tmp_path / "state" / "limits.json").read_text())
    assert [meter["subject"] for meter in kept["meters"]] == ["key:laptop"]


async def test_what_a_task_uses_is_charged_to_the_key_that_sent_it(tmp_path: Path) -> None:
    async with server(tmp_path, laptop=[{**HOUR, "tokens": 5000}]) as (_, http):
        task = await http.post(REWRITE, json=TASK, params={"wait": 60}, headers=shows(LAPTOP))
        usage = task.json()["usage"]
        spent = usage["input_tokens"] + usage["output_tokens"]
        mine, other = await say(http), await say(http, PHONE)
    assert task.json()["history"][0]["sender"] == {"key": "laptop"}
    chatted = mine.json()["usage"]["total_tokens"]
    assert int(mine.headers["x-ratelimit-remaining-tokens"]) <= 5000 - spent
    assert spent > 0
    assert int(other.headers["x-ratelimit-remaining-tokens"]) > 5000 - spent - chatted


async def test_a_role_asked_as_a_chat_is_charged_once(tmp_path: Path) -> None:
    async with server(tmp_path, laptop=[{**HOUR, "tokens": 5000, "requests": 5}]) as (_, http):
        body = chat(json.dumps(TASK["payload"]), model="productivity/rewrite")
        role = await http.post("/v1/chat/completions", json=body, headers=shows(LAPTOP))
        used = role.json()["usage"]["total_tokens"]
        refused = await http.post("/v1/chat/completions", json=chat("x " * 50_000), headers=shows(LAPTOP))
    assert role.status_code == 200
    assert used > 0
    assert refused.headers["x-ratelimit-remaining-tokens"] == str(5000 - used)
    assert refused.headers["x-ratelimit-remaining-requests"] == "3"


async def test_a_project_is_bounded_for_all_its_keys_together(tmp_path: Path) -> None:
    projects = {"shop": {"paths": ["/home/me/shop"], "limits": [{**HOUR, "requests": 2}]}}
    async with server(tmp_path, projects=projects) as (_, http):
        by_name = await say(http, LAPTOP, **{"X-Project": "shop"})
        system = {"role": "system", "content": "<env>\nWorking directory: /home/me/shop/src\n</env>"}
        body = chat()
        body["messages"] = [system, *body["messages"]]
        by_path = await http.post("/v1/chat/completions", json=body, headers=shows(PHONE))
        refused = [
            await http.post("/v1/chat/completions", json=body, headers=shows(LAPTOP)),
            await say(http, PHONE, **{"X-Project": "shop"}),
            # Another name, or a typo, leads not past the project of the folder.
            await http.post(
                "/v1/chat/completions", json=body, headers={**shows(PHONE), "X-Project": "no-such-project"}
            ),
        ]
        outside = [await say(http), await say(http, **{"X-Project": "no-such-project"})]
    assert [by_name.status_code, by_path.status_code] == [200, 200]
    assert [answer.status_code for answer in refused] == [429, 429, 429]
    assert "'shop'" in refused[0].json()["error"]["message"]
    assert [answer.status_code for answer in outside] == [200, 200]


async def test_a_tier_has_limits_for_each_caller(tmp_path: Path) -> None:
    tiers = {"small": [{**HOUR, "requests": 1}]}
    async with server(tmp_path, gateway={"limits": {"tiers": tiers}}) as (_, http):
        answers = [await http.post("/v1/chat/completions", json=chat(model="small"), headers=shows(key))
                   for key in (LAPTOP, LAPTOP, PHONE)]  # fmt: skip
    assert [answer.status_code for answer in answers] == [200, 429, 200]


async def test_gpu_time_is_counted_and_bounded(tmp_path: Path) -> None:
    async with server(tmp_path, laptop=[{**HOUR, "gpu_s": 0.3}], llms=scripted("hi", delay_s=0.5)) as (
        _,
        http,
    ):
        first, second = await say(http), await say(http)
    assert (first.status_code, second.status_code) == (200, 429)
    assert "GPU" in second.json()["error"]["message"]


async def test_without_keys_each_address_has_a_share_of_its_own(tmp_path: Path) -> None:
    gateway = {"limits": {"address": [{**HOUR, "requests": 1}]}}
    config = write_config(tmp_path, llms=scripted("hi"), messaging={"enabled": False}, gateway=gateway)
    given: dict[str, Any] = {"AI_AGENT_SERVER_API_KEY": ""}
    async with ServerProcess(tmp_path / "state", config, **given) as running:
        statuses = []
        for address, headers in (
            ("127.0.0.1", {}), ("127.0.0.1", {"X-Forwarded-For": "203.0.113.9"}), ("127.0.0.2", {}),
            ("127.0.0.2", {}),
        ):  # fmt: skip
            transport = httpx.AsyncHTTPTransport(local_address=address)
            async with httpx.AsyncClient(base_url=running.url, transport=transport) as http:
                answer = await http.post("/v1/chat/completions", json=chat(), headers=headers)
                statuses.append(answer.status_code)
    assert statuses == [200, 429, 200, 429]


async def test_a_reload_changes_limits_and_keeps_what_was_used(tmp_path: Path) -> None:
    async with server(tmp_path, laptop=[{**HOUR, "requests": 1}]) as (running, http):
        first, refused = await say(http), await say(http)
        assert running.config is not None
        document = json.loads(running.config.read_text())
        document["gateway"]["keys"]["laptop"]["limits"] = [{**HOUR, "requests": 3}]
        running.config.write_text(json.dumps(document))
        async with asyncio.timeout(60):
            while (again := await say(http)).status_code == 429:
                await asyncio.sleep(0.2)
    assert (first.status_code, refused.status_code) == (200, 429)
    assert again.headers["x-ratelimit-remaining-requests"] == "1"
