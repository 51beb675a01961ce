"""Whatever is sent to a real server, it answers, and never as if the fault were its own.

`FUZZED_REQUESTS=20000 pytest tests/acceptance/test_fuzzed_requests.py` sends more.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.servers.process import SCRIPT, ServerProcess, write_config

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(0)]

EXAMPLES = int(os.environ.get("FUZZED_REQUESTS", "200"))
GROWTH_BYTES = 256 * 2**20
"""More than the largest bodies that are allowed at once take, and less than what is not let go of."""
TOOL: Any = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
PNG = "data:image/png;base64,iVBORw0KGgo="
PARTS: Any = [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": PNG}}]
TURNS: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": PARTS},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "c", "content": "It is 42."},
]
BLOCKS: Any = [
    {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
]
SCHEMA: Any = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
GOOD: dict[str, Any] = {
    "/v1/chat/completions": {
        "model": "auto",
        "messages": TURNS,
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["END"],
        "seed": 7,
        "n": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [{"type": "function", "function": TOOL}],
        "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    },
    "/v1/responses": {
        "model": "auto",
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "It is 42."},
        ],
        "tools": [{"type": "function", **TOOL}, {"type": "namespace", "name": "n", "tools": []}],
        "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}, "verbosity": "low"},
        "reasoning": {"effort": "low"},
        "max_output_tokens": 9,
        "stream": True,
        "store": False,
    },
    "/v1/embeddings": {
        "model": "vectors",
        "input": ["one", "two"],
        "encoding_format": "float",
        "dimensions": 2,
    },
    "/v1/messages": {
        "model": "auto",
        "max_tokens": 9,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": BLOCKS},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "look", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "42"}]},
        ],
        "tools": [{"name": "look", "description": "Looks.", "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "adaptive"},
        "stop_sequences": ["END"],
        "stream": True,
    },
    "/v1/messages/count_tokens": {"model": "auto", "messages": [{"role": "user", "content": BLOCKS}]},
    "/mcp/tools/classify": {"text": "Good.", "labels": ["good", "bad"], "multiple": False},
    "/mcp/tools/extract": {"text": "Ann is 5.", "schema": SCHEMA, "instructions": "Names."},
    "/mcp": {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-11-25",
            "capabilities": {"roots": {"listChanged": True}},
            "clientInfo": {"name": "fuzz", "version": "1"},
            "_meta": {"progressToken": 1},
        },
    },
    "/api/v1/productivity/rewrite": {
        "payload": {"text": "Hello", "instructions": "shorter"},
        "limits": {"tokens": 100},
        "scope": "role",
        "privacy": "local",
        "status": "submitted",
        "history": [],
    },
    "/api/v1/load-balancer/explain": {"tier": "main", "privacy": "local", "input_tokens": 100},
}

REPLIES: list[Any] = [
    {"when": "Good.", "say": [{"label": "good"}]},
    {"when": "Ann is 5.", "say": [{"a": "Ann"}]},
    "Hello.",
]
NO_FAULT_OF_OURS = {"/api/v1/docs#invalid-output"}
"""The scripted LLM has no answer of just any form."""

odd_text = st.text(max_size=12) | st.sampled_from(
    ["\x00", "\ud800", "\u2028", "\ufeff", "a" * 5000, "../../etc", "🦊" * 50, "null", "1e999", "auto", PNG]
)
odd_number = st.integers() | st.floats() | st.sampled_from([2**63, -(2**64), 10**400, 0, -1, 1e308, -0.0])
anything = st.recursive(
    st.none() | st.booleans() | odd_number | odd_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_text, inner, max_size=4),
    max_leaves=12,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value within `value`."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """`value` with what is at `path` changed."""
    if not path:
        return change(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], change)
    return copy


@st.composite
def spoiled(draw: st.DrawFn, good: Any) -> bytes:
    """A body that was good, until a few of its values or bytes became others."""
    body = good
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(sorted(places(body), key=str)))
        odd = draw(anything)
        deep = draw(st.sampled_from([0, 0, 0, 1, 40, 2000]))
        how = draw(st.sampled_from(["replace", "nest", "more"]))

        def change(old: Any, odd: Any = odd, deep: int = deep, how: str = how) -> Any:
            if how == "nest" and deep <= 40:
                for _ in range(deep):
                    old = [old]
                return old
            if how == "more" and isinstance(old, dict):
                return old | {"extra": odd, str(odd)[:9]: old}
            return old * 40 if how == "more" and isinstance(old, list | str) else odd

        body = changed(body, path, change)
    said = json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(said)))
        said = said[:at] + draw(st.binary(max_size=8)) + said[at + draw(st.integers(0, 8)) :]
    return said


deep = st.sampled_from([b"[", b'{"a":', b'[{"messages":']).flatmap(
    lambda one: st.integers(1, 30_000).map(lambda times: one * times)
)
requests = st.sampled_from(sorted(GOOD)).flatmap(
    lambda path: st.tuples(
        st.just(path), spoiled(GOOD[path]) | st.binary(max_size=200) | deep | anything.map(_json)
    )
)
headers = st.dictionaries(
    st.sampled_from(
        ["X-Tier", "X-Project", "X-Privacy", "X-Priority", "Idempotency-Key", "Prefer", "anthropic-version"]
    ),
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20).map(str.strip),
    max_size=3,
)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServerProcess]:
    llms: dict[str, Any] = {
        "scripted": {
            **SCRIPT,
            "capabilities": ["chat", "json_schema", "tools", "vision"],
            "context": 100_000,
            "options": {"replies": REPLIES},
        },
        "large": {**SCRIPT, "tier": "main", "context": 100_000},
        "vectors": {**SCRIPT, "capabilities": ["embeddings"]},
    }
    folder = tmp_path_factory.mktemp("fuzzed")
    config = write_config(folder, llms=llms, messaging={"enabled": False})
    async with ServerProcess(folder / "state", config) as process:
        yield process


async def test_good_bodies_are_good(server: ServerProcess) -> None:
    async with server.http() as http:
        answers = {path: await post(http, path, _json(body), {}) for path, body in GOOD.items()}
    assert {path: answer.text for path, answer in answers.items() if answer.status_code >= 400} == {}


async def test_no_request_is_answered_with_a_fault_of_the_server(server: ServerProcess) -> None:
    grown: list[float] = []
    async with server.http() as http:
        began_bytes = psutil.Process(server.pid).memory_info().rss

        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(requests, headers)
        def sent(request: tuple[str, bytes], more: dict[str, str]) -> None:
            path, body = request
            answer = asyncio.run_coroutine_threadsafe(post(http, path, body, more), loop).result(120)
            if answer.status_code >= 400:
                told = answer.json()
                assert "error" in told or "detail" in told, (path, answer.text[:500])
                is_ours = answer.status_code >= 500 and told.get("type") not in NO_FAULT_OF_OURS
                assert not is_ours, (path, body[:2000], more, answer.text[:500])

        loop = asyncio.get_running_loop()
        await asyncio.to_thread(sent)
        grown.append(psutil.Process(server.pid).memory_info().rss - began_bytes)
        health = await http.get("/api/v1/health")
    assert health.json()["status"] in {"ok", "degraded"}
    assert grown[0] < GROWTH_BYTES


async def post(http: httpx.AsyncClient, path: str, body: bytes, more: dict[str, str]) -> httpx.Response:
    known = {
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
        "anthropic-version": "2023-06-01",
    }
    return await http.post(path, content=body, headers=known | more)
