"""What a task does next: routes, stop rules, the best of its work. Pure decisions over its history."""

import hashlib
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import cached_property
from typing import TypeAlias

import msgspec

from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.task_packet import (
    Artifact,
    ErrorDetail,
    FeedbackReceived,
    Hop,
    InputRequired,
    Paused,
    Reason,
    Recovered,
    Resumed,
    Started,
    StepFinished,
    StepStarted,
    TaskPacket,
    TestReport,
)
from ai_agent_server.core.workflow import END, Edge, Workflow

POISON_AFTER = 20
"""A step that was begun this many times more without a result is taken to be the cause.

Not fewer: a storm of kills from outside finds the same steps under way again and again, and a bound
of 3 failed tasks that had done nothing wrong.
"""

IDLE_STEPS = 8
"""No workflow gets further by this many steps in a row without an LLM; calls have a limit of their own."""

OUTSIDE_ROUNDS = 64
"""So often at most a task waits for somebody outside: two outside agents could send it to and fro for ever,
at no cost that any limit counts."""

ENDING_OUTCOMES: dict[str, tuple[Reason, str]] = {
    "unavailable": ("llm_unavailable", "no LLM could serve the step"),
    "no_sandbox": ("sandbox_unavailable", "nothing may be accepted without a sandbox to run it in"),
    "budget_calls": ("budget_calls", "the limit of LLM calls is used up"),
    "budget_tokens": ("budget_tokens", "the limit of tokens is used up"),
    "budget_wall": ("budget_wall", "the time is used up"),
    "budget_cost": ("budget_cost", "the limit of cost is used up"),
    "budget_sender": ("budget_sender", "what it may use together with others is used up"),
    "refused": ("sender_refused", "the key that sent it may not do this any more"),
    "error": ("internal", "the step broke"),
}
"""Outcomes that the engine itself gives a step, and how they end the task."""


REPEATED_OUTCOMES: dict[str, tuple[Reason, str]] = {
    "invalid": ("invalid_output", "unusable answers"),
    "cut": ("llm_unavailable", "answers that were cut off"),
}
"""Outcomes after which the same role is tried again, and how they end the task when that is no help."""


class RunStep(msgspec.Struct, frozen=True, kw_only=True):
    """Run `role`. `resumed`: its start is in the history already; it was under way at a crash."""

    step: int
    role: str
    attempt: int
    hop: Hop
    resumed: bool = False


class AskOutside(msgspec.Struct, frozen=True, kw_only=True):
    """Wait for a feedback packet for `role`, at the latest until `expires_at`."""

    role: str
    question: str
    expires_at: datetime
    hop: Hop


class StillWaiting(msgspec.Struct, frozen=True, kw_only=True):
    """The task waits already."""

    expires_at: datetime


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """The task is paused."""


class EndWell(msgspec.Struct, frozen=True, kw_only=True):
    """The task is completed."""

    result: JSONObject


class EndBadly(msgspec.Struct, frozen=True, kw_only=True):
    """The task has failed; `result` is the best there was."""

    reason: Reason
    error: ErrorDetail
    result: JSONObject | None


class Decline(msgspec.Struct, frozen=True, kw_only=True):
    """The task is rejected: no agent can do anything with what was sent."""

    error: ErrorDetail


_IDLING = frozenset({InputRequired, Paused, Recovered})
"""The events that begin a time in which nobody works on the task, or end one."""

Action: TypeAlias = RunStep | AskOutside | StillWaiting | Hold | EndWell | EndBadly | Decline
Report: TypeAlias = StepFinished | FeedbackReceived
_REPORTS = (StepFinished, FeedbackReceived)
_ANSWERS = (*_REPORTS, InputRequired)


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """One version of the work, with what its tests showed, if they ran.

    `output`: what the artifact is the JSON text of, where the work is not code but what a role answers.
    """

    artifact: Artifact
    report: TestReport | None = None
    output: JSONObject | None = None


def deadline(packet: TaskPacket) -> datetime | None:
    """When the task's time is used up; None before it began.

    Time in which nobody worked on it does not count: waiting for somebody outside, being paused, and
    the server being away.
    """
    if packet.started_at is None:
        return None
    return packet.started_at + timedelta(seconds=packet.limits.wall_s) + _idle(packet)


def _idle(packet: TaskPacket) -> timedelta:
    """For how long nobody was to work on the task, up to when it last went on."""
    if _IDLING.isdisjoint(map(type, packet.history)):
        return timedelta(0)
    began = (place for place, event in enumerate(packet.history) if isinstance(event, Started | Recovered))
    events = packet.history[next(began, len(packet.history)) :]
    idle, since = timedelta(0), None
    asked = paused = False
    before = packet.started_at
    for event in events:
        match event:
            case InputRequired():
                asked = True
            case FeedbackReceived():
                asked = False
            case Paused():
                paused = True
            case Resumed():
                paused = False
            case StepFinished() if since is not None and not asked:
                since = event.at  # it was under way when the pause came
            case Recovered() if since is None and before is not None:
                idle += event.at - before
            case _:
                pass
        if asked or paused:
            since = since or event.at
        elif since is not None:
            idle, since = idle + (event.at - since), None
        before = event.at
    return idle


def _expiry(packet: TaskPacket, asked: InputRequired) -> datetime:
    """When a question expires: later by what the task was paused since it was asked."""
    until, paused_at = asked.expires_at, asked.at
    for event in packet.history[asked.seq :]:
        if isinstance(event, Paused):
            paused_at = event.at
        elif isinstance(event, Resumed):
            until += event.at - paused_at
    return until


def next_action(packet: TaskPacket, workflow: Workflow, *, external: frozenset[str], now: datetime) -> Action:
    """What comes next. `external` names the roles that outside agents fill."""
    return _Decision(packet, workflow, external, now).take()


def drafts(packet: TaskPacket, workflow: Workflow) -> tuple[Draft, ...]:
    """Every version of the work in the order it was made; a report belongs to the latest before it."""
    made: list[Draft] = []
    if given := _given_code(packet):
        made.append(Draft(artifact=Artifact(artifact_id="given", kind="code", content=given)))
    versions = _versions(packet, workflow)
    for event in packet.history:
        if not isinstance(event, _REPORTS):
            continue
        if event.seq in versions:
            made.append(versions[event.seq])
        if event.report is not None and made:
            made[-1] = msgspec.structs.replace(made[-1], report=event.report)
    return tuple(made)


def _given_code(packet: TaskPacket) -> str:
    given = packet.payload.get("code")
    return given if isinstance(given, str) else ""


def _versions(packet: TaskPacket, workflow: Workflow) -> dict[int, Draft]:
    """What each report added to the work, by its `seq`.

    What a maker says beside its code is no version of the work; where no code is made, it is the work.
    """
    makers = [
        event
        for event in packet.history
        if isinstance(event, _REPORTS) and (event.role in workflow.makers or not workflow.makers)
    ]
    artifacts = {e.seq: Draft(artifact=e.artifact) for e in makers if e.artifact is not None}
    if artifacts or not workflow.makers or _given_code(packet):
        return artifacts
    return {
        e.seq: Draft(artifact=_document(e.output), output=e.output) for e in makers if e.output is not None
    }


def _document(output: JSONObject) -> Artifact:
    content = msgspec.json.format(msgspec.json.encode(output)).decode()
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Artifact(artifact_id=digest, kind="document", content=content, language="json")


def best(versions: tuple[Draft, ...]) -> Draft | None:
    """The version to keep: passed, then most anchors, most tests, most others that agree, the earliest.

    What an LLM answers first is its likeliest; nothing without evidence takes its place.
    """

    def rank(draft: Draft) -> tuple[bool, int, int, int]:
        report = draft.report
        if report is None:
            return (False, -1, -1, 0)
        return (report.verdict == "pass", report.anchors_passed, report.tests_passed, report.agreeing)

    return max(versions, key=rank, default=None)


def result(packet: TaskPacket, workflow: Workflow, *, outcome: str) -> JSONObject | None:
    """What the task has to show: the best version and its tests, or the last role's output."""
    found: JSONObject = {"outcome": outcome}
    chosen = best(drafts(packet, workflow))
    if chosen is not None:
        if chosen.output is None:
            found["artifact"] = msgspec.to_builtins(chosen.artifact)
        found["verdict"] = chosen.report.verdict if chosen.report else "unverified"
        found["tests"] = msgspec.to_builtins(chosen.report) if chosen.report else None
    last = next((r for r in _reports(packet) if r.output is not None), None)
    if chosen is not None and chosen.output is not None:
        found["output"] = chosen.output
    elif last is not None:
        found["output"] = last.output
    return found if len(found) > 1 else None


def _reports(packet: TaskPacket) -> Iterator[Report]:
    """What roles and outside agents reported, the latest first."""
    return (e for e in reversed(packet.history) if isinstance(e, _REPORTS))


class _Decision:
    def __init__(
        self, packet: TaskPacket, workflow: Workflow, external: frozenset[str], now: datetime
    ) -> None:
        self.packet, self.workflow, self.external, self.now = packet, workflow, external, now
        self.started = [e for e in packet.history if type(e) is StepStarted]
        self.finished = [e for e in packet.history if type(e) is StepFinished]
        # What a fork took over is known to it, but uses up nothing of what it may do itself.
        copied = packet.copied_seq
        self.own_finished = [e for e in self.finished if e.seq > copied] if copied else self.finished
        own = packet.history[copied:]
        self.own_runs = [e for e in own if isinstance(e, (StepStarted, InputRequired))]
        """When a role was run or asked, without what a fork took over."""

    @cached_property
    def versions(self) -> dict[int, Draft]:
        return _versions(self.packet, self.workflow)

    def take(self) -> Action:
        if self.packet.paused_at is not None:
            return Hold()
        last = self._last()
        if isinstance(last, InputRequired):
            expires_at = _expiry(self.packet, last)
            if self.now >= expires_at:
                return self._end("input_expired", f"nobody answered for {last.role} in time")
            return StillWaiting(expires_at=expires_at)
        until = deadline(self.packet)
        if until is not None and self.now >= until:
            return self._end("budget_wall", "the time is used up")
        if len(self.started) > len(self.finished):
            return self._resume(self.started[-1])
        if last is None:
            return self._run(self.packet.role, Hop(on="entry", why="the task was sent here"))
        return self._route(last)

    def _resume(self, open_step: StepStarted) -> Action:
        tries = sum(isinstance(e, Started | Recovered) for e in self.packet.history[open_step.seq :])
        if tries > POISON_AFTER:
            return self._end("poison", f"{open_step.role} was cut off {tries} times in a row")
        return RunStep(
            step=open_step.step,
            role=open_step.role,
            attempt=open_step.attempt,
            hop=open_step.hop,
            resumed=True,
        )

    def _last(self) -> StepFinished | FeedbackReceived | InputRequired | None:
        # Feedback that came while a step ran has the last word over that step: it was sent by
        # somebody who saw more than the step's agent did.
        since = self.started[-1].seq if self.started else 0
        newest: StepFinished | FeedbackReceived | InputRequired | None = None
        for event in self.packet.history[since:]:
            outranked = isinstance(event, StepFinished) and isinstance(newest, FeedbackReceived)
            if isinstance(event, _ANSWERS) and not outranked:
                newest = event
        return newest

    def _route(self, last: Report) -> Action:
        on = f"{last.role}.{last.outcome}"
        if last.outcome in ENDING_OUTCOMES:
            reason, message = ENDING_OUTCOMES[last.outcome]
            error = last.error if isinstance(last, StepFinished) else None
            return self._end(reason, error.message if error else last.why or message)
        if last.outcome == "rejected":
            return Decline(error=ErrorDetail(code="invalid_payload", message=last.why))
        if last.outcome in REPEATED_OUTCOMES:
            return self._again(last, on)
        if last.outcome == "unclear":
            return self._ask("user", Hop(on=on, why=last.why or "the task is not clear enough; say more"))
        if last.outcome == "answer":
            asked = self.finished[-1].role if self.finished else self.packet.role
            return self._run(asked, Hop(on=on, why="the question was answered"))
        edges = self.workflow.routes.get(on, ())
        if self.packet.scope == "role":
            edges = tuple(edge for edge in edges if edge.to == last.role)
            if not edges:
                return EndWell(result=self._result(last.outcome))
        if not edges:
            if last.outcome in {"done", "pass"}:
                return EndWell(result=self._result(last.outcome))
            return self._end("max_debug", last.why or f"{on} leads nowhere")
        return self._follow(edges, on, last)

    def _follow(self, edges: tuple[Edge, ...], on: str, last: Report) -> Action:
        for edge in edges:
            if edge.to == END:
                return EndWell(result=self._result(last.outcome))
            if not self._open(edge):
                continue
            stop = self._stop_rule(edge)
            if stop is not None:
                return stop
            hop = Hop(on=on, why=self._why(edge, last), feedback=edge.feedback)
            return self._run(edge.to, hop)
        return self._end("max_debug", f"every route from {on} is used up")

    def _why(self, edge: Edge, last: Report) -> str:
        runs = self._runs(edge)
        why = last.why or last.outcome
        return f"{why} (run {runs + 1} of {edge.at_most})" if edge.at_most is not None else why

    def _runs(self, edge: Edge) -> int:
        runs = 0
        for event in reversed(self.own_runs):
            if event.role in edge.since:
                break
            runs += event.role == edge.to
        return runs

    def _open(self, edge: Edge) -> bool:
        if edge.at_most is not None and self._runs(edge) >= edge.at_most:
            return False
        # A fix that changed nothing will not change anything the next time either.
        return not (edge.feedback and edge.to in self.workflow.makers and self._changed_nothing(edge.to))

    def _changed_nothing(self, role: str) -> bool:
        made = [(e.role, self._made(e)) for e in self.finished if e.role in self.workflow.makers]
        made = [(maker, content) for maker, content in made if content]
        if not self.own_finished or not made or made[-1][0] != role:
            return False
        return any(content == made[-1][1] for _, content in made[:-1])

    def _made(self, event: StepFinished) -> str:
        """What names the version that the step added to the work, "" if it added none."""
        version = self.versions.get(event.seq)
        return version.artifact.artifact_id if version else ""

    def _stop_rule(self, edge: Edge) -> EndBadly | None:
        workflow = self.workflow
        finished = self.own_finished
        if len(finished) >= IDLE_STEPS and all(e.call is None for e in finished[-IDLE_STEPS:]):
            return self._end("loop_detected", f"{IDLE_STEPS} steps in a row asked no LLM anything")
        if edge.feedback and self.packet.usage.feedback_hops >= self.packet.limits.feedback_hops:
            return self._end("max_debug", f"{self.packet.limits.feedback_hops} feedback hops are used up")
        if len(finished) >= workflow.max_same_step:
            same: dict[tuple[str, str, str], int] = {}
            for e in finished:
                if e.call is not None and (made := self._made(e)):
                    answer = e.role, e.call.prompt_sha256, made
                    same[answer] = same.get(answer, 0) + 1
            top = max(same, key=same.__getitem__, default=None)
            if top is not None and same[top] >= workflow.max_same_step:
                return self._end("loop_detected", f"{top[0]} gave the same answer {same[top]} times")
        scores = [
            (e.report.anchors_passed, e.report.tests_passed)
            for e in finished
            if e.report is not None and e.outcome != "disputed"
        ]
        if scores and len(scores) - 1 - scores.index(max(scores)) >= workflow.max_rounds_without_progress:
            return self._end("no_progress", f"no better for {workflow.max_rounds_without_progress} rounds")
        return None

    def _again(self, last: Report, on: str) -> Action:
        in_a_row = 0
        for event in reversed(self.own_finished):
            if event.role != last.role or event.outcome not in REPEATED_OUTCOMES:
                break
            in_a_row += 1
        if in_a_row < self.workflow.max_invalid_output:
            hop = Hop(on=on, why=last.why or "the answer was not of the form asked for")
            return self._run(last.role, hop, attempt=in_a_row + 1)
        if edges := self.workflow.routes.get(on, ()):
            return self._follow(edges, on, last)
        reason, what = REPEATED_OUTCOMES[last.outcome]
        error = last.error if isinstance(last, StepFinished) else None
        detail = error.message if error else last.why
        return self._end(reason, f"{last.role} gave {in_a_row} {what}: {detail}")

    def _run(self, role: str, hop: Hop, *, attempt: int = 1) -> Action:
        if role in self.external:
            return self._ask(role, hop)
        return RunStep(step=len(self.started) + 1, role=role, attempt=attempt, hop=hop)

    def _ask(self, role: str, hop: Hop) -> AskOutside | EndBadly:
        if sum(isinstance(event, InputRequired) for event in self.own_runs) >= OUTSIDE_ROUNDS:
            return self._end("loop_detected", f"somebody outside was waited for {OUTSIDE_ROUNDS} times")
        expires_at = self.now + timedelta(seconds=self.workflow.input_expires_s)
        return AskOutside(role=role, question=hop.why, expires_at=expires_at, hop=hop)

    def _result(self, outcome: str) -> JSONObject:
        return result(self.packet, self.workflow, outcome=outcome) or {"outcome": outcome}

    def _end(self, reason: Reason, message: str) -> EndBadly:
        return EndBadly(
            reason=reason,
            error=ErrorDetail(code=reason, message=message),
            result=result(self.packet, self.workflow, outcome="failed"),
        )
