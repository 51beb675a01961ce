"""OpenAI's SDK with two lines of set-up, answered by the embedded model as it is packaged."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel, Field

from tests.servers.process import ServerProcess, write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO: Any = [{"role": "user", "content": "Say hello."}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[openai.AsyncOpenAI]:
    folder: Path = tmp_path_factory.mktemp("embedded")
    config = write_config(folder, messaging={"enabled": False})
    async with (
        ServerProcess(folder / "state", config) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_a_conversation(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="auto", messages=HELLO, max_tokens=24, temperature=0)
    assert answer.model == "embedded"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 0
    assert 0 < answer.usage.completion_tokens <= 24


async def test_a_stream_is_the_same_answer(client: openai.AsyncOpenAI) -> None:
    given: dict[str, Any] = {
        "model": "small",
        "messages": HELLO,
        "max_tokens": 24,
        "temperature": 0,
        "seed": 1,
    }
    # Both read it from a prompt that is known: what is read anew is not read to the letter the same.
    await client.chat.completions.create(**given | {"max_tokens": 1})
    whole = await client.chat.completions.create(**given)
    stream = await client.chat.completions.create(
        **given, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 5
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_an_answer_that_obeys_a_schema(client: openai.AsyncOpenAI) -> None:
    class Colour(BaseModel):
        name: Annotated[str, Field(max_length=20)]  # or the model may write until it is cut
        is_warm: bool

    answer = await client.chat.completions.parse(
        model="embedded",
        messages=[{"role": "user", "content": "Name a colour."}],
        response_format=Colour,
        max_tokens=200,
    )
    assert isinstance(answer.choices[0].message.parsed, Colour)


async def test_a_tool_that_has_to_be_called(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="embedded",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "parameters": {
                        "type": "object",
                        "properties": {"city": {"enum": ["Paris", "Rome"]}},
                        "required": ["city"],
                        "additionalProperties": False,
                    },
                },
            }
        ],
        tool_choice="required",
        max_tokens=80,
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.tool_calls is not None
    (call,) = answer.choices[0].message.tool_calls
    assert call.type == "function"
    assert json.loads(call.function.arguments)["city"] in {"Paris", "Rome"}


async def test_a_prompt_that_is_longer_than_the_context(client: openai.AsyncOpenAI) -> None:
    long: Any = [{"role": "user", "content": "word " * 20_000}]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="auto", messages=long)
    assert caught.value.code == "context_length_exceeded"
    assert "4096" in caught.value.message
