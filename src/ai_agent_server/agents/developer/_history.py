"""What a developer task asks and what was tried so far, read from its packet. Pure."""

import ast
import builtins
import re

import msgspec

from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.code_text import assertions, builtin_under_test
from ai_agent_server.core.next_step import Draft, drafts
from ai_agent_server.core.prompt import as_text
from ai_agent_server.core.task_packet import Artifact, FeedbackReceived, StepFinished, TaskPacket
from ai_agent_server.core.workflow import Workflow

FALLBACK_NAME = "solution"
"""What the function is called where nobody says: coder and QA never meet, yet have to agree."""
SHOWN_EXAMPLES = 5
SHOWN_FAILURES = 4
SHOWN_CHARS = 600
"""How much of one failure's detail a prompt shows: the end, where a traceback says what it was."""

_NAMED = re.compile(
    r"\bdef\s+([A-Za-z_]\w*)"
    r"|\b(?:named|called)\s+[`'\"]?([A-Za-z_]\w*)"
    r"|\b(?:function|method|class)\s+[`'\"]?([A-Za-z_]\w*)(?=[`'\"]|\s*\()"
    r"|`([A-Za-z_]\w*)\(?"
)


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """The first test that a version failed, and what it said."""

    test: str
    detail: str


def specification(packet: TaskPacket) -> dict[str, str]:
    """The fields that hold what was asked, and nothing that was made."""
    examples = shown_examples(packet)
    return {
        "task": as_text(packet.payload.get("task")),
        "context": as_text(packet.payload.get("context")),
        "language": language(packet),
        "entry_point": entry_point(packet),
        "example": examples[0] if examples else "",
        "examples": "\n".join(examples[:SHOWN_EXAMPLES]),
        "answers": answers(packet),
    }


def language(packet: TaskPacket) -> str:
    """The language to write, in lower case; Python where nobody says.

    What diagnosis found counts only if the task itself has the word: code in a language that
    cannot be run here is accepted unverified, and a guess must not lead there.
    """
    given = as_text(packet.payload.get("language")).strip().lower()
    if given:
        return given
    found = as_text(_last_output(packet, "language").get("language")).strip().lower()
    task = as_text(packet.payload.get("task")).lower()
    if found and not anchors(packet) and re.search(rf"(?<!\w){re.escape(found)}(?!\w)", task):
        return found
    return "python"


def is_python(packet: TaskPacket) -> bool:
    """Whether the work can be run here."""
    return language(packet) in {"python", "python3", "py"}


def opening(packet: TaskPacket) -> str:
    """A Python function begun, what it is for above it as comments; "" where that says too little."""
    name = entry_point(packet)
    if not is_python(packet) or not name.isidentifier() or name == FALLBACK_NAME or name[0].isupper():
        return ""
    said = [*as_text(packet.payload.get("task")).splitlines()]
    said += [f"Example: {example}" for example in shown_examples(packet)[:1]]
    return "\n".join((*(f"# {line}".rstrip() for line in said), f"def {name}("))


def answers(packet: TaskPacket) -> str:
    """What people answered to questions about the task, one a line."""
    said: list[str] = []
    for event in packet.history:
        if isinstance(event, FeedbackReceived) and event.outcome == "answer":
            said += [event.why] if event.why else []
            said += [as_text(event.output)] if event.output is not None else []
    return "\n".join(said)


def shown_examples(packet: TaskPacket) -> tuple[str, ...]:
    """The examples that the task gives, as a prompt shows them: those that cannot be run as well."""
    found: list[str] = []
    for example in _given_examples(packet):
        found += assertions(example) or (example,)
    return tuple(found)


def anchors(packet: TaskPacket) -> tuple[str, ...]:
    """The examples that can be run, one assert statement each."""
    return tuple(found for example in _given_examples(packet) for found in assertions(example))


def unusable_examples(packet: TaskPacket) -> tuple[str, ...]:
    """The examples that cannot be run; somebody should be told."""
    return tuple(example for example in _given_examples(packet) if not assertions(example))


def _given_examples(packet: TaskPacket) -> tuple[str, ...]:
    given = packet.payload.get("examples")
    return tuple(str(e).strip() for e in given if str(e).strip()) if isinstance(given, list) else ()


def entry_point(packet: TaskPacket) -> str:
    """What the function or class is called: as the task, its examples or its code say."""
    given = as_text(packet.payload.get("entry_point")).strip()
    if given:
        return given
    for example in anchors(packet):
        for name in called_names(example):
            return name
    if (own := builtin_under_test(anchors(packet))) is not None:
        return own
    named = _NAMED.search(as_text(packet.payload.get("task")))
    if named is not None:
        return next(group for group in named.groups() if group)
    return FALLBACK_NAME


def called_names(source: str) -> tuple[str, ...]:
    """The names that `source` calls and that are not built in, in order."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls.sort(key=lambda node: (node.lineno, node.col_offset))
    names = (call.func.id for call in calls if isinstance(call.func, ast.Name))
    return tuple(name for name in names if not hasattr(builtins, name))


def versions(packet: TaskPacket) -> tuple[Draft, ...]:
    """Every version of the code, with what its tests showed."""
    return tuple(draft for draft in drafts(packet, Workflow()) if draft.artifact.kind == "code")


def latest_code(packet: TaskPacket) -> Artifact | None:
    """The version that waits to be tested."""
    made = versions(packet)
    return made[-1].artifact if made else None


def version_to_mend(packet: TaskPacket) -> Draft | None:
    """The best version so far, the latest of equals: a fix that broke what passed is left behind."""

    def rank(numbered: tuple[int, Draft]) -> tuple[int, int, int]:
        number, draft = numbered
        report = draft.report
        if report is None:
            return (-1, -1, number)
        return (report.anchors_passed, report.tests_passed, number)

    made = versions(packet)
    if not made:
        return None
    return max(enumerate(made), key=rank)[1]


def failure(packet: TaskPacket, draft: Draft) -> Failure:
    """What `draft` failed; where no test says, what was last said against it."""
    report = draft.report
    test = report.failing[0] if report and report.failing else ""
    # The runner's detail begins with the test itself.
    detail = report.detail.removeprefix(test).strip() if report else ""
    if not test and not detail:
        detail = _last_complaint(packet)
    return Failure(test=test, detail=detail[-SHOWN_CHARS:])


def failures(packet: TaskPacket) -> str:
    """What went wrong so far, for one who starts afresh: each failing test once, never the code."""
    seen: dict[str, str] = {}
    for draft in versions(packet):
        found = failure(packet, draft)
        if draft.report is not None and draft.report.verdict != "pass" and (found.test or found.detail):
            seen[found.test or found.detail] = _last_line(found.detail)
    lines = [f"{test}\n  {why}" if why and why != test else test for test, why in seen.items()]
    return "\n".join(lines[-SHOWN_FAILURES:])


def plan(packet: TaskPacket) -> str:
    """The latest plan, its steps numbered."""
    return _listed(_last_output(packet, "plan").get("plan"))


def outline(packet: TaskPacket) -> str:
    """The latest outline of parts."""
    return _listed(_last_output(packet, "parts").get("parts"))


def _listed(value: object) -> str:
    if not isinstance(value, list):
        return as_text(value)
    return "\n".join(f"{number}. {_item(item)}" for number, item in enumerate(value, 1))


def _item(item: object) -> str:
    if isinstance(item, dict):
        return ": ".join(as_text(part) for part in item.values())
    return as_text(item)


def _last_output(packet: TaskPacket, key: str) -> JSONObject:
    for event in reversed(packet.history):
        if isinstance(event, StepFinished | FeedbackReceived) and event.output and key in event.output:
            return event.output
    return {}


def _last_complaint(packet: TaskPacket) -> str:
    for event in reversed(packet.history):
        if isinstance(event, StepFinished | FeedbackReceived) and event.outcome == "fail" and event.why:
            return event.why
    return ""


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
