"""What every LLM engine promises, tested on every engine there is.

llama.cpp runs the real embedded model; the others speak to doubles over real sockets. A new file in
llm_engines is tested from the moment it exists: it needs a rig in `RIGS`, and fails until it has one.
"""

import asyncio
import json
import math
import socket
from array import array
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, ClassVar

import jsonschema
import msgspec
import pytest
import pytest_asyncio

from ai_agent_server import llm_engines
from ai_agent_server.core.chat import (
    ChatDelta,
    ChatReply,
    ChatRequest,
    ImagePart,
    Message,
    TextPart,
    Tool,
    message,
)
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.discovery import implementation, kinds
from ai_agent_server.errors import (
    ContextOverflowError,
    EngineAuthError,
    EngineBusyError,
    EngineError,
    EngineFailedError,
    EngineProtocolError,
    EngineRequestError,
    EngineTimeoutError,
    EngineUnreachableError,
    ModelNotFoundError,
)
from ai_agent_server.llm_engines.base import (
    CountingEngine,
    EmbeddingEngine,
    EngineSpec,
    EngineTimeouts,
    JoinedStream,
    LLMEngine,
    chat,
)
from tests.servers.anthropic_double import AnthropicDouble
from tests.servers.http_double import RETRY_AFTER_S, HTTPDouble
from tests.servers.llama_server_double import LlamaServerDouble
from tests.servers.ollama_double import OllamaDouble
from tests.servers.openai_double import OpenAIDouble
from tests.servers.vllm_double import VLLMDouble

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "sk-very-secret-key"
WEATHER = Tool(
    name="weather",
    description="The weather in a city.",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
    },
)
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 200}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FAULTS: dict[str, type[EngineError]] = {
    "refused": EngineUnreachableError,
    "reset": EngineUnreachableError,
    "silent": EngineTimeoutError,
    "stall": EngineTimeoutError,
    "cut": EngineProtocolError,
    "unfinished": EngineProtocolError,
    "malformed": EngineProtocolError,
    "misshapen": EngineProtocolError,
    "error_in_stream": EngineFailedError,
    "ok_then_error": EngineFailedError,
    "busy": EngineBusyError,
    "overloaded": EngineBusyError,
    "auth": EngineAuthError,
    "no_model": ModelNotFoundError,
    "overflow": ContextOverflowError,
    "bad_request": EngineRequestError,
    "redirect": EngineRequestError,
    "failed": EngineFailedError,
}


class Rig:
    """How the suite comes by an engine of one kind. Subclasses override what differs."""

    kind: ClassVar[str]
    faults: frozenset[str] = frozenset(FAULTS)
    """What this kind can be made to suffer."""
    moves: ClassVar[bool] = False
    """Whether its model comes and goes as it is told."""

    def __init__(self) -> None:
        self._engines: list[LLMEngine] = []
        self._nobody = socket.socket()
        """Has a port on which nobody listens, as long as a test lasts."""

    async def start(self) -> None:
        """Before a test."""

    async def stop(self) -> None:
        """After a test."""
        for engine in self._engines:
            await engine.aclose()
        self._nobody.close()

    def build(
        self, options: Any, *, model: str = "double-1", timeouts: EngineTimeouts | None = None
    ) -> LLMEngine:
        """A new engine, closed at the end of the test."""
        spec = EngineSpec(name="it", model=model, api_key=KEY, timeouts=timeouts or EngineTimeouts())
        engine_class = implementation(llm_engines, self.kind)
        engine: LLMEngine = engine_class(spec, msgspec.convert(options, engine_class.Options))
        self._engines.append(engine)
        return engine

    def engine(self, says: str = "", timeouts: EngineTimeouts | None = None) -> LLMEngine:
        """An engine whose model says `says`, where it can be told to."""
        raise NotImplementedError

    def failing(self, fault: str, timeouts: EngineTimeouts | None = None) -> LLMEngine:
        """An engine that suffers `fault`."""
        raise NotImplementedError

    def embedder(self, timeouts: EngineTimeouts | None = None) -> LLMEngine:
        """An engine whose model gives vectors."""
        return self.engine(timeouts=timeouts)

    async def until_free(self) -> None:
        """Until nothing is being written any more."""

    def loads(self) -> int:
        """How often a model was loaded, as far as can be seen."""
        return 0


class DoubleRig(Rig):
    """An engine that speaks to a double."""

    double_class: ClassVar[type[HTTPDouble]]
    suffix = ""

    async def start(self) -> None:
        self.double = self.double_class()
        self.double.api_key = KEY
        await self.double.__aenter__()
        self._hung_up = 0

    async def stop(self) -> None:
        await super().stop()
        await self.double.__aexit__(None, None, None)

    def engine(self, says: str = "", timeouts: EngineTimeouts | None = None) -> LLMEngine:
        self.double.reply = says or self.double.reply
        self.double.piece_s = 0.001
        return self.build({"base_url": self.double.url + self.suffix}, timeouts=timeouts)

    def failing(self, fault: str, timeouts: EngineTimeouts | None = None) -> LLMEngine:
        if fault == "refused":
            self._nobody.bind(("127.0.0.1", 0))
            port = self._nobody.getsockname()[1]
            return self.build({"base_url": f"http://127.0.0.1:{port}{self.suffix}"}, timeouts=timeouts)
        self.double.fault = fault  # type: ignore[assignment]  # a table's key
        self.double.redirect_to = f"http://127.0.0.2:{self.double.port}/stolen"
        return self.engine(timeouts=timeouts)

    async def until_free(self) -> None:
        self._hung_up += 1
        await self.double.until_hung_up(self._hung_up)


class OpenAIRig(DoubleRig):
    kind = "api.openai"
    double_class = OpenAIDouble
    suffix = "/v1"


class AnthropicRig(DoubleRig):
    kind = "api.anthropic"
    double_class = AnthropicDouble


class LlamaServerRig(DoubleRig):
    kind = "local.llama_server"
    double_class = LlamaServerDouble


class VLLMRig(DoubleRig):
    kind = "local.vllm"
    double_class = VLLMDouble
    moves = True


class OllamaRig(DoubleRig):
    kind = "local.ollama"
    double_class = OllamaDouble
    moves = True
    double: OllamaDouble

    def loads(self) -> int:
        return self.double.loads


class ScriptedRig(Rig):
    kind = "local.scripted"
    faults = frozenset({"refused", "silent", "cut", "misshapen", "busy", "auth", "bad_request", "failed"})
    _SWITCH: ClassVar[dict[str, str]] = {
        "refused": "unreachable",
        "silent": "timeout",
        "misshapen": "protocol",
        "bad_request": "request",
    }

    def engine(self, says: str = "", timeouts: EngineTimeouts | None = None) -> LLMEngine:
        call = {"name": "weather", "arguments": {"city": "Paris"}}
        replies = [
            {"when": "Result of the weather", "say": ["Sunny."]},
            {"when": "weather", "tool_calls": [call]},
            {"when": "Ann", "say": [{"name": "Ann", "age": 30}]},
            says or "The answer is 42, of course.",
        ]
        return self.build({"replies": replies, "tokens_per_s": 2000}, timeouts=timeouts)

    def failing(self, fault: str, timeouts: EngineTimeouts | None = None) -> LLMEngine:
        options = {"fail": self._SWITCH.get(fault, fault), "retry_after_s": RETRY_AFTER_S}
        return self.build({**options, "replies": ["one two three"]}, timeouts=timeouts)


class LlamaCppRig(Rig):
    """The real model, loaded once for all the tests."""

    kind = "local.llama_cpp"
    faults = frozenset({"no_model", "overflow", "bad_request"})
    moves = True
    MODEL = "SmolLM2-135M-Instruct"

    def __init__(self, shared: LLMEngine) -> None:
        super().__init__()
        self._shared = shared

    def engine(self, says: str = "", timeouts: EngineTimeouts | None = None) -> LLMEngine:
        return self.build({}, model=self.MODEL, timeouts=timeouts) if timeouts else self._shared

    def embedder(self, timeouts: EngineTimeouts | None = None) -> LLMEngine:
        return self.build({"embeddings": "mean"}, model=self.MODEL, timeouts=timeouts)

    def failing(self, fault: str, timeouts: EngineTimeouts | None = None) -> LLMEngine:
        return self.build({}, model="nope") if fault == "no_model" else self._shared

    async def until_free(self) -> None:
        # The server's own word for it; there is no other door to look through.
        child = self._shared._child  # type: ignore[attr-defined]  # LlamaCppEngine's
        async with asyncio.timeout(60):
            while any(slot["is_processing"] for slot in await child.http.get("/slots", list[dict[str, Any]])):
                await asyncio.sleep(0.01)


RIGS: dict[str, type[Rig]] = {
    rig.kind: rig
    for rig in (OpenAIRig, AnthropicRig, LlamaServerRig, VLLMRig, OllamaRig, ScriptedRig, LlamaCppRig)
}
MOVING = sorted(kind for kind, rig in RIGS.items() if rig.moves)
SERVED = sorted(kind for kind, rig in RIGS.items() if issubclass(rig, DoubleRig))
FAILING = [(kind, fault) for kind in sorted(RIGS) for fault in FAULTS if fault in RIGS[kind].faults]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def embedded() -> AsyncIterator[LLMEngine]:
    spec = EngineSpec(name="it", model=LlamaCppRig.MODEL, context_tokens=1024, slots=2)
    engine_class = implementation(llm_engines, LlamaCppRig.kind)
    engine: LLMEngine = engine_class(spec, engine_class.Options())
    yield engine
    await engine.aclose()


@pytest_asyncio.fixture(loop_scope="module", params=sorted(kinds(llm_engines)))
async def rig(request: pytest.FixtureRequest, embedded: LLMEngine) -> AsyncIterator[Rig]:
    kind = request.param
    if kind not in RIGS:
        pytest.fail(
            f"the engine {kind!r} has no rig: write one in {__name__} (a DoubleRig, if it speaks to a "
            "server, and the server's double in tests/servers) and add it to RIGS"
        )
    found = LlamaCppRig(embedded) if kind == LlamaCppRig.kind else RIGS[kind]()
    await found.start()
    yield found
    await found.stop()


def ask(text: str, **rest: Any) -> ChatRequest:
    """A short request."""
    return ChatRequest(messages=(message("user", text),), **{"max_tokens": 48, "temperature": 0.0, **rest})


def impatient(fault: str) -> EngineTimeouts:
    """Short where the fault is a silence, so that no other one is taken for a silence."""
    match fault:
        case "silent":
            return EngineTimeouts(first_token_s=1.0)
        case "stall":
            return EngineTimeouts(idle_s=0.5)
        case _:
            return EngineTimeouts()


async def collect(engine: LLMEngine, request: ChatRequest) -> list[ChatDelta]:
    """Every delta, within a bound."""
    async with asyncio.timeout(60):
        return [delta async for delta in engine.stream(request)]


async def whole(engine: LLMEngine, request: ChatRequest) -> ChatReply:
    """The whole answer, within a bound."""
    async with asyncio.timeout(60):
        return await chat(engine, request)


async def test_an_answer_comes_in_pieces_that_join_to_the_whole(rig: Rig) -> None:
    said = "Zwölf Boxkämpfer\u2028 jagen Viktor 🌍 über den Deich."
    deltas = await collect(rig.engine(says=said), ask("Say something nice about Paris."))
    joined = JoinedStream()
    for delta in deltas:
        joined.add(delta)
    assert len([delta for delta in deltas if delta.text]) > 1
    assert joined.reply().text == "".join(delta.text for delta in deltas)
    if not isinstance(rig, LlamaCppRig):
        assert joined.reply().text == said


async def test_the_last_delta_says_why_it_ended_and_what_was_used(rig: Rig) -> None:
    *before, last = await collect(rig.engine(), ask("Say something nice about Paris."))
    assert last.finish_reason in {"stop", "length"}
    assert [delta.finish_reason for delta in before] == [None] * len(before)
    assert last.usage is not None
    assert last.usage.input_tokens > 0
    assert last.usage.output_tokens > 0
    assert last.model


async def test_no_delta_is_empty(rig: Rig) -> None:
    for delta in await collect(rig.engine(), ask("Say something nice about Paris.")):
        assert delta.text or delta.tool_calls or delta.finish_reason


@pytest.mark.parametrize("rig", [*SERVED, LlamaCppRig.kind], indirect=True)
async def test_an_answer_cut_at_max_tokens_says_length(rig: Rig) -> None:
    reply = await whole(rig.engine(), ask("Count to one hundred.", max_tokens=3))
    assert reply.finish_reason == "length"
    assert reply.usage.output_tokens <= 3


async def test_an_answer_obeys_the_schema_that_was_asked_for(rig: Rig) -> None:
    reply = await whole(rig.engine(), ask("Ann is 30 years old.", response_schema=PERSON, max_tokens=100))
    jsonschema.validate(json.loads(reply.text), PERSON)


async def test_a_required_tool_is_called_with_arguments_of_its_shape(rig: Rig) -> None:
    request = ask("What is the weather in Paris?", tools=(WEATHER,), tool_choice="required", max_tokens=100)
    reply = await whole(rig.engine(), request)
    assert reply.finish_reason == "tool_calls"
    (call,) = reply.tool_calls
    assert call.id
    assert call.name == "weather"
    jsonschema.validate(json.loads(call.arguments), WEATHER.parameters)


async def test_a_tools_result_is_taken_up(rig: Rig) -> None:
    engine = rig.engine()
    request = ask("What is the weather in Paris?", tools=(WEATHER,), tool_choice="required", max_tokens=100)
    called = await whole(engine, request)
    (call,) = called.tool_calls
    turns = (
        *request.messages,
        Message(role="assistant", parts=(), tool_calls=called.tool_calls),
        Message(role="tool", parts=(TextPart(text="Result of the weather: 21 C"),), tool_call_id=call.id),
    )
    reply = await whole(engine, msgspec.structs.replace(request, messages=turns, tool_choice="none"))
    assert reply.text
    assert reply.tool_calls == ()


async def test_closing_the_stream_frees_its_slot(rig: Rig) -> None:
    stream = rig.engine(says="word " * 3000).stream(ask("Count to one thousand.", max_tokens=900))
    async with asyncio.timeout(60):
        await anext(stream)
    await stream.aclose()
    await rig.until_free()


async def test_cancelling_the_reader_frees_its_slot(rig: Rig) -> None:
    engine, began = rig.engine(says="word " * 3000), asyncio.Event()

    async def read() -> None:
        async for _ in engine.stream(ask("Count to one thousand.", max_tokens=900)):
            began.set()

    reading = asyncio.create_task(read())
    async with asyncio.timeout(60):
        await began.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await rig.until_free()


async def test_many_may_ask_at_the_same_time(rig: Rig) -> None:
    engine = rig.engine()
    replies = await asyncio.gather(*(whole(engine, ask(f"Say {n}.", max_tokens=8)) for n in range(6)))
    assert all(reply.text for reply in replies)


@pytest.mark.parametrize(("rig", "fault"), FAILING, indirect=["rig"])
async def test_a_fault_becomes_the_error_that_it_means(rig: Rig, fault: str) -> None:
    engine = rig.failing(fault, impatient(fault))
    text = "too long " * 3000 if fault == "overflow" else "Hello."
    schema = {"type": "strin"} if fault == "bad_request" else None
    with pytest.raises(EngineError) as caught:
        await collect(engine, ask(text, response_schema=schema))
    assert type(caught.value) is FAULTS[fault]
    assert KEY not in f"{caught.value!r} {caught.value} {engine!r} {vars(caught.value)}"
    assert caught.value.engine == "it"
    if isinstance(caught.value, EngineTimeoutError):
        assert caught.value.phase == ("first_token" if fault == "silent" else "idle")
    if fault == "busy":
        assert isinstance(caught.value, EngineBusyError)
        assert caught.value.retry_after_s == RETRY_AFTER_S


@pytest.mark.parametrize("rig", SERVED, indirect=True)
async def test_a_fault_of_one_request_leaves_the_next_alone(rig: DoubleRig) -> None:
    engine = rig.failing("cut")
    with pytest.raises(EngineProtocolError):
        await collect(engine, ask("Hello."))
    rig.double.fault = None
    assert (await whole(engine, ask("Hello."))).text == rig.double.reply


@pytest.mark.parametrize("rig", SERVED, indirect=True)
async def test_a_redirect_is_not_followed(rig: DoubleRig) -> None:
    with pytest.raises(EngineRequestError, match="redirect"):
        await collect(rig.failing("redirect"), ask("Hello."))
    assert "/stolen" not in rig.double.paths()


@pytest.mark.parametrize("rig", SERVED, indirect=True)
async def test_an_image_reaches_the_server_as_it_is(rig: DoubleRig) -> None:
    content = "iVBORw0KGgo="
    image = ImagePart(media_type="image/png", content=content)
    turn = Message(role="user", parts=(TextPart(text="What is it?"), image))
    await whole(rig.engine(), ChatRequest(messages=(turn,)))
    assert content in json.dumps(rig.double.requests[-1].json)


async def test_asking_for_the_models_loads_none(rig: Rig) -> None:
    engine = rig.engine(timeouts=EngineTimeouts(first_token_s=5))
    cards = await engine.models()
    assert [card.name for card in cards]
    assert all(card.residency != "loaded" or isinstance(rig, LlamaServerRig | VLLMRig) for card in cards)
    assert rig.loads() == 0
    if isinstance(rig, DoubleRig):
        assert all(request.method == "GET" for request in rig.double.requests)


@pytest.mark.parametrize("rig", SERVED, indirect=True)
async def test_models_of_a_server_that_is_not_there_is_an_engine_error(rig: DoubleRig) -> None:
    with pytest.raises(EngineUnreachableError):
        await rig.failing("refused").models()


async def test_load_and_unload_are_always_allowed(rig: Rig) -> None:
    engine = rig.engine()
    await engine.load()
    await engine.unload()
    await engine.unload()
    assert (await whole(engine, ask("Hello."))).text


@pytest.mark.parametrize("rig", MOVING, indirect=True)
async def test_a_model_that_was_unloaded_is_said_to_be_and_serves_again(rig: Rig) -> None:
    async def residency() -> str:
        return next(iter(await engine.models())).residency

    engine = rig.engine(says="The answer is 42.")
    await engine.load()
    assert await residency() == "loaded"
    await engine.unload()
    assert await residency() == "unloaded"
    said = (await whole(engine, ask("Hello.", max_tokens=8))).text
    assert said == "The answer is 42." or (said and isinstance(rig, LlamaCppRig))
    assert await residency() == "loaded"


async def test_a_closed_engine_closes_again_and_answers_with_an_engine_error(rig: Rig) -> None:
    engine = rig.engine(timeouts=EngineTimeouts(first_token_s=5))
    await engine.aclose()
    await engine.aclose()
    with pytest.raises(EngineError):
        await collect(engine, ask("Hello."))


@pytest.mark.parametrize("rig", [*SERVED, LlamaCppRig.kind], indirect=True)
async def test_closing_the_engine_ends_its_streams_with_an_engine_error(rig: Rig) -> None:
    engine = rig.engine(says="word " * 3000, timeouts=EngineTimeouts(first_token_s=60))
    async with aclosing(engine.stream(ask("Count to one thousand.", max_tokens=900))) as stream:
        async with asyncio.timeout(60):
            await anext(stream)
        await engine.aclose()
        with pytest.raises(EngineError):
            async with asyncio.timeout(60):
                async for _ in stream:
                    pass


EMBED_FAULTS = frozenset(FAULTS) - {"stall", "unfinished", "error_in_stream", "ok_then_error", "overflow"}
COUNTS = sorted(kind for kind in RIGS if hasattr(implementation(llm_engines, kind), "count"))
COUNT_FAULTS = frozenset({"refused", "reset", "silent", "busy", "auth", "failed"})


async def count(engine: LLMEngine, request: ChatRequest) -> int | None:
    """The prompt's tokens, within a bound."""
    assert isinstance(engine, CountingEngine)
    async with asyncio.timeout(60):
        return await engine.count(request)


@pytest.mark.parametrize("rig", COUNTS, indirect=True)
@pytest.mark.parametrize("tools", [(), (WEATHER,)])
async def test_a_prompt_is_counted_as_its_answer_counts_it(rig: Rig, tools: tuple[Tool, ...]) -> None:
    engine = rig.engine()
    request = ask("Was kostet die Fahrt nach München? 0123456789", tools=tools, max_tokens=4)
    reply = await whole(engine, request)
    assert await count(engine, request) == reply.usage.input_tokens


@pytest.mark.parametrize("rig", [LlamaCppRig.kind], indirect=True)
async def test_a_prompt_is_counted_without_loading_the_embedded_model(rig: Rig) -> None:
    engine = rig.build({}, model=LlamaCppRig.MODEL)
    assert await count(engine, ask("Hello.")) is None
    assert (await engine.models())[0].residency == "unloaded"


@pytest.mark.parametrize("rig", [LlamaServerRig.kind], indirect=True)
async def test_a_prompt_is_counted_without_having_a_router_load(rig: LlamaServerRig) -> None:
    assert isinstance(rig.double, LlamaServerDouble)
    rig.double.router = {"double-1": "unloaded"}
    assert await count(rig.engine(), ask("Hello.")) is None
    assert rig.double.router == {"double-1": "unloaded"}


@pytest.mark.parametrize(
    ("rig", "fault"),
    [(kind, fault) for kind in COUNTS if kind in SERVED for fault in sorted(COUNT_FAULTS)],
    indirect=["rig"],
)
async def test_a_fault_of_a_count_becomes_the_error_that_it_means(rig: Rig, fault: str) -> None:
    engine = rig.failing(fault, EngineTimeouts(connect_s=0.5) if fault == "silent" else None)
    with pytest.raises(EngineError) as caught:
        await count(engine, ask("Hello."))
    assert type(caught.value) is FAULTS[fault]
    assert KEY not in f"{caught.value!r} {caught.value} {engine!r} {vars(caught.value)}"


EMBEDS = sorted(kind for kind in RIGS if hasattr(implementation(llm_engines, kind), "embed"))
FAILING_EMBEDS = [
    (kind, fault)
    for kind, fault in FAILING
    if fault in EMBED_FAULTS and kind in {*EMBEDS} - {LlamaCppRig.kind}
]


async def embed(engine: LLMEngine, *inputs: str, dimensions: int | None = None) -> EmbeddingReply:
    """The vectors of the inputs, within a bound."""
    assert isinstance(engine, EmbeddingEngine)
    async with asyncio.timeout(60):
        return await engine.embed(EmbeddingRequest(inputs=inputs, dimensions=dimensions))


def alike(one: bytes, other: bytes) -> float:
    """The cosine between two vectors."""
    left, right = array("f", one), array("f", other)
    product: float = sum(a * b for a, b in zip(left, right, strict=True))
    return product / math.hypot(*left) / math.hypot(*right)


@pytest.mark.parametrize("rig", EMBEDS, indirect=True)
async def test_each_input_has_its_own_vector_in_the_inputs_order(rig: Rig) -> None:
    reply = await embed(rig.embedder(), "A cat sleeps.", "Quarterly revenue rose.", "A cat sleeps.")
    first, second, third = reply.vectors
    assert alike(first, third) > 0.999
    assert alike(first, second) < 0.999
    assert reply.usage.input_tokens > 0
    assert reply.model


@pytest.mark.parametrize("rig", EMBEDS, indirect=True)
async def test_shorter_vectors_come_as_asked_for_or_not_at_all(rig: Rig) -> None:
    try:
        reply = await embed(rig.embedder(), "A cat sleeps.", dimensions=2)
    except EngineRequestError:
        return
    assert [len(vector) for vector in reply.vectors] == [8]


@pytest.mark.parametrize(("rig", "fault"), FAILING_EMBEDS, indirect=["rig"])
async def test_a_fault_of_an_embedding_becomes_the_error_that_it_means(rig: Rig, fault: str) -> None:
    engine = rig.failing(fault, impatient(fault))
    with pytest.raises(EngineError) as caught:
        await embed(engine, "one", "two")
    # What was cut before its end is no answer that began: it may be asked for again.
    expected = {FAULTS[fault]} | ({EngineUnreachableError} if fault == "cut" else set())
    assert type(caught.value) in expected
    assert KEY not in f"{caught.value!r} {caught.value} {engine!r} {vars(caught.value)}"
    assert caught.value.engine == "it"


@pytest.mark.parametrize("rig", [kind for kind in SERVED if kind in EMBEDS], indirect=True)
async def test_an_input_longer_than_the_context_is_refused_as_that(rig: DoubleRig) -> None:
    with pytest.raises(ContextOverflowError):
        await embed(rig.failing("overflow"), "too long")


@pytest.mark.parametrize("rig", [LlamaCppRig.kind], indirect=True)
async def test_an_input_longer_than_the_embedded_models_context_is_refused_as_that(rig: Rig) -> None:
    with pytest.raises(ContextOverflowError):
        await embed(rig.embedder(), "too long " * 9000)


@pytest.mark.parametrize("rig", [LlamaCppRig.kind], indirect=True)
async def test_the_embedded_model_writes_too_while_it_gives_vectors(rig: Rig) -> None:
    engine = rig.embedder()
    reply, vectors = await asyncio.gather(whole(engine, ask("Hello.", max_tokens=8)), embed(engine, "Hello."))
    assert reply.text
    assert vectors.vectors


@pytest.mark.parametrize("rig", [LlamaCppRig.kind], indirect=True)
async def test_an_embedded_model_that_was_not_told_to_gives_no_vectors(rig: Rig) -> None:
    with pytest.raises(EngineRequestError, match="embeddings"):
        await embed(rig.engine(), "Hello.")


@pytest.mark.parametrize("rig", EMBEDS, indirect=True)
async def test_a_closed_engine_gives_no_vectors(rig: Rig) -> None:
    engine = rig.embedder(timeouts=EngineTimeouts(first_token_s=5))
    await engine.aclose()
    with pytest.raises(EngineError):
        await embed(engine, "Hello.")


@pytest.mark.parametrize("rig", [OpenAIRig.kind], indirect=True)
async def test_a_server_that_knows_no_base64_is_understood(rig: OpenAIRig) -> None:
    engine = rig.engine()
    known = await embed(engine, "one", "three")
    rig.double.knows_base64 = False  # type: ignore[attr-defined]  # the OpenAIDouble's
    assert (await embed(engine, "one", "three")).vectors == known.vectors
