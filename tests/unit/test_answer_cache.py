"""The exact cache: what is one question, what is kept and for how long, and who waits for whom."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
import pytest

from ai_agent_server.config import settings as configuration
from ai_agent_server.config.settings import CacheSettings, Settings
from ai_agent_server.core.chat import (
    Candidate,
    ChatDelta,
    ChatRequest,
    ChatUsage,
    Decision,
    RouteHints,
    ToolCallDelta,
    message,
)
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.errors import EngineFailedError
from ai_agent_server.gateway.answer_cache import AnswerCache, Reading
from ai_agent_server.gateway.caller import Caller
from ai_agent_server.llm_engines.base import JoinedStream
from ai_agent_server.load_balancer.base import Sent
from tests.waiting import until

USING = Caller(key="laptop", cache="use")
REFRESHING = Caller(key="laptop", cache="refresh")


class Engine:
    """Answers word by word as it is let go on; counts how often it was asked, and broken off."""

    def __init__(self, *words: str, llm: str = "embedded", **last: Any) -> None:
        self.words, self.llm, self.last = words or ("Blue",), llm, last
        self.asked = self.closed = 0
        self.error: Exception | None = None
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def stream(self, sent: Sent) -> AsyncGenerator[ChatDelta, None]:
        self.asked += 1
        sent(self.llm, "local")
        decision = Decision(
            chosen=self.llm, reason="", strategy="", candidates=self.last.get("candidates", ())
        )
        try:
            for word in self.words:
                yield ChatDelta(text=word, llm=self.llm, source="local", decision=decision)
                await self.may_go_on.wait()
                if self.error is not None:
                    raise self.error
            yield ChatDelta(
                finish_reason=self.last.get("finish_reason", "stop"),
                usage=ChatUsage(input_tokens=5, output_tokens=len(self.words)),
            )
        except (GeneratorExit, asyncio.CancelledError):
            self.closed += 1
            raise


class World:
    """A cache, its configuration, its clock."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.settings: Settings = configuration.load(None)
        self.cache = AnswerCache(settings=lambda: self.settings, clock=lambda: self.now_s)

    def bound(self, **bounds: Any) -> None:
        gateway = msgspec.structs.replace(self.settings.gateway, cache=CacheSettings(**bounds))
        self.settings = msgspec.structs.replace(self.settings, gateway=gateway)

    def reading(self, request: ChatRequest, caller: Caller = USING) -> Reading:
        reading = self.cache.reading(request, caller)
        assert reading is not None
        return reading

    async def answer(self, engine: Engine, request: ChatRequest, caller: Caller = USING) -> str:
        """`hit` or `miss`."""
        reading = self.reading(request, caller)
        await read(reading, engine)
        assert reading.pays == (reading.outcome == "miss")
        return reading.outcome


async def read(reading: Reading, engine: Engine) -> str:
    joined = JoinedStream()
    async for delta in reading.stream(engine.stream, lambda *_: None):
        joined.add(delta)
    return joined.reply().text


def ask(text: str = "Name a colour.", **changes: Any) -> ChatRequest:
    return ChatRequest(messages=(message("user", text),), **changes)


@pytest.fixture
def world() -> World:
    return World()


async def test_who_does_not_want_it_goes_past_it(world: World) -> None:
    assert world.cache.reading(ask(), Caller(cache="off")) is None
    world.bound(max_mb=0)
    assert world.cache.reading(ask(), USING) is None


@pytest.mark.parametrize(
    "other",
    [
        ask("Name a color."),
        ask(seed=1),
        ask(temperature=0.0),
        ask(max_tokens=3),
        ask(stop=("x",)),
        ask(response_schema={"type": "object"}),
        ask(route=RouteHints(llm="embedded")),
        ask(route=RouteHints(privacy="local")),
        ask(route=RouteHints(allowed=("embedded",))),
    ],
)
async def test_whatever_decides_the_answer_makes_it_another_question(
    world: World, other: ChatRequest
) -> None:
    engine = Engine()
    assert await world.answer(engine, ask()) == "miss"
    assert await world.answer(engine, other) == "miss"
    assert await world.answer(engine, ask()) == "hit"


async def test_who_is_served_first_and_in_which_trace_does_not_decide_the_answer(world: World) -> None:
    engine = Engine()
    await world.answer(engine, ask(route=RouteHints(urgency="batch", key="laptop"), traceparent="00-1"))
    assert await world.answer(engine, ask()) == "hit"


async def test_the_order_of_a_schemas_keys_is_that_of_the_answers(world: World) -> None:
    engine, text = Engine(), {"type": "string"}
    await world.answer(engine, ask(response_schema={"properties": {"a": text, "b": text}}))
    assert await world.answer(engine, ask(response_schema={"properties": {"b": text, "a": text}})) == "miss"


async def test_what_one_key_or_project_was_answered_is_not_told_to_another(world: World) -> None:
    engine = Engine()
    phone, shop = Caller(key="phone", cache="use"), Caller(key="laptop", project="shop", cache="use")
    await world.answer(engine, ask())
    assert [await world.answer(engine, ask(), caller) for caller in (phone, shop)] == ["miss", "miss"]
    world.bound(shared=True)
    await world.answer(engine, ask())
    assert [await world.answer(engine, ask(), caller) for caller in (phone, shop)] == ["hit", "hit"]
    # Another privacy comes to the cache as another question, whoever asks it.
    assert await world.answer(engine, ask(route=RouteHints(privacy="local")), phone) == "miss"


async def test_an_answer_comes_again_as_it_was(world: World) -> None:
    async def thinking(sent: Sent) -> AsyncGenerator[ChatDelta, None]:
        yield ChatDelta(reasoning="Hm. ", llm="embedded", model="m", source="local")
        yield ChatDelta(reasoning="Yes.")
        yield ChatDelta(text="I ")
        yield ChatDelta(text="look.", tool_calls=(ToolCallDelta(index=0, id="c1", name="look"),))
        yield ChatDelta(tool_calls=(ToolCallDelta(index=0, arguments='{"a":1}'),))
        yield ChatDelta(finish_reason="tool_calls", usage=ChatUsage(input_tokens=5, output_tokens=7))

    replies = []
    for _ in range(2):
        joined = JoinedStream()
        async for delta in world.reading(ask()).stream(thinking, lambda *_: None):
            joined.add(delta)
        replies.append(joined.reply())
    again = replies[1]
    assert again.decision is not None
    assert "cache" in again.decision.reason
    assert msgspec.structs.replace(again, decision=None) == replies[0]


async def test_an_answer_is_too_old_after_its_time(world: World) -> None:
    engine = Engine()
    world.bound(ttl_s=60)
    await world.answer(engine, ask())
    world.now_s += 59
    reading = world.reading(ask())
    assert (reading.is_kept, reading.age_s) == (True, 59)
    world.now_s += 1
    assert await world.answer(engine, ask()) == "miss"


async def test_what_was_not_used_for_longest_makes_room(world: World) -> None:
    engine = Engine()
    world.bound(max_answers=2)
    for text in ("a", "b", "a", "c"):
        await world.answer(engine, ask(text))
    assert world.cache.state().answers == 2
    assert [world.reading(ask(text)).is_kept for text in ("a", "b", "c")] == [True, False, True]


async def test_it_never_holds_more_bytes_than_it_may(world: World) -> None:
    engine = Engine("x" * 10_000)
    world.bound(max_mb=0.1)
    for number in range(30):
        await world.answer(engine, ask(str(number)))
        assert world.cache.state().size_bytes <= 0.1 * 2**20
    assert world.cache.state().answers == 9
    await world.answer(Engine("x" * 200_000), ask("too large"))
    assert not world.reading(ask("too large")).is_kept
    world.bound(max_mb=0)
    world.cache.forget(())
    assert (world.cache.state().answers, world.cache.state().size_bytes) == (0, 0)


async def test_a_refresh_asks_and_takes_the_old_answers_place(world: World) -> None:
    await world.answer(Engine("old"), ask())
    one = world.cache.state()
    assert await world.answer(Engine("new"), ask(), REFRESHING) == "miss"
    assert await read(world.reading(ask()), Engine("none")) == "new"
    assert world.cache.state() == one


@pytest.mark.parametrize("how", ["error", "content_filter", "empty", "left"])
async def test_an_answer_that_did_not_end_well_is_not_kept(world: World, how: str) -> None:
    engine = Engine("" if how == "empty" else "Blue")
    if how == "content_filter":
        engine.last["finish_reason"] = "content_filter"
    if how == "error":
        engine.error = EngineFailedError("it broke", engine="embedded")
        with pytest.raises(EngineFailedError):
            await read(world.reading(ask()), engine)
    elif how == "left":
        engine.may_go_on.clear()
        leaving = world.reading(ask()).stream(engine.stream, lambda *_: None)
        await anext(leaving)
        await leaving.aclose()
        assert engine.closed == 1
    else:
        await read(world.reading(ask()), engine)
    assert not world.reading(ask()).is_kept


async def test_one_asks_and_the_others_hear_it_too(world: World) -> None:
    engine = Engine("Blue", " or", " green")
    engine.may_go_on.clear()
    readings = [world.reading(ask()) for _ in range(5)]
    reads = [asyncio.create_task(read(reading, engine)) for reading in readings]
    await asyncio.sleep(0)
    engine.may_go_on.set()
    assert set(await asyncio.gather(*reads)) == {"Blue or green"}
    assert engine.asked == 1
    assert [reading.outcome for reading in readings] == ["miss", "hit", "hit", "hit", "hit"]
    assert [reading.pays for reading in readings] == [True, False, False, False, False]


async def test_who_joins_late_hears_it_from_the_beginning(world: World) -> None:
    engine = Engine("Blue", " or", " green")
    engine.may_go_on.clear()
    early = world.reading(ask()).stream(engine.stream, lambda *_: None)
    await anext(early)
    late = asyncio.create_task(read(world.reading(ask()), engine))
    await asyncio.sleep(0)
    engine.may_go_on.set()
    assert "".join([delta.text async for delta in early]) == " or green"
    assert await late == "Blue or green"
    assert engine.asked == 1


async def test_everybody_who_waits_knows_which_llm_has_the_question(world: World) -> None:
    engine, told = Engine(), list[str]()
    engine.may_go_on.clear()
    streams = [
        world.reading(ask()).stream(engine.stream, lambda llm, source: told.append(f"{llm} {source}"))
        for _ in range(3)
    ]
    for number, stream in enumerate(streams, 1):
        await anext(stream)
        assert told == ["embedded local"] * number
    for stream in streams:
        await stream.aclose()


async def test_who_waits_at_the_keyboard_does_not_join_what_has_time(world: World) -> None:
    engine = Engine()
    engine.may_go_on.clear()
    reads = [
        asyncio.create_task(read(world.reading(ask(route=RouteHints(urgency=urgency))), engine))
        for urgency in ("background", "interactive")
    ]
    await until(lambda: engine.asked == 2)
    engine.may_go_on.set()
    await asyncio.gather(*reads)


async def test_one_who_asked_and_leaves_ends_it_for_nobody_else_and_another_pays(world: World) -> None:
    engine = Engine("Blue", " or", " green")
    engine.may_go_on.clear()
    first, second = world.reading(ask()), world.reading(ask())
    leaving, staying = (asyncio.create_task(read(reading, engine)) for reading in (first, second))
    await until(lambda: engine.asked == 1)
    leaving.cancel()
    await asyncio.wait((leaving,))
    engine.may_go_on.set()
    assert await staying == "Blue or green"
    assert (engine.asked, engine.closed) == (1, 0)
    assert (first.pays, second.pays) == (False, True)


async def test_the_last_one_who_leaves_ends_it(world: World) -> None:
    engine = Engine("Blue", " or", " green")
    engine.may_go_on.clear()
    readings = [world.reading(ask()) for _ in range(2)]
    reads = [asyncio.create_task(read(reading, engine)) for reading in readings]
    await until(lambda: engine.asked == 1)
    for task in reads:
        task.cancel()
    await asyncio.wait(reads)
    assert engine.closed == 1
    assert sum(reading.pays for reading in readings) == 1
    engine.may_go_on.set()
    assert await world.answer(engine, ask()) == "miss"


async def test_nobody_joins_what_is_being_ended(world: World) -> None:
    closing, closed = asyncio.Event(), asyncio.Event()

    async def slow_to_close(sent: Sent) -> AsyncGenerator[ChatDelta, None]:
        try:
            yield ChatDelta(text="Bl", llm="embedded", source="local")
            await asyncio.Event().wait()
        finally:
            closing.set()
            await closed.wait()

    leaving = world.reading(ask()).stream(slow_to_close, lambda *_: None)
    await anext(leaving)
    ending = asyncio.create_task(leaving.aclose())
    await closing.wait()
    engine = Engine()
    assert await world.answer(engine, ask()) == "miss"
    closed.set()
    await ending
    assert await world.answer(engine, ask()) == "hit"


async def test_an_error_is_everybodys(world: World) -> None:
    engine = Engine()
    engine.error = EngineFailedError("it broke", engine="embedded")
    reads = [read(world.reading(ask()), engine) for _ in range(3)]
    answers = await asyncio.gather(*reads, return_exceptions=True)
    assert [type(answer) for answer in answers] == [EngineFailedError] * 3
    assert engine.asked == 1


async def test_what_a_changed_llm_said_is_forgotten(world: World) -> None:
    await world.answer(Engine(llm="embedded"), ask("a"))
    await world.answer(Engine(llm="other"), ask("b"))
    under_way = Engine(llm="embedded")
    under_way.may_go_on.clear()
    task = asyncio.create_task(read(world.reading(ask("c")), under_way))
    await until(lambda: under_way.asked == 1)
    world.cache.forget({"embedded"})
    under_way.may_go_on.set()
    await task
    assert [world.reading(ask(text)).is_kept for text in ("a", "b", "c")] == [False, True, False]


async def test_a_stand_ins_answer_is_not_kept_for_when_the_usual_one_is_back(world: World) -> None:
    await world.answer(Engine(llm="another"), ask(route=RouteHints(llm="embedded")))
    assert world.cache.state().answers == 0

    small, main = world.settings.llms["embedded"], "large"
    llms = {"embedded": small, main: msgspec.structs.replace(small, tier="main")}
    world.settings = msgspec.structs.replace(world.settings, llms=llms)
    wants_main = ask(route=RouteHints(tier="main"))
    out = (Candidate(llm=main, refused_by="LB-9 circuit"),)
    await world.answer(Engine(llm="embedded", candidates=out), wants_main)
    assert world.cache.state().answers == 0
    never = (Candidate(llm=main, refused_by="LB-5 capability"),)
    await world.answer(Engine(llm="embedded", candidates=never), wants_main)
    assert world.cache.state().answers == 1


async def vectors(
    world: World,
    *texts: str,
    caller: Caller = USING,
    meanwhile: Callable[[], None] = lambda: None,
    llm: str = "embedded",
    size_bytes: int = 4,
) -> str:
    """`hit` or `miss`."""
    kept = world.cache.vectors(EmbeddingRequest(inputs=texts, route=RouteHints(llm="embedded")), caller)
    assert kept is not None
    vector = b"\0\0\x80?" * (size_bytes // 4)

    async def ask() -> EmbeddingReply:
        meanwhile()
        return EmbeddingReply(vectors=(vector,), usage=ChatUsage(input_tokens=3), llm=llm)

    reply = await kept.reply(ask)
    assert (reply.vectors, reply.usage.input_tokens) == ((vector,), 3)
    return kept.outcome


async def test_vectors_are_kept_for_the_same_texts_in_their_order_key_and_time(world: World) -> None:
    outcomes = [await vectors(world, "a", "b") for _ in range(2)]
    assert outcomes == ["miss", "hit"]
    assert await vectors(world, "b", "a") == "miss"
    assert await vectors(world, "a", "b", caller=Caller(key="phone", cache="use")) == "miss"
    assert await vectors(world, "a", "b", caller=REFRESHING) == "miss"
    world.now_s += world.settings.gateway.cache.ttl_s
    assert await vectors(world, "a", "b") == "miss"
    assert world.cache.vectors(EmbeddingRequest(inputs=("a",)), Caller(key="laptop", cache="off")) is None


async def test_what_is_larger_than_the_cache_leaves_the_others_there(world: World) -> None:
    world.bound(max_mb=0.01)
    await vectors(world, "a")
    for _ in range(2):
        assert await vectors(world, "many", size_bytes=20_000) == "miss"
    assert await vectors(world, "a") == "hit"


async def test_vectors_of_a_model_that_was_changed_meanwhile_or_of_another_are_not_kept(world: World) -> None:
    assert await vectors(world, "a", meanwhile=lambda: world.cache.forget(["embedded"])) == "miss"
    assert await vectors(world, "a", llm="another") == "miss"
    assert await vectors(world, "a") == "miss"
    assert await vectors(world, "a") == "hit"
    world.cache.forget(["embedded"])
    assert await vectors(world, "a") == "miss"
