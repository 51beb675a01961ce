"""OpenAI's own SDK against a real server: every request that it makes, every answer that it reads."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

from tests.servers.gateway import Gateway, running
from tests.servers.http_double import Fault
from tests.servers.openai_double import OpenAIDouble

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO: Any = [{"role": "user", "content": "What is the answer?"}]
ANSWER = "The answer is 42, of course."
LOOK: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PNG = "data:image/png;base64,iVBORw0KGgo="


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    # Not shorter: an engine that was silent for so long has no status any more when it fails.
    async with running(folder, aliases={"gpt-*": "main", "claude-*": "small"}, keep_alive_s=1.0) as gateway:
        yield gateway


@pytest_asyncio.fixture(loop_scope="module")
async def doubles(gateway: Gateway) -> AsyncIterator[tuple[OpenAIDouble, OpenAIDouble]]:
    async with gateway.doubles() as doubles:
        yield doubles


@pytest.fixture
def first(doubles: tuple[OpenAIDouble, OpenAIDouble]) -> OpenAIDouble:
    return doubles[0]


@pytest.fixture
def second(doubles: tuple[OpenAIDouble, OpenAIDouble]) -> OpenAIDouble:
    return doubles[1]


@pytest_asyncio.fixture(loop_scope="module")
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def chunks_of(stream: openai.AsyncStream[ChatCompletionChunk]) -> list[ChatCompletionChunk]:
    return [chunk async for chunk in stream]


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def chats(double: OpenAIDouble) -> list[Any]:
    """The chats that were asked for; the server looks at the models now and then."""
    return [request.json for request in double.requests if request.method == "POST"]


async def until_asked(double: OpenAIDouble, times: int = 1) -> None:
    """So many chats have been asked for."""
    async with asyncio.timeout(60):
        while len(chats(double)) < times:
            await asyncio.sleep(0.01)


async def until_idle(gateway: Gateway) -> None:
    """Every slot is free again."""
    async with gateway.process.http() as http, asyncio.timeout(60):
        while any(llm["in_flight"] for llm in (await http.get("/api/v1/llms")).json()["items"]):
            await asyncio.sleep(0.02)


# Whole answers


async def test_a_whole_answer(client: openai.AsyncOpenAI, first: OpenAIDouble) -> None:
    answer = await client.chat.completions.create(model="first", messages=HELLO)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (ANSWER, "stop")
    assert choice.message.refusal is None
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "first"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        11,
        6,
        17,
    )


async def test_the_headers_tell_who_answered_and_why(client: openai.AsyncOpenAI, first: OpenAIDouble) -> None:
    raw = await client.chat.completions.with_raw_response.create(model="first", messages=HELLO)
    assert raw.headers["x-llm"] == "first"
    assert raw.headers["x-tier"] == "small"
    assert "asked for by name" in raw.headers["x-routing-reason"]
    assert raw.headers["x-request-id"] == raw.request_id
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert float(raw.headers["x-overhead-ms"]) >= 0


async def test_a_clients_trace_goes_on_to_the_engine(client: openai.AsyncOpenAI, first: OpenAIDouble) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for sent in (trace, "00-nonsense"):
        await client.chat.completions.create(
            model="first", messages=HELLO, extra_headers={"traceparent": sent}
        )
    assert [r.headers.get("traceparent") for r in first.requests if r.method == "POST"] == [trace, None]


async def test_what_steers_the_answer_reaches_the_engine(
    client: openai.AsyncOpenAI, first: OpenAIDouble
) -> None:
    await client.chat.completions.create(
        model="first",
        messages=[{"role": "developer", "content": "Be brief."}, *HELLO],
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["END"],
        max_completion_tokens=3,
        user="somebody",
        metadata={"unknown": "tolerated"},
    )
    body = chats(first)[-1]
    assert {key: body[key] for key in ("temperature", "top_p", "seed", "stop", "max_tokens")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["END"],
        "max_tokens": 3,
    }
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


async def test_an_answer_that_was_cut_by_its_limit_says_so(
    client: openai.AsyncOpenAI, first: OpenAIDouble
) -> None:
    answer = await client.chat.completions.create(model="first", messages=HELLO, max_tokens=2)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("The answer", "length")


async def test_a_tool_is_called_and_its_result_read(client: openai.AsyncOpenAI, first: OpenAIDouble) -> None:
    answer = await client.chat.completions.create(model="first", messages=HELLO, tools=[LOOK])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"city": "Paris"})
    result = {"role": "tool", "tool_call_id": call.id, "content": "It is 42."}
    conversation: Any = [*HELLO, choice.message, result]
    again = await client.chat.completions.create(model="first", messages=conversation, tools=[LOOK])
    assert again.choices[0].message.content == ANSWER


async def test_a_named_tool_is_the_only_one_that_may_be_called(
    client: openai.AsyncOpenAI, first: OpenAIDouble
) -> None:
    other: Any = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
    await client.chat.completions.create(
        model="first",
        messages=HELLO,
        tools=[other, LOOK],
        tool_choice={"type": "function", "function": {"name": "look"}},
    )
    body = chats(first)[-1]
    assert [tool["function"]["name"] for tool in body["tools"]] == ["look"]
    assert body["tool_choice"] == "required"


async def test_an_answer_obeys_a_schema(client: openai.AsyncOpenAI, first: OpenAIDouble) -> None:
    class Place(BaseModel):
        city: str

    answer = await client.chat.completions.parse(model="first", messages=HELLO, response_format=Place)
    assert answer.choices[0].message.parsed == Place(city="Paris")


async def test_json_mode_asks_for_an_object(client: openai.AsyncOpenAI, first: OpenAIDouble) -> None:
    answer = await client.chat.completions.create(
        model="first", messages=HELLO, response_format={"type": "json_object"}
    )
    assert json.loads(answer.choices[0].message.content or "") == {}


async def test_an_image_is_sent_along(client: openai.AsyncOpenAI, first: OpenAIDouble) -> None:
    parts: Any = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": PNG}}]
    await client.chat.completions.create(model="first", messages=[{"role": "user", "content": parts}])
    assert chats(first)[-1]["messages"][0]["content"][1]["image_url"]["url"] == PNG


# Streams


async def test_a_stream(client: openai.AsyncOpenAI, first: OpenAIDouble) -> None:
    chunks = await chunks_of(await client.chat.completions.create(model="first", messages=HELLO, stream=True))
    assert text_of(chunks) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None and chunk.model == "first" for chunk in chunks)


async def test_a_stream_with_its_usage(client: openai.AsyncOpenAI, first: OpenAIDouble) -> None:
    *chunks, last = await chunks_of(
        await client.chat.completions.create(
            model="first", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 17


async def test_a_streamed_tool_call(client: openai.AsyncOpenAI, first: OpenAIDouble) -> None:
    async with client.chat.completions.stream(model="first", messages=HELLO, tools=[LOOK]) as stream:
        completion = await stream.get_final_completion()
    assert completion.choices[0].message.tool_calls is not None
    (call,) = completion.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}


async def test_a_stream_names_its_llm_before_the_first_chunk(
    client: openai.AsyncOpenAI, first: OpenAIDouble
) -> None:
    raw = await client.chat.completions.with_raw_response.create(model="first", messages=HELLO, stream=True)
    assert raw.headers["x-llm"] == "first"
    assert raw.headers["x-accel-buffering"] == "no"
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert text_of([chunk async for chunk in raw.parse()]) == ANSWER


async def test_a_client_that_waits_hears_something_before_the_first_token(
    gateway: Gateway, first: OpenAIDouble
) -> None:
    first.fault = "silent"
    body = {"model": "first", "messages": HELLO, "stream": True}
    async with (
        gateway.process.http() as http,
        http.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        assert answer.status_code == 200
        assert "x-llm" not in answer.headers
        lines = answer.aiter_lines()
        assert [await anext(lines) for _ in range(3)] == [": keep-alive", "", ": keep-alive"]
    await until_idle(gateway)


# Models, tiers, aliases


async def test_the_models_that_there_are(client: openai.AsyncOpenAI, gateway: Gateway) -> None:
    models = (await client.models.list()).data
    assert [model.id for model in models] == [
        "first",
        "second",
        "script",
        "auto",
        "small",
        "main",
        "desk/clerk",
        "desk/reader",
    ]
    assert all(model.object == "model" and model.created > 0 and model.owned_by for model in models)


@pytest.mark.parametrize("name", ["first", "main", "auto", "desk/clerk"])
async def test_one_model(client: openai.AsyncOpenAI, gateway: Gateway, name: str) -> None:
    assert (await client.models.retrieve(name)).id == name


async def test_a_model_that_there_is_not(client: openai.AsyncOpenAI, gateway: Gateway) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gone/llm", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("model", "extra", "served"),
    [
        ("auto", {}, ("small", "first")),
        ("auto", {"max_tokens": 600}, ("main", "second")),
        ("auto", {"tools": [LOOK]}, ("main", "second")),
        ("auto", {"extra_headers": {"X-Tier": "main"}}, ("main", "second")),
        ("small", {}, ("small", "first")),
        ("main", {}, ("main", "second")),
        ("small", {"extra_headers": {"X-Tier": "main"}}, ("main", "second")),
        ("gpt-4o-mini", {}, ("main", "second")),
        ("claude-haiku", {}, ("small", "first")),
        ("second", {}, ("main", "second")),
    ],
)
async def test_the_tier_and_the_llm_follow_from_what_is_asked(
    client: openai.AsyncOpenAI,
    doubles: tuple[OpenAIDouble, OpenAIDouble],
    model: str,
    extra: dict[str, Any],
    served: tuple[str, str],
) -> None:
    raw = await client.chat.completions.with_raw_response.create(model=model, messages=HELLO, **extra)
    assert (raw.headers["x-tier"], raw.headers["x-llm"]) == served


async def test_a_long_prompt_is_of_the_main_tier(client: openai.AsyncOpenAI, second: OpenAIDouble) -> None:
    long: Any = [{"role": "user", "content": "word " * 2000}]
    raw = await client.chat.completions.with_raw_response.create(model="auto", messages=long)
    assert raw.headers["x-tier"] == "main"


async def test_a_tier_bounds_the_answer_and_an_llm_does_not(
    client: openai.AsyncOpenAI, doubles: tuple[OpenAIDouble, OpenAIDouble]
) -> None:
    for model, given, reaches in (
        ("small", 900, 512),
        ("main", 9000, 2048),
        ("main", None, 2048),
        ("second", 9000, 9000),
    ):
        await client.chat.completions.create(
            model=model, messages=HELLO, max_tokens=openai.omit if given is None else given
        )
        double = doubles[0] if model == "small" else doubles[1]
        assert chats(double)[-1]["max_tokens"] == reaches


# Errors


async def test_a_prompt_that_fits_nobody_is_refused_before_it_is_sent(
    client: openai.AsyncOpenAI, doubles: tuple[OpenAIDouble, OpenAIDouble]
) -> None:
    long: Any = [{"role": "user", "content": "word " * 20_000}]
    for model in ("first", "auto", "main"):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model=model, messages=long)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
        assert "maximum context length" in caught.value.message
        assert "8192" in caught.value.message
    assert not chats(doubles[0]) + chats(doubles[1])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "first", "messages": []}, "messages"),
        ({"model": "first", "messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"model": "first", "messages": HELLO, "n": 2}, "n"),
        ({"model": "first", "messages": HELLO, "temperature": 9}, "temperature"),
        ({"messages": HELLO}, "model"),
    ],
)
async def test_a_wrong_request_is_told_with_its_parameter(
    gateway: Gateway, body: dict[str, Any], param: str
) -> None:
    async with gateway.process.http() as http:
        answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


async def test_a_tier_that_there_is_not(client: openai.AsyncOpenAI, gateway: Gateway) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="auto", messages=HELLO, extra_headers={"X-Tier": "huge"})
    assert caught.value.param == "X-Tier"


@pytest.mark.parametrize(
    ("asked", "content", "told"),
    [
        ("GET /v1/nothing", b"", (404, "unknown_url")),
        ("POST /v1/assistants", b"{}", (404, "unknown_url")),
        ("GET /v1/chat/completions", b"", (405, "method_not_supported")),
        ("POST /v1/chat/completions", b"{", (400, None)),
        ("POST /v1/chat/completions", b"\xff\xfe", (400, None)),
        ("POST /v1/chat/completions", b" " * (9 * 1024 * 1024), (413, "request_too_large")),
    ],
)
async def test_every_error_has_the_form_that_clients_read(
    gateway: Gateway, asked: str, content: bytes, told: tuple[int, str | None]
) -> None:
    method, path = asked.split()
    headers = {"Content-Type": "application/json"} if content else {}
    async with gateway.process.http() as http:
        answer = await http.request(method, path, content=content, headers=headers)
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.status_code, error["code"]) == told


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("busy", (429, "rate_limit_exceeded", None)),
        ("overflow", (400, "context_length_exceeded", None)),
        ("bad_request", (400, "refused_by_engine", "false")),
        ("no_model", (404, "model_not_found", None)),
        ("auth", (503, "llm_unavailable", None)),
        ("failed", (503, "llm_unavailable", None)),
        ("reset", (503, "llm_unavailable", None)),
        ("silent", (503, "llm_unavailable", None)),
        ("ok_then_error", (503, "llm_unavailable", None)),
    ],
)
async def test_what_the_engine_refuses_is_told_whole_or_streamed(
    client: openai.AsyncOpenAI,
    gateway: Gateway,
    first: OpenAIDouble,
    fault: Fault,
    told: tuple[int, str, str | None],
) -> None:
    first.fault = fault
    for stream in (False, True):
        if fault == "silent" and stream:
            continue  # by then a keep-alive has gone out
        await gateway.forget()
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(
                model="first", messages=HELLO, stream=stream, extra_body={"route": stream}
            )
        should_retry = caught.value.response.headers.get("x-should-retry")
        assert (caught.value.status_code, caught.value.code, should_retry) == told
    if fault == "busy":
        assert caught.value.response.headers["retry-after"] == "7"
        assert caught.value.response.headers["retry-after-ms"] == "7000"


@pytest.mark.parametrize("fault", ["stall", "cut", "unfinished", "malformed", "misshapen", "error_in_stream"])
async def test_a_stream_that_breaks_is_never_taken_for_whole(
    client: openai.AsyncOpenAI, gateway: Gateway, first: OpenAIDouble, fault: Fault
) -> None:
    first.fault = fault
    stream = await client.chat.completions.create(model="first", messages=HELLO, stream=True)
    seen: list[ChatCompletionChunk] = []

    async def read() -> None:
        async for chunk in stream:
            seen.append(chunk)  # noqa: PERF401 - what came before the break is wanted

    with pytest.raises(openai.APIError) as caught:
        await read()
    assert caught.value.code in {"engine_timeout", "engine_answer_broken", "engine_failed"}
    assert text_of(seen) == "The answer"
    assert all(chunk.choices[0].finish_reason is None for chunk in seen)
    with pytest.raises(openai.APIStatusError) as caught_whole:
        await client.chat.completions.create(model="first", messages=HELLO)
    assert caught_whole.value.status_code in {502, 504}
    await until_idle(gateway)


async def test_a_broken_stream_ends_without_done(gateway: Gateway, first: OpenAIDouble) -> None:
    first.fault = "cut"
    body = {"model": "first", "messages": HELLO, "stream": True}
    async with gateway.process.http() as http:
        answer = await http.post("/v1/chat/completions", json=body)
    assert "[DONE]" not in answer.text
    last = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert set(last["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "fault", ["ok_then_error", "failed", "reset", "overloaded", "busy", "no_model", "auth"]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_token_another_llm_serves(
    client: openai.AsyncOpenAI,
    doubles: tuple[OpenAIDouble, OpenAIDouble],
    gateway: Gateway,
    fault: Fault,
    stream: bool,
) -> None:
    doubles[0].fault = fault
    raw = await client.chat.completions.with_raw_response.create(model="auto", messages=HELLO, stream=stream)
    assert raw.headers["x-llm"] == "second"
    if fault != "busy":  # that one asked to be left alone, which is no failure
        assert "after first" in raw.headers["x-routing-reason"]


# Clients that leave


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_the_slot(
    gateway: Gateway, first: OpenAIDouble, stream: bool
) -> None:
    first.reply, first.piece_s = "word " * 1000, 0.2
    body = {"model": "first", "messages": HELLO, "stream": stream}

    async def ask() -> None:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:
            await http.post("/v1/chat/completions", json=body)

    asking = asyncio.create_task(ask())
    await until_asked(first)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await first.until_hung_up()
    await until_idle(gateway)


async def test_a_client_that_leaves_before_the_first_token_frees_the_slot(
    gateway: Gateway, first: OpenAIDouble
) -> None:
    first.fault = "silent"
    for times, stream in enumerate((False, True), 1):
        asking = asyncio.create_task(
            httpx.AsyncClient(timeout=60).post(
                f"{gateway.url}/v1/chat/completions",
                json={"model": "first", "messages": HELLO, "stream": stream},
            )
        )
        await until_asked(first, times)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await first.until_hung_up(times)
    await until_idle(gateway)


# A role as a model


async def test_a_role_answers_as_a_chat_partner(client: openai.AsyncOpenAI, gateway: Gateway) -> None:
    raw = await client.chat.completions.with_raw_response.create(model="desk/clerk", messages=HELLO)
    answer = raw.parse()
    assert answer.choices[0].message.content == "the clerk's answer"
    assert answer.model == "desk/clerk"
    assert answer.usage is not None
    assert answer.usage.total_tokens > 0
    async with gateway.process.http() as http:
        task = (await http.get(f"/api/v1/tasks/{raw.headers['x-task-id']}")).json()
    assert task["payload"] == {"task": "What is the answer?"}
    assert task["status"] == "completed"


async def test_a_role_tells_its_steps_as_thoughts(client: openai.AsyncOpenAI, gateway: Gateway) -> None:
    conversation: Any = [
        {"role": "user", "content": "before"},
        {"role": "assistant", "content": "yes?"},
        *HELLO,
    ]
    raw = await client.chat.completions.with_raw_response.create(
        model="desk/clerk", messages=conversation, stream=True
    )
    chunks = [chunk async for chunk in raw.parse()]
    assert text_of(chunks) == "the clerk's answer"
    thoughts = "".join(
        getattr(chunk.choices[0].delta, "reasoning_content", "") or "" for chunk in chunks if chunk.choices
    )
    assert "clerk: begins" in thoughts
    assert "clerk: done" in thoughts
    async with gateway.process.http() as http:
        task = (await http.get(f"/api/v1/tasks/{raw.headers['x-task-id']}")).json()
    assert task["payload"] == {
        "task": "What is the answer?",
        "context": "user: before\n\nassistant: yes?",
    }


async def test_a_payload_may_be_sent_whole(client: openai.AsyncOpenAI, gateway: Gateway) -> None:
    given: Any = [{"role": "user", "content": json.dumps({"task": "x", "context": "y"})}]
    answer = await client.chat.completions.create(model="desk/clerk", messages=given)
    assert answer.choices[0].message.content == "the clerk's answer"
    wrong: Any = [{"role": "user", "content": json.dumps({"task": 7})}]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="desk/clerk", messages=wrong)
    assert caught.value.param == "payload.task"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_a_role_cancels_its_task(
    gateway: Gateway, first: OpenAIDouble, stream: bool
) -> None:
    first.reply, first.piece_s = "word " * 1000, 0.2
    body = {"model": "desk/reader", "messages": HELLO, "stream": stream}
    async with gateway.process.http() as http:
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        await until_asked(first)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await first.until_hung_up()
        newest = (await http.get("/api/v1/tasks", params={"role": "reader", "limit": 1})).json()["items"][0]
        async with asyncio.timeout(60):
            while newest["status"] != "canceled":
                await asyncio.sleep(0.02)
                newest = (await http.get(f"/api/v1/tasks/{newest['task_id']}")).json()
    await until_idle(gateway)


async def test_a_role_that_fails_says_so_and_is_not_repeated(
    client: openai.AsyncOpenAI, gateway: Gateway, first: OpenAIDouble
) -> None:
    first.fault = "bad_request"
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await client.chat.completions.create(model="desk/reader", messages=HELLO)
    assert caught.value.code == "task_failed"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "/api/v1/tasks/" in caught.value.message


async def test_the_metrics_count_requests_and_tokens_kept_local(
    client: openai.AsyncOpenAI, gateway: Gateway, first: OpenAIDouble
) -> None:
    async def counted(requests: int) -> dict[str, Any]:
        """The row, once it has so many."""
        async with gateway.process.http() as http, asyncio.timeout(60):
            while True:
                metrics = (await http.get("/api/v1/metrics")).json()
                found: dict[str, Any]
                for found in metrics["gateway"]["requests"]:
                    labels = tuple(found[name] for name in ("surface", "tier", "llm", "status"))
                    if labels == ("chat", "small", "first", "ok") and found["requests"] >= requests:
                        assert metrics["use"]["local_share"] == 1
                        return found
                await asyncio.sleep(0.02)

    await client.chat.completions.create(model="first", messages=HELLO)
    before = await counted(1)
    await client.chat.completions.create(model="first", messages=HELLO)
    after = await counted(before["requests"] + 1)
    assert after["requests"] == before["requests"] + 1
    assert after["input_tokens"] == before["input_tokens"] + 11
    assert after["output_tokens"] == before["output_tokens"] + 6
    async with gateway.process.http() as http:
        text = (await http.get("/metrics")).text
    assert (
        'ai_agent_server_gateway_requests_total{llm="first",status="ok",surface="chat",tier="small"}' in text
    )
