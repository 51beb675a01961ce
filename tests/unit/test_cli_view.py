"""How events look to a person, and what he is told to do next."""

import io
import re
from datetime import UTC, datetime

import pytest
from msgspec import to_builtins
from rich.console import Console

from ai_agent_server.cli import view
from ai_agent_server.cli.caller import Caller
from ai_agent_server.client import Fetched
from ai_agent_server.core.chat import Decision
from ai_agent_server.core.task_packet import (
    AnyTaskEvent,
    Artifact,
    Canceled,
    ErrorDetail,
    Failed,
    FeedbackReceived,
    Hop,
    InputRequired,
    LLMCall,
    Progress,
    Reason,
    Recovered,
    Started,
    StepFinished,
    StepStarted,
    Submitted,
    TaskPacket,
    TestReport,
)
from ai_agent_server.core.transitions import fold
from ai_agent_server.load_balancer.base import AcceleratorView, QueueDecision

AT = datetime(2026, 11, 21, tzinfo=UTC)
ID = "01939a1e-7c3b-7000-8000-000000000001"
CALL = LLMCall(
    llm="big",
    model="qwen3:14b",
    source="local",
    input_tokens=812,
    output_tokens=512,
    finish_reason="length",
    time_to_first_token_ms=412,
    duration_ms=9000,
    prompt_sha256="",
    cost_usd=0.0123,
    decision=Decision(chosen="big", reason="big: best of 2 (in memory)", strategy="resident_first"),
)
CALL_LINE = (
    "   big (qwen3:14b), best of 2 (in memory); 812 tokens in, 512 out, cut at the limit, "
    "first after 0.4 s, $0.0123"
)
HOSTILE = ErrorDetail(code="x", message="no\x1b[2J JSON")
FEEDBACK_HOP = Hop(on="qa.fail", why="1 of 2", feedback=True)
REPORT = TestReport(
    verdict="fail",
    tier="bubblewrap",
    anchors_passed=1,
    anchors_total=2,
    tests_passed=3,
    tests_total=4,
    failing=("assert f(2) == 3",),
    disputed=("assert f(0) == 0",),
    detail="got 4\nexpected 3",
)


def lines(event: AnyTaskEvent) -> list[str]:
    return [line.plain.rstrip() for line in view.describe(event)]


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (Submitted(at=AT, via="rest"), []),
        (Started(at=AT, generation=1), []),
        (Started(at=AT, generation=2), ["   taken up again"]),
        (Recovered(at=AT, generation=2, why="lost"), ["   the server came back: lost"]),
        (
            StepStarted(at=AT, step=4, role="debug", attempt=2, hop=FEEDBACK_HOP),
            [" 4 debug, attempt 2  feedback hop, qa.fail: 1 of 2"],
        ),
        (
            StepFinished(
                at=AT, step=4, role="qa", outcome="fail", call=CALL, report=REPORT, duration_ms=9100
            ),
            [
                CALL_LINE,
                "   verdict fail: 1 of 2 examples, 3 of 4 tests, sandbox bubblewrap, 1 disputed",
                "   first to fail: assert f(2) == 3",
                "   got 4",
                "   expected 3",
                "   fail  9.1 s",
            ],
        ),
        (
            StepFinished(at=AT, step=1, role="planner", outcome="invalid", error=HOSTILE),
            ["   invalid: no\ufffd[2J JSON  0.0 s"],
        ),
        (
            FeedbackReceived(at=AT, role="qa", outcome="fail", via="nats", sender="ci", why="broke"),
            ["   feedback from ci by nats: qa.fail broke"],
        ),
        (
            Failed(at=AT, reason="max_debug", error=ErrorDetail(code="max_debug", message="used up")),
            ["failed (max_debug): used up"],
        ),
        (Canceled(at=AT), ["canceled (canceled_by_client)"]),
    ],
)
def test_an_event_is_told_in_lines(event: AnyTaskEvent, said: list[str]) -> None:
    assert lines(event) == said


def test_a_question_is_told_with_its_end() -> None:
    (line,) = lines(InputRequired(at=AT, role="user", question="which language?", expires_at=AT))
    assert line.startswith("   waits for user until 2026-11-2")
    assert line.endswith(": which language?")


def packet(*events: AnyTaskEvent) -> TaskPacket:
    base = TaskPacket(
        task_id=ID, context_id=ID, profile="developer", role="planner", payload={}, created_at=AT
    )
    return fold(base, [Submitted(at=AT, via="rest"), Started(at=AT, generation=1), *events])


def failed(reason: Reason) -> TaskPacket:
    return packet(Failed(at=AT, reason=reason, error=ErrorDetail(code=reason, message="no")))


@pytest.mark.parametrize(
    ("task", "step"),
    [
        (packet(), f"ai-agent-server watch {ID}"),
        (packet(Canceled(at=AT)), f"ai-agent-server tasks show {ID}"),
        (failed("llm_unavailable"), "ai-agent-server doctor"),
        (failed("sandbox_unavailable"), "ai-agent-server doctor"),
        (failed("no_progress"), "larger model"),
        (failed("budget_wall"), "budget_wall"),
        (failed("internal"), "--json"),
        (
            packet(InputRequired(at=AT, role="user", question="?", expires_at=AT)),
            f'tasks feedback {ID} --role user --outcome answer --why "..."',
        ),
        (packet(InputRequired(at=AT, role="qa", question="?", expires_at=AT)), "--role qa --outcome pass"),
    ],
)
def test_what_to_do_next_fits_how_the_task_stands(task: TaskPacket, step: str) -> None:
    assert any(step in said for said in view.what_next(task, Caller()))


def shown(found: object) -> str:
    out = Console(file=io.StringIO(), width=100, highlight=False, markup=False)
    out.print(found, soft_wrap=True)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


@pytest.mark.parametrize(
    ("tier", "by"),
    [("landlock", "sandbox landlock"), ("schema", "by its schema"), ("outside", "from outside")],
)
def test_a_verdict_says_what_judged(tier: str, by: str) -> None:
    report = TestReport(verdict="pass", tier=tier, tests_passed=3, tests_total=3)
    assert view.verdict(report).plain == f"verdict pass: 3 of 3 tests, {by}"


def test_a_failed_task_shows_the_best_there_was_and_its_verdict() -> None:
    report = TestReport(verdict="fail", tier="bubblewrap", anchors_passed=1, anchors_total=2)
    code = Artifact(artifact_id="a", kind="code", content="def f(n):\n    return n * 2\n")
    best = {"artifact": to_builtins(code), "verdict": "fail", "tests": to_builtins(report)}
    error = ErrorDetail(code="max_debug", message="used up")
    task = packet(Failed(at=AT, reason="max_debug", error=error, result=best))
    said = shown(view.result(Fetched(packet=task, file="/state/x.json"))).splitlines()
    assert "  def f(n):" in said
    assert "verdict fail: 1 of 2 examples, sandbox bubblewrap" in said
    assert "failed (max_debug)  0 LLM calls, 0 tokens in, 0 out, 0 feedback hops" in said
    assert said[-1] == "file /state/x.json"


def test_a_result_of_another_shape_is_shown_as_json() -> None:
    assert '"label": "spam"' in shown(view.output({"label": "spam", "score": 1}))
    assert shown(view.output({"text": "a [bold]summary"})) == "a [bold]summary\n"


def test_progress_is_for_terminals_alone() -> None:
    progress = Progress(
        task_id=ID, step=1, role="qa", llm="big", why="big: only one", output_tokens=7, elapsed_ms=1500
    )
    piped = Console(file=io.StringIO(), highlight=False)
    with view.TaskView(piped) as live:
        live.tell(progress)
    assert isinstance(piped.file, io.StringIO)
    assert piped.file.getvalue() == ""
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False)
    with view.TaskView(terminal) as live:
        live.tell(progress)
    assert isinstance(terminal.file, io.StringIO)
    assert "qa on big, only one: 7 tokens, 1.5 s" in terminal.file.getvalue()


def test_a_command_that_is_told_goes_to_the_same_server_by_the_same_program() -> None:
    called = Caller(program=(".venv/bin/ai-agent-server",), server="http://127.0.0.1:9")

    assert view.what_next(packet(), called) == (
        f".venv/bin/ai-agent-server watch {ID} --server http://127.0.0.1:9",
    )


def test_a_waiting_task_shows_who_is_waited_for_until_when_and_why() -> None:
    asked = packet(InputRequired(at=AT, role="qa", question="no qa runs here", expires_at=AT))
    out = io.StringIO()
    Console(file=out, width=200).print(view.result(Fetched(packet=asked)))

    assert re.search(r"waits for qa until 20\S+ \S+: no qa runs here", out.getvalue())
    assert "0 LLM calls" in out.getvalue()


def test_the_chosen_llm_is_named_once() -> None:
    out = io.StringIO()
    found = Decision(chosen="big", reason="big: best of 2 (in memory)", strategy="resident_first")
    Console(file=out, width=200).print(view.decision(found))

    assert out.getvalue().startswith("big: best of 2")


def test_an_accelerator_tells_its_memory_and_what_its_queue_decided() -> None:
    out = io.StringIO()
    found = AcceleratorView(
        name="gpu0",
        memory_mb=16384,
        headroom_mb=384,
        external_mb=1000,
        budget_mb=15000,
        used_mb=9000,
        llms=(),
        queue=(),
        recent=tuple(
            QueueDecision(what="load", why=f"GQ-8 waited its {number}", ago_s=number, llm="co\x1b[2Jder")
            for number in range(40)
        ),
    )
    Console(file=out, width=200).print(view.accelerator(found))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert lines[0] == "gpu0: 9000 of 15000 MB taken, 1000 MB by other programs"
    assert lines[2] == "0.0 s load co\ufffd[2Jder GQ-8 waited its 0"
    assert len(lines) == 2 + view.DECISIONS
