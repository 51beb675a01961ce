"""The exact cache as clients meet it: three surfaces, whole and streamed, keys, limits, a reload."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import pytest_asyncio

from tests.servers.gateway import Gateway, configuration, running
from tests.servers.openai_double import OpenAIDouble
from tests.servers.ports import held_port
from tests.servers.process import ServerProcess, scripted, write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANSWER = "The answer is 42, of course."
USE = {"X-Cache": "use"}
LAPTOP, PHONE = "sk-the-laptop", "sk-the-phone"
SOON_S = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    async with running(tmp_path_factory.mktemp("cache")) as gateway:
        yield gateway


@pytest_asyncio.fixture(loop_scope="module")
async def first(gateway: Gateway) -> AsyncIterator[OpenAIDouble]:
    async with gateway.doubles() as (first, _):
        yield first


@pytest_asyncio.fixture(loop_scope="module")
async def http(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with gateway.process.http() as http:
        yield http


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "first", "messages": [{"role": "user", "content": text}], **more}


def asked(double: OpenAIDouble) -> int:
    return sum(request.method == "POST" for request in double.requests)


async def until(http: httpx.AsyncClient, **wanted: int) -> None:
    """Until the metrics of the cache say this."""
    async with asyncio.timeout(SOON_S):
        while True:
            cache = (await http.get("/api/v1/metrics")).json()["gateway"]["cache"]
            if all(cache[name] == value for name, value in wanted.items()):
                return
            await asyncio.sleep(0.02)


@asynccontextmanager
async def joined(http: httpx.AsyncClient, text: str) -> AsyncIterator[AsyncIterator[str]]:
    """A streamed answer of which something came: who reads it waits for the one question with the others."""
    body = chat(text, stream=True)
    async with http.stream("POST", "/v1/chat/completions", json=body, headers=USE) as answer:
        lines = answer.aiter_lines()
        async for line in lines:
            if line.startswith("data: "):
                break
        yield lines


async def test_openais_sdk_gets_the_same_answer_again_whole_and_streamed(
    gateway: Gateway, first: OpenAIDouble
) -> None:
    text: Any = [{"role": "user", "content": "by OpenAI's SDK"}]
    async with openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, default_headers=USE
    ) as client:
        answers = [
            await client.chat.completions.with_raw_response.create(model="first", messages=text)
            for _ in range(2)
        ]
        stream = await client.chat.completions.create(
            model="first", messages=text, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        response = await client.responses.create(model="first", input="by OpenAI's SDK")
        events = await client.responses.create(model="first", input="by OpenAI's SDK", stream=True)
        last = [event async for event in events][-1]
    assert asked(first) == 1
    assert [answer.headers["x-cache"] for answer in answers] == ["miss", "hit"]
    assert ["age" in answer.headers for answer in answers] == [False, True]
    assert "cache" in answers[1].headers["x-routing-reason"]
    assert answers[1].headers["x-llm"] == "first"
    one, again = [answer.parse() for answer in answers]
    assert one.id != again.id
    assert (one.choices, one.usage) == (again.choices, again.usage)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-1].usage == one.usage
    assert response.output_text == ANSWER
    assert last.type == "response.completed"
    assert last.response.output_text == ANSWER


async def test_anthropics_sdk_gets_what_was_streamed_whole(gateway: Gateway, first: OpenAIDouble) -> None:
    question: Any = {
        "model": "first",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": "by Anthropic's SDK"}],
        "tools": [{"name": "look", "input_schema": {"type": "object", "properties": {"a": {"type": "string"}},
                                                    "required": ["a"]}}],
    }  # fmt: skip
    async with anthropic.AsyncAnthropic(
        base_url=gateway.url, api_key="none", max_retries=0, default_headers=USE
    ) as client:
        async with client.messages.stream(**question) as stream:
            streamed = await stream.get_final_message()
        whole = await client.messages.with_raw_response.create(**question)
    assert asked(first) == 1
    assert whole.headers["x-cache"] == "hit"
    message = await whole.parse()
    assert message.content == streamed.content
    assert [block.type for block in message.content] == ["tool_use"]
    assert (message.stop_reason, message.usage) == (streamed.stop_reason, streamed.usage)
    assert message.id != streamed.id


async def test_it_is_used_by_who_asks_for_it_alone(http: httpx.AsyncClient, first: OpenAIDouble) -> None:
    body = chat("who asks for it")
    told = []
    for header in (None, "use", "off", "use", "refresh", "use"):
        answer = await http.post(
            "/v1/chat/completions", json=body, headers={} if header is None else {"X-Cache": header}
        )
        told.append(answer.headers.get("x-cache"))
    assert told == [None, "miss", None, "hit", "miss", "hit"]
    assert asked(first) == 4
    wrong = await http.post("/v1/chat/completions", json=body, headers={"X-Cache": "yes"})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["message"] == (
        "Invalid 'X-Cache': no such use of the cache (choices: off, use, refresh)"
    )


async def test_a_role_is_never_answered_from_it(http: httpx.AsyncClient, first: OpenAIDouble) -> None:
    body = chat("a task each time") | {"model": "desk/clerk"}
    answers = [await http.post("/v1/chat/completions", json=body, headers=USE) for _ in range(2)]
    assert answers[0].headers["x-task-id"] != answers[1].headers["x-task-id"]
    assert "x-cache" not in answers[1].headers


async def test_a_stream_that_was_cut_is_asked_for_anew(http: httpx.AsyncClient, first: OpenAIDouble) -> None:
    body = chat("cut", stream=True)
    first.fault = "cut"
    broken = await http.post("/v1/chat/completions", json=body, headers=USE)
    assert "[DONE]" not in broken.text
    assert "error" in broken.text
    first.fault = None
    whole = await http.post("/v1/chat/completions", json=body, headers=USE)
    assert whole.headers["x-cache"] == "miss"
    assert whole.text.endswith("data: [DONE]\n\n")


async def test_many_who_ask_at_once_are_one_question(http: httpx.AsyncClient, first: OpenAIDouble) -> None:
    first.piece_s = 0.05
    bodies = [chat("at once", stream=bool(number % 2)) for number in range(8)]
    answers = await asyncio.gather(
        *(http.post("/v1/chat/completions", json=body, headers=USE) for body in bodies)
    )
    assert asked(first) == 1
    assert sorted(answer.headers["x-cache"] for answer in answers) == ["hit"] * 7 + ["miss"]
    assert {answer.status_code for answer in answers} == {200}


async def test_who_asked_may_leave_and_the_last_one_frees_the_slot(
    http: httpx.AsyncClient, first: OpenAIDouble
) -> None:
    first.piece_s = 0.2

    async def ask(text: str) -> None:
        await http.post("/v1/chat/completions", json=chat(text), headers=USE)

    leaving = asyncio.create_task(ask("one leaves"))
    await first.until_writing()
    async with joined(http, "one leaves") as staying:
        leaving.cancel()
        await asyncio.wait((leaving,))
        rest = [line async for line in staying if line]
    assert " course." in rest[-3]
    assert rest[-1] == "data: [DONE]"
    assert (asked(first), first.hung_up) == (1, 0)

    first.reply = "word " * 1000
    leaving = asyncio.create_task(ask("both leave"))
    await first.until_writing()
    async with joined(http, "both leave"):
        leaving.cancel()
        await asyncio.wait((leaving,))
    await first.until_hung_up()
    assert asked(first) == 2


async def test_keys_have_their_own_answers_and_pay_for_no_hit(tmp_path: Path) -> None:
    def key(env: str, **more: Any) -> dict[str, Any]:
        limits = [{"per_s": 3600, "requests": 6, "tokens": 1000}]
        return {"api_key": {"env": env}, "limits": limits, **more}

    config = write_config(
        tmp_path,
        llms=scripted("one two three"),
        messaging={"enabled": False},
        gateway={"keys": {"laptop": key("LAPTOP", cache=True), "phone": key("PHONE")}},
    )
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 600}

    async def ask(key: str, **headers: str) -> httpx.Response:
        shown = {"Authorization": f"Bearer {key}", **headers}
        return await client.post("/v1/chat/completions", json=body, headers=shown)

    environ: dict[str, Any] = {"LAPTOP": LAPTOP, "PHONE": PHONE, "AI_AGENT_SERVER_API_KEY": "sk-admin"}
    async with ServerProcess(tmp_path / "state", config, **environ) as process, process.http() as client:
        answers = [await ask(LAPTOP) for _ in range(5)]
        other = [await ask(PHONE), await ask(PHONE, **USE), await ask(PHONE, **USE)]
        async with asyncio.timeout(SOON_S):
            while True:
                metrics = (await client.get("/api/v1/metrics", headers={"x-api-key": "sk-admin"})).json()
                if metrics["gateway"]["cache"]["hits"] >= 5 and metrics["use"]["total"]["calls"] >= 3:
                    break
                await asyncio.sleep(0.02)
        text = (await client.get("/metrics", headers={"x-api-key": "sk-admin"})).text
        too_many = [(await ask(LAPTOP)).status_code for _ in range(2)]
    # 600 are set aside for a question, so that a second one beside it would not fit.
    assert [answer.headers["x-cache"] for answer in answers] == ["miss", *["hit"] * 4]
    left = [answer.headers["x-ratelimit-remaining-tokens"] for answer in answers]
    assert left[1:] == [str(1000 - 4)] * 4
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == [
        "5",
        "4",
        "3",
        "2",
        "1",
    ]
    assert answers[4].json()["usage"]["total_tokens"] == 4
    assert [answer.headers.get("x-cache") for answer in other] == [None, "miss", "hit"]
    assert too_many == [200, 429]
    assert metrics["gateway"]["cache"] == {
        "answers": 2, "size_bytes": metrics["gateway"]["cache"]["size_bytes"],
        "hits": 5, "misses": 2, "tokens_saved": 20,
    }  # fmt: skip
    assert (metrics["use"]["total"]["calls"], metrics["use"]["tokens_total"]) == (3, 12)
    assert "ai_agent_server_gateway_cache_hits_total 5.0" in text
    assert "ai_agent_server_gateway_cache_saved_tokens_total 20.0" in text


async def test_a_reload_forgets_what_a_changed_llm_said(tmp_path: Path) -> None:
    (tmp_path / "clerk.md").write_text("You are a clerk.")
    path = tmp_path / "configuration.json"
    with held_port() as away:
        document = configuration((away, away), cache={"by_default": True})
    document["llms"]["other"] = {**document["llms"]["script"], "options": {"replies": ["another"]}}
    path.write_text(json.dumps(document))

    async def ask(model: str) -> tuple[str, str]:
        answer = await client.post("/v1/chat/completions", json=chat("Hello") | {"model": model})
        return answer.headers["x-cache"], answer.json()["choices"][0]["message"]["content"]

    async with ServerProcess(tmp_path / "state", path) as process, process.http() as client:
        before = [await ask(model) for model in ("script", "other", "script", "other")]
        document["llms"]["script"]["options"] = {"replies": ["a new answer"]}
        path.write_text(json.dumps(document))
        await until(client, answers=1)
        after = [await ask(model) for model in ("script", "other")]
    assert before == [("miss", "the clerk's answer"), ("miss", "another"),
                      ("hit", "the clerk's answer"), ("hit", "another")]  # fmt: skip
    assert after == [("miss", "a new answer"), ("hit", "another")]
