"""Many LLMs as one: retries, fallback, circuits, slots, toggles and reload, over engines written by hand."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence

import msgspec
import pytest
import structlog
from structlog.typing import EventDict

from ai_agent_server.config.settings import BalancerSettings, CircuitSettings, LLMSettings, RetrySettings
from ai_agent_server.core.chat import ChatDelta, ChatReply, ChatRequest, ChatUsage, RouteHints, message
from ai_agent_server.core.ports import Balancer
from ai_agent_server.errors import (
    ContextOverflowError,
    EngineAuthError,
    EngineBusyError,
    EngineFailedError,
    EngineProtocolError,
    EngineRequestError,
    EngineTimeoutError,
    EngineUnreachableError,
    ModelNotFoundError,
    NoLLMError,
    UnknownLLMError,
)
from ai_agent_server.llm_engines.base import ModelCard, Residency, chat
from ai_agent_server.load_balancer.balanced_engine import BalancedEngine, Member
from ai_agent_server.load_balancer.base import LLMView, Requirements
from ai_agent_server.load_balancer.strategies.resident_first import ResidentFirst
from tests.waiting import until

DEADLINE_S = 60.0

Step = ChatDelta | Exception
ANSWER: tuple[Step, ...] = (
    ChatDelta(text="four", model="m"),
    ChatDelta(finish_reason="stop", usage=ChatUsage(input_tokens=3, output_tokens=5)),
)


class LineEngine:
    """Says its lines: one script for each call, the last one for ever; `hold` keeps it in its first line."""

    def __init__(self, *scripts: Sequence[Step] | Exception) -> None:
        self.scripts: list[Sequence[Step]] = [
            (script,) if isinstance(script, Exception) else script for script in scripts or (ANSWER,)
        ]
        self.hold = asyncio.Event()
        self.hold.set()
        self.calls: list[str] = []
        self.running = self.most_running = self.cut_off = 0
        self.residency: Residency = "unknown"
        self.asked_for_models = self.loads = self.closed = 0

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        script = self.scripts[min(len(self.calls), len(self.scripts) - 1)]
        self.calls.append(request.messages[-1].text)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.hold.wait()
            for step in script:
                await asyncio.sleep(0)
                if isinstance(step, Exception):
                    raise step
                yield step
        except (GeneratorExit, asyncio.CancelledError):
            self.cut_off += 1
            raise
        finally:
            self.running -= 1

    async def models(self) -> tuple[ModelCard, ...]:
        self.asked_for_models += 1
        return (ModelCard(name="m", residency=self.residency, memory_bytes=123),)

    async def load(self) -> None:
        self.loads += 1
        self.residency = "loaded"

    async def unload(self) -> None:
        self.residency = "unloaded"

    async def aclose(self) -> None:
        self.closed += 1


class SkippedTime:
    """A clock that only sleeping moves, and at once."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pauses: list[float] = []

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now_s += seconds
        await asyncio.sleep(0)


LOCAL = LLMSettings(engine="local.line", model="m", source="local")
API = LLMSettings(engine="api.line", model="m", source="api")
SETTINGS = BalancerSettings(
    circuit=CircuitSettings(failures=5, cooldown_s=30.0),
    retry=RetrySettings(attempts=3, backoff_s=1.0, backoff_max_s=8.0),
    max_wait_s=60.0,
)


def changed(settings: LLMSettings, **fields: object) -> LLMSettings:
    return msgspec.structs.replace(settings, **fields)


def balanced(
    members: dict[str, tuple[LLMSettings, LineEngine]],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    settings: BalancerSettings = SETTINGS,
) -> BalancedEngine:
    return BalancedEngine(
        {name: Member(settings=llm, engine=engine) for name, (llm, engine) in members.items()},
        strategy=ResidentFirst(),
        settings=settings,
        clock=clock,
        rng=random.Random(7),
        sleep=sleep,
    )


def asking(text: str = "2+2?", **route: object) -> ChatRequest:
    hints = msgspec.convert(route, RouteHints)
    return ChatRequest(messages=(message("user", text),), route=hints)


def view_of(engine: BalancedEngine, name: str) -> LLMView:
    (view,) = [view for view in engine.views() if view.name == name]
    return view


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What the balancer logs: the events' names, with why."""
    said: list[str] = []

    def take(_: object, __: str, event: EventDict) -> EventDict:
        said.append(f"{event['event']} {event.get('why', '')}".strip())
        raise structlog.DropEvent

    structlog.configure(processors=[take])
    yield said
    structlog.reset_defaults()


async def test_the_first_delta_says_which_llm_and_why() -> None:
    engine = balanced({"a": (LOCAL, LineEngine())})
    first, last = [delta async for delta in engine.stream(asking())]
    assert (first.text, first.llm, first.source, first.model) == ("four", "a", "local", "m")
    assert first.decision is not None
    assert first.decision.chosen == "a"
    assert first.decision.strategy == "resident_first"
    assert (last.llm, last.decision, last.finish_reason) == ("", None, "stop")


async def test_a_failure_before_the_first_token_is_repeated_after_a_growing_jittered_pause() -> None:
    skipped = SkippedTime()
    line = LineEngine(EngineUnreachableError("refused"), EngineFailedError("500"), ANSWER)
    engine = balanced({"a": (LOCAL, line)}, clock=skipped.clock, sleep=skipped.sleep)
    assert (await chat(engine, asking())).text == "four"
    first, second = skipped.pauses
    assert 0.5 <= first <= 1.0
    assert 1.0 <= second <= 2.0


async def test_what_keeps_failing_falls_back_to_the_next(told: list[str]) -> None:
    skipped = SkippedTime()
    broken, whole = LineEngine(EngineFailedError("500")), LineEngine()
    engine = balanced({"a": (LOCAL, broken), "b": (API, whole)}, clock=skipped.clock, sleep=skipped.sleep)
    reply = await chat(engine, asking())
    assert (reply.llm, reply.source) == ("b", "api")
    assert len(broken.calls) == 3
    assert reply.decision is not None
    assert [(each.llm, each.refused_by) for each in reply.decision.candidates] == [
        ("b", None),
        ("a", "LB-8 tried"),
    ]
    assert told == [
        "llm.retried EngineFailedError",
        "llm.retried EngineFailedError",
        "llm.given_up EngineFailedError",
    ]


async def test_nothing_is_repeated_after_the_first_token() -> None:
    cut = LineEngine((ChatDelta(text="fo"), EngineProtocolError("cut")))
    other = LineEngine()
    engine = balanced({"a": (LOCAL, cut), "b": (LOCAL, other)})
    seen = []
    with pytest.raises(EngineProtocolError, match="cut"):
        async for delta in engine.stream(asking()):
            seen.append(delta.text)  # noqa: PERF401 - what came before the error is the point
    assert seen == ["fo"]
    assert (len(cut.calls), len(other.calls)) == (1, 0)
    assert view_of(engine, "a").failures == 1


async def test_an_empty_delta_binds_nobody_yet() -> None:
    skipped = SkippedTime()
    line = LineEngine((ChatDelta(model="m"), EngineFailedError("500")), (ChatDelta(model="m"), *ANSWER))
    engine = balanced({"a": (LOCAL, line)}, clock=skipped.clock, sleep=skipped.sleep)
    deltas = [delta async for delta in engine.stream(asking())]
    assert [delta.text for delta in deltas] == ["four", ""]
    assert (deltas[0].llm, deltas[0].model) == ("a", "m")


async def test_an_answer_that_is_only_an_end_is_an_answer() -> None:
    line = LineEngine((ChatDelta(finish_reason="stop", usage=ChatUsage(input_tokens=1)),))
    reply = await chat(balanced({"a": (LOCAL, line)}), asking())
    assert (reply.text, reply.llm, reply.usage.input_tokens) == ("", "a", 1)


async def test_a_stream_that_ends_without_saying_why_is_no_success() -> None:
    engine = balanced({"a": (LOCAL, LineEngine((ChatDelta(text="fo"),)))})
    with pytest.raises(EngineProtocolError, match="finish_reason"):
        await chat(engine, asking())
    assert view_of(engine, "a").failures == 1


async def test_a_retry_after_sends_the_request_to_another_at_once() -> None:
    skipped = SkippedTime()
    busy, other = LineEngine(EngineBusyError("429", retry_after_s=20.0)), LineEngine()
    engine = balanced({"a": (LOCAL, busy), "b": (LOCAL, other)}, clock=skipped.clock, sleep=skipped.sleep)
    assert (await chat(engine, asking())).llm == "b"
    assert skipped.pauses == []
    assert (await chat(engine, asking())).llm == "b"
    assert len(busy.calls) == 1


async def test_a_retry_after_is_waited_for_where_there_is_no_other(told: list[str]) -> None:
    skipped = SkippedTime()
    busy = LineEngine(EngineBusyError("429", retry_after_s=20.0), ANSWER)
    engine = balanced({"a": (LOCAL, busy)}, clock=skipped.clock, sleep=skipped.sleep)
    assert (await chat(engine, asking())).llm == "a"
    assert skipped.now_s == pytest.approx(20.0)
    assert told == ["llm.circuit_opened EngineBusyError", "llm.waited", "llm.circuit_closed"]


async def test_a_retry_after_beyond_the_longest_wait_ends_the_request_at_once() -> None:
    skipped = SkippedTime()
    busy = LineEngine(EngineBusyError("quota", retry_after_s=3600.0))
    engine = balanced({"a": (LOCAL, busy)}, clock=skipped.clock, sleep=skipped.sleep)
    with pytest.raises(NoLLMError) as caught:
        await chat(engine, asking())
    assert skipped.pauses == []
    assert caught.value.refusals == {"a": "LB-9 circuit: EngineBusyError: quota"}
    assert isinstance(caught.value.__cause__, EngineBusyError)


async def test_a_full_engine_has_not_failed() -> None:
    skipped = SkippedTime()
    engine = balanced(
        {"a": (LOCAL, LineEngine(EngineBusyError("503")))}, clock=skipped.clock, sleep=skipped.sleep
    )
    for _ in range(4):
        with pytest.raises(NoLLMError):
            await chat(engine, asking())
    assert view_of(engine, "a").circuit == "closed"


async def test_a_request_that_is_wrong_is_wrong_everywhere() -> None:
    wrong, other = LineEngine(EngineRequestError("400")), LineEngine()
    engine = balanced({"a": (LOCAL, wrong), "b": (LOCAL, other)})
    with pytest.raises(EngineRequestError, match="400"):
        await chat(engine, asking())
    assert (len(wrong.calls), len(other.calls)) == (1, 0)
    assert view_of(engine, "a").failures == 0


@pytest.mark.parametrize("error", [EngineAuthError("401"), ModelNotFoundError("404")])
async def test_what_a_repeat_cannot_mend_goes_to_the_next_at_once(error: Exception) -> None:
    broken, other = LineEngine(error), LineEngine()
    engine = balanced({"a": (LOCAL, broken), "b": (LOCAL, other)})
    assert (await chat(engine, asking())).llm == "b"
    assert len(broken.calls) == 1


async def test_a_prompt_that_is_too_long_goes_to_a_longer_context_only() -> None:
    short, same = LineEngine(ContextOverflowError("too long")), LineEngine()
    members = {"a": (LOCAL, short), "b": (LOCAL, same), "c": (changed(LOCAL, context=32_000), LineEngine())}
    assert (await chat(balanced(members), asking())).llm == "c"
    assert same.calls == []


async def test_the_engine_s_own_word_stands_where_no_longer_context_is() -> None:
    engine = balanced({"a": (LOCAL, LineEngine(ContextOverflowError("too long")))})
    with pytest.raises(ContextOverflowError):
        await chat(engine, asking())


async def test_the_end_names_what_went_wrong_on_each_llm() -> None:
    skipped = SkippedTime()
    members = {
        "a": (LOCAL, LineEngine(EngineUnreachableError("refused"))),
        "b": (changed(LOCAL, toggle=False), LineEngine()),
        "c": (API, LineEngine()),
    }
    engine = balanced(members, clock=skipped.clock, sleep=skipped.sleep)
    with pytest.raises(NoLLMError) as caught:
        await chat(engine, asking(privacy="local"))
    assert caught.value.refusals == {
        "a": "LB-8 tried: EngineUnreachableError: refused",
        "b": "LB-1 toggle: it is switched off",
        "c": "LB-3 privacy: the request may not leave this machine",
    }


async def test_what_is_assigned_to_a_locked_llm_ends_rather_than_moves() -> None:
    skipped = SkippedTime()
    broken, other = LineEngine(EngineFailedError("500")), LineEngine()
    engine = balanced(
        {"a": (changed(LOCAL, locked=True), broken), "b": (LOCAL, other)},
        clock=skipped.clock,
        sleep=skipped.sleep,
    )
    with pytest.raises(NoLLMError) as caught:
        await chat(engine, asking(llm="a"))
    assert caught.value.refusals["b"].startswith("LB-2 lock")
    assert other.calls == []


async def test_what_is_assigned_to_an_unlocked_llm_moves_within_its_tier_when_that_fails() -> None:
    skipped = SkippedTime()
    broken, main, small = LineEngine(EngineFailedError("500")), LineEngine(), LineEngine()
    members = {"a": (LOCAL, broken), "b": (changed(LOCAL, tier="main"), main), "c": (API, small)}
    engine = balanced(members, clock=skipped.clock, sleep=skipped.sleep)
    reply = await chat(engine, asking(llm="a"))
    assert reply.llm == "c"
    assert reply.decision is not None
    assert reply.decision.reason == "c: stands in for a (api); after a"


async def test_an_open_circuit_lets_exactly_one_request_probe() -> None:
    now_s = 0.0
    line = LineEngine(*[EngineFailedError("500")] * 5, ANSWER)
    settings = msgspec.structs.replace(SETTINGS, retry=RetrySettings(attempts=1))
    engine = balanced({"a": (changed(LOCAL, slots=50), line)}, clock=lambda: now_s, settings=settings)
    for _ in range(5):
        with pytest.raises(NoLLMError):
            await chat(engine, asking())
    assert view_of(engine, "a").circuit == "open"

    line.hold.clear()
    requests = [asyncio.create_task(chat(engine, asking(str(n)))) for n in range(20)]
    await until(lambda: engine.waiting == 20)
    assert line.running == 0
    now_s = 30.0
    requests.append(asyncio.create_task(chat(engine, asking("20"))))
    await until(lambda: line.running > 0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert line.running == 1, "one probe"
    assert line.calls[-1] == "0", "and it is the request that waited longest"
    assert view_of(engine, "a").probing
    line.hold.set()
    async with asyncio.timeout(DEADLINE_S):
        replies = await asyncio.gather(*requests)
    assert len(replies) == 21
    assert view_of(engine, "a").circuit == "closed"


async def test_who_waited_before_the_circuit_opened_is_served_after_its_cooldown() -> None:
    line = LineEngine(EngineFailedError("500"), ANSWER)
    line.hold.clear()
    settings = BalancerSettings(
        circuit=CircuitSettings(failures=1, cooldown_s=0.05), retry=RetrySettings(attempts=1), max_wait_s=3600
    )
    engine = balanced({"a": (LOCAL, line)}, settings=settings)
    running = asyncio.create_task(chat(engine, asking()))
    await until(lambda: line.running == 1)
    waiting = asyncio.create_task(chat(engine, asking()))
    await until(lambda: engine.waiting == 1)
    line.hold.set()
    with pytest.raises(NoLLMError):
        await running
    async with asyncio.timeout(DEADLINE_S):
        assert (await waiting).text == "four"


async def test_who_waits_is_told_when_a_retry_after_ends_all_hope() -> None:
    line = LineEngine(EngineBusyError("quota", retry_after_s=100_000.0))
    line.hold.clear()
    settings = msgspec.structs.replace(SETTINGS, max_wait_s=3600.0)
    engine = balanced({"a": (LOCAL, line)}, settings=settings)
    running = asyncio.create_task(chat(engine, asking()))
    await until(lambda: line.running == 1)
    waiting = asyncio.create_task(chat(engine, asking()))
    await until(lambda: engine.waiting == 1)
    line.hold.set()
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(NoLLMError, match="quota"):
            await running
        with pytest.raises(NoLLMError, match="LB-9 circuit"):
            await waiting
    assert len(line.calls) == 1


async def test_a_request_whose_probe_failed_does_not_wait_for_the_next_one() -> None:
    skipped = SkippedTime()
    settings = msgspec.structs.replace(SETTINGS, circuit=CircuitSettings(failures=1, cooldown_s=10.0))
    line = LineEngine(EngineFailedError("500"))
    engine = balanced({"a": (LOCAL, line)}, clock=skipped.clock, sleep=skipped.sleep, settings=settings)
    with pytest.raises(NoLLMError):
        await chat(engine, asking())
    assert len(line.calls) == 2, "the failure that opened the circuit, and one probe"
    assert skipped.now_s == pytest.approx(10.0)


async def test_switching_an_llm_on_closes_its_circuit() -> None:
    engine = balanced({"a": (LOCAL, LineEngine(EngineBusyError("quota", retry_after_s=9999.0), ANSWER))})
    with pytest.raises(NoLLMError):
        await chat(engine, asking())
    assert view_of(engine, "a").circuit == "open"
    await engine.set_toggle("a", True)
    assert (await chat(engine, asking())).text == "four"


async def test_a_probe_whose_client_left_is_nobody_s_failure() -> None:
    skipped = SkippedTime()
    line = LineEngine(EngineBusyError("429", retry_after_s=100.0), ANSWER)
    engine = balanced({"a": (LOCAL, line)}, clock=skipped.clock, sleep=skipped.sleep)
    with pytest.raises(NoLLMError):
        await chat(engine, asking())
    skipped.now_s = 100.0
    line.hold.clear()
    request = asyncio.create_task(chat(engine, asking()))
    await until(lambda: view_of(engine, "a").probing)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    view = view_of(engine, "a")
    assert (view.circuit, view.probing, view.in_flight) == ("half_open", False, 0)


async def test_a_cold_load_is_not_a_failure() -> None:
    skipped = SkippedTime()
    line = LineEngine(EngineTimeoutError("first_token", 120.0))
    line.residency = "loading"
    engine = balanced({"a": (LOCAL, line)}, clock=skipped.clock, sleep=skipped.sleep)
    await engine.refresh_residency()
    for _ in range(4):
        with pytest.raises(NoLLMError):
            await chat(engine, asking())
    assert view_of(engine, "a").failures == 0
    line.residency = "loaded"
    await engine.refresh_residency()
    with pytest.raises(NoLLMError):
        await chat(engine, asking())
    assert view_of(engine, "a").failures == 3


async def test_a_local_llm_gets_no_more_than_its_slots_and_the_rest_in_order() -> None:
    line = LineEngine()
    line.hold.clear()
    engine = balanced({"a": (changed(LOCAL, slots=2), line)})
    requests = []
    for n in range(12):
        requests.append(asyncio.create_task(chat(engine, asking(str(n)))))
        await asyncio.sleep(0)
    await until(lambda: engine.waiting == 10)
    view = view_of(engine, "a")
    assert (view.in_flight, view.waiting) == (2, 10)
    line.hold.set()
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*requests)
    assert line.most_running == 2
    assert line.calls == [str(n) for n in range(12)]
    assert view_of(engine, "a").in_flight == 0


async def test_an_api_is_not_held_to_slots() -> None:
    line = LineEngine()
    line.hold.clear()
    engine = balanced({"a": (API, line)})
    requests = [asyncio.create_task(chat(engine, asking())) for _ in range(5)]
    await until(lambda: line.running == 5)
    line.hold.set()
    await asyncio.gather(*requests)


async def test_a_wait_that_is_over_ends_with_every_llm_s_refusal() -> None:
    line = LineEngine()
    line.hold.clear()
    settings = msgspec.structs.replace(SETTINGS, max_wait_s=0.05)
    engine = balanced({"a": (LOCAL, line)}, settings=settings)
    running = asyncio.create_task(chat(engine, asking()))
    await until(lambda: line.running == 1)
    with pytest.raises(NoLLMError) as caught:
        await chat(engine, asking())
    assert caught.value.refusals == {"a": "LB-8 tried: no free slot within 0.05 s"}
    assert engine.waiting == 0
    line.hold.set()
    assert (await running).text == "four"


async def test_when_the_wait_is_over_a_free_llm_that_ranks_behind_serves() -> None:
    line, behind = LineEngine(), LineEngine()
    line.hold.clear()
    settings = msgspec.structs.replace(SETTINGS, max_wait_s=0.05)
    engine = balanced({"a": (LOCAL, line), "b": (API, behind)}, settings=settings)
    running = asyncio.create_task(chat(engine, asking()))
    await until(lambda: line.running == 1)
    assert (await chat(engine, asking())).llm == "b"
    with pytest.raises(NoLLMError):
        await chat(engine, asking(privacy="local"))
    assert len(behind.calls) == 1
    line.hold.set()
    await running


async def test_who_leaves_the_line_takes_no_place() -> None:
    line = LineEngine()
    line.hold.clear()
    engine = balanced({"a": (LOCAL, line)})
    requests = []
    for n in range(3):
        requests.append(asyncio.create_task(chat(engine, asking(str(n)))))
        await asyncio.sleep(0)
    await until(lambda: engine.waiting == 2)
    requests[1].cancel()
    await until(lambda: engine.waiting == 1)
    line.hold.set()
    async with asyncio.timeout(DEADLINE_S):
        await requests[2]
    assert line.calls == ["0", "2"]


async def one_that_runs_and_one_that_waits(
    engine: BalancedEngine, line: LineEngine
) -> tuple[asyncio.Task[ChatReply], asyncio.Task[ChatReply]]:
    """Of one slot, held by `line`."""
    line.hold.clear()
    running = asyncio.create_task(chat(engine, asking("0")))
    await until(lambda: line.running == 1)
    waiting = asyncio.create_task(chat(engine, asking("1")))
    await until(lambda: engine.waiting == 1)
    return running, waiting


async def test_who_leaves_in_the_moment_of_being_served_gives_the_place_back() -> None:
    line = LineEngine()
    engine = balanced({"a": (LOCAL, line)})
    running, waiting = await one_that_runs_and_one_that_waits(engine, line)
    running.cancel()
    async with asyncio.timeout(DEADLINE_S):
        while engine.waiting:
            await asyncio.sleep(0)
    assert len(line.calls) == 1, "the place is given, and not yet taken"
    waiting.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    line.hold.set()
    async with asyncio.timeout(DEADLINE_S):
        assert (await chat(engine, asking("2"))).llm == "a"
    assert view_of(engine, "a").in_flight == 0


async def test_a_wait_that_cannot_be_logged_costs_nobody_the_place() -> None:
    def broken(_: object, __: str, event: EventDict) -> EventDict:
        raise BrokenPipeError(str(event["event"]))

    line = LineEngine()
    engine = balanced({"a": (LOCAL, line)})
    running, waiting = await one_that_runs_and_one_that_waits(engine, line)
    structlog.configure(processors=[broken])
    try:
        line.hold.set()
        with pytest.raises(BrokenPipeError, match="waited"):
            await waiting
    finally:
        structlog.reset_defaults()
    await running
    assert view_of(engine, "a").in_flight == 0


async def test_a_client_that_closes_its_stream_frees_the_slot() -> None:
    line = LineEngine()
    engine = balanced({"a": (LOCAL, line)})
    stream = engine.stream(asking())
    assert (await anext(stream)).text == "four"
    assert view_of(engine, "a").in_flight == 1
    await stream.aclose()
    assert line.cut_off == 1
    view = view_of(engine, "a")
    assert (view.in_flight, view.failures, view.circuit) == (0, 0, "closed")


async def test_an_llm_that_is_switched_off_finishes_what_it_answers_and_takes_no_more(
    told: list[str],
) -> None:
    line = LineEngine()
    line.hold.clear()
    engine = balanced({"a": (LOCAL, line)})
    running = asyncio.create_task(chat(engine, asking()))
    await until(lambda: line.running == 1)
    waiting = asyncio.create_task(chat(engine, asking()))
    await until(lambda: engine.waiting == 1)
    await engine.set_toggle("a", False)
    with pytest.raises(NoLLMError, match="LB-1 toggle"):
        await waiting
    line.hold.set()
    assert (await running).text == "four"
    await engine.set_toggle("a", True)
    assert (await chat(engine, asking())).text == "four"
    assert told == ["llm.toggled off", "llm.toggled on"]
    with pytest.raises(UnknownLLMError, match="there are: a"):
        await engine.set_toggle("b", False)


async def test_a_toggle_is_kept_before_it_counts() -> None:
    kept: list[tuple[str, bool, bool]] = []

    async def keep(name: str, on: bool, over: bool) -> None:
        assert view_of(engine, name).toggle
        kept.append((name, on, over))

    engine = BalancedEngine(
        {"a": Member(settings=LOCAL, engine=LineEngine())},
        strategy=ResidentFirst(),
        settings=SETTINGS,
        clock=time.monotonic,
        rng=random.Random(7),
        keep_toggle=keep,
    )
    await engine.set_toggle("a", False)
    assert kept == [("a", False, True)]
    assert not view_of(engine, "a").toggle


async def test_a_switch_that_a_reload_overtakes_counts_for_the_llm_that_is_there_now() -> None:
    kept: list[tuple[str, bool, bool]] = []

    async def keep(name: str, on: bool, over: bool) -> None:
        if not kept:
            engine.replace(
                {"a": Member(settings=changed(LOCAL, context=8192, toggle=False), engine=LineEngine())}
            )
        kept.append((name, on, over))

    engine = BalancedEngine(
        {"a": Member(settings=LOCAL, engine=LineEngine())},
        strategy=ResidentFirst(),
        settings=SETTINGS,
        clock=time.monotonic,
        rng=random.Random(7),
        keep_toggle=keep,
    )
    await engine.set_toggle("a", True)
    assert kept == [("a", True, True), ("a", True, False)], "kept again over what is configured now"
    assert view_of(engine, "a").toggle
    await engine.aclose()


async def test_a_switch_of_an_llm_that_a_reload_takes_away_is_refused() -> None:
    async def keep(name: str, on: bool, over: bool) -> None:
        engine.replace({"b": Member(settings=LOCAL, engine=LineEngine())})

    engine = BalancedEngine(
        {"a": Member(settings=LOCAL, engine=LineEngine())},
        strategy=ResidentFirst(),
        settings=SETTINGS,
        clock=time.monotonic,
        rng=random.Random(7),
        keep_toggle=keep,
    )
    with pytest.raises(UnknownLLMError, match="there are: b"):
        await engine.set_toggle("a", False)
    await engine.aclose()


async def test_an_llm_starts_as_it_was_switched_and_a_changed_configuration_wins() -> None:
    line = LineEngine()
    engine = BalancedEngine(
        {"a": Member(settings=LOCAL, engine=line, switched=False)},
        strategy=ResidentFirst(),
        settings=SETTINGS,
        clock=time.monotonic,
        rng=random.Random(7),
    )
    assert not view_of(engine, "a").toggle
    engine.replace({"a": Member(settings=changed(LOCAL, tier="main"), engine=line)})
    assert not view_of(engine, "a").toggle, "its toggle in the file is what it was"
    engine.replace({"a": Member(settings=changed(LOCAL, toggle=False), engine=line)})
    engine.replace({"a": Member(settings=LOCAL, engine=line)})
    assert view_of(engine, "a").toggle
    await engine.aclose()


async def test_a_reload_keeps_what_did_not_change_and_drops_no_stream() -> None:
    same, old, new, unused, gone = (LineEngine() for _ in range(5))
    old.hold.clear()
    engine = balanced({"same": (LOCAL, same), "moved": (LOCAL, old), "gone": (LOCAL, gone)})
    running = asyncio.create_task(chat(engine, asking(llm="moved")))
    await until(lambda: old.running == 1)
    await engine.set_toggle("same", False)
    engine.replace(
        {
            "same": Member(settings=changed(LOCAL, tier="main"), engine=unused),
            "moved": Member(settings=changed(LOCAL, context=8192), engine=new),
        }
    )
    await until(lambda: (unused.closed, gone.closed) == (1, 1))
    assert (old.closed, same.closed) == (0, 0)
    assert old.running == 1, "its stream goes on"
    view = view_of(engine, "same")
    assert (view.tier, view.toggle) == ("main", False)
    assert (await chat(engine, asking(llm="moved"))).llm == "moved"
    assert len(new.calls) == 1
    old.hold.set()
    assert (await running).text == "four"
    await until(lambda: old.closed == 1)
    await engine.aclose()
    assert (same.closed, old.closed, new.closed) == (1, 1, 1)


async def test_an_engine_that_closes_slowly_holds_no_reload_up_and_is_waited_for_at_the_end() -> None:
    class Slow(LineEngine):
        async def aclose(self) -> None:
            await ending.wait()
            self.closed += 1

    ending, old, new = asyncio.Event(), Slow(), LineEngine()
    engine = balanced({"a": (LOCAL, old)})
    engine.replace({"a": Member(settings=changed(LOCAL, context=8192), engine=new)})
    assert (await chat(engine, asking())).text == "four"
    assert len(new.calls) == 1
    closing = asyncio.create_task(engine.aclose())
    await until(lambda: new.closed == 1)
    assert not closing.done()
    ending.set()
    await closing
    assert old.closed == 1


async def test_closing_waits_for_no_stream_of_an_engine_that_was_replaced() -> None:
    old = LineEngine()
    old.hold.clear()
    engine = balanced({"a": (LOCAL, old)})
    running = asyncio.create_task(chat(engine, asking()))
    await until(lambda: old.running == 1)
    engine.replace({})
    async with asyncio.timeout(DEADLINE_S):
        await engine.aclose()
    assert old.closed == 1
    old.hold.set()
    await running


async def test_a_fault_in_one_engine_ends_neither_the_watch_nor_the_closing_of_the_others(
    told: list[str],
) -> None:
    class Faulty(LineEngine):
        async def models(self) -> tuple[ModelCard, ...]:
            self.asked_for_models += 1
            raise ZeroDivisionError

        async def aclose(self) -> None:
            raise ZeroDivisionError

    faulty, whole = Faulty(), LineEngine()
    whole.residency = "loaded"
    engine = BalancedEngine(
        {name: Member(settings=LOCAL, engine=line) for name, line in (("a", faulty), ("b", whole))},
        strategy=ResidentFirst(),
        settings=SETTINGS,
        clock=time.monotonic,
        rng=random.Random(7),
        residency_interval_s=0.001,
    )
    engine.start()
    await until(lambda: faulty.asked_for_models > 2)
    assert [view.resident for view in engine.views()] == [None, True]
    await engine.aclose()
    assert whole.closed == 1
    assert set(told) == {"llm.residency_unknown", "llm.close_failed"}


async def test_who_waits_goes_on_waiting_through_a_reload() -> None:
    line, fresh = LineEngine(), LineEngine()
    line.hold.clear()
    engine = balanced({"a": (LOCAL, line)})
    running = asyncio.create_task(chat(engine, asking("0")))
    await until(lambda: line.running == 1)
    waiting = asyncio.create_task(chat(engine, asking("1")))
    await until(lambda: engine.waiting == 1)
    engine.replace({"a": Member(settings=LOCAL, engine=line), "b": Member(settings=LOCAL, engine=fresh)})
    async with asyncio.timeout(DEADLINE_S):
        assert (await waiting).llm == "b"
    line.hold.set()
    await running


async def test_residency_is_asked_of_local_engines_only_and_nothing_is_loaded() -> None:
    local, api = LineEngine(), LineEngine()
    local.residency = "unloaded"
    engine = balanced({"a": (LOCAL, local), "b": (API, api)})
    engine.start()
    engine.start()
    await until(lambda: view_of(engine, "a").resident is False)
    assert view_of(engine, "b").resident is None
    assert (api.asked_for_models, local.loads, api.loads) == (0, 0, 0)
    cards = {card.name: card for card in await engine.models()}
    assert (cards["a"].residency, cards["a"].memory_bytes) == ("unloaded", 123)
    await chat(engine, asking())
    assert view_of(engine, "a").resident is True, "it just answered"
    await engine.aclose()


async def test_load_and_unload_name_an_llm_or_take_the_local_ones() -> None:
    one, two, api = LineEngine(), LineEngine(), LineEngine()
    engine = balanced({"one": (LOCAL, one), "two": (LOCAL, two), "api": (API, api)})
    await engine.load()
    assert (one.loads, two.loads, api.loads) == (1, 0, 0)
    await engine.load("two")
    assert [view.resident for view in engine.views()] == [True, True, None]
    await engine.unload()
    assert [view.resident for view in engine.views()] == [False, False, None]
    with pytest.raises(UnknownLLMError):
        await engine.load("three")


async def test_rates_are_measured() -> None:
    skipped = SkippedTime()

    class Paced(LineEngine):
        async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
            skipped.now_s += 0.5
            yield ChatDelta(text="a")
            skipped.now_s += 2.0
            yield ChatDelta(finish_reason="stop", usage=ChatUsage(input_tokens=1, output_tokens=21))

    engine = balanced({"a": (LOCAL, Paced())}, clock=skipped.clock, sleep=skipped.sleep)
    async for _ in engine.stream(asking()):
        skipped.now_s += 60.0  # a client that reads slowly is not a slow engine
    view = view_of(engine, "a")
    assert view.time_to_first_token_ms == pytest.approx(500.0)
    assert view.tokens_per_s == pytest.approx(10.0)


async def test_a_first_token_after_a_load_measures_the_load_and_not_the_llm() -> None:
    skipped = SkippedTime()

    class Slow(LineEngine):
        async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
            skipped.now_s += 12.0
            yield ChatDelta(text="a")
            yield ChatDelta(finish_reason="stop")

    slow = Slow()
    slow.residency = "unloaded"
    engine = balanced({"a": (LOCAL, slow)}, clock=skipped.clock, sleep=skipped.sleep)
    await engine.refresh_residency()
    await chat(engine, asking())
    view = view_of(engine, "a")
    assert view.load_s == pytest.approx(12.0)
    assert view.time_to_first_token_ms is None


async def test_explaining_calls_nothing() -> None:
    line = LineEngine()
    engine: Balancer = balanced({"a": (LOCAL, line)})
    assert engine.explain(Requirements(tier="small")).chosen == "a"
    assert engine.explain(Requirements(llm="zzz")).chosen is None
    assert (line.calls, line.asked_for_models) == ([], 0)


async def test_costs_are_those_of_the_llm() -> None:
    priced = changed(API, cost_per_million_input_usd=1.0, cost_per_million_output_usd=10.0)
    engine = balanced({"a": (priced, LineEngine())})
    usage = ChatUsage(input_tokens=1_000_000, output_tokens=500_000)
    assert engine.cost_usd("a", usage) == pytest.approx(6.0)
    assert engine.cost_usd("gone", usage) == 0.0


async def test_closing_ends_every_wait_and_may_be_done_twice() -> None:
    line = LineEngine()
    line.hold.clear()
    engine = balanced({"a": (LOCAL, line)})
    engine.start()
    running = asyncio.create_task(chat(engine, asking()))
    await until(lambda: line.running == 1)
    waiting = asyncio.create_task(chat(engine, asking()))
    await until(lambda: engine.waiting == 1)
    await engine.aclose()
    await engine.aclose()
    with pytest.raises(NoLLMError, match="closed"):
        await waiting
    assert line.closed == 2
    with pytest.raises(NoLLMError, match="closed"):
        await chat(engine, asking())
    line.hold.set()
    await running


async def test_many_requests_through_failures_all_end_and_leave_nothing_behind() -> None:
    rng = random.Random(11)
    errors = (
        EngineFailedError("500"),
        EngineBusyError("503"),
        EngineUnreachableError("x"),
        EngineBusyError("429", retry_after_s=0.01),
    )

    class Moody(LineEngine):
        async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            try:
                await asyncio.sleep(0)
                if rng.random() < 0.3:
                    raise rng.choice(errors)
                yield ChatDelta(text="a")
                yield ChatDelta(finish_reason="stop")
            finally:
                self.running -= 1

    one, two = Moody(), Moody()
    settings = BalancerSettings(
        circuit=CircuitSettings(failures=3, cooldown_s=0.02),
        retry=RetrySettings(attempts=4, backoff_s=0.001, backoff_max_s=0.002),
        max_wait_s=DEADLINE_S,
    )
    engine = balanced({"a": (changed(LOCAL, slots=2), one), "b": (LOCAL, two)}, settings=settings)

    async def ask(n: int) -> ChatReply | NoLLMError:
        try:
            return await chat(engine, asking(str(n)))
        except NoLLMError as exc:
            return exc

    async with asyncio.timeout(DEADLINE_S):
        ends = await asyncio.gather(*(ask(n) for n in range(200)))
    assert len(ends) == 200
    assert sum(isinstance(end, ChatReply) for end in ends) > 100
    assert (one.most_running, two.most_running) == (2, 1)
    assert engine.waiting == 0
    assert [view.in_flight for view in engine.views()] == [0, 0]
    assert not any(view.probing for view in engine.views())
