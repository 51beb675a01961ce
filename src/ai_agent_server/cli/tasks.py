"""`run`, `submit`, `watch` and `tasks`: what a person does with tasks on a running server."""

import asyncio
import contextlib
import re
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from cyclopts import App, Parameter
from rich.console import Console
from rich.text import Text

from ai_agent_server.cli import Exit, view
from ai_agent_server.cli.caller import Caller
from ai_agent_server.cli.options import AsJSON, ServerURL, caller, connect, console, print_json
from ai_agent_server.client import Client, Fetched
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.fork import last_good_step
from ai_agent_server.core.task_packet import (
    FeedbackDraft,
    ForkDraft,
    InputRequired,
    LimitsDraft,
    TaskDraft,
    TaskPacket,
    TaskStatus,
    TaskSummary,
)
from ai_agent_server.errors import InvalidPacketError
from ai_agent_server.tasks_state.base import TaskPage

__all__ = (
    "TaskOptions",
    "addressed",
    "exit_code",
    "follow",
    "payload",
    "run",
    "show_end",
    "submit",
    "tasks",
    "watch",
)

T = TypeVar("T")

DEFAULT_TO = "developer/planner"
TO = re.compile(r"[a-z0-9-]+/[a-z0-9-]+")
Words = Annotated[
    str,
    Parameter(
        name="[PROFILE/ROLE] TASK",
        show_default=False,
        help=f"Where it goes ({DEFAULT_TO} unless said), and what is wanted: words, or the payload as JSON.",
    ),
]

DEAD_REASONS = frozenset({"poison", "internal", "llm_unavailable", "sandbox_unavailable"})
"""Why a task failed that may do better another time."""

tasks = App(name="tasks", help="List tasks; show, cancel, delete one, or send feedback.")
tasks.command(
    "ai_agent_server.cli.folder:verify",
    name="verify",
    help="Check every task's file against its schema and its own history, server running or not.",
)
tasks.command(
    "ai_agent_server.cli.folder:export",
    name="export",
    help="Write every task as a JSON line, server running or not.",
)
tasks.command(
    "ai_agent_server.cli.folder:archive",
    name="archive",
    help="Show what is in the archive, or move ended tasks into it while no server runs.",
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What a task is made of, besides its text."""

    example: Annotated[
        tuple[str, ...],
        Parameter(
            name=["--example", "-e"],
            negative=(),
            show_default=False,
            help="An assertion that must hold; repeat for more.",
        ),
    ] = ()
    entry_point: Annotated[str | None, Parameter(help="The function that is called.")] = None
    payload: Annotated[
        Path | None,
        Parameter(
            name="--payload", allow_leading_hyphen=True, help="A JSON file to start from; - reads it here."
        ),
    ] = None
    set_field: Annotated[
        tuple[str, ...],
        Parameter(
            name=["--set", "-s"],
            negative=(),
            show_default=False,
            help="A field of the payload, NAME=VALUE: JSON or text, @FILE reads a file; repeat for more.",
        ),
    ] = ()
    scope: Annotated[
        Literal["workflow", "role"], Parameter(help="The whole workflow, or this one role alone.")
    ] = "workflow"
    privacy: Annotated[Literal["any", "local"], Parameter(help="local: nothing leaves this machine.")] = "any"
    calls: Annotated[int | None, Parameter(help="At most so many LLM calls.")] = None
    tokens: Annotated[int | None, Parameter(help="At most so many tokens, in and out.")] = None
    wall_s: Annotated[float | None, Parameter(help="At most so many seconds.")] = None
    feedback_hops: Annotated[int | None, Parameter(help="At most so many feedback hops.")] = None
    cost_usd: Annotated[float | None, Parameter(help="At most so many dollars.")] = None

    def draft(self, text: str | None) -> TaskDraft:
        """The packet to send. Raises `InvalidPacketError`."""
        limits = LimitsDraft(
            calls=self.calls,
            tokens=self.tokens,
            wall_s=self.wall_s,
            feedback_hops=self.feedback_hops,
            cost_usd=self.cost_usd,
        )
        made = payload(
            text,
            document=_read(self.payload) if self.payload is not None else None,
            fields=self.set_field,
            examples=self.example,
            entry_point=self.entry_point,
        )
        try:
            msgspec.json.encode(made)
        except UnicodeEncodeError as exc:
            raise InvalidPacketError("what was typed is not UTF-8") from exc
        return TaskDraft(
            payload=made,
            limits=limits if limits != LimitsDraft() else None,
            scope=self.scope,
            privacy=self.privacy,
        )


def addressed(words: tuple[str, ...]) -> tuple[str, str, str | None]:
    """(profile, role, text) of what stands after the command. Raises `InvalidPacketError`."""
    match words:
        case (to,) if TO.fullmatch(to):
            text = None
        case (text,):
            to = DEFAULT_TO
        case (to, text) if TO.fullmatch(to):
            pass
        case ():
            to, text = DEFAULT_TO, None
        case _:
            raise InvalidPacketError(
                f"{words[0]!r} is not PROFILE/ROLE" if len(words) == 2 else "put the task in quotes",
                expected="[PROFILE/ROLE] TASK",
            )
    profile, _, role = to.partition("/")
    return profile, role, text


def payload(
    text: str | None,
    *,
    document: str | None = None,
    fields: tuple[str, ...] = (),
    examples: tuple[str, ...] = (),
    entry_point: str | None = None,
) -> JSONObject:
    """The payload that the options describe, the later ones over `document`. Raises `InvalidPacketError`."""
    made: JSONObject = {}
    if document is not None:
        made |= _object(document, "--payload")
    if text is not None and text.lstrip().startswith("{"):
        made |= _object(text, "the task begins with { but")
    elif text is not None:
        made["task"] = text
    if entry_point is not None:
        made["entry_point"] = entry_point
    if examples:
        made["examples"] = list(examples)
    for field in fields:
        name, equals, value = field.partition("=")
        if not (name and equals):
            raise InvalidPacketError(f"--set {field} is not NAME=VALUE")
        made[name] = _read(Path(value[1:])) if value.startswith("@") else _value(value)
    if not made:
        raise InvalidPacketError("say what is wanted: a TASK, --payload FILE or --set NAME=VALUE")
    return made


def _object(text: str, what: str) -> JSONObject:
    try:
        found: Any = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise InvalidPacketError(f"{what} is no JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise InvalidPacketError(f"{what} is no JSON object")
    return found


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as exc:
        raise InvalidPacketError(f"{path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise InvalidPacketError(f"{path} is not UTF-8 text") from exc


def run(
    *words: Words,
    options: TaskOptions = TaskOptions(),
    server: ServerURL = None,
    as_json: AsJSON = False,
) -> int:
    """Submit a task, follow it to its end, show the result.

    Exit code 0: completed. 1: not. 4: it waits for an answer.
    """
    profile, role, text = addressed(words)
    draft = options.draft(text)

    async def talk() -> Fetched:
        async with connect(server) as client:
            sent = await client.submit(profile, role, draft, idempotency_key=str(uuid.uuid4()))
            task_id = sent.packet.task_id
            with _going_on(caller(server).command("watch", task_id)):
                fetched = await follow(client, task_id, None if as_json else out)
                while _asks(fetched) and sys.stdin.isatty() and not as_json:
                    said = out.input("answer (empty leaves it for later): ")
                    if not said.strip():
                        break
                    since = fetched.packet.revision
                    answer = FeedbackDraft(
                        role="user", outcome="answer", why=said, answers=_question(fetched)
                    )
                    await client.feedback(task_id, answer)
                    fetched = await follow(client, task_id, out, since=since)
                return fetched

    out = console()
    fetched = asyncio.run(talk())
    if as_json:
        print_json(fetched.packet)
    else:
        show_end(out, fetched, caller(server))
    return exit_code(fetched.packet)


def submit(
    *words: Words,
    options: TaskOptions = TaskOptions(),
    server: ServerURL = None,
    as_json: AsJSON = False,
    idempotency_key: str | None = None,
) -> int:
    """Submit a task and print its id.

    Parameters
    ----------
    idempotency_key
        The same key again answers the same task instead of a second one.
    """
    profile, role, text = addressed(words)
    draft = options.draft(text)

    async def talk() -> Fetched:
        async with connect(server) as client:
            return await client.submit(
                profile, role, draft, idempotency_key=idempotency_key or str(uuid.uuid4())
            )

    sent = asyncio.run(talk())
    return _print_id(sent.packet, as_json=as_json)


def watch(task_id: str, /, *, since: int = 0, server: ServerURL = None, as_json: AsJSON = False) -> int:
    """Follow a task to its end; what happened before is told first.

    With --json, one event a line as it comes.

    Parameters
    ----------
    since
        Tell only what came after this `seq`.
    """

    async def talk() -> Fetched:
        async with connect(server) as client:
            if as_json:
                async with contextlib.aclosing(client.follow(task_id, since=since)) as told:
                    async for item in told:
                        print_json(item, pretty=False)
                return await client.task(task_id)
            with _going_on(caller(server).command("watch", task_id)):
                return await follow(client, task_id, out, since=since, until_asked=False)

    out = console()
    fetched = asyncio.run(talk())
    if not as_json:
        show_end(out, fetched, caller(server))
    return exit_code(fetched.packet)


async def follow(
    client: Client, task_id: str, out: Console | None, *, since: int = 0, until_asked: bool = True
) -> Fetched:
    """Show the task on `out` until it ended, or until it asks the person, and answer it as it is."""
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(view.TaskView(out)) if out is not None else None
        async with contextlib.aclosing(client.follow(task_id, since=since)) as told:
            async for item in told:
                if live is not None:
                    live.tell(item)
                if until_asked and isinstance(item, InputRequired) and item.role == "user":
                    fetched = await client.task(task_id)
                    # An old question is told again to who comes late; it may be answered by now.
                    if _asks(fetched):
                        return fetched
    return await client.task(task_id)


def _asks(fetched: Fetched) -> bool:
    return fetched.packet.status is TaskStatus.INPUT_REQUIRED


def _question(fetched: Fetched) -> int | None:
    """The `seq` of the question that it waits on."""
    asked = (event.seq for event in reversed(fetched.packet.history) if isinstance(event, InputRequired))
    return next(asked, None)


@contextlib.contextmanager
def _going_on(command: str) -> Iterator[None]:
    try:
        yield
    except asyncio.CancelledError:
        sys.stderr.write(f"\nthe task goes on: {command}\n")
        raise


def show_end(out: Console, fetched: Fetched, called: Caller | None) -> None:
    """The result, and what can be done now; without `called` the result alone."""
    out.print(view.result(fetched), soft_wrap=True)
    for step in () if called is None else view.what_next(fetched.packet, called):
        out.print(Text(f"next {step}", style="dim"), soft_wrap=True)


def exit_code(packet: TaskPacket) -> int:
    """What the task came to."""
    match packet.status:
        case TaskStatus.COMPLETED:
            return Exit.OK
        case TaskStatus.INPUT_REQUIRED:
            return Exit.INPUT_REQUIRED
        case _:
            return Exit.FAILED


@tasks.default
def list_tasks(
    *,
    profile: str | None = None,
    role: str | None = None,
    status: TaskStatus | None = None,
    limit: Annotated[int, Parameter(help="At most so many, 200 at most.")] = 20,
    cursor: Annotated[str | None, Parameter(help="Where the page before ended.")] = None,
    server: ServerURL = None,
    as_json: AsJSON = False,
) -> int:
    """List tasks, newest first."""

    async def talk() -> TaskPage:
        async with connect(server) as client:
            return await client.tasks(profile=profile, role=role, status=status, limit=limit, cursor=cursor)

    page = asyncio.run(talk())
    if as_json:
        print_json(page)
    elif not page.items:
        console().print("no tasks")
    else:
        out = console()
        out.print(view.tasks_table(page.items), soft_wrap=True)
        if page.next_cursor:
            filters = (("profile", profile), ("role", role), ("status", status), ("limit", limit))
            kept = [word for name, value in filters if value for word in (f"--{name}", str(value))]
            more = caller(server).command("tasks", *kept, "--cursor", page.next_cursor)
            out.print(f"more: {more}", soft_wrap=True)
    return Exit.OK


@tasks.command
def show(task_id: str, /, *, server: ServerURL = None, as_json: AsJSON = False) -> int:
    """Show a task: every step and why, its result, its file."""
    fetched = _on_task(server, lambda client: client.task(task_id))
    if as_json:
        print_json(fetched.packet)
        return Exit.OK
    out = console()
    with view.TaskView(out) as live:
        live.tell(fetched.packet)
    out.print(view.asked(fetched.packet), soft_wrap=True)
    for event in fetched.packet.history:
        for line in view.describe(event):
            out.print(line, soft_wrap=True)
    show_end(out, fetched, caller(server) if fetched.packet.status is TaskStatus.INPUT_REQUIRED else None)
    return Exit.OK


@tasks.command
def cancel(task_id: str, /, *, server: ServerURL = None, as_json: AsJSON = False) -> int:
    """End a task now; what it had is kept."""
    return _changed(_on_task(server, lambda client: client.cancel(task_id)), as_json)


@tasks.command
def pause(task_id: str, /, *, server: ServerURL = None, as_json: AsJSON = False) -> int:
    """Hold a task after the step that is under way, also over a restart."""
    return _changed(_on_task(server, lambda client: client.pause(task_id)), as_json)


@tasks.command
def resume(task_id: str, /, *, server: ServerURL = None, as_json: AsJSON = False) -> int:
    """Let a paused task go on."""
    return _changed(_on_task(server, lambda client: client.resume(task_id)), as_json)


@tasks.command
def fork(
    task_id: str,
    /,
    *,
    step: Annotated[int, Parameter(help="Its steps up to this one are taken over; 0: none.")],
    set_field: Annotated[
        tuple[str, ...],
        Parameter(
            name=["--set", "-s"],
            negative=(),
            show_default=False,
            help="A field of the payload that is to be another, NAME=VALUE as for `run`; null takes it away.",
        ),
    ] = (),
    calls: Annotated[int | None, Parameter(help="At most so many LLM calls from there on.")] = None,
    server: ServerURL = None,
    as_json: AsJSON = False,
) -> int:
    """Submit a task that goes on after a step of an ended one, and print its id."""
    draft = ForkDraft(
        step=step,
        payload=payload(None, fields=set_field) if set_field else None,
        limits=LimitsDraft(calls=calls) if calls is not None else None,
    )
    made = _on_task(server, lambda client: client.fork(task_id, draft, idempotency_key=str(uuid.uuid4())))
    return _print_id(made.packet, as_json=as_json)


@tasks.command
def requeue(task_id: str, /, *, server: ServerURL = None, as_json: AsJSON = False) -> int:
    """Put a failed task back: a new one goes on after the last step that did its work; print its id.

    Once for each task: a repeat prints the same id.
    """
    failed = _on_task(server, lambda client: client.task(task_id)).packet
    if failed.status is not TaskStatus.FAILED:
        raise InvalidPacketError(f"task {task_id} has not failed ({failed.status})", expected="a failed task")
    draft = ForkDraft(step=last_good_step(failed))
    made = _on_task(server, lambda client: client.fork(task_id, draft, idempotency_key=f"requeue:{task_id}"))
    return _print_id(made.packet, as_json=as_json)


@tasks.command
def dlq(
    *,
    limit: Annotated[int, Parameter(help="At most so many.")] = 20,
    server: ServerURL = None,
    as_json: AsJSON = False,
) -> int:
    """List the tasks that failed for no fault of their own, newest first: `tasks requeue` puts one back."""

    async def talk() -> list[TaskSummary]:
        found: list[TaskSummary] = []
        cursor: str | None = None
        async with connect(server) as client:
            while True:
                page = await client.tasks(status=TaskStatus.FAILED, limit=200, cursor=cursor)
                found += [task for task in page.items if task.reason in DEAD_REASONS]
                cursor = page.next_cursor
                if cursor is None or len(found) >= limit:
                    return found[:limit]

    dead = asyncio.run(talk())
    if as_json:
        print_json(dead)
    elif not dead:
        console().print("no tasks")
    else:
        console().print(view.tasks_table(tuple(dead)), soft_wrap=True)
    return Exit.OK


@tasks.command
def delete(task_id: str, /, *, server: ServerURL = None, as_json: AsJSON = False) -> int:
    """Remove an ended task and its file."""
    _on_task(server, lambda client: client.delete(task_id))
    if as_json:
        print_json({"task_id": task_id, "deleted": True})
    else:
        console().print(f"deleted {task_id}", soft_wrap=True)
    return Exit.OK


@tasks.command
def feedback(
    task_id: str,
    /,
    *,
    role: str,
    outcome: str,
    why: str = "",
    code: Annotated[Path | None, Parameter(help="A file whose code replaces the task's.")] = None,
    failing: Annotated[
        tuple[str, ...],
        Parameter(negative=(), show_default=False, help="A test that failed; repeat for more."),
    ] = (),
    sender: str = "",
    server: ServerURL = None,
    as_json: AsJSON = False,
) -> int:
    """Report for a role, as an outside agent or a person.

    Parameters
    ----------
    role
        Who reports: a role of the task's profile, or `user` to answer a question.
    outcome
        The word that the routes look up: done, pass, fail, answer, ...
    why
        The reason, or the answer.
    sender
        Who you are, for the history.
    """
    draft = FeedbackDraft(
        role=role,
        outcome=outcome,
        why=why,
        sender=sender,
        failing=failing,
        code=_read(code) if code is not None else None,
    )
    return _changed(_on_task(server, lambda client: client.feedback(task_id, draft)), as_json)


def _print_id(packet: TaskPacket, *, as_json: bool) -> int:
    if as_json:
        print_json(packet)
    else:
        sys.stdout.write(packet.task_id + "\n")
    return Exit.OK


def _on_task(server: str | None, ask: Callable[[Client], Awaitable[T]]) -> T:
    async def talk() -> T:
        async with connect(server) as client:
            return await ask(client)

    return asyncio.run(talk())


def _changed(fetched: Fetched, as_json: bool) -> int:
    packet = fetched.packet
    if as_json:
        print_json(packet)
    else:
        paused = " and paused" if packet.paused_at is not None else ""
        console().print(f"{packet.task_id} is {packet.status.value}{paused}", soft_wrap=True)
    return Exit.OK
