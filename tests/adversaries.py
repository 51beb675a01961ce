"""Agents that mean no good, each making the next move of a task out of spite; and what must hold after."""

import random
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from ai_agent_server.core.next_step import drafts
from ai_agent_server.core.task_packet import (
    FeedbackReceived,
    InputRequired,
    StepFinished,
    StepStarted,
    TaskPacket,
    TaskStatus,
    TestReport,
)
from ai_agent_server.core.workflow import END, Edge, Workflow

GIANT = "x" * 500_000
NO_REAL_OUTCOMES = ("", "end", "qa.pass", "brilliant", "done done", "../../etc", "answer", "more", "🏆" * 50)
VERDICTS: tuple[Any, ...] = ("pass", "fail", "error", "timeout", "memory", "signal", "unverified")


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent does in its step. Tokens are what the LLM would like to use."""

    outcome: str
    why: str = ""
    code: str | None = None
    report: TestReport | None = None
    talks: bool = True
    prompt: str = "p"
    input_tokens: int = 50
    output_tokens: int = 50
    takes_s: float = 1.0


Adversary: TypeAlias = Callable[[random.Random, str, int], Move]
"""(randomness, role, turn) -> what it does."""


def report_of(verdict: Any, anchors: int = 0, tests: int = 0) -> TestReport:
    """A report out of thin air."""
    return TestReport(
        verdict=verdict,
        tier="none",
        anchors_passed=anchors,
        anchors_total=2,
        tests_passed=tests,
        tests_total=4,
    )


def never_ending(rng: random.Random, role: str, turn: int) -> Move:
    """Always a little better, never done; what it writes is new each time."""
    if role == "qa":
        return Move(outcome="fail", report=report_of("fail", turn, turn), talks=rng.random() < 0.5)
    return Move(outcome="done", code=f"# attempt {turn}", prompt=str(turn))


def lying(rng: random.Random, role: str, turn: int) -> Move:
    """Says it passed over a report that says it failed; counts more tests than there are; makes up words."""
    if rng.random() < 0.3:
        return Move(outcome=rng.choice(NO_REAL_OUTCOMES), report=report_of(rng.choice(VERDICTS), 99, -1))
    claimed = rng.choice(("done", "pass", "fail", "fail", "disputed"))
    return Move(outcome=claimed, code=f"lie {turn % 3}", report=report_of("fail", 10**9, -5))


def ping_pong(_rng: random.Random, role: str, turn: int) -> Move:
    """One undoes what the other did, and so on."""
    if role == "qa":
        return Move(outcome="fail", report=report_of("fail", 1, 1), talks=False)
    return Move(outcome="done", code=("to", "fro")[turn // 2 % 2], prompt=str(turn))


def always_the_same(_rng: random.Random, role: str, _turn: int) -> Move:
    """The same answer to the same prompt, for ever."""
    if role == "qa":
        return Move(outcome="fail", report=report_of("fail"), talks=False)
    return Move(outcome="done", code="same")


def contradicting_tests(rng: random.Random, role: str, turn: int) -> Move:
    """Tests that no code can hold: what passed fails the next time, and all of it is disputed."""
    if role == "qa":
        flip = turn % 4
        return Move(
            outcome=("fail", "disputed", "disputed", "disputed")[flip],
            report=report_of("fail", 2 - flip % 2, 4 * (flip % 2)),
            talks=rng.random() < 0.7,
        )
    return Move(outcome="done", code=f"version {rng.randrange(3)}", prompt=str(rng.randrange(3)))


def giant_outputs(rng: random.Random, role: str, turn: int) -> Move:
    """Half a megabyte where a word would do, and a token count that heeds no bound."""
    said = GIANT[: rng.choice((10, 10_000, 500_000))]
    return Move(
        outcome="fail" if role == "qa" else "done",
        why=said,
        code=f"{turn}{said}",
        report=report_of("fail", 1, 1) if role == "qa" else None,
        prompt=str(turn),
        input_tokens=rng.choice((10, 4_000, 100_000)),
        output_tokens=rng.choice((10, 4_000, 10_000_000)),
    )


def unusable(rng: random.Random, _role: str, turn: int) -> Move:
    """Answers that cannot be read, engines that break."""
    outcome = rng.choice(
        ("invalid", "invalid", "invalid", "cut", "cut", "unavailable", "error", "no_sandbox")
    )
    return Move(outcome=outcome, why=f"complaint {turn}", talks=rng.random() < 0.8, prompt=str(turn))


def idle(rng: random.Random, role: str, turn: int) -> Move:
    """Asks no LLM anything, so that no call is ever counted."""
    return Move(outcome=rng.choice(("done", "fail", "disputed", "more")), talks=False, code=f"{role}{turn}")


def questioning(rng: random.Random, _role: str, turn: int) -> Move:
    """Finds nothing clear, whatever it is told."""
    return Move(
        outcome=rng.choice(("unclear", "unclear", "done")), why=f"and {turn}?", talks=rng.random() < 0.5
    )


def slow(rng: random.Random, role: str, turn: int) -> Move:
    """Each step takes as long as it is let."""
    move = never_ending(rng, role, turn)
    return msgspec.structs.replace(move, takes_s=rng.choice((1.0, 60.0, 1e6)))


def random_agent(rng: random.Random, role: str, turn: int) -> Move:
    """Each move one of the others'."""
    return rng.choice(tuple(KINDS.values())[:-1])(rng, role, turn)


KINDS: dict[str, Adversary] = {
    "never_ending": never_ending,
    "lying": lying,
    "ping_pong": ping_pong,
    "always_the_same": always_the_same,
    "contradicting_tests": contradicting_tests,
    "giant_outputs": giant_outputs,
    "unusable": unusable,
    "idle": idle,
    "questioning": questioning,
    "slow": slow,
    "random": random_agent,
}

ROLES = ("planner", "fast-coder", "qa", "debug", "deep-coder", "diagnosis")
OUTCOMES = ("done", "pass", "fail", "disputed", "more", "invalid", "unclear")


def random_workflow(rng: random.Random) -> Workflow:
    """Routes that somebody might write who does not think of the end."""
    gaps, bounds = rng.choice((0.0, 0.1)), rng.choice((0.0, 0.4))
    routes = {
        f"{role}.{outcome}": tuple(
            Edge(
                to=END if rng.random() < 0.02 else role if rng.random() < 0.1 else rng.choice(ROLES),
                at_most=rng.choice((1, 2, 50)) if rng.random() < bounds else None,
                since=tuple(rng.sample(ROLES, rng.randrange(3))),
                feedback=rng.random() < bounds,
            )
            for _ in range(rng.randrange(1, 4))
        )
        for role in ROLES
        for outcome in OUTCOMES
        if rng.random() >= gaps
    }
    return Workflow(
        routes=routes,
        makers=tuple(rng.sample(ROLES, rng.randrange(4))),
        max_invalid_output=rng.choice((1, 3, 1000)),
        max_rounds_without_progress=rng.choice((1, 4, 1_000_000)),
        max_same_step=rng.choice((1, 3, 1_000_000)),
        input_expires_s=rng.choice((1.0, 86_400.0)),
    )


def check(packet: TaskPacket, workflow: Workflow) -> None:
    """What holds of every task that has ended, found from its history by other means than the code's."""
    limits = packet.limits
    assert packet.status is TaskStatus.COMPLETED or packet.reason
    calls = tokens = 0
    cost_usd = 0.0
    for event in packet.history:
        if isinstance(event, StepFinished) and event.call is not None:
            assert calls < limits.calls
            assert tokens < limits.tokens
            assert not limits.cost_usd or cost_usd < limits.cost_usd
            calls += 1
            tokens += event.call.input_tokens + event.call.output_tokens
            cost_usd += event.call.cost_usd
    assert (packet.usage.calls, packet.usage.tokens) == (calls, tokens)
    hops = [e.hop for e in packet.history if isinstance(e, StepStarted | InputRequired) and e.hop]
    assert sum(hop.feedback for hop in hops) <= limits.feedback_hops
    assert all(hop.on and hop.why for hop in hops)
    _check_best(packet, workflow)


def _check_best(packet: TaskPacket, workflow: Workflow) -> None:
    """A version that was made is kept, and none that was made is better."""
    made = drafts(packet, workflow)
    makers = [
        event
        for event in packet.history
        if isinstance(event, StepFinished | FeedbackReceived) and event.role in workflow.makers
    ]
    assert made or not any(event.artifact or event.output for event in makers)
    if not made or packet.status is TaskStatus.REJECTED:
        return
    assert packet.result is not None
    if "artifact" in packet.result:
        kept = packet.result["artifact"]["content"]
        versions = [draft for draft in made if draft.artifact.content == kept]
    else:
        versions = [draft for draft in made if draft.output == packet.result["output"]]
    assert versions
    reports = [draft.report for draft in made if draft.report is not None]
    if not reports:
        assert packet.result["verdict"] == "unverified"
        return
    mine = [draft.report for draft in versions if draft.report is not None]
    passed = [report for report in reports if report.verdict == "pass"]
    assert packet.result["verdict"] == "pass" or not passed
    most = max(report.anchors_passed for report in passed or reports)
    assert any(report.anchors_passed == most for report in mine)
