"""`/v1/responses` of a real server, asked by OpenAI's own SDK, which checks every shape it is given."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter

from tests.servers.openai_double import OpenAIDouble
from tests.servers.ports import held_port
from tests.servers.process import SCRIPT, ServerProcess, packaged, write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
NAMESPACE: Any = {
    "type": "namespace",
    "name": "mcp__files",
    "description": "Files.",
    "tools": [{"type": "function", "name": "read", "parameters": {"type": "object"}}],
}
REPLIES: list[Any] = [
    {"when": "It is 21 C", "say": ["Mild."]},
    {"when": "weather in Paris", "tool_calls": [{"name": "weather", "arguments": {"city": "Paris"}}]},
    {"when": "read the file", "tool_calls": [{"name": "mcp__files__read", "arguments": {"path": "a"}}]},
    {"when": "long", "say": ["a b c"], "finish_reason": "length"},
    "The answer is 42, of course.",
]


class Gateway:
    """The server's client, and the port of the model server `double`."""

    def __init__(self, client: openai.AsyncOpenAI, port: int) -> None:
        self.client, self.port = client, port


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """One server for all the tests; `double` is where a test may have its model server listen."""
    folder = tmp_path_factory.mktemp("gateway")
    scripts = {
        "scripted": {"replies": REPLIES, "tokens_per_s": 2000},
        "broken": {"replies": ["one two three four"], "fail": "cut"},
        "down": {"fail": "auth"},
    }
    llms: dict[str, Any] = {
        name: {**SCRIPT, "locked": True, "options": options} for name, options in scripts.items()
    }
    llms["embedded"] = packaged()["llms"]["embedded"]
    balancer = {"circuit": {"failures": 1_000_000}, "retry": {"attempts": 1}}
    with held_port() as port:
        llms["double"] = {
            "engine": "api.openai",
            "model": "double-1",
            "source": "local",
            "locked": True,
            "timeouts": {"first_token_s": 60, "idle_s": 1.5},
            "options": {"base_url": f"http://127.0.0.1:{port}/v1"},
        }
        config = write_config(folder, llms=llms, balancer=balancer, messaging={"enabled": False})
        async with (
            ServerProcess(folder / "state", config) as server,
            openai.AsyncOpenAI(
                base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
            ) as client,
        ):
            yield Gateway(client, port)


@pytest.fixture
def client(gateway: Gateway) -> openai.AsyncOpenAI:
    """OpenAI's SDK, with two lines of configuration."""
    return gateway.client


async def events_of(client: openai.AsyncOpenAI, **body: Any) -> list[dict[str, Any]]:
    """Every event as it came, each judged by the SDK's types, in order and numbered."""
    body = {"model": "scripted", "input": "Hi", **body, "stream": True}
    headers = {"Authorization": "Bearer none"}
    seen: list[dict[str, Any]] = []
    async with (
        httpx.AsyncClient(timeout=30) as http,
        http.stream("POST", f"{client.base_url}responses", json=body, headers=headers) as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        name = ""
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                assert event["type"] == name
                EVENTS.validate_python(event)
                assert event["sequence_number"] == len(seen)
                seen.append(event)
    return seen


async def test_a_text_is_answered_whole_with_every_header(client: openai.AsyncOpenAI) -> None:
    raw = await client.responses.with_raw_response.create(model="scripted", input="Hi", store=True)
    response = raw.parse()
    assert response.output_text == "The answer is 42, of course."
    assert response.status == "completed"
    assert response.id.startswith("resp_")
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens > 0
    assert raw.http_response.json()["store"] is False
    assert raw.headers["x-llm"] == "scripted"
    for name in ("x-request-id", "openai-processing-ms", "x-tier", "x-routing-reason", "x-overhead-ms"):
        assert raw.headers[name]


async def test_a_streamed_answer_comes_in_pieces_in_openais_order(client: openai.AsyncOpenAI) -> None:
    events = await events_of(client)
    kinds = [event["type"].removeprefix("response.") for event in events]
    pieces = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert len(pieces) > 1
    assert [kind for kind in dict.fromkeys(kinds)] == [  # noqa: C416 - the order matters
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(pieces) == Response.model_validate(events[-1]["response"]).output_text


async def test_the_sdks_own_stream_helper_follows_it(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="scripted", input="Hi", instructions="Be brief.") as stream:
        async for _ in stream:
            pass
        response = await stream.get_final_response()
        assert response.output_text == "The answer is 42, of course."


async def test_a_tool_is_called_and_its_output_is_taken_up(client: openai.AsyncOpenAI) -> None:
    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    called = await client.responses.create(model="scripted", input=question, tools=[WEATHER])
    (call,) = called.output
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Paris"}
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "It is 21 C"}
    turns: Any = [*question, *called.output, output]
    told = await client.responses.create(model="scripted", input=turns, tools=[WEATHER])
    assert told.output_text == "Mild."


async def test_a_streamed_call_of_a_nested_function_names_its_namespace(client: openai.AsyncOpenAI) -> None:
    events = await events_of(
        client, input="Please read the file.", tools=[NAMESPACE, {"type": "web_search"}, WEATHER]
    )
    (item,) = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert (item["namespace"], item["name"]) == ("mcp__files", "read")
    assert json.loads(item["arguments"]) == {"path": "a"}
    assert [tool["type"] for tool in events[-1]["response"]["tools"]] == ["namespace", "function"]
    arguments = [e for e in events if e["type"] == "response.function_call_arguments.done"]
    assert arguments[0]["arguments"] == item["arguments"]


async def test_an_answer_that_met_its_limit_is_incomplete(client: openai.AsyncOpenAI) -> None:
    whole = await client.responses.create(model="scripted", input="a long one")
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert (await events_of(client, input="a long one"))[-1]["type"] == "response.incomplete"


async def test_an_answer_that_breaks_off_never_completes(client: openai.AsyncOpenAI) -> None:
    events = await events_of(client, model="broken")
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["code"] == "server_error"
    assert "response.completed" not in {event["type"] for event in events}
    with pytest.raises(openai.InternalServerError):
        await client.responses.create(model="broken", input="Hi")


@pytest.mark.parametrize("fault", ["stall", "cut", "unfinished", "malformed", "misshapen", "error_in_stream"])
async def test_an_upstream_that_fails_in_the_middle_is_never_a_clean_end(
    gateway: Gateway, fault: Any
) -> None:
    async with OpenAIDouble(port=gateway.port) as double:
        double.fault = fault
        events = await events_of(gateway.client, model="double")
        assert events[-1]["type"] == "response.failed"
        with pytest.raises(openai.APIStatusError):
            await gateway.client.responses.create(model="double", input="Hi")


BAD = openai.BadRequestError


@pytest.mark.parametrize(
    ("body", "error", "said"),
    [
        ({"model": "nope"}, openai.NotFoundError, ("model", "model_not_found")),
        ({"previous_response_id": "resp_1"}, BAD, ("previous_response_id", "invalid_value")),
        ({"temperature": "hot"}, BAD, ("temperature", "invalid_value")),
        ({"input": [{"role": "king"}]}, BAD, ("input[0].role", "invalid_value")),
        ({"model": "down"}, openai.APIStatusError, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_answered_is_an_error_in_openais_form(
    client: openai.AsyncOpenAI, body: dict[str, Any], error: Any, said: tuple[str, str] | None, stream: bool
) -> None:
    with pytest.raises(error) as caught:
        await client.responses.create(**{"model": "scripted", "input": "Hi", "stream": stream, **body})
    assert isinstance(caught.value, openai.APIStatusError)
    assert isinstance(caught.value.body, dict)
    assert {*caught.value.body} == {"message", "type", "param", "code"}
    assert said in {None, (caught.value.param, caught.value.code)}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_the_engine(gateway: Gateway, stream: bool) -> None:
    async with OpenAIDouble(reply="word " * 5000, piece_s=0.01, port=gateway.port) as double:
        asking = asyncio.create_task(_read(gateway.client, stream=stream))
        while "/v1/chat/completions" not in double.paths():
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await double.until_hung_up()


async def _read(client: openai.AsyncOpenAI, *, stream: bool) -> None:
    if not stream:
        await client.responses.create(model="double", input="Hi")
        return
    async for _ in await client.responses.create(model="double", input="Hi", stream=True):
        pass


class Person(BaseModel):
    """What is extracted."""

    name: Annotated[str, Field(max_length=40)]
    age: int


async def test_the_embedded_model_fills_a_form_that_the_sdk_parses(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.parse(
        model="embedded", input="Ann is 30 years old.", text_format=Person, temperature=0
    )
    assert isinstance(response.output_parsed, Person)
    events = await events_of(
        client, model="embedded", input="Say hello.", max_output_tokens=16, temperature=0
    )
    assert events[-1]["response"]["usage"]["output_tokens"] > 0
