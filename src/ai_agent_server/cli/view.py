"""How a task looks on a terminal or in a pipe: each event as lines, the running step, the result."""

import re
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, assert_never

import msgspec
from rich.console import Console, Group, RenderableType
from rich.status import Status
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ai_agent_server.cli.caller import Caller
from ai_agent_server.client import Fetched, Told
from ai_agent_server.core.chat import Decision
from ai_agent_server.core.task_packet import (
    AnyTaskEvent,
    Artifact,
    Canceled,
    Completed,
    Failed,
    FeedbackReceived,
    InputRequired,
    LLMCall,
    Paused,
    Progress,
    Recovered,
    Rejected,
    Resumed,
    Started,
    StepFinished,
    StepStarted,
    Submitted,
    TaskPacket,
    TaskStatus,
    TaskSummary,
    TestReport,
)
from ai_agent_server.load_balancer.base import AcceleratorView

T = TypeVar("T")

__all__ = (
    "TaskView",
    "accelerator",
    "asked",
    "decision",
    "describe",
    "printable",
    "result",
    "tasks_table",
    "what_next",
)

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
DETAIL_LINES = 4
DECISIONS = 12
"""Of a queue's last ones."""
STATUS_STYLE = {
    TaskStatus.COMPLETED: "green",
    TaskStatus.FAILED: "red",
    TaskStatus.REJECTED: "red",
    TaskStatus.CANCELED: "yellow",
    TaskStatus.INPUT_REQUIRED: "yellow",
}
JUDGES = {"schema": "by its schema", "outside": "from outside"}
"""What judged where no sandbox did, by the report's `tier`."""
OUTCOME_STYLE = {"pass": "green", "done": "green", "fail": "red", "invalid": "red", "disputed": "yellow"}


def printable(text: str) -> str:
    """`text` without what would steer a terminal: models and strangers wrote it."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def describe(event: AnyTaskEvent) -> tuple[Text, ...]:
    """The lines that tell `event` to a person; none where another line tells it already."""
    match event:
        case Submitted():
            fork = event.forked_from
            if fork is None:
                return ()
            after = f"after step {fork.step}" if fork.step else "from its beginning"
            return (_line(f"goes on from task {fork.task_id} {after}", style="dim"),)
        case Started():
            return () if event.generation == 1 else (_line("taken up again", style="yellow"),)
        case Recovered():
            return (_line(f"the server came back: {event.why}", style="yellow"),)
        case StepStarted():
            attempt = f", attempt {event.attempt}" if event.attempt > 1 else ""
            line = Text(f"{event.step:>2} ", style="dim")
            line.append(event.role, style="bold")
            hop = "feedback hop, " if event.hop.feedback else ""
            line.append(printable(f"{attempt}  {hop}{event.hop.on}: {event.hop.why}"), style="dim")
            return (line,)
        case StepFinished():
            return _step_finished(event)
        case FeedbackReceived():
            sender = f" from {event.sender}" if event.sender else ""
            line = _line(
                f"feedback{sender} by {event.via}: {event.role}.{event.outcome} {event.why}".rstrip()
            )
            return (line, *(_report(event.report) if event.report else ()))
        case InputRequired():
            until = event.expires_at.astimezone().isoformat(sep=" ", timespec="minutes")
            return (_line(f"waits for {event.role} until {until}: {event.question}", style="yellow"),)
        case Paused():
            return (_line("paused", style="yellow"),)
        case Resumed():
            return (_line("resumed", style="yellow"),)
        case Completed():
            return (Text("completed", style="bold green"),)
        case Failed() | Rejected():
            said = "failed" if isinstance(event, Failed) else "rejected"
            return (Text(printable(f"{said} ({event.reason}): {event.error.message}"), style="bold red"),)
        case Canceled():
            return (Text(f"canceled ({event.reason})", style="bold yellow"),)
        case _:
            assert_never(event)


def _step_finished(event: StepFinished) -> tuple[Text, ...]:
    lines = [_line(_call(event.call), style="cyan")] if event.call is not None else []
    lines += _report(event.report) if event.report is not None else []
    if event.artifact is not None and event.artifact.repairs:
        lines.append(_line(f"repaired without a model: {', '.join(event.artifact.repairs)}", style="dim"))
    said = event.error.message if event.error is not None else event.why
    outcome = Text("   ")
    outcome.append(event.outcome, style=OUTCOME_STYLE.get(event.outcome, ""))
    if said and event.report is None:
        outcome.append(printable(f": {_cut(said)}"))
    outcome.append(f"  {event.duration_ms / 1000:.1f} s", style="dim")
    lines.append(outcome)
    return tuple(lines)


def _call(call: LLMCall) -> str:
    why = f", {_reason(call.llm, call.decision.reason)}" if call.decision is not None else ""
    model = f" ({call.model})" if call.model and call.model != call.llm else ""
    cost = f", ${call.cost_usd:.4f}" if call.cost_usd else ""
    cut = ", cut at the limit" if call.finish_reason == "length" else ""
    return (
        f"{call.llm}{model}{why}; {call.input_tokens} tokens in, {call.output_tokens} out{cut}, "
        f"first after {call.time_to_first_token_ms / 1000:.1f} s{cost}"
    )


def _reason(llm: str, why: str) -> str:
    # A decision's reason names the LLM first; here it stands before it already.
    return why.removeprefix(f"{llm}: ")


def _report(report: TestReport) -> list[Text]:
    lines = [Text("   ").append_text(verdict(report))]
    first = _cut(report.failing[0]) if report.failing else ""
    if first:
        lines.append(_line(f"first to fail: {first}", style="dim"))
    detail = [
        line for line in printable(report.detail).splitlines() if line.strip() and line.strip() != first
    ]
    lines += [_line(line, style="dim") for line in detail[:DETAIL_LINES]]
    return lines


def verdict(report: TestReport) -> Text:
    """A test report in one line."""
    style = "green" if report.verdict == "pass" else "yellow" if report.verdict == "unverified" else "red"
    counts = [
        f"{passed} of {total} {what}"
        for what, passed, total in (
            ("examples", report.anchors_passed, report.anchors_total),
            ("tests", report.tests_passed, report.tests_total),
        )
        if total
    ]
    line = Text(f"verdict {report.verdict}", style=style)
    by = JUDGES.get(report.tier, f"sandbox {report.tier}")
    line.append(f": {', '.join(counts) or 'nothing was run'}, {by}", style="")
    if report.disputed:
        line.append(f", {len(report.disputed)} disputed")
    return line


class TaskView:
    """Tells what happens to a task as it comes; the running step has a live line on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = Status("", console=console) if console.is_terminal else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def tell(self, item: Told) -> None:
        """Show it."""
        if isinstance(item, Progress):
            self._show(
                f"{item.role} on {item.llm}, {_reason(item.llm, item.why)}: {item.output_tokens} tokens, "
                f"{item.elapsed_ms / 1000:.1f} s"
            )
        elif isinstance(item, TaskPacket):
            self._console.print(
                Text(f"task {item.task_id}  {item.profile}/{item.role}"), soft_wrap=True, highlight=False
            )
        else:
            for line in describe(item):
                self._console.print(line, soft_wrap=True, highlight=False)
            if isinstance(item, StepStarted):
                self._show(f"{item.role}: choosing an LLM")
            elif isinstance(item, InputRequired):
                self._show(f"waiting for {item.role}")
            elif self._status is not None:
                self._status.stop()

    def _show(self, text: str) -> None:
        if self._status is not None:
            # Text, not markup: a reason may hold square brackets.
            self._status.update(Text(printable(text)))
            self._status.start()


def result(fetched: Fetched) -> RenderableType:
    """What came of an ended task: its code or output, the verdict, its numbers, its file."""
    packet = fetched.packet
    parts: list[RenderableType] = [*_made(packet.result or {})]
    usage = packet.usage
    ended = Text(packet.status.value, style=f"bold {STATUS_STYLE.get(packet.status, '')}".rstrip())
    ended.append(f" ({packet.reason})" if packet.reason else "")
    ended.append(
        f"  {_counted(usage.calls, 'LLM call')}, {usage.input_tokens} tokens in, {usage.output_tokens} out, "
        f"{_counted(usage.feedback_hops, 'feedback hop')}",
        style="dim",
    )
    parts.append(ended)
    if packet.status is TaskStatus.INPUT_REQUIRED and (question := _question(packet)) is not None:
        parts += _unindented(list(describe(question)))
    if fetched.file:
        parts.append(Text(f"file {fetched.file}"))
    return Group(*parts)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _made(found: dict[str, Any]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    artifact = _as(found.get("artifact"), Artifact)
    report = _as(found.get("tests"), TestReport)
    if artifact is not None:
        language = artifact.language or ("python" if artifact.kind in {"code", "tests"} else "markdown")
        parts += [Text(""), _indented(highlighted(artifact.content, language)), Text("")]
    elif found.get("output") is not None:
        parts += [Text(""), _indented(output(found["output"])), Text("")]
    if report is not None:
        parts += _unindented(_report(report))
    elif artifact is not None:
        parts.append(Text("not verified: nothing tested it", style="yellow"))
    return parts


def highlighted(code: str, language: str) -> Text:
    """`code` with the terminal's own colours; no trailing blanks, so that a pipe gets the code as it is."""
    lexed = Syntax("", language, theme="ansi_dark", background_color="default").highlight(printable(code))
    lexed.rstrip()
    return lexed


def output(found: Any) -> Text:
    """A role's output: its text where it is one, JSON otherwise."""
    if isinstance(found, dict) and len(found) == 1 and isinstance(text := next(iter(found.values())), str):
        return Text(printable(text))
    pretty = msgspec.json.format(msgspec.json.encode(found), indent=2).decode()
    return highlighted(pretty, "json")


def asked(packet: TaskPacket) -> RenderableType:
    """What the task was given."""
    return _indented(output(packet.payload), "   ")


def what_next(packet: TaskPacket, called: Caller) -> tuple[str, ...]:
    """Commands, as they can be copied, and advice that make sense now."""
    me = packet.task_id
    doctor = called.command("doctor")
    show = called.command("tasks", "show", me)
    match packet.reason:
        case "llm_unavailable":
            return (doctor, called.command("llms", "explain", f"{packet.profile}/{packet.role}"))
        case "sandbox_unavailable":
            return (doctor,)
        case "max_debug" | "loop_detected" | "no_progress" | "invalid_output":
            init = called.command("init", asks_server=False)
            return (
                f"{show}   # every step and why",
                f"{init}   # use a larger model: Ollama, llama-server, vLLM or an API",
            )
        case "budget_calls" | "budget_tokens" | "budget_wall" | "budget_cost":
            help_page = called.command("run", "--help", asks_server=False)
            return (f"raise the limit that was met ({packet.reason}): {help_page}",)
        case "budget_sender" | "sender_refused":
            return (f"{called.command('keys', asks_server=False)}   # what each key may do, and use",)
        case "poison" | "internal":
            return (f"{called.command('tasks', 'show', me, '--json')}   # its whole history",)
    if packet.status is TaskStatus.INPUT_REQUIRED:
        question = _question(packet)
        role = question.role if question else "user"
        outcome = {"user": "answer", "qa": "pass"}.get(role, "done")
        words = ("tasks", "feedback", me, "--role", role, "--outcome", outcome)
        return (f'{called.command(*words)} --why "..."',)
    if packet.paused_at is not None:
        return (called.command("tasks", "resume", me),)
    if not packet.status.is_final:
        return (called.command("watch", me),)
    return (show,)


def _question(packet: TaskPacket) -> InputRequired | None:
    return next((event for event in reversed(packet.history) if isinstance(event, InputRequired)), None)


def tasks_table(items: Sequence[TaskSummary]) -> RenderableType:
    """A page of tasks; plain columns, so that a pipe can cut them."""
    table = _table("task", "to", "status", "calls", "tokens", "created")
    for item in items:
        status = Text(item.status.value, style=STATUS_STYLE.get(item.status, ""))
        status.append(f" ({item.reason})" if item.reason else "", style="dim")
        status.append(" (paused)" if item.paused_at is not None else "", style="yellow")
        created = item.created_at.astimezone().isoformat(sep=" ", timespec="seconds")
        usage = item.usage
        table.add_row(
            item.task_id,
            f"{item.profile}/{item.role}",
            status,
            str(usage.calls),
            str(usage.tokens),
            created,
        )
    return table


def decision(found: Decision) -> RenderableType:
    """Which LLM, why, and what became of each of the others."""
    head = Text(found.chosen or "no LLM", style="bold green" if found.chosen else "bold red")
    head.append(printable(f": {_reason(found.chosen or '', found.reason)}"), style="")
    table = _table("llm", "score", "why")
    for candidate in found.candidates:
        score = "" if candidate.score is None else f"{candidate.score:.2f}"
        parts = ", ".join(f"{name} {value:.2f}" for name, value in candidate.parts.items())
        why = " ".join(part for part in (candidate.refused_by, candidate.why, parts) if part)
        table.add_row(Text(candidate.llm), score, Text(printable(why)))
    return Group(head, table)


def accelerator(found: AcceleratorView) -> RenderableType:
    """Its memory, who waits, and what its queue decided, newest first, each with its rule."""
    head = Text(printable(found.name), style="bold")
    head.append(f": {found.used_mb:.0f} of {found.budget_mb:.0f} MB taken", style="")
    if found.external_mb:
        head.append(f", {found.external_mb:.0f} MB by other programs", style="")
    if found.queue:
        head.append(f", {len(found.queue)} waiting", style="")
    table = _table("ago", "what", "llm", "rule")
    for decided in found.recent[:DECISIONS]:
        name = printable(decided.llm or decided.request)
        table.add_row(f"{decided.ago_s:.1f} s", decided.what, Text(name), Text(printable(decided.why)))
    return Group(head, table) if found.recent else head


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _as(found: Any, kind: type[T]) -> T | None:
    """`found` as a value, None where it is not one: results of other versions are shown as JSON."""
    if found is None:
        return None
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError:
        return None


def _indented(text: Text, by: str = "  ") -> Text:
    return Text("\n").join(Text(by).append_text(line) for line in text.split("\n"))


def _unindented(lines: list[Text]) -> list[RenderableType]:
    return [line[3:] for line in lines]


def _line(text: str, *, style: str = "") -> Text:
    return Text("   ").append(printable(text), style=style)


def _cut(text: str, at: int = 300) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= at else flat[: at - 3] + "..."
