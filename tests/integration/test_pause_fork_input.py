"""A task that is paused, forked, or waits for an answer: also over a restart, with a clock that jumps."""

import asyncio
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ai_agent_server.channels.base import FEEDBACK
from ai_agent_server.channels.memory_channel import MemoryChannel
from ai_agent_server.config.settings import CallbackSettings, CallbackTarget, EnvSecret
from ai_agent_server.core.chat import RouteHints
from ai_agent_server.core.fork import last_good_step
from ai_agent_server.core.mcp_handler import McpHandler
from ai_agent_server.core.task_packet import (
    Callback,
    FeedbackDraft,
    FeedbackReceived,
    ForkDraft,
    InputRequired,
    LimitsDraft,
    Recovered,
    Started,
    StepFinished,
    StepStarted,
    Submitted,
    TaskPacket,
    TaskStatus,
)
from ai_agent_server.core.verification import faults
from ai_agent_server.core.webhooks import Targets
from ai_agent_server.errors import (
    IdempotencyConflictError,
    InvalidPacketError,
    InvalidTransitionError,
    TaskLiveError,
)
from ai_agent_server.tasks_state._verify import verify
from ai_agent_server.tasks_state.base import TaskFilter
from tests.acceptance.test_cli import cli
from tests.integration.test_orchestration_engine import (
    DEADLINE_S,
    Clock,
    Words,
    draft,
    ended,
    judge,
    now,
    profile,
    roles_of,
    running,
    until,
    words,
)
from tests.servers.process import ServerProcess, scripted, write_config

__all__ = ("words",)

ANSWER = FeedbackDraft(role="qa", outcome="pass")


async def asked(words: Words) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not words.asked:
            await asyncio.sleep(0.01)


async def test_a_pause_lets_the_step_end_and_holds_over_a_restart(tmp_path: Path, words: Words) -> None:
    words.gate.clear()
    async with running(tmp_path, words) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        await asked(words)
        held = await engine.pause(packet.task_id, via="rest")
        assert (held.status, held.paused_at is not None) == (TaskStatus.WORKING, True)
        assert (await engine.pause(packet.task_id, via="rest")).revision == held.revision
        words.gate.set()
        held = await until(engine, packet.task_id, lambda p: roles_of(p) == ["planner"])
        assert words.cut == 0
        (page,) = (await engine.list(TaskFilter(), limit=1)).items
        assert page.paused_at == held.paused_at
    async with running(tmp_path, words) as engine:
        await asyncio.sleep(0.1)
        assert await engine.read(packet.task_id) == held, "not even a start is written"
        resumed = await engine.resume(packet.task_id, via="nats")
        assert resumed.paused_at is None
        assert (await engine.resume(packet.task_id, via="nats")).paused_at is None
        done = await ended(engine, packet.task_id)
        assert done.status is TaskStatus.COMPLETED
        assert roles_of(done) == ["planner", "fast-coder", "qa", "debug", "qa"]
        assert len(words.asked) == 3, "no step was run twice"
        for change in (engine.pause, engine.resume):
            with pytest.raises(InvalidTransitionError, match="it has ended"):
                await change(packet.task_id, via="rest")
    assert faults(done) == ()


async def test_a_task_that_is_paused_in_the_queue_does_not_begin(tmp_path: Path, words: Words) -> None:
    words.gate.clear()
    async with running(tmp_path, words, max_running=1) as engine:
        await engine.submit(draft(), via="rest")
        await asked(words)
        packet, _ = await engine.submit(draft(), via="rest")
        await engine.pause(packet.task_id, via="rest")
        words.gate.set()
        await until(engine, packet.task_id, lambda _: engine.status().live == 1)
        held = await engine.read(packet.task_id)
        assert (held.status, roles_of(held)) == (TaskStatus.SUBMITTED, [])
        await engine.resume(packet.task_id, via="rest")
        assert (await ended(engine, packet.task_id)).status is TaskStatus.COMPLETED


async def test_time_in_which_it_is_paused_is_not_the_tasks_time(tmp_path: Path, words: Words) -> None:
    clock = Clock()
    words.gate.clear()
    async with running(tmp_path, words, clock=clock) as engine:
        packet, _ = await engine.submit(draft(limits=LimitsDraft(wall_s=60.0)), via="rest")
        await asked(words)
        await engine.pause(packet.task_id, via="rest")
        words.gate.set()
        await until(engine, packet.task_id, lambda p: roles_of(p) == ["planner"])
        clock.ahead += timedelta(days=3)
        await engine.resume(packet.task_id, via="rest")
        done = await ended(engine, packet.task_id)
    assert done.status is TaskStatus.COMPLETED, done.error


async def test_a_paused_task_can_be_canceled(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words, profile(qa=None)) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        await ended(engine, packet.task_id)
        await engine.pause(packet.task_id, via="rest")
        canceled = await engine.cancel(packet.task_id)
    assert (canceled.status, canceled.paused_at) == (TaskStatus.CANCELED, None)


async def test_a_question_expires_over_a_restart(tmp_path: Path, words: Words) -> None:
    clock = Clock()
    async with running(tmp_path, words, profile(qa=None), clock=clock) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        waiting = await ended(engine, packet.task_id)
        question = waiting.history[-1]
        assert isinstance(question, InputRequired)
    clock.ahead += question.expires_at - question.at + timedelta(seconds=1)
    async with running(tmp_path, words, profile(qa=None), clock=clock) as engine:
        done = await until(engine, packet.task_id, lambda p: p.status.is_final)
    assert (done.status, done.reason) == (TaskStatus.FAILED, "input_expired")
    assert done.result is not None, "with the best there was"


async def test_a_question_that_is_paused_expires_later_by_the_pause(tmp_path: Path, words: Words) -> None:
    clock = Clock()
    async with running(tmp_path, words, profile(qa=None), clock=clock) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        await ended(engine, packet.task_id)
        await engine.pause(packet.task_id, via="rest")
        clock.ahead += timedelta(days=10)
        await engine.resume(packet.task_id, via="rest")
        await asyncio.sleep(0.1)
        assert (await engine.read(packet.task_id)).status is TaskStatus.INPUT_REQUIRED
        await engine.feedback(packet.task_id, ANSWER, via="rest")
        done = await until(engine, packet.task_id, lambda p: p.status.is_final)
    assert done.status is TaskStatus.COMPLETED


async def test_an_answer_while_it_is_paused_is_kept_for_later(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words, profile(qa=None)) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        await ended(engine, packet.task_id)
        await engine.pause(packet.task_id, via="rest")
        await engine.feedback(packet.task_id, ANSWER, via="rest")
    async with running(tmp_path, words, profile(qa=None)) as engine:
        await asyncio.sleep(0.1)
        assert not (await engine.read(packet.task_id)).status.is_final
        await engine.resume(packet.task_id, via="rest")
        assert (await ended(engine, packet.task_id)).status is TaskStatus.COMPLETED


async def test_a_question_takes_one_answer_however_many_come_at_once(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words, profile(qa=None)) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        question = (await ended(engine, packet.task_id)).revision
    fail = FeedbackDraft(role="qa", outcome="fail", why="adds badly", answers=question)
    async with running(tmp_path, words, profile(qa=None)) as engine:
        answers = await asyncio.gather(
            *(engine.feedback(packet.task_id, fail, via="rest") for _ in range(20)), return_exceptions=True
        )
        taken = [answer for answer in answers if isinstance(answer, TaskPacket)]
        refused = [answer for answer in answers if isinstance(answer, InvalidTransitionError)]
        assert (len(taken), len(refused)) == (1, 19)
        assert "is not open" in str(refused[0])
        again = await until(
            engine,
            packet.task_id,
            lambda p: p.status is TaskStatus.INPUT_REQUIRED and p.revision > question + 1,
        )
        with pytest.raises(InvalidTransitionError):  # the next question is open, and it is another one
            await engine.feedback(packet.task_id, fail, via="rest")
    assert sum(isinstance(event, FeedbackReceived) for event in again.history) == 1


async def test_a_fork_goes_on_after_its_step_and_copies_what_came_before(
    tmp_path: Path, words: Words
) -> None:
    told: list[tuple[str, int]] = []
    async with running(tmp_path, words, profile(qa=judge("fail", "pass", "pass"))) as engine:
        engine.observe(lambda packet, events: told.extend((packet.task_id, event.seq) for event in events))
        packet, _ = await engine.submit(draft(), via="rest")
        origin = await ended(engine, packet.task_id)
        calls = len(words.asked)
        made, is_new = await engine.fork(
            packet.task_id, ForkDraft(step=2, payload={"task": "subtract", "entry_point": "sub"}), via="rest"
        )
        done = await ended(engine, made.task_id)
        assert is_new
        assert await engine.read(packet.task_id) == origin
    first = made.history[0]
    assert isinstance(first, Submitted)
    assert first.forked_from is not None
    assert (first.forked_from.task_id, first.forked_from.step) == (origin.task_id, 2)
    assert (made.status, made.context_id) == (TaskStatus.SUBMITTED, origin.context_id)
    assert done.payload["task"] == "subtract"
    kinds = StepStarted | StepFinished
    assert [(e.step, e.role) for e in done.history if isinstance(e, kinds)][:4] == [
        (e.step, e.role) for e in origin.history if isinstance(e, kinds)
    ][:4]
    assert roles_of(done) == ["planner", "fast-coder", "qa"]
    assert len(words.asked) == calls, "what was copied was not run again"
    assert (done.usage.calls, done.usage.tokens) == (0, 0)
    assert [seq for task_id, seq in told if task_id == made.task_id] == [
        1, *(e.seq for e in done.history if e.seq > first.forked_from.seq)
    ]  # fmt: skip
    assert not any(isinstance(e, Started | Recovered) for e in done.history[: first.forked_from.seq])
    assert faults(done) == ()
    assert verify(tmp_path).faults == ()


async def test_a_fork_from_the_beginning_and_a_fork_of_a_fork(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words, profile(qa=judge("pass"))) as engine:
        packet, _ = await engine.submit(draft(limits=LimitsDraft(calls=2)), via="rest")
        await ended(engine, packet.task_id)
        made, _ = await engine.fork(packet.task_id, ForkDraft(step=0), via="rest")
        again = await ended(engine, made.task_id)
        made, _ = await engine.fork(again.task_id, ForkDraft(step=1), via="rest")
        last = await ended(engine, made.task_id)
    assert (again.usage.calls, last.usage.calls) == (2, 1)
    assert roles_of(again) == roles_of(last) == ["planner", "fast-coder", "qa"]
    assert last.status is TaskStatus.COMPLETED


async def test_what_a_fork_copied_uses_up_none_of_its_own_rounds(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words, profile(qa=judge("fail"))) as engine:
        packet, _ = await engine.submit(draft(), via="rest")
        origin = await ended(engine, packet.task_id)
        assert origin.status is TaskStatus.FAILED
        made, _ = await engine.fork(
            packet.task_id, ForkDraft(step=last_good_step(origin), payload={"task": "another"}), via="rest"
        )
        done = await ended(engine, made.task_id)
    assert made.forked_from is not None
    copied = made.forked_from.seq
    assert any(isinstance(e, StepStarted) and e.role != "qa" for e in done.history[copied:])


async def test_what_a_fork_copied_is_not_published_as_news(tmp_path: Path, words: Words) -> None:
    channel = MemoryChannel()
    async with running(tmp_path, words, profile(qa=judge("pass"))) as engine:
        handler = McpHandler(
            engine,
            channel,
            clock=now,
            metrics=bytes,
            metrics_interval_s=60,
            state_path=tmp_path / "published",
        )
        async with handler:
            packet, _ = await engine.submit(draft(), via="rest")
            await ended(engine, packet.task_id)
            made, _ = await engine.fork(packet.task_id, ForkDraft(step=2), via="rest")
            done = await ended(engine, made.task_id)
        told = []
        async with channel.subscribe(FEEDBACK, group="outside") as deliveries, asyncio.timeout(DEADLINE_S):
            while (made.task_id, done.revision) not in told:
                body = json.loads((await anext(deliveries)).body)
                told.append((body["task_id"], body["event"]["seq"]))
    await channel.aclose()
    assert made.forked_from is not None
    own = [1, *range(made.forked_from.seq + 1, done.revision + 1)]
    assert [seq for task_id, seq in told if task_id == made.task_id] == own


async def test_what_a_private_role_may_write_goes_to_no_callback_elsewhere(
    tmp_path: Path, words: Words
) -> None:
    developer = profile()["developer"]
    private = msgspec.structs.replace(developer.roles["qa"], hints=RouteHints(privacy="local"))
    roles = {**developer.roles, "qa": private}
    target = CallbackTarget(url="https://ci.example.test/", secret=EnvSecret(env="HOOK"))
    targets = Targets(lambda: CallbackSettings(targets={"ci": target}), {"HOOK": "a secret"})
    wanted = draft(callback=Callback(url="https://ci.example.test/hooks"))
    profiles = {"developer": msgspec.structs.replace(developer, roles=roles)}
    async with running(tmp_path, words, profiles, check_callback=targets.check) as engine:
        with pytest.raises(InvalidPacketError, match="leaves this machine"):
            await engine.submit(wanted, via="rest")
        alone, _ = await engine.submit(msgspec.structs.replace(wanted, scope="role"), via="rest")
        await ended(engine, alone.task_id)


async def test_what_cannot_be_forked_is_said(tmp_path: Path, words: Words) -> None:
    async with running(tmp_path, words) as engine:
        words.gate.clear()
        packet, _ = await engine.submit(draft(), via="rest")
        with pytest.raises(TaskLiveError):
            await engine.fork(packet.task_id, ForkDraft(step=0), via="rest")
        words.gate.set()
        await ended(engine, packet.task_id)
        with pytest.raises(InvalidPacketError, match="expected 0 to 5"):
            await engine.fork(packet.task_id, ForkDraft(step=6), via="rest")
        with pytest.raises(InvalidPacketError, match="/payload/task"):
            await engine.fork(packet.task_id, ForkDraft(step=0, payload={"task": None}), via="rest")
        one, is_first = await engine.fork(packet.task_id, ForkDraft(step=1), via="rest", idempotency_key="k")
        same, is_second = await engine.fork(
            packet.task_id, ForkDraft(step=1), via="rest", idempotency_key="k"
        )
        assert (one.task_id, is_first, is_second) == (same.task_id, True, False)
        with pytest.raises(IdempotencyConflictError):
            await engine.fork(packet.task_id, ForkDraft(step=2), via="rest", idempotency_key="k")
        await ended(engine, one.task_id)


async def test_a_person_pauses_resumes_and_forks_over_a_kill(tmp_path: Path) -> None:
    # The step is under way for as long as the pause takes.
    config = write_config(tmp_path, llms=scripted("short", delay_s=60), messaging={"enabled": False})
    server = ServerProcess(tmp_path / "state", config)
    body = {"payload": {"text": "A long text."}}
    async with server, server.http() as http:
        task_id = (await http.post("/api/v1/productivity/summarize", json=body)).json()["task_id"]
        at = {"AI_AGENT_SERVER_URL": server.url}
        paused = await cli("tasks", "pause", task_id, cwd=tmp_path, **at)
        assert "paused" in paused.out, paused
        await server.kill()
    write_config(tmp_path, llms=scripted("short", delay_s=0.5), messaging={"enabled": False})
    async with server, server.http() as http:
        at = {"AI_AGENT_SERVER_URL": server.url}
        assert (await http.get(f"/api/v1/tasks/{task_id}")).json()["paused_at"] is not None
        assert (await cli("tasks", "resume", task_id, cwd=tmp_path, **at)).code == 0
        assert (await cli("watch", task_id, cwd=tmp_path, **at)).code == 0
        assert (await http.post(f"/api/v1/tasks/{task_id}/pause")).status_code == 409
        forked = await cli(
            "tasks", "fork", task_id, "--step", "0", "-s", "text=Another.", "--json", cwd=tmp_path, **at
        )
        assert forked.json["payload"] == {"text": "Another."}
        wrong: Any = await http.post(f"/api/v1/tasks/{task_id}/fork", json={"step": 7})
        assert (wrong.status_code, wrong.json()["pointer"]) == (422, "/step")
        assert (await cli("watch", forked.json["task_id"], cwd=tmp_path, **at)).code == 0
    history = json.loads(Path(server.state_dir, "tasks_state", task_id[-2:], f"{task_id}.json").read_text())
    assert [event["seq"] for event in history["history"]] == list(range(1, history["revision"] + 1))


async def test_a_task_that_failed_for_no_fault_of_its_own_is_put_back_once(tmp_path: Path) -> None:
    config = write_config(tmp_path, llms=scripted("short"), messaging={"enabled": False})
    async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:
        at = {"AI_AGENT_SERVER_URL": server.url}
        await http.patch("/api/v1/llms/scripted", json={"toggle": False})
        body = {"payload": {"text": "A long text."}}
        task_id = (await http.post("/api/v1/productivity/summarize", json=body)).json()["task_id"]
        assert "task.failed" in (await http.get(f"/api/v1/tasks/{task_id}/events")).text
        failed = (await http.get(f"/api/v1/tasks/{task_id}")).json()
        assert failed["reason"] == "llm_unavailable"
        dead = await cli("tasks", "dlq", "--json", cwd=tmp_path, **at)
        assert [task["task_id"] for task in dead.json] == [failed["task_id"]]
        await http.patch("/api/v1/llms/scripted", json={"toggle": True})
        again = await cli("tasks", "requeue", failed["task_id"], cwd=tmp_path, **at)
        assert (await cli("tasks", "requeue", failed["task_id"], cwd=tmp_path, **at)).out == again.out
        task_id = again.out.strip()
        done = (await http.get(f"/api/v1/tasks/{task_id}/events")).text
        assert "task.completed" in done
        refused = await cli("tasks", "requeue", task_id, cwd=tmp_path, **at)
        assert refused.code
