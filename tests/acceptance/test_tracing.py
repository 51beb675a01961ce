"""Traces to a collector on a socket: what is told, what goes on in them, and what a dead collector costs."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from ai_agent_server.assembly import tracer_for
from ai_agent_server.config import settings
from ai_agent_server.config.settings import Settings
from ai_agent_server.errors import ConfigurationError
from ai_agent_server.tracing.otlp import MAX_QUEUED, OtlpTracer
from tests.servers.gateway import configuration
from tests.servers.openai_double import OpenAIDouble
from tests.servers.otlp_double import OtlpDouble, attributes
from tests.servers.ports import held_port
from tests.servers.process import ServerProcess, packaged

pytestmark = pytest.mark.asyncio(loop_scope="module")

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HELLO = "What is the secret of the desert?"
SOON_S = 50.0


@asynccontextmanager
async def server(
    folder: Path, tracing: dict[str, Any], **environ: str
) -> AsyncIterator[tuple[ServerProcess, int]]:
    """A server that tells its spans, and the port of the LLM `first` behind it."""
    (folder / "clerk.md").write_text("You are a clerk.")
    config = folder / "configuration.json"
    given: dict[str, Any] = dict(environ)
    with held_port() as first, held_port() as second:
        config.write_text(json.dumps(configuration((first, second)) | {"tracing": tracing}))
        async with ServerProcess(folder / "state", config, **given) as process:
            yield process, first


class Traced:
    """A server, its collector, and the LLM that it asks."""

    def __init__(self, process: ServerProcess, collector: OtlpDouble, first: OpenAIDouble) -> None:
        self.process, self.collector, self.first = process, collector, first


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[ServerProcess, int, int]]:
    folder = tmp_path_factory.mktemp("traced")
    with held_port() as port:
        async with server(folder, {"endpoint": OtlpDouble(port).endpoint}) as (process, llm_port):
            yield process, llm_port, port


@pytest_asyncio.fixture(loop_scope="module")
async def traced(running: tuple[ServerProcess, int, int]) -> AsyncIterator[Traced]:
    process, llm_port, port = running
    async with OpenAIDouble(port=llm_port) as first, OtlpDouble(port) as collector:
        yield Traced(process, collector, first)


async def chat(process: ServerProcess, *, model: str = "first", stream: bool = False, **headers: str) -> int:
    """The status of a chat."""
    body = {"model": model, "messages": [{"role": "user", "content": HELLO}], "seed": 7, "stream": stream}
    async with process.http() as http:
        return (await http.post("/v1/chat/completions", json=body, headers=headers)).status_code


def traceparents(double: OpenAIDouble) -> list[str | None]:
    """What came with each chat."""
    return [request.headers.get("traceparent") for request in double.requests if request.method == "POST"]


def ids(span: Span) -> tuple[str, str, str]:
    """Trace, parent, itself."""
    return span.trace_id.hex(), span.parent_span_id.hex(), span.span_id.hex()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_clients_trace_goes_on_through_the_server_to_the_engine(traced: Traced, stream: bool) -> None:
    collector, first = traced.collector, traced.first
    assert await chat(traced.process, stream=stream, traceparent=f"00-{TRACE}-{CLIENT}-01") == 200
    await collector.until(2)
    (asked,), (called,) = collector.named("chat first"), collector.named("chat double-1")
    assert ids(asked)[:2] == (TRACE, CLIENT)
    assert ids(called)[:2] == (TRACE, ids(asked)[2])
    assert traceparents(first) == [f"00-{TRACE}-{ids(called)[2]}-01"]
    assert (asked.kind, called.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT)
    assert asked.start_time_unix_nano <= called.start_time_unix_nano < called.end_time_unix_nano
    assert called.end_time_unix_nano <= asked.end_time_unix_nano
    assert collector.resource["service.name"] == "ai-agent-server"
    assert attributes(asked) == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "ai_agent_server",
        "gen_ai.request.model": "first", "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 11, "gen_ai.usage.output_tokens": 6,
        "ai_agent_server.surface": "chat", "ai_agent_server.tier": "small", "ai_agent_server.llm": "first",
        "ai_agent_server.request_id": attributes(asked)["ai_agent_server.request_id"],
    }  # fmt: skip
    assert attributes(called) == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "double-1", "gen_ai.request.seed": 7,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 11, "gen_ai.usage.output_tokens": 6,
        "ai_agent_server.llm": "first",
    }  # fmt: skip
    for body in collector.bodies:
        assert b"desert" not in body
        assert first.reply.encode() not in body


async def test_a_request_without_a_trace_begins_one_and_a_failure_has_its_name(traced: Traced) -> None:
    traced.first.fault = "bad_request"
    assert await chat(traced.process, traceparent="not a trace") == 400
    assert await chat(traced.process, model="desk/clerk") == 200
    await traced.collector.until(4)
    (asked,), (called,) = traced.collector.named("chat first"), traced.collector.named("chat double-1")
    (task,) = traced.collector.named("invoke_agent desk/clerk")
    assert ids(asked)[1] == ""
    assert ids(called)[:2] == (ids(asked)[0], ids(asked)[2])
    assert asked.status.code == called.status.code == Status.STATUS_CODE_ERROR
    assert attributes(asked)["error.type"] == "refused_by_engine"
    assert attributes(called)["error.type"] == "EngineRequestError"
    assert task.status.code == Status.STATUS_CODE_UNSET
    assert ids(task)[0] != ids(asked)[0]
    assert attributes(task)["ai_agent_server.task_id"]


async def test_what_a_client_does_not_want_told_is_not_and_goes_on_as_such(traced: Traced) -> None:
    await chat(traced.process, traceparent=f"00-{TRACE}-{CLIENT}-00")
    await chat(traced.process)
    await traced.collector.until(2)
    assert {ids(span)[0] for span in traced.collector.spans} != {TRACE}
    assert len(traced.collector.spans) == 2
    passed_on, _ = traceparents(traced.first)
    assert passed_on is not None
    assert passed_on.startswith(f"00-{TRACE}-")
    assert passed_on.endswith("-00")


async def test_a_collector_that_is_away_costs_nothing_and_hears_of_it_later(tmp_path: Path) -> None:
    with held_port() as port:
        await hears_of_it_later(OtlpDouble(port=port), tmp_path)


async def hears_of_it_later(collector: OtlpDouble, folder: Path) -> None:
    tracing = {"endpoint": collector.endpoint, "headers": {"Authorization": {"env": "COLLECTOR_KEY"}}}
    async with (
        server(folder, tracing, COLLECTOR_KEY="Bearer sk-collector") as (process, port),
        OpenAIDouble(port=port),
    ):
        assert await chat(process) == 200
        async with asyncio.timeout(SOON_S):
            while "tracing.not_sent" not in process.log.read_text():
                await asyncio.sleep(0.1)
        assert await chat(process) == 200
        async with collector:
            collector.status = 503
            async with asyncio.timeout(SOON_S):
                while not collector.headers:
                    await asyncio.sleep(0.1)
            collector.status = 200
            await collector.until(4)
        log = process.log.read_text()
    assert len({span.span_id for span in collector.spans}) == len(collector.spans) == 4
    assert collector.headers[0]["authorization"] == "Bearer sk-collector"
    assert log.count("tracing.not_sent") == 1
    assert "sk-collector" not in log


def described(**tracing: Any) -> Settings:
    return settings.parse(json.dumps(packaged(tracing=tracing)).encode(), source="test")


async def test_what_keeps_traces_from_being_told_is_said_before_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert tracer_for(described(), {}) is None
    with pytest.raises(ConfigurationError, match=r"/tracing/endpoint: not an http\(s\) URL"):
        described(endpoint="localhost:4318")
    here = "http://127.0.0.1:4318/v1/traces"
    wants_key = described(endpoint=here, headers={"x-key": {"env": "NOT_THERE"}})
    with pytest.raises(ConfigurationError, match="/tracing/headers/x-key: the variable NOT_THERE is not set"):
        tracer_for(wants_key, {})
    with pytest.raises(ConfigurationError, match="NOT_THERE has what no header may have") as told:
        tracer_for(wants_key, {"NOT_THERE": "sk-secret\n"})
    assert "sk-secret" not in str(told.value)
    with pytest.raises(ConfigurationError, match="a host and a path alone"):
        described(endpoint="http://user:sk-secret@127.0.0.1:4318/v1/traces")
    # As it is where the package was not installed.
    monkeypatch.delitem(sys.modules, "ai_agent_server.tracing.otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.proto", None)
    for name in [name for name in sys.modules if name.startswith("opentelemetry.proto.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigurationError, match=r"pip install 'ai-agent-server\[otlp\]'"):
        tracer_for(described(endpoint=here), {})


def tracer(collector: OtlpDouble, share: float = 1.0) -> OtlpTracer:
    numbers = iter(range(1, 1_000_000))

    def random(size: int) -> bytes:
        # The first half of a trace's id says nothing of whether it is told.
        return (next(numbers) * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8).rjust(size, b"\1")

    return OtlpTracer(
        collector.endpoint,
        headers={},
        resource={"service.name": "x"},
        share=share,
        now_ns=lambda: 1,
        random=random,
    )


async def test_a_share_of_the_traces_is_told() -> None:
    collector = OtlpDouble()
    async with collector, tracer(collector, share=0.25) as spans:
        for _ in range(1000):
            spans.begin("x", kind="server", parent="", attributes={}).end()
    assert 200 < len(collector.spans) < 300


async def test_spans_that_nobody_takes_do_not_pile_up() -> None:
    collector = OtlpDouble()
    async with collector, tracer(collector) as spans:
        for _ in range(MAX_QUEUED + 100):
            spans.begin("x", kind="server", parent="", attributes={}).end()
    assert len(collector.spans) == MAX_QUEUED
