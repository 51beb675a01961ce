"""The orchestration engine on a real file store: intake, the loop, cancel, feedback, restart, overload."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uuid_utils

from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome, RoleSpec
from ai_agent_server.cluster.alone import Alone
from ai_agent_server.config import settings as configuration
from ai_agent_server.core.chat import ChatDelta, ChatRequest, ChatUsage, RouteHints, message
from ai_agent_server.core.exchange import SLACK_PIECES, Anybody
from ai_agent_server.core.next_step import POISON_AFTER
from ai_agent_server.core.orchestration_engine import OrchestrationEngine, Profile, Role
from ai_agent_server.core.ports import Grant
from ai_agent_server.core.task_packet import (
    Artifact,
    FeedbackDraft,
    InputRequired,
    LimitsDraft,
    Progress,
    Started,
    StepFinished,
    StepStarted,
    TaskDraft,
    TaskPacket,
    TaskStatus,
    TestReport,
)
from ai_agent_server.core.workflow import Workflow
from ai_agent_server.errors import (
    EngineProtocolError,
    EngineUnreachableError,
    IdempotencyConflictError,
    IntakeFullError,
    InvalidOutputError,
    InvalidPacketError,
    InvalidTransitionError,
    LimitExceededError,
    SandboxError,
    ShuttingDownError,
    StoreUnusableError,
    TaskLiveError,
    TaskNotFoundError,
    UnknownRoleError,
)
from ai_agent_server.llm_engines.base import ModelCard
from ai_agent_server.load_balancer.base import Sent
from ai_agent_server.sandbox.base import SandboxProbe
from ai_agent_server.tasks_state.base import TaskFilter
from ai_agent_server.tasks_state.json_file_store import JsonFileStore

WORKFLOW = msgspec.convert(configuration.packaged_debug_loop()["workflow"], Workflow)
SCHEMA = configuration.load(None).profiles["developer"].payload_schema
Script = Callable[[AgentContext], Awaitable[Outcome]]
DEADLINE_S = 60.0


class Words:
    """An LLM that answers at once, or not before `gate` opens; it knows whether it was cut off."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[ChatRequest] = []
        self.cut = 0
        self.fault: Exception | None = None
        self.is_queued = self.is_silent = False
        """It has not sent the request on; it has, and no token has come."""

    async def stream(
        self, request: ChatRequest, *, sent: Sent | None = None
    ) -> AsyncGenerator[ChatDelta, None]:
        self.asked.append(request)
        if self.fault is not None:
            raise self.fault
        if sent is not None and not self.is_queued:
            sent("words", "local")
        try:
            if self.is_queued or self.is_silent:
                await self.gate.wait()
            yield ChatDelta(text="he", llm="words", model="words", source="local")
            await self.gate.wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.cut += 1
            raise
        yield ChatDelta(text="llo", finish_reason="stop", usage=ChatUsage(input_tokens=7, output_tokens=2))

    async def models(self) -> tuple[ModelCard, ...]:
        return ()

    async def load(self) -> None: ...
    async def unload(self) -> None: ...
    async def aclose(self) -> None: ...


class NoSandbox:
    """Nothing here runs code."""

    async def probe(self) -> SandboxProbe:
        return SandboxProbe(tier="none", works=False)

    async def run(self, *args: Any, **kwargs: Any) -> Any:
        raise SandboxError("no tier works")


class Rationed:
    """Senders that refuse the first so many calls, and admit every later one."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals

    def admit(self, packet: TaskPacket, hints: RouteHints, *, tokens: int) -> Grant:
        if self.refusals:
            self.refusals -= 1
            raise LimitExceededError("used up", unit="tokens", retry_after_s=60, is_quota=False, headers={})
        return Anybody().admit(packet, hints, tokens=tokens)


class Scripted:
    """An agent whose step is a function."""

    def __init__(self, name: str, script: Script) -> None:
        self.card = AgentCard(name=name, description="", outcomes=("done", "pass", "fail"))
        self._script = script

    async def run(self, context: AgentContext) -> Outcome:
        return await self._script(context)


async def talks(context: AgentContext) -> Outcome:
    reply = await context.chat(ChatRequest(messages=(message("user", context.spec.role),)))
    return Outcome(verdict="done", output={"text": reply.text})


def codes(context: AgentContext) -> Artifact:
    version = f"v{len(context.packet.history)}"
    return Artifact(artifact_id=version, kind="code", content=version)


async def writes(context: AgentContext) -> Outcome:
    await context.chat(ChatRequest(messages=(message("user", context.spec.role),)))
    return Outcome(verdict="done", artifact=codes(context))


def judge(*verdicts: str) -> Script:
    told = itertools.chain(verdicts, itertools.repeat(verdicts[-1]))

    async def judges(context: AgentContext) -> Outcome:
        verdict: Any = next(told)
        report = TestReport(verdict=verdict, tier="bubblewrap", tests_passed=int(verdict == "pass"))
        return Outcome(verdict=verdict, report=report)

    return judges


def profile(**scripts: Script | None) -> dict[str, Profile]:
    chosen: dict[str, Script | None] = {
        "planner": talks,
        "fast-coder": writes,
        "deep-coder": writes,
        "debug": writes,
        "qa": judge("fail", "pass"),
    }
    chosen |= {name.replace("_", "-"): script for name, script in scripts.items()}
    roles = {
        name: Role(
            spec=RoleSpec(profile="developer", role=name),
            agent=Scripted(name, script) if script else None,
            payload_schema=SCHEMA,
        )
        for name, script in chosen.items()
    }
    return {"developer": Profile(roles=roles, workflow=WORKFLOW)}


async def no_files(path: str) -> bytes:
    raise InvalidPacketError(f"{path} is not allowed")


def now() -> datetime:
    return datetime.now(UTC)


class Clock:
    """The time, put forward by a test."""

    def __init__(self) -> None:
        self.ahead = timedelta(0)

    def __call__(self) -> datetime:
        return now() + self.ahead


@asynccontextmanager
async def running(
    root: Path, words: Words, profiles: dict[str, Profile] | None = None, **options: Any
) -> AsyncIterator[OrchestrationEngine]:
    store = options.pop("store", None) or JsonFileStore(root)
    await store.open()
    engine = OrchestrationEngine(
        profiles=profiles or profile(),
        store=store,
        leases=options.pop("leases", Alone()),
        llm=words,
        sandbox=NoSandbox(),
        clock=options.pop("clock", now),
        new_id=lambda: str(uuid_utils.uuid7()),
        monotonic=asyncio.get_running_loop().time,
        read_file=no_files,
        **({"shutdown_s": 2.0} | options),
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.aclose()
        await store.aclose()


def draft(**changes: Any) -> TaskDraft:
    base = TaskDraft(payload={"task": "add two numbers"}, profile="developer", role="planner")
    return msgspec.structs.replace(base, **changes)


async def ended(engine: OrchestrationEngine, task_id: str) -> TaskPacket:
    packet = await engine.wait(task_id, DEADLINE_S)
    assert packet.status.is_final or packet.status is TaskStatus.INPUT_REQUIRED, packet.status
    return packet


async def until(engine: OrchestrationEngine, task_id: str, met: Callable[[TaskPacket], bool]) -> TaskPacket:
    async with asyncio.timeout(DEADLINE_S):
        while not met(packet := await engine.read(task_id)):
            await asyncio.sleep(0.01)
    return packet


@pytest.fixture
def words() -> Words:
    return Words()


def roles_of(packet: TaskPacket) -> list[str]:
    return [event.role for event in packet.history if isinstance(event, StepFinished)]


async def test_the_main_job_runs_from_plan_to_a_passing_test(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words) as engine:
        packet, created = await engine.submit(draft(), via="rest")
        assert created
        assert packet.status is TaskStatus.SUBMITTED
        done = await ended(engine, packet.task_id)
    assert done.status is TaskStatus.COMPLETED
    assert roles_of(done) == ["planner", "fast-coder", "qa", "debug", "qa"]
    assert done.usage.calls == 3
    assert (done.usage.input_tokens, done.usage.output_tokens) == (21, 6)
    assert done.usage.feedback_hops == 1
    assert [event.seq for event in done.history] == list(range(1, done.revision + 1))
    assert done.result is not None
    assert done.result["verdict"] == "pass"


async def test_a_task_that_waits_for_its_senders_share_many_times_goes_on(
    tmp_path: Path, words: Words
) -> None:
    senders = Rationed(2 * POISON_AFTER)
    async with running(tmp_path, words, senders=senders) as engine:
        packet, _ = await engine.submit(draft(scope="role"), via="rest")
        async with asyncio.timeout(60):
            while not (done := await engine.read(packet.task_id)).status.is_final:
                await engine.resume(packet.task_id, via="rest")  # it looks again at once
                await asyncio.sleep(0.002)
    assert (done.status, done.reason, senders.refusals) == (TaskStatus.COMPLETED, None, 0)
    assert sum(isinstance(event, Started) for event in done.history) == 1


async def test_every_hop_says_why_it_was_taken(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        done = await ended(engine, packet.task_id)
    hops = [(e.role, e.hop.on) for e in done.history if isinstance(e, StepStarted)]
    assert hops == [
        ("planner", "entry"),
        ("fast-coder", "planner.done"),
        ("qa", "fast-coder.done"),
        ("debug", "qa.fail"),
        ("qa", "debug.done"),
    ]
    assert all(e.hop.why for e in done.history if isinstance(e, StepStarted))


async def test_a_hop_to_somebody_outside_says_why_as_well(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words, profile(qa=None)) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        waiting = await ended(engine, packet.task_id)
    asked = waiting.history[-1]
    assert isinstance(asked, InputRequired)
    assert asked.hop is not None
    assert (asked.hop.on, asked.hop.why) == ("fast-coder.done", asked.question)


async def test_a_reader_sees_every_event_once_and_in_order(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words) as engine:
        words.gate.clear()
        packet, _ = await engine.submit(draft(), via="rest")
        seen: list[int] = []

        async def read() -> None:
            seen.extend([e.seq async for e in engine.follow(packet.task_id) if not isinstance(e, Progress)])

        reader = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        words.gate.set()
        await asyncio.wait_for(reader, DEADLINE_S)
        late = [e.seq async for e in engine.follow(packet.task_id, since=3) if not isinstance(e, Progress)]
    assert seen == list(range(1, seen[-1] + 1))
    assert late == seen[3:]


async def test_cancel_cuts_the_llm_off_and_nothing_follows(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words) as engine:
        words.gate.clear()
        packet, _ = await engine.submit(draft(), via="rest")
        while not words.asked:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        canceled = await engine.cancel(packet.task_id)
        assert canceled.status is TaskStatus.CANCELED
        assert words.cut == 1
        assert canceled.usage.calls == 1, "what was used before the cancel was used"
        words.gate.set()
        await asyncio.sleep(0.1)
        assert (await engine.read(packet.task_id)).revision == canceled.revision
        with pytest.raises(InvalidTransitionError):
            await engine.cancel(packet.task_id)
        assert engine.status().live == 0


@pytest.mark.parametrize("is_queued", [True, False])
async def test_a_cancel_before_the_first_token_charges_for_the_prompt_that_an_llm_has(
    tmp_path: Path, words: Words, is_queued: bool
) -> None:
    words.is_queued, words.is_silent = is_queued, not is_queued
    words.gate.clear()
    async with running(tmp_path, words) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        async with asyncio.timeout(DEADLINE_S):
            while not words.asked:
                await asyncio.sleep(0.01)
        canceled = await engine.cancel(packet.task_id)
    usage = canceled.usage
    assert (usage.calls, usage.output_tokens, usage.input_tokens > 0) == (
        (0, 0, False) if is_queued else (1, 0, True)
    )


async def test_a_live_task_cannot_be_deleted_and_an_ended_one_is_gone(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words) as engine:
        words.gate.clear()
        packet, _ = await engine.submit(draft(), via="rest")
        with pytest.raises(TaskLiveError):
            await engine.delete(packet.task_id)
        await engine.cancel(packet.task_id)
        await engine.delete(packet.task_id)
        with pytest.raises(TaskNotFoundError):
            await engine.read(packet.task_id)


async def test_a_restart_takes_up_the_step_that_was_cut(tmp_path: Path, words: Words) -> None:
    words.gate.clear()
    async with running(tmp_path, words, shutdown_s=0.05) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        while not words.asked:
            await asyncio.sleep(0.01)
    words.gate.set()
    async with running(tmp_path, words) as engine:
        done = await ended(engine, packet.task_id)
    assert done.status is TaskStatus.COMPLETED
    assert done.generation == 2
    assert roles_of(done) == ["planner", "fast-coder", "qa", "debug", "qa"]
    assert sum(request.messages[0].text == "planner" for request in words.asked) == 2


async def test_shutdown_lets_a_step_finish_inside_the_bound(tmp_path: Path, words: Words) -> None:
    words.gate.clear()
    async with running(tmp_path, words, shutdown_s=DEADLINE_S) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        while not words.asked:
            await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(0.1, words.gate.set)
        await engine.aclose()
        kept = await engine.read(packet.task_id)
        assert roles_of(kept) == ["planner"]
        with pytest.raises(ShuttingDownError):
            await engine.submit(draft(), via="rest")


async def test_the_same_key_is_one_task_and_another_body_is_refused(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words) as engine:
        first, created = await engine.submit(draft(), via="rest", idempotency_key="k")
        again, created_again = await engine.submit(draft(), via="rest", idempotency_key="k")
        assert (created, created_again, again.task_id) == (True, False, first.task_id)
        with pytest.raises(IdempotencyConflictError):
            await engine.submit(draft(payload={"task": "other"}), via="rest", idempotency_key="k")


async def test_fifty_submissions_of_one_key_at_once_are_one_task(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words) as engine:
        answers = await asyncio.gather(
            *(engine.submit(draft(), via="rest", idempotency_key="k") for _ in range(50))
        )
        assert len({packet.task_id for packet, _ in answers}) == 1
        assert sum(created for _, created in answers) == 1


async def test_intake_is_bounded_also_when_many_come_at_once(tmp_path: Path, words: Words) -> None:
    words.gate.clear()
    async with running(tmp_path, words, max_live=3, shutdown_s=0.05) as engine:
        answers = await asyncio.gather(
            *(engine.submit(draft(), via="rest") for _ in range(10)), return_exceptions=True
        )
        refused = [answer for answer in answers if isinstance(answer, IntakeFullError)]
        assert len(refused) == 7
        assert 1 <= refused[0].retry_after_s <= 120
        assert engine.status().live == 3
        words.gate.set()
        for answer in answers:
            if isinstance(answer, tuple):
                await ended(engine, answer[0].task_id)
        assert (await engine.submit(draft(), via="rest"))[1]


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"payload": {}}, "/payload/task"),
        ({"payload": {"task": 3}}, "/payload/task"),
        ({"payload": {"task": "x", "color": "red"}}, "/payload/color"),
        ({"payload": {"task": "x", "examples": ["a", 1]}}, "/payload/examples/1"),
        ({"task_id": "../../etc/passwd"}, "/task_id"),
        ({"task_id": "0197A000-0000-7000-8000-000000000001"}, "/task_id"),
        ({"context_id": "c1"}, "/context_id"),
    ],
)
async def test_a_wrong_packet_says_where_it_is_wrong(
    tmp_path: Path, words: Words, changes: dict[str, Any], pointer: str
) -> None:
    async with running(tmp_path, words) as engine:
        with pytest.raises(InvalidPacketError) as caught:
            await engine.submit(draft(**changes), via="rest")
        assert caught.value.pointer == pointer
        assert caught.value.expected
        assert (await engine.list(TaskFilter(), limit=10)).items == ()


async def test_an_unknown_role_names_the_roles_there_are(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words) as engine:
        with pytest.raises(UnknownRoleError) as caught:
            await engine.submit(draft(role="poet"), via="rest")
        assert "planner" in caught.value.choices
        with pytest.raises(UnknownRoleError):
            await engine.submit(draft(profile="nobody"), via="rest")


async def test_an_outside_qa_gives_its_verdict_by_feedback(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words, profile(qa=None)) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        waiting = await ended(engine, packet.task_id)
        assert waiting.status is TaskStatus.INPUT_REQUIRED
        with pytest.raises(InvalidPacketError):
            await engine.feedback(packet.task_id, FeedbackDraft(role="qa", outcome="maybe"), via="nats")
        await engine.feedback(
            packet.task_id,
            FeedbackDraft(role="qa", outcome="fail", why="adds badly", failing=("assert add(1,1)==2",)),
            via="nats",
        )
        await until(
            engine,
            packet.task_id,
            lambda p: "debug" in roles_of(p) and p.status is TaskStatus.INPUT_REQUIRED,
        )
        await engine.feedback(packet.task_id, FeedbackDraft(role="qa", outcome="pass"), via="nats")
        done = await ended(engine, packet.task_id)
        with pytest.raises(InvalidTransitionError):
            await engine.feedback(packet.task_id, FeedbackDraft(role="qa", outcome="pass"), via="nats")
    assert done.status is TaskStatus.COMPLETED
    assert roles_of(done) == ["planner", "fast-coder", "debug"]


async def test_waiting_for_an_outside_agent_survives_a_restart(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words, profile(qa=None)) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        await ended(engine, packet.task_id)
    async with running(tmp_path, words, profile(qa=None)) as engine:
        assert (await engine.read(packet.task_id)).status is TaskStatus.INPUT_REQUIRED
        await engine.feedback(packet.task_id, FeedbackDraft(role="qa", outcome="pass"), via="rest")
        done = await until(engine, packet.task_id, lambda p: p.status.is_final)
    assert done.status is TaskStatus.COMPLETED


async def test_feedback_while_a_step_runs_is_not_lost(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words) as engine:
        words.gate.clear()
        packet, _ = await engine.submit(draft(role="fast-coder"), via="rest")
        while not words.asked:
            await asyncio.sleep(0.01)
        await engine.feedback(packet.task_id, FeedbackDraft(role="qa", outcome="fail"), via="rest")
        words.gate.set()
        done = await ended(engine, packet.task_id)
    assert done.status is TaskStatus.COMPLETED
    assert roles_of(done)[:2] == ["fast-coder", "debug"]


async def test_a_message_that_comes_again_changes_nothing(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words, profile(qa=None)) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        await ended(engine, packet.task_id)
        passed = FeedbackDraft(role="qa", outcome="pass")
        await engine.feedback(packet.task_id, passed, via="nats", message_id="m1")
        again = await engine.feedback(packet.task_id, passed, via="nats", message_id="m1")
    assert sum(event.__class__.__name__ == "FeedbackReceived" for event in again.history) == 1


async def test_nobody_passes_work_that_is_not_there_nor_answers_what_was_not_asked(
    tmp_path: Path, words: Words
) -> None:
    async with running(tmp_path, words) as engine:
        words.gate.clear()
        packet, _ = await engine.submit(draft(), via="rest")
        for told in (FeedbackDraft(role="qa", outcome="pass"), FeedbackDraft(role="user", outcome="answer")):
            with pytest.raises(InvalidTransitionError):
                await engine.feedback(packet.task_id, told, via="rest")
        await engine.cancel(packet.task_id)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (EngineUnreachableError("refused"), "llm_unavailable"),
        (InvalidOutputError("no code in it"), "invalid_output"),
        (SandboxError("no tier"), "sandbox_unavailable"),
        (ZeroDivisionError("a fault of the agent"), "internal"),
    ],
)
async def test_a_step_that_breaks_ends_the_task_with_a_reason(
    tmp_path: Path, words: Words, fault: Exception, reason: str
) -> None:
    async def breaks(_context: AgentContext) -> Outcome:
        raise fault

    async with running(tmp_path, words, profile(qa=breaks)) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        done = await ended(engine, packet.task_id)
        other, _ = await engine.submit(draft(role="planner", scope="role"), via="rest")
        assert (await ended(engine, other.task_id)).status is TaskStatus.COMPLETED
    assert (done.status, done.reason) == (TaskStatus.FAILED, reason)
    assert done.error is not None
    assert done.result is not None
    assert done.result["artifact"]["content"]


async def test_a_payload_that_an_agent_cannot_use_is_rejected(tmp_path: Path, words: Words) -> None:
    async def declines(_context: AgentContext) -> Outcome:
        raise InvalidPacketError("the image is no image", pointer="/payload/image")

    async with running(tmp_path, words, profile(planner=declines)) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        done = await ended(engine, packet.task_id)
        followed = [e async for e in engine.follow(packet.task_id)]
    assert (done.status, done.reason) == (TaskStatus.REJECTED, "invalid_payload")
    assert done.error is not None
    assert "/payload/image" in done.error.message
    assert len(followed) == done.revision


async def test_call_and_token_limits_end_the_task_before_the_next_call(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words, profile(qa=judge("fail"))) as engine:
        packet, _ = await engine.submit(draft(limits=LimitsDraft(calls=2)), via="rest")
        by_calls = await ended(engine, packet.task_id)
        packet, _ = await engine.submit(draft(limits=LimitsDraft(tokens=12)), via="rest")
        by_tokens = await ended(engine, packet.task_id)
    assert (by_calls.reason, by_calls.usage.calls) == ("budget_calls", 2)
    assert by_tokens.reason == "budget_tokens"
    assert by_calls.limits.tokens == 60_000


async def test_a_prompt_that_would_pass_the_limit_of_tokens_is_not_sent(tmp_path: Path, words: Words) -> None:
    async def says_much(context: AgentContext) -> Outcome:
        await context.chat(ChatRequest(messages=(message("user", "much " * 1_000),)))
        return Outcome(verdict="done")

    async with running(tmp_path, words, profile(planner=says_much)) as engine:
        packet, _ = await engine.submit(draft(limits=LimitsDraft(tokens=500)), via="rest")
        done = await ended(engine, packet.task_id)
    assert (done.reason, done.usage.calls, words.asked) == ("budget_tokens", 0, [])


class Endless(Words):
    """Goes on until it is hung up on."""

    def __init__(self, piece: str) -> None:
        super().__init__()
        self.piece = piece

    async def stream(
        self, request: ChatRequest, *, sent: Sent | None = None
    ) -> AsyncGenerator[ChatDelta, None]:
        assert sent is not None
        self.asked.append(request)
        try:
            while True:
                yield ChatDelta(text=self.piece, llm="words", model="words", source="local")
                await asyncio.sleep(0)
        except GeneratorExit:
            self.cut += 1
            raise


async def test_an_answer_beyond_its_tokens_is_cut_and_counted(tmp_path: Path) -> None:
    endless = Endless("word ")
    async with running(tmp_path, endless) as engine:
        packet, _ = await engine.submit(draft(scope="role", limits=LimitsDraft(tokens=100)), via="rest")
        done = await ended(engine, packet.task_id)
    (step,) = [event for event in done.history if isinstance(event, StepFinished)]
    assert step.call is not None
    assert step.call.finish_reason == "length"
    assert (done.status, endless.cut) == (TaskStatus.COMPLETED, 1)
    assert 100 <= done.usage.tokens <= 100 + SLACK_PIECES


async def test_an_answer_of_giant_pieces_is_hung_up_on(tmp_path: Path) -> None:
    endless = Endless("x" * 100_000)
    async with running(tmp_path, endless) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        done = await ended(engine, packet.task_id)
    assert (done.status, done.reason) == (TaskStatus.FAILED, "llm_unavailable")
    assert endless.cut == len(endless.asked) == 3
    assert done.error is not None
    assert "beyond any bound" in done.error.message


async def test_waiting_for_somebody_is_not_the_tasks_time(tmp_path: Path, words: Words) -> None:
    clock = Clock()
    async with running(tmp_path, words, profile(qa=None), clock=clock) as engine:
        packet, _ = await engine.submit(draft(limits=LimitsDraft(wall_s=60.0)), via="rest")
        await ended(engine, packet.task_id)
        clock.ahead += timedelta(minutes=10)
        await engine.feedback(packet.task_id, FeedbackDraft(role="qa", outcome="pass"), via="rest")
        done = await until(engine, packet.task_id, lambda p: p.status.is_final)
    assert done.status is TaskStatus.COMPLETED, done.error


async def test_an_answer_that_is_cut_is_counted_and_had_again(tmp_path: Path) -> None:
    class Cuts(Words):
        async def stream(
            self, request: ChatRequest, *, sent: Sent | None = None
        ) -> AsyncGenerator[ChatDelta, None]:
            assert sent is not None
            self.asked.append(request)
            yield ChatDelta(text="half", llm="words", model="words", source="local")
            if len(self.asked) == 1:
                raise EngineProtocolError("cut")
            yield ChatDelta(finish_reason="stop", usage=ChatUsage(input_tokens=7, output_tokens=2))

    async with running(tmp_path, Cuts()) as engine:
        packet, _ = await engine.submit(draft(role="planner", scope="role"), via="rest")
        done = await ended(engine, packet.task_id)
    outcomes = [e.outcome for e in done.history if isinstance(e, StepFinished)]
    assert (done.status, outcomes) == (TaskStatus.COMPLETED, ["cut", "done"])
    assert done.usage.calls == 2


async def test_what_a_step_found_outlives_a_store_that_is_away(tmp_path: Path, words: Words) -> None:
    class Away(JsonFileStore):
        failing = 0

        async def append(self, task_id: str, events: Any, *, expected_revision: int) -> TaskPacket:
            if self.failing and any(isinstance(event, StepFinished) for event in events):
                self.failing -= 1
                raise StoreUnusableError("away")
            return await super().append(task_id, events, expected_revision=expected_revision)

    store = Away(tmp_path)
    store.failing = 2
    async with running(tmp_path, words, store=store) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        done = await ended(engine, packet.task_id)
    assert done.status is TaskStatus.COMPLETED
    assert len(words.asked) == done.usage.calls == 3


async def test_a_reader_beyond_the_end_or_after_the_stop_does_not_hang(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        async with asyncio.timeout(60):
            async for _ in engine.follow(packet.task_id, since=9999):
                pass
        words.gate.clear()
        other, _ = await engine.submit(draft(), via="rest")
        engine_closing = asyncio.create_task(engine.aclose())
        words.gate.set()
        await engine_closing
        async with asyncio.timeout(60):
            assert [item async for item in engine.follow(other.task_id)]
            await engine.wait(other.task_id, 1000)


async def test_after_a_private_role_nothing_of_the_task_goes_out(tmp_path: Path, words: Words) -> None:
    profiles = profile()
    roles = dict(profiles["developer"].roles)
    roles["fast-coder"] = msgspec.structs.replace(roles["fast-coder"], hints=RouteHints(privacy="local"))
    profiles = {"developer": msgspec.structs.replace(profiles["developer"], roles=roles)}
    async with running(tmp_path, words, profiles) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        await ended(engine, packet.task_id)
    assert [(r.messages[0].text, r.route.privacy) for r in words.asked] == [
        ("planner", "any"),
        ("fast-coder", "local"),
        ("debug", "local"),
    ]


async def test_the_time_limit_cuts_a_call_off(tmp_path: Path, words: Words) -> None:
    words.gate.clear()
    async with running(tmp_path, words) as engine:
        packet, _ = await engine.submit(draft(limits=LimitsDraft(wall_s=2.0)), via="rest")
        done = await ended(engine, packet.task_id)
    assert done.reason == "budget_wall"
    assert words.cut == 1


async def test_privacy_of_the_packet_reaches_the_llm(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words) as engine:
        packet, _ = await engine.submit(draft(privacy="local"), via="rest")
        await ended(engine, packet.task_id)
    assert {request.route.privacy for request in words.asked} == {"local"}


async def test_a_role_keeps_its_privacy_whatever_the_packet_says(tmp_path: Path, words: Words) -> None:
    profiles = profile()
    roles = dict(profiles["developer"].roles)
    roles["planner"] = msgspec.structs.replace(roles["planner"], hints=RouteHints(privacy="local"))
    profiles = {"developer": msgspec.structs.replace(profiles["developer"], roles=roles)}
    async with running(tmp_path, words, profiles) as engine:
        packet, _ = await engine.submit(draft(privacy="any"), via="rest")
        done = await ended(engine, packet.task_id)
    assert done.privacy == "local"
    assert {request.route.privacy for request in words.asked} == {"local"}
