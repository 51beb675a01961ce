"""`/v1/messages` of a real server, asked by Anthropic's own SDK, which checks every shape it is given."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
import pytest_asyncio
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from tests.servers.anthropic_double import AnthropicDouble
from tests.servers.claude_code import request_of_claude_code
from tests.servers.http_double import RETRY_AFTER_S, Fault, Out, Request
from tests.servers.openai_double import OpenAIDouble
from tests.servers.process import SCRIPT, ServerProcess, packaged, write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
WEATHER: Any = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CITY = {"type": "string", "maxLength": 20}
REPLIES: list[Any] = [
    {"when": "It is 21 C", "say": ["Mild."]},
    {"when": "weather in Paris", "tool_calls": [{"name": "weather", "arguments": {"city": "Paris"}}]},
    {"when": "two cities", "say": ["Both:"], "tool_calls": [
        {"name": "weather", "arguments": {"city": "Paris"}},
        {"name": "weather", "arguments": {"city": "Rome"}},
    ]},
    {"when": "I love it", "say": [{"label": "good"}]},
    {"when": "long story", "say": ["Once upon"], "finish_reason": "length"},
    {"when": "count", "say": ["one two three STOP four"]},
    {"when": "src/app.py", "tool_calls": [{"name": "Read", "arguments": {"file_path": "/work/src/app.py"}}]},
    "The answer is 42, of course.",
]  # fmt: skip
ANSWER = "The answer is 42, of course."
KEEP_ALIVE_S = 0.1
SOON_S = 60.0


class House:
    """The server, the servers that it asks, and a client of it."""

    def __init__(self, server: ServerProcess, openai: OpenAIDouble, claude: AnthropicDouble) -> None:
        self.server, self.openai, self.claude = server, openai, claude
        self.client = anthropic.AsyncAnthropic(
            base_url=server.url, api_key="none", max_retries=0, _strict_response_validation=True
        )
        self.hung_up = 0

    async def left(self) -> None:
        """Until the engine that was asked last is free, because the client left."""
        self.hung_up += 1
        await self.openai.until_hung_up(self.hung_up)

    async def events(self, **body: Any) -> list[dict[str, Any]]:
        """Every event as it came, each judged by the SDK's types."""
        seen: list[dict[str, Any]] = []
        async with (
            httpx.AsyncClient(timeout=30) as http,
            http.stream("POST", f"{self.server.url}/v1/messages", json=asking(**body, stream=True)) as answer,
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
                    if name not in {"ping", "error"}:
                        EVENTS.validate_python(event)
                    seen.append(event)
        return seen

    async def post(self, path: str = "/v1/messages", **options: Any) -> httpx.Response:
        async with self.server.http() as http:
            return await http.post(path, **options)


def configuration(folder: Path, openai: OpenAIDouble, claude: AnthropicDouble, **gateway: Any) -> Path:
    long = {"context": 200_000, "tier": "main", "locked": True}
    embedded = packaged()["llms"]["embedded"]
    return write_config(
        folder,
        llms={
            "scripted": {**SCRIPT, **long, "options": {"replies": REPLIES, "tokens_per_s": 2000}},
            "busy": {**SCRIPT, **long, "options": {"fail": "busy", "retry_after_s": RETRY_AFTER_S}},
            "double": {
                **long,
                "engine": "api.openai",
                "model": "double-1",
                "source": "local",
                "capabilities": ["chat", "tools", "json_schema", "vision"],
                "options": {"base_url": f"{openai.url}/v1"},
            },
            "claude": {
                **long,
                "engine": "api.anthropic",
                "model": "claude-double",
                "source": "api",
                "capabilities": ["chat", "tools", "json_schema", "vision"],
                "options": {"base_url": claude.url},
            },
            "embedded": embedded,
        },
        balancer={"retry": {"attempts": 1}, "circuit": {"failures": 10_000}},
        gateway={"aliases": {"claude-*": "scripted"}, **gateway},
        server={"max_body_mb": 1},
    )


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("anthropic")
    async with OpenAIDouble() as openai, AnthropicDouble() as claude:
        config = configuration(folder, openai, claude)
        async with ServerProcess(folder / "state", config) as server:
            house = House(server, openai, claude)
            yield house
            await house.client.close()


@pytest_asyncio.fixture(loop_scope="module")
async def house(shared: House) -> AsyncIterator[House]:
    yield shared
    shared.openai.fault, shared.openai.piece_s, shared.openai.reply = None, 0.0, ANSWER
    shared.claude.fault, shared.claude.thinks = None, False


def asking(said: str = "Hi.", **rest: Any) -> dict[str, Any]:
    """A request's body."""
    return {
        "model": "scripted",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": said}],
        **rest,
    }


def words(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


async def test_a_message_is_answered_whole_with_every_header(house: House) -> None:
    raw = await house.client.messages.with_raw_response.create(**asking(system="Be brief."))
    message = await raw.parse()
    assert (message.type, message.role, message.model) == ("message", "assistant", "scripted")
    assert words(message) == ANSWER
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.input_tokens > 0
    assert message.usage.output_tokens > 0
    assert message.usage.cache_read_input_tokens == 0
    assert message.id == f"msg_{raw.headers['request-id']}"
    assert raw.headers["x-llm"] == "scripted"
    assert raw.headers["x-tier"] == "main"
    assert "scripted" in raw.headers["x-routing-reason"]
    assert float(raw.headers["x-overhead-ms"]) >= 0


async def test_a_stream_joins_to_the_same_message(house: House) -> None:
    async with house.client.messages.stream(**asking()) as stream:
        pieces = [piece async for piece in stream.text_stream]
        message = await stream.get_final_message()
    assert len(pieces) > 3
    assert "".join(pieces) == words(message) == ANSWER
    assert message.stop_reason == "end_turn"
    assert message.usage.input_tokens > 0
    assert message.usage.output_tokens > 0


async def test_a_streams_events_have_their_names_and_their_order(house: House) -> None:
    seen = await house.events()
    kinds = [event["type"] for event in seen]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[3:-3]) <= {"content_block_delta", "ping"}
    assert seen[0]["message"]["usage"]["input_tokens"] > 0


async def test_the_beta_client_is_answered_too(house: House) -> None:
    message = await house.client.beta.messages.create(**asking(betas=["context-management-2025-06-27"]))
    assert "".join(block.text for block in message.content if block.type == "text") == ANSWER


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
async def test_a_tool_is_called_and_its_result_taken_up(house: House, streamed: bool) -> None:
    async def ask(**body: Any) -> Message:
        if not streamed:
            message: Message = await house.client.messages.create(**body)
            return message
        async with house.client.messages.stream(**body) as stream:
            return await stream.get_final_message()

    body = asking("What is the weather in Paris?", tools=[WEATHER], tool_choice={"type": "any"})
    called = await ask(**body)
    assert called.stop_reason == "tool_use"
    (call,) = [block for block in called.content if block.type == "tool_use"]
    assert (call.name, call.input) == ("weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "It is 21 C."}
    turns = [
        *body["messages"],
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result]},
    ]
    answered = await ask(**{**body, "messages": turns, "tool_choice": {"type": "auto"}})
    assert words(answered) == "Mild."


async def test_words_and_two_calls_come_as_blocks_of_their_own(house: House) -> None:
    async with house.client.messages.stream(**asking("two cities", tools=[WEATHER])) as stream:
        message = await stream.get_final_message()
    assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
    assert [block.input for block in message.content if block.type == "tool_use"] == [
        {"city": "Paris"},
        {"city": "Rome"},
    ]


async def test_every_engine_is_told_an_image(house: House) -> None:
    image = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    content = [{"type": "text", "text": "What is it?"}, {"type": "image", "source": image}]
    for model, double in (("double", house.openai), ("claude", house.claude)):
        body = asking(model=model, messages=[{"role": "user", "content": content}])
        assert words(await house.client.messages.create(**body)) == ANSWER
        assert "iVBORw0KGgo=" in json.dumps(double.asked[-1].json)


async def test_an_answer_obeys_the_schema_that_was_asked_for(house: House) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    wanted = {"format": {"type": "json_schema", "schema": schema}}
    for model in ("double", "claude"):
        body = asking(model=model, output_config=wanted)
        assert json.loads(words(await house.client.messages.create(**body))) == {"city": "Paris"}


async def test_claude_behind_the_gateway_shows_its_thinking(house: House) -> None:
    house.claude.thinks = True
    body = asking(model="claude", thinking={"type": "adaptive", "display": "summarized"})
    async with house.client.messages.stream(**body) as stream:
        message = await stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text"]
    whole = await house.client.messages.create(**body)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    unasked = await house.client.messages.create(**asking(model="claude"))
    assert [block.type for block in unasked.content] == ["text"]


async def test_the_embedded_model_answers_whole_and_streamed(house: House) -> None:
    body = asking("Say hello.", model="embedded", max_tokens=12, extra_body={"temperature": 0})
    message = await house.client.messages.create(**body)
    assert words(message)
    assert message.stop_reason in {"end_turn", "max_tokens"}
    async with house.client.messages.stream(**body) as stream:
        assert words(await stream.get_final_message())


async def test_the_embedded_model_calls_the_tool_that_it_has_to(house: House) -> None:
    body = asking(
        "Weather in Paris?",
        model="embedded",
        # Or the model may write the name of a city until it is cut.
        tools=[{**WEATHER, "input_schema": {**WEATHER["input_schema"], "properties": {"city": CITY}}}],
        tool_choice={"type": "tool", "name": "weather"},
    )
    message = await house.client.messages.create(**body)
    assert message.stop_reason == "tool_use"
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert isinstance(call.input["city"], str)


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
async def test_a_stop_sequence_ends_the_answer_and_frees_the_engine(house: House, streamed: bool) -> None:
    house.openai.reply, house.openai.piece_s = "one two three STOP " + "more " * 3000, 0.02
    body = asking(model="double", stop_sequences=["STOP", "HALT"], max_tokens=2000)
    if streamed:
        async with house.client.messages.stream(**body) as stream:
            message = await stream.get_final_message()
    else:
        message = await house.client.messages.create(**body)
    assert words(message) == "one two three "
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "STOP")
    await house.left()


async def test_an_answer_that_was_too_long_says_so(house: House) -> None:
    assert (await house.client.messages.create(**asking("long story"))).stop_reason == "max_tokens"


@pytest.mark.parametrize("model", ["scripted", "main", "auto", "claude-opus-5-20260901"])
async def test_a_model_is_an_llm_a_tier_auto_or_an_alias(house: House, model: str) -> None:
    message = await house.client.messages.create(**asking(model=model, tools=[WEATHER]))
    assert message.content


async def test_a_role_runs_a_task_and_tells_its_result(house: House) -> None:
    body = asking(
        json.dumps({"text": "I love it.", "labels": ["good", "bad"]}), model="productivity/classify"
    )
    raw = await house.client.messages.with_raw_response.create(**body)
    assert words(await raw.parse())
    assert raw.headers["x-task-id"]


class GatedDouble(OpenAIDouble):
    """Answers nobody before `gate` is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def answer(self, request: Request, out: Out) -> None:
        """Answer one request."""
        if request.method == "POST":
            await self.gate.wait()
        await super().answer(request, out)


async def test_a_slow_llm_is_waited_for_with_pings(tmp_path: Path) -> None:
    async with GatedDouble() as slow, AnthropicDouble() as claude:
        config = configuration(tmp_path, slow, claude, keep_alive_s=KEEP_ALIVE_S)
        async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:
            body = asking(model="double", stream=True)
            kinds = []
            async with http.stream("POST", "/v1/messages", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("event: "):
                        kinds.append(line.removeprefix("event: "))
                    if kinds == ["ping"] * 3:
                        slow.gate.set()
            assert kinds.index("message_start") > 2
            assert set(kinds[: kinds.index("message_start")]) == {"ping"}
            assert kinds[-1] == "message_stop"
            slow.gate.clear()
            whole = asyncio.create_task(http.post("/v1/messages", json=asking(model="double")))
            async with asyncio.timeout(SOON_S):
                while len(slow.asked) < 2:
                    await asyncio.sleep(0.01)
            slow.gate.set()
            assert (await whole).json()["content"][0]["text"] == ANSWER


async def test_tokens_are_counted_without_asking_an_llm(house: House) -> None:
    asked = len(house.openai.asked)
    counted = await house.client.messages.count_tokens(
        model="double", system="Be brief.", messages=[{"role": "user", "content": "word " * 700}]
    )
    assert 500 < counted.input_tokens < 1500
    with_tool = await house.client.messages.count_tokens(
        model="double", messages=[{"role": "user", "content": "Hi."}], tools=[WEATHER]
    )
    assert 20 < with_tool.input_tokens < 100
    with pytest.raises(anthropic.NotFoundError):
        await house.client.messages.count_tokens(model="nope", messages=[{"role": "user", "content": "Hi."}])
    assert len(house.openai.asked) == asked


async def test_somebody_answers_the_first_knock(house: House) -> None:
    async with house.server.http() as http:
        assert (await http.head("/")).status_code == 200


async def test_what_claude_code_sends_is_understood(house: House) -> None:
    body, headers = request_of_claude_code(model="claude-opus-5-20260901")
    sent = json.dumps(body).encode()
    assert 50_000 < len(sent) < 80_000
    async with (
        house.server.http() as http,
        http.stream("POST", "/v1/messages?beta=true", content=sent, headers=headers) as answer,
    ):
        assert answer.status_code == 200
        events = [json.loads(line[6:]) async for line in answer.aiter_lines() if line.startswith("data: ")]
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [(block["type"], block.get("name")) for block in starts] == [("tool_use", "Read")]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_what_claude_code_sends_reaches_the_llm_without_what_changes_each_time(house: House) -> None:
    house.openai.knows_tools = False
    for _ in range(2):
        body, headers = request_of_claude_code(model="double")
        assert (await house.post("/v1/messages?beta=true", json=body, headers=headers)).status_code == 200
    first, second = (request.json for request in house.openai.asked[-2:])
    house.openai.knows_tools = True
    assert first["messages"] == second["messages"]
    assert [turn["role"] for turn in first["messages"]] == ["system", "user", "assistant", "tool", "user"]
    assert "x-anthropic-billing-header" not in json.dumps(first)
    assert "signature" not in json.dumps(first)
    names = [tool["function"]["name"] for tool in first["tools"]]
    assert "Read" in names
    assert "web_search" not in names
    assert "mcp__tracker__search" in names
    assert "mcp__tracker__create" not in names


# Errors


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"stop_sequences": 5}, "stop_sequences"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"tools": [{"name": "x", "input_schema": []}]}, "tools[0].input_schema"),
    ],
)
async def test_a_mistake_is_told_with_its_place(house: House, body: Any, said: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        await house.client.messages.create(**asking(**body))
    assert caught.value.type == "invalid_request_error"
    assert said in str(caught.value.api_message)
    assert caught.value.request_id


async def test_a_model_that_is_not_there_is_told_with_the_way_to_lead_it_somewhere(house: House) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        await house.client.messages.create(**asking(model="gpt-9"))
    assert caught.value.type == "not_found_error"
    assert "gpt-9" in str(caught.value)
    assert "gateway.aliases" in str(caught.value)


async def test_a_prompt_that_is_too_long_is_told_by_the_words_that_clients_know(house: House) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        await house.client.messages.create(**asking("word " * 9000, model="embedded"))
    assert str(caught.value.api_message).startswith("prompt is too long")


async def test_a_busy_llm_is_a_rate_limit_with_the_time_to_wait(house: House) -> None:
    with pytest.raises(anthropic.RateLimitError) as caught:
        await house.client.messages.create(**asking(model="busy"))
    assert caught.value.type == "rate_limit_error"
    assert caught.value.response.headers["retry-after"] == str(RETRY_AFTER_S)


BEFORE: dict[Fault, type[anthropic.APIStatusError]] = {
    "auth": anthropic.APIStatusError,
    "failed": anthropic.APIStatusError,
    "bad_request": anthropic.BadRequestError,
    "no_model": anthropic.NotFoundError,
    "overflow": anthropic.BadRequestError,
    "overloaded": anthropic.RateLimitError,
}


@pytest.mark.parametrize("model", ["double", "claude"])
@pytest.mark.parametrize("fault", BEFORE)
@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
async def test_an_error_before_the_first_word_has_its_status(
    house: House, model: str, fault: Fault, streamed: bool
) -> None:
    house.openai.fault = house.claude.fault = fault
    with pytest.raises(BEFORE[fault]) as caught:
        await house.client.messages.create(**asking(model=model), stream=streamed)
    assert caught.value.status_code >= 400
    assert caught.value.type


AFTER: tuple[Fault, ...] = ("cut", "unfinished", "malformed", "misshapen", "error_in_stream")


@pytest.mark.parametrize("model", ["double", "claude"])
@pytest.mark.parametrize("fault", AFTER)
async def test_an_error_after_the_first_word_is_told_in_the_stream(
    house: House, model: str, fault: Fault
) -> None:
    house.openai.fault = house.claude.fault = fault
    house.openai.piece_s = 0.01
    seen = await house.events(model=model)
    assert seen[-1]["type"] == "error"
    assert seen[-1]["error"]["type"] == "api_error"
    assert seen[-1]["request_id"]
    assert "message_stop" not in [event["type"] for event in seen]
    with pytest.raises(anthropic.APIStatusError):
        async with house.client.messages.stream(**asking(model=model)) as stream:
            await stream.get_final_message()
    with pytest.raises(anthropic.APIStatusError) as caught:
        await house.client.messages.create(**asking(model=model))
    assert caught.value.status_code == 502


async def test_what_is_no_json_too_large_or_not_there_is_told_in_anthropics_form(house: House) -> None:
    json_type, text_type = {"Content-Type": "application/json"}, {"Content-Type": "text/plain"}
    invalid = "invalid_request_error"
    for answer, status, kind in (
        (await house.post(content=b"{", headers=json_type), 400, invalid),
        (await house.post(content=b"{}", headers=text_type), 415, invalid),
        (await house.post(json=asking("x" * 2**21)), 413, "request_too_large"),
        (await house.post("/v1/messages/batches", json={}), 404, "not_found_error"),
        (await house.post(json=asking(), headers={"X-Tier": "huge"}), 400, invalid),
    ):
        said = answer.json()
        assert (answer.status_code, said["type"], said["error"]["type"]) == (status, "error", kind)
        assert said["error"]["message"]
        assert said["request_id"] == answer.headers["request-id"]


async def test_a_key_is_asked_for_in_anthropics_form_and_taken_in_both_headers(tmp_path: Path) -> None:
    config = write_config(tmp_path, llms={"scripted": {**SCRIPT, "options": {"replies": ["Hi."]}}})
    async with ServerProcess(tmp_path / "state", config, AI_AGENT_SERVER_API_KEY="sk-mine") as server:
        for key in ("", "sk-other"):
            async with server.http() as http:
                headers = {"x-api-key": key} if key else {}
                answer = await http.post("/v1/messages", json=asking(), headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
        for headers in ({"x-api-key": "sk-mine"}, {"Authorization": "Bearer sk-mine"}):
            async with server.http() as http:
                assert (await http.post("/v1/messages", json=asking(), headers=headers)).status_code == 200
                assert (await http.head("/")).status_code == 200


# Leaving


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
async def test_a_client_that_leaves_frees_the_engine(house: House, streamed: bool) -> None:
    house.openai.reply, house.openai.piece_s = "word " * 3000, 0.03
    body = asking(model="double", max_tokens=2000)
    async with house.server.http() as http:
        sending = http.build_request("POST", "/v1/messages", json={**body, "stream": streamed})
        if streamed:
            answer = await http.send(sending, stream=True)
            await anext(answer.aiter_bytes())
            await answer.aclose()
        else:
            waiting = asyncio.create_task(http.send(sending))
            await house.openai.until_writing()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
    await house.left()


async def test_a_client_that_leaves_before_the_first_word_frees_the_engine(house: House) -> None:
    house.openai.fault = "silent"
    async with house.server.http() as http:
        body = asking(model="double", stream=True)
        waiting = asyncio.create_task(http.post("/v1/messages", json=body))
        await house.openai.until_writing()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    await house.left()


async def test_many_at_once_get_each_their_own_answer(house: House) -> None:
    async def one(number: int) -> str:
        async with house.client.messages.stream(**asking(f"{number}: long story")) as stream:
            return words(await stream.get_final_message())

    assert set(await asyncio.gather(*(one(number) for number in range(50)))) == {"Once upon"}
