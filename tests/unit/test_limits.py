"""Ten thousand tasks in the hands of adversaries: each ends, inside its limits, with its best work."""

import random
from datetime import UTC, datetime, timedelta
from typing import TypeVar, assert_never

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_agent_server.config import settings as configuration
from ai_agent_server.core.exchange import spent
from ai_agent_server.core.next_step import (
    AskOutside,
    Decline,
    EndBadly,
    EndWell,
    Hold,
    RunStep,
    StillWaiting,
    deadline,
    next_action,
)
from ai_agent_server.core.task_packet import (
    Artifact,
    Completed,
    ErrorDetail,
    Failed,
    FeedbackReceived,
    InputRequired,
    Limits,
    LLMCall,
    Paused,
    Recovered,
    Rejected,
    Resumed,
    Started,
    StepFinished,
    StepStarted,
    Submitted,
    TaskEvent,
    TaskPacket,
)
from ai_agent_server.core.transitions import fold
from tests.adversaries import KINDS, ROLES, Adversary, Move, check, random_workflow, report_of

T = TypeVar("T")

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
PACKAGED = configuration.load(None).profiles["developer"].workflow
RUNS = 10_000
MOST_EVENTS = 1_000
"""Far beyond what any of the limits below allows: a task that comes here would never end."""


class World:
    """One task, its adversary, and a clock; crashes and outside agents come as they like."""

    def __init__(self, seed: int, adversary: Adversary) -> None:
        self.rng = rng = random.Random(seed)
        self.adversary = adversary
        self.now = NOW
        self.workflow = PACKAGED if rng.random() < 0.5 else random_workflow(rng)
        self.external = frozenset(rng.sample(ROLES, _often(rng, 0, 1, 2, 6)))
        self.crashes = _often(rng, 0.0, 0.05, 0.9, 1.0)
        self.meddles = _often(rng, 0.0, 0.1, 0.5)
        self.pauses = _often(rng, 0.0, 0.05, 0.3)
        self.documents = rng.random() < 0.3
        self.stubborn = rng.choice((None, "done", "fail", "more"))
        self.answers = _often(rng, 1.0, 0.9, 0.0)
        self.turn, self.worked_s = 0, 0.0
        limits = Limits(
            calls=_often(rng, 16, 60, 5, 1, 0),
            tokens=_often(rng, 60_000, 5_000, 100, 0),
            wall_s=_often(rng, 900.0, 30.0, 0.0),
            feedback_hops=_often(rng, 8, 1_000, 1, 0),
            cost_usd=_often(rng, None, 0.001, 0.0),
        )
        fresh = TaskPacket(
            task_id="0197a000-0000-7000-8000-000000000001",
            context_id="0197a000-0000-7000-8000-000000000002",
            profile="developer",
            role=rng.choice(ROLES),
            payload={"task": "add", **({"code": "given"} if rng.random() < 0.2 else {})},
            created_at=NOW,
            limits=limits,
            scope="role" if rng.random() < 0.1 else "workflow",
        )
        self.packet = fold(fresh, [Submitted(at=NOW, via="rest"), Started(at=NOW, generation=1)])

    def add(self, *events: TaskEvent) -> None:
        self.packet = fold(self.packet, events)

    def live(self) -> TaskPacket:
        """Run the task until it has ended."""
        while not self.packet.status.is_final:
            assert self.packet.revision < MOST_EVENTS, "this task would never end"
            self.advance()
        return self.packet

    def advance(self) -> None:
        if self.packet.paused_at is None and self.rng.random() < self.pauses:
            self.add(Paused(at=self.now, via="rest"))
        action = next_action(self.packet, self.workflow, external=self.external, now=self.now)
        match action:
            case RunStep():
                self.step(action)
            case AskOutside():
                self.add(
                    InputRequired(
                        at=self.now,
                        role=action.role,
                        question=action.question,
                        expires_at=action.expires_at,
                        hop=action.hop,
                    )
                )
            case Hold():
                self.now += timedelta(days=1)
                self.add(Resumed(at=self.now, via="rest"))
            case StillWaiting():
                if self.rng.random() < self.answers:
                    self.now += timedelta(seconds=1)
                    self.meddle(self.asked())
                else:
                    self.now = action.expires_at
            case EndWell():
                self.add(Completed(at=self.now, result=action.result))
            case EndBadly():
                self.add(Failed(at=self.now, reason=action.reason, error=action.error, result=action.result))
            case Decline():
                self.add(Rejected(at=self.now, reason="invalid_payload", error=action.error))
            case _:
                assert_never(action)

    def step(self, action: RunStep) -> None:
        if not action.resumed:
            self.add(
                StepStarted(
                    at=self.now, step=action.step, role=action.role, attempt=action.attempt, hop=action.hop
                )
            )
        if self.rng.random() < self.crashes:
            self.now += timedelta(seconds=5)
            self.add(Recovered(at=self.now, generation=self.packet.generation + 1, why="it was killed"))
            return
        if self.rng.random() < self.meddles:
            self.meddle(self.rng.choice((*ROLES, "user")))
        self.turn += 1
        move = self.adversary(self.rng, action.role, self.turn)
        over = spent(self.packet.usage, self.packet.limits)
        if move.talks and over is not None:
            move = Move(outcome=over, talks=False)
        # What the engine does with a step that takes too long.
        until = deadline(self.packet)
        assert until is not None
        ends = min(until, self.now + timedelta(seconds=move.takes_s))
        if ends == until:
            move = Move(outcome="budget_wall", talks=False)
        self.worked_s += (ends - self.now) / timedelta(seconds=1)
        self.now = ends
        self.add(
            StepFinished(
                at=self.now,
                step=action.step,
                role=action.role,
                outcome=move.outcome,
                why=move.why,
                artifact=None if self.documents else _artifact(move.code),
                output={"text": move.code} if self.documents and move.code is not None else None,
                report=move.report,
                call=self.call(move) if move.talks else None,
                error=ErrorDetail(code="x", message=move.why) if move.outcome == "invalid" else None,
            )
        )

    def call(self, move: Move) -> LLMCall:
        return LLMCall(
            llm="m",
            model="m",
            source="local",
            input_tokens=move.input_tokens,
            output_tokens=move.output_tokens,
            finish_reason="stop",
            time_to_first_token_ms=1,
            duration_ms=1,
            prompt_sha256=move.prompt,
            cost_usd=0.0
            if self.packet.limits.cost_usd == 0
            else 0.0003,  # the balancer then takes free ones alone
        )

    def asked(self) -> str:
        """The role that is waited for; sometimes another one reports."""
        last = next(e for e in reversed(self.packet.history) if not isinstance(e, Paused | Resumed))
        assert isinstance(last, InputRequired)
        return last.role if self.rng.random() < 0.9 else self.rng.choice(ROLES)

    def meddle(self, role: str) -> None:
        """An outside agent reports, asked or not."""
        rng = self.rng
        outcome = self.stubborn or rng.choice(("done", "fail", "answer", "pass", "disputed", "unclear", ""))
        if role == "user":
            outcome = "answer"
        self.add(
            FeedbackReceived(
                at=self.now,
                role=role,
                outcome=outcome,
                via="nats",
                artifact=_artifact(f"outside {self.turn}" if rng.random() < 0.5 else None),
                output={"text": "from outside"} if rng.random() < 0.3 else None,
                report=report_of("fail", 1) if outcome == "fail" else None,
            )
        )


def _often(rng: random.Random, usual: T, *others: T) -> T:
    """`usual` two times in three."""
    return usual if rng.random() < 0.67 else rng.choice(others)


def _artifact(code: str | None) -> Artifact | None:
    return None if code is None else Artifact(artifact_id=code[:40], kind="code", content=code)


def ended(kind: str, seed: int) -> TaskPacket:
    """A task of these agents, run to its end and looked at."""
    world = World(seed, KINDS[kind])
    try:
        packet = world.live()
        check(packet, world.workflow)
        assert world.worked_s <= packet.limits.wall_s
    except AssertionError as exc:
        exc.add_note(f"kind={kind} seed={seed} events={world.packet.revision}")
        raise
    return packet


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_agents_do_the_task_ends_inside_its_limits_with_its_best_work(kind: str) -> None:
    packets = [ended(kind, seed) for seed in range(-(-RUNS // len(KINDS)))]
    assert len({packet.reason for packet in packets}) > 4, "these agents met too few of the ways to end"


@settings(max_examples=500)
@given(st.sampled_from(tuple(KINDS)), st.integers(RUNS))
def test_other_tasks_each_time_end_as_well(kind: str, seed: int) -> None:
    ended(kind, seed)
