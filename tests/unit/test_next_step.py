"""What a task does next, by table and by adversary."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from ai_agent_server.core.next_step import (
    POISON_AFTER,
    AskOutside,
    EndBadly,
    EndWell,
    RunStep,
    StillWaiting,
    best,
    drafts,
    next_action,
)
from ai_agent_server.core.task_packet import (
    Artifact,
    FeedbackReceived,
    InputRequired,
    Limits,
    LLMCall,
    Recovered,
    Started,
    StepFinished,
    StepStarted,
    Submitted,
    TaskEvent,
    TaskPacket,
    TestReport,
)
from ai_agent_server.core.transitions import fold
from ai_agent_server.core.workflow import Edge, Workflow

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
TO_QA = (Edge(to="qa"),)
TO_PLANNER = Edge(to="planner", at_most=3, feedback=True)
TO_DEBUG = Edge(to="debug", at_most=2, since=("fast-coder", "deep-coder"), feedback=True)
AGAIN = Edge(to="qa", at_most=2, since=("fast-coder", "deep-coder", "debug"))
WORKFLOW = Workflow(
    makers=("fast-coder", "deep-coder", "debug"),
    routes={
        "diagnosis.done": (Edge(to="planner", at_most=1),),
        "architect.done": (Edge(to="planner", at_most=1),),
        "planner.done": (Edge(to="fast-coder", at_most=1), Edge(to="deep-coder")),
        "fast-coder.done": TO_QA,
        "deep-coder.done": TO_QA,
        "debug.done": TO_QA,
        "qa.pass": (Edge(to="end"),),
        "qa.disputed": (AGAIN, TO_DEBUG, TO_PLANNER),
        "qa.fail": (TO_DEBUG, TO_PLANNER),
    },
)
NOBODY: frozenset[str] = frozenset()


def packet(**changes: Any) -> TaskPacket:
    fresh = TaskPacket(
        task_id="0197a000-0000-7000-8000-000000000001",
        context_id="0197a000-0000-7000-8000-000000000002",
        profile="developer",
        role="planner",
        payload={"task": "add"},
        created_at=NOW,
    )
    fresh = msgspec.structs.replace(fresh, **changes)
    return fold(fresh, [Submitted(at=NOW, via="rest"), Started(at=NOW, generation=1)])


def call(prompt: str = "p") -> LLMCall:
    return LLMCall(
        llm="m",
        model="m",
        source="local",
        input_tokens=10,
        output_tokens=10,
        finish_reason="stop",
        time_to_first_token_ms=1,
        duration_ms=1,
        prompt_sha256=prompt,
    )


def code(content: str) -> Artifact:
    return Artifact(artifact_id=content, kind="code", content=content)


def report(verdict: Any, anchors: int = 0, tests: int = 0) -> TestReport:
    return TestReport(
        verdict=verdict,
        tier="bubblewrap",
        anchors_passed=anchors,
        anchors_total=2,
        tests_passed=tests,
        tests_total=4,
    )


class Story:
    """A task that is told step by step: each role's outcome as the agents would report it."""

    def __init__(self, start: TaskPacket, workflow: Workflow = WORKFLOW) -> None:
        self.packet, self.workflow = start, workflow

    def next(self, now: datetime = NOW, external: frozenset[str] = NOBODY) -> Any:
        return next_action(self.packet, self.workflow, external=external, now=now)

    def step(self, outcome: str, **found: Any) -> str:
        """Run the step that is due and report `outcome`; answers the role that ran."""
        action = self.next()
        assert isinstance(action, RunStep), action
        self.add(
            StepStarted(at=NOW, step=action.step, role=action.role, attempt=action.attempt, hop=action.hop),
            StepFinished(at=NOW, step=action.step, role=action.role, outcome=outcome, **found),
        )
        return action.role

    def add(self, *events: TaskEvent) -> None:
        self.packet = fold(self.packet, events)


def test_a_task_begins_at_the_role_it_was_sent_to() -> None:
    action = Story(packet(role="architect")).next()
    assert isinstance(action, RunStep)
    assert (action.role, action.step, action.attempt, action.hop.on) == ("architect", 1, 1, "entry")


def test_the_main_job_goes_plan_code_test_debug_test_and_ends_well() -> None:
    story = Story(packet())
    roles = [
        story.step("done", output={"plan": "1. add"}, call=call()),
        story.step("done", artifact=code("bad"), call=call()),
        story.step("fail", report=report("fail", 1, 1), call=call()),
        story.step("done", artifact=code("good"), call=call("q")),
        story.step("pass", report=report("pass", 2, 4)),
    ]
    assert roles == ["planner", "fast-coder", "qa", "debug", "qa"]
    end = story.next()
    assert isinstance(end, EndWell)
    assert end.result["artifact"]["content"] == "good"
    assert end.result["verdict"] == "pass"


def test_debug_used_up_leads_to_a_new_plan_and_the_deep_coder() -> None:
    story = Story(packet())
    story.step("done")
    story.step("done", artifact=code("a"), call=call())
    roles = []
    for round_ in range(2):
        story.step("fail", report=report("fail", round_))
        roles.append(story.step("done", artifact=code(f"fix{round_}"), call=call(str(round_))))
    story.step("fail", report=report("fail", 2))
    roles += [story.step("done"), story.step("done", artifact=code("afresh"), call=call("z"))]
    assert roles == ["debug", "debug", "planner", "deep-coder"]


def test_a_fix_that_changed_nothing_is_not_tried_again() -> None:
    story = Story(packet())
    story.step("done")
    story.step("done", artifact=code("a"), call=call())
    story.step("fail", report=report("fail"))
    story.step("done", artifact=code("a"), call=call("q"))
    story.step("fail", report=report("fail"))
    assert story.step("done") == "planner"


def test_the_same_answer_to_the_same_prompt_three_times_is_a_loop() -> None:
    story = Story(packet(), Workflow(routes={"planner.done": (Edge(to="planner"),)}, makers=("planner",)))
    for _ in range(2):
        story.step("done", artifact=code("same"), call=call("same"))
    story.step("done", artifact=code("same"), call=call("another prompt"))
    assert isinstance(story.next(), RunStep)
    story.step("done", artifact=code("same"), call=call("same"))
    end = story.next()
    assert isinstance(end, EndBadly)
    assert end.reason == "loop_detected"


def test_four_rounds_without_a_better_score_end_the_task_with_the_best_artifact() -> None:
    story = Story(packet(limits=Limits(feedback_hops=99)))
    story.step("done")
    story.step("done", artifact=code("first"), call=call())
    story.step("fail", report=report("fail", 1))
    turn = 0
    while not isinstance(end := story.next(), EndBadly):
        turn += 1
        outcome = ("fail", {"report": report("fail", 0)}) if end.role == "qa" else ("done", {})
        found: dict[str, Any] = outcome[1]
        if end.role in WORKFLOW.makers:
            found = {"artifact": code(f"v{turn}"), "call": call(str(turn))}
        story.step(outcome[0], **found)
    assert end.reason == "no_progress"
    assert end.result is not None
    assert end.result["artifact"]["content"] == "first"


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ("unavailable", "llm_unavailable"),
        ("no_sandbox", "sandbox_unavailable"),
        ("budget_calls", "budget_calls"),
        ("budget_tokens", "budget_tokens"),
        ("budget_cost", "budget_cost"),
        ("error", "internal"),
    ],
)
def test_what_the_engine_could_not_do_ends_the_task_with_its_reason(outcome: str, reason: str) -> None:
    story = Story(packet())
    story.step(outcome)
    end = story.next()
    assert isinstance(end, EndBadly)
    assert end.reason == reason


def test_unusable_answers_are_asked_for_again_three_times_at_most() -> None:
    story = Story(packet())
    attempts = []
    while isinstance(action := story.next(), RunStep):
        attempts.append(action.attempt)
        story.step("invalid", call=call())
    assert attempts == [1, 2, 3]
    assert isinstance(action, EndBadly)
    assert action.reason == "invalid_output"


def test_the_deadline_ends_whatever_is_under_way() -> None:
    story = Story(packet(limits=Limits(wall_s=60)))
    assert isinstance(story.next(NOW + timedelta(seconds=59)), RunStep)
    end = story.next(NOW + timedelta(seconds=60))
    assert isinstance(end, EndBadly)
    assert end.reason == "budget_wall"


def test_feedback_hops_are_bounded() -> None:
    story = Story(packet(limits=Limits(feedback_hops=1)))
    story.step("done")
    story.step("done", artifact=code("a"), call=call())
    story.step("fail", report=report("fail"))
    story.step("done", artifact=code("b"), call=call("q"))
    story.step("fail", report=report("fail", 1))
    end = story.next()
    assert isinstance(end, EndBadly)
    assert end.reason == "max_debug"


def test_a_step_that_a_crash_cut_is_taken_up_as_it_was() -> None:
    story = Story(packet())
    due = story.next()
    story.add(
        StepStarted(at=NOW, step=1, role="planner", attempt=1, hop=due.hop),
        Recovered(at=NOW, generation=2, why="restart"),
    )
    action = story.next()
    assert isinstance(action, RunStep)
    assert (action.step, action.role, action.resumed) == (1, "planner", True)


def test_a_step_that_is_there_at_every_crash_is_poison() -> None:
    story = Story(packet())
    story.add(StepStarted(at=NOW, step=1, role="planner", attempt=1, hop=story.next().hop))
    for generation in range(2, POISON_AFTER + 3):
        story.add(Recovered(at=NOW, generation=generation, why="restart"))
    end = story.next()
    assert isinstance(end, EndBadly)
    assert end.reason == "poison"


def test_an_outside_agents_verdict_takes_the_same_route_as_our_own() -> None:
    story = Story(packet())
    story.step("done")
    story.step("done", artifact=code("a"), call=call())
    action = story.next(external=frozenset({"qa"}))
    assert isinstance(action, AskOutside)
    story.add(InputRequired(at=NOW, role=action.role, question=action.question, expires_at=action.expires_at))
    assert isinstance(story.next(), StillWaiting)
    story.add(FeedbackReceived(at=NOW, role="qa", outcome="fail", via="nats", why="it is wrong"))
    after = story.next()
    assert isinstance(after, RunStep)
    assert (after.role, after.hop.feedback) == ("debug", True)
    assert "it is wrong" in after.hop.why


def test_two_outside_agents_cannot_send_a_task_to_and_fro_for_ever() -> None:
    to_and_fro = Workflow(routes={"planner.done": (Edge(to="qa"),), "qa.fail": (Edge(to="planner"),)})
    story = Story(packet(), to_and_fro)
    outside = frozenset({"planner", "qa"})
    while isinstance(action := story.next(external=outside), AskOutside):
        outcome = "done" if action.role == "planner" else "fail"
        story.add(
            InputRequired(
                at=NOW,
                role=action.role,
                question=action.question,
                expires_at=action.expires_at,
                hop=action.hop,
            ),
            FeedbackReceived(at=NOW, role=action.role, outcome=outcome, via="nats"),
        )
    assert isinstance(action, EndBadly)
    assert action.reason == "loop_detected"


def test_an_outside_agents_turns_count_as_our_own_do() -> None:
    story = Story(packet())
    story.step("done")
    story.step("done", artifact=code("a"), call=call())
    asked = []
    while not isinstance(action := story.next(external=frozenset({"debug"})), EndBadly):
        if isinstance(action, AskOutside):
            asked.append(action.hop.on)
            story.add(
                InputRequired(
                    at=NOW, role="debug", question="?", expires_at=action.expires_at, hop=action.hop
                ),
                FeedbackReceived(at=NOW, role="debug", outcome="done", via="nats", artifact=code(f"{asked}")),
            )
        elif action.role == "qa":
            story.step("fail", report=report("fail"), call=call(str(len(story.packet.history))))
        else:
            story.step("done", call=call(str(len(story.packet.history))), artifact=code(f"{asked}"))
        if action.role == "planner":
            break
    assert asked == ["qa.fail", "qa.fail"]
    assert story.packet.usage.feedback_hops == 3


def test_feedback_that_comes_while_a_step_runs_has_the_last_word() -> None:
    story = Story(packet())
    story.step("done")
    due = story.next()
    story.add(
        StepStarted(at=NOW, step=2, role="fast-coder", attempt=1, hop=due.hop),
        FeedbackReceived(at=NOW, role="qa", outcome="pass", via="rest"),
        StepFinished(at=NOW, step=2, role="fast-coder", outcome="done", artifact=code("a")),
    )
    assert isinstance(story.next(), EndWell)


def test_a_question_waits_and_its_answer_runs_the_asking_role_again() -> None:
    story = Story(packet(role="diagnosis"))
    story.step("unclear", why="which language?")
    ask = story.next()
    assert isinstance(ask, AskOutside)
    assert (ask.role, ask.question) == ("user", "which language?")
    story.add(InputRequired(at=NOW, role="user", question=ask.question, expires_at=ask.expires_at))
    assert isinstance(story.next(ask.expires_at), EndBadly)
    story.add(FeedbackReceived(at=NOW, role="user", outcome="answer", via="rest", why="python"))
    again = story.next()
    assert isinstance(again, RunStep)
    assert again.role == "diagnosis"


def test_scope_role_runs_one_role_alone() -> None:
    story = Story(packet(scope="role", role="planner"))
    story.step("done", output={"plan": "x"})
    end = story.next()
    assert isinstance(end, EndWell)
    assert end.result["output"] == {"plan": "x"}


def test_scope_role_follows_a_route_back_to_itself() -> None:
    story = Story(packet(scope="role", role="qa"))
    story.step("disputed", report=report("fail", 2, 1))
    assert story.step("pass", report=report("pass", 2, 2)) == "qa"
    assert isinstance(story.next(), EndWell)


def test_the_best_version_passed_or_else_held_most_anchors() -> None:
    story = Story(packet(limits=Limits(feedback_hops=99)))
    story.step("done")
    story.step("done", artifact=code("one anchor"), call=call())
    story.step("fail", report=report("fail", 1, 4))
    story.step("done", artifact=code("two anchors"), call=call("b"))
    story.step("fail", report=report("fail", 2, 0))
    chosen = best(drafts(story.packet, WORKFLOW))
    assert chosen is not None
    assert chosen.artifact.content == "two anchors"


CLERK = Workflow(
    makers=("extract", "repair"),
    routes={
        "extract.done": (Edge(to="validate"),),
        "repair.done": (Edge(to="validate"),),
        "validate.fail": (Edge(to="repair", feedback=True),),
    },
)


def test_where_no_code_is_made_what_a_maker_answers_is_the_work() -> None:
    story = Story(packet(role="extract"), CLERK)
    story.step("done", output={"total": "x"}, call=call())
    story.step("fail", report=report("fail", 0, 1))
    story.step("done", output={"total": 7}, call=call("b"))
    assert story.step("pass", report=report("pass", 0, 2), output={"note": "not the work"}) == "validate"
    end = story.next()
    assert isinstance(end, EndWell)
    assert (end.result["output"], end.result["verdict"]) == ({"total": 7}, "pass")
    assert "artifact" not in end.result


def test_an_answer_that_does_not_obey_its_schema_may_have_a_route_of_its_own() -> None:
    routes = {**CLERK.routes, "extract.invalid": (Edge(to="repair", at_most=1, feedback=True),)}
    story = Story(packet(role="extract"), Workflow(makers=CLERK.makers, routes=routes, max_invalid_output=1))
    story.step("invalid", why="'total' is a required property", call=call())
    action = story.next()
    assert isinstance(action, RunStep)
    assert (action.role, action.hop.on) == ("repair", "extract.invalid")
    assert "'total' is a required property" in action.hop.why


def test_a_repair_that_changed_nothing_is_not_tried_again() -> None:
    story = Story(packet(role="extract"), CLERK)
    story.step("done", output={"total": "x"}, call=call())
    story.step("fail", report=report("fail", 0, 1))
    story.step("done", output={"total": "x"}, call=call("b"))
    story.step("fail", report=report("fail", 0, 1))
    end = story.next()
    assert isinstance(end, EndBadly)
    assert end.reason == "max_debug"
    assert end.result is not None
    assert end.result["output"] == {"total": "x"}


def test_what_a_maker_says_beside_its_code_is_not_the_work() -> None:
    story = Story(packet())
    story.step("done", output={"plan": ["1"]})
    story.step("done", artifact=code("a"), call=call())
    story.add(FeedbackReceived(at=NOW, role="debug", outcome="done", via="nats", output={"note": "x"}))
    assert [draft.artifact.content for draft in drafts(story.packet, WORKFLOW)] == ["a"]


def test_a_route_without_bounds_is_still_ended_by_the_call_limit() -> None:
    endless = Workflow(routes={"planner.done": (Edge(to="planner"),)})
    story = Story(packet(limits=Limits(calls=5)), endless)
    while isinstance(action := story.next(), RunStep):
        spent = story.packet.usage.calls >= 5
        story.step("budget_calls" if spent else "done", **({} if spent else {"call": call()}))
    assert isinstance(action, EndBadly)
    assert action.reason == "budget_calls"
