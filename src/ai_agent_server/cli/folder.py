"""`tasks verify`, `export` and `archive`: what is done with a state folder itself, not through a server."""

import asyncio
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from ai_agent_server import log
from ai_agent_server.cli import Exit
from ai_agent_server.cli.options import AsJSON, StateDir, console, print_json, state_folder
from ai_agent_server.core.task_packet import TaskPacket
from ai_agent_server.durable import translated
from ai_agent_server.errors import TaskNotFoundError
from ai_agent_server.tasks_state import _verify
from ai_agent_server.tasks_state._archive import ARCHIVE, Archive
from ai_agent_server.tasks_state._retention import Housekeeper
from ai_agent_server.tasks_state._verify import TaskFiles, Verified
from ai_agent_server.tasks_state.base import Retention
from ai_agent_server.tasks_state.json_file_store import JsonFileStore

__all__ = ("archive", "everyone", "export", "verify")


def verify(
    *,
    mend: Annotated[
        bool,
        Parameter(
            negative=(),
            help="Move faulty files to corrupt/ in the state folder. Only while no server has the folder.",
        ),
    ] = False,
    state_dir: StateDir = None,
    as_json: AsJSON = False,
) -> int:
    """Check every task's file against its schema and its own history, server running or not.

    Exit code 0: nothing is wrong. 1: something is, and it is listed.
    """
    log.configure("warning")
    root = state_folder(state_dir)
    found = _verify.mend(root) if mend else _verify.verify(root)
    if as_json:
        print_json(found)
    else:
        _show(found)
    return Exit.FAILED if found.faults else Exit.OK


def _show(found: Verified) -> None:
    out = console()
    if found.faults:
        table = Table(box=None, pad_edge=False)
        for column in ("FILE", "WRONG", *(("MOVED TO",) if found.faults[0].moved_to else ())):
            table.add_column(column, overflow="fold")
        for fault in found.faults:
            moved = (fault.moved_to,) if fault.moved_to else ()
            table.add_row(*map(Text, (fault.file, fault.problem, *moved)))
        out.print(table, soft_wrap=True)
    notes = [f"{found.tasks} tasks ({found.live} live), {found.events} events in {found.root}"]
    if found.ahead:
        notes.append(f"{found.ahead} of them newer in the journal than in their files")
    if found.archived:
        notes.append(f"{found.archived} in the archive")
    if found.set_aside:
        notes.append(f"{found.set_aside} files in corrupt/")
    wrong = f"{len(found.faults)} wrong" if found.faults else "nothing is wrong"
    out.print(f"{'; '.join(notes)}: {wrong}", soft_wrap=True)


def export(
    file: Annotated[Path, Parameter(allow_leading_hyphen=True, help="Where to; - is the standard output.")],
    /,
    *,
    archived: Annotated[
        bool, Parameter(negative=(), help="The tasks of the archive too, before the others.")
    ] = False,
    state_dir: StateDir = None,
) -> int:
    """Write every task as a JSON line, with its whole history, server running or not.

    A file is written beside its name first and takes its place when it is whole.
    """
    root = state_folder(state_dir)
    with translated(root):
        files = TaskFiles(root)
        packets = everyone(Archive(root / ARCHIVE), files) if archived else files.packets()
        if str(file) == "-":
            for packet in packets:
                print_json(packet, pretty=False)
            return Exit.OK
        temporary = file.with_name(f"{file.name}.part")
        tasks = 0
        with temporary.open("wb") as out:
            for packet in packets:
                out.write(msgspec.json.encode(packet) + b"\n")
                tasks += 1
        temporary.replace(file)
    console().print(f"{tasks} tasks in {file}", soft_wrap=True)
    return Exit.OK


def archive(
    task_id: str | None = None,
    /,
    *,
    max_age_days: Annotated[
        float | None, Parameter(help="Move those that ended longer ago. A day is the least.")
    ] = None,
    max_tasks: Annotated[int | None, Parameter(help="Keep so many ended ones, move the others.")] = None,
    state_dir: StateDir = None,
    as_json: AsJSON = False,
) -> int:
    """Show what is in the archive, one task of it, or move ended tasks into it while no server runs.

    A running server does that by itself, as `store.retention` in its configuration says.
    """
    log.configure("warning")
    root = state_folder(state_dir)
    kept = Archive(root / ARCHIVE)
    if task_id is not None:
        packet = kept.read(task_id)
        if packet is None:
            raise TaskNotFoundError(task_id)
        print_json(packet)
        return Exit.OK
    retention = Retention(max_age_days=max_age_days, max_tasks=max_tasks)
    if retention != Retention():
        TaskFiles(root)  # a folder that is none is not made one
        moved = asyncio.run(_tidied(root, kept, retention))
        sys.stderr.write(f"{moved} tasks moved to {kept.folder}\n")
    months = kept.months()
    if as_json:
        print_json({"items": months})
        return Exit.OK
    table = Table(box=None, pad_edge=False)
    for column in ("FILE", "TASKS", "BYTES"):
        table.add_column(column, overflow="fold")
    for month in months:
        table.add_row(month.file, str(month.tasks), str(month.size_bytes))
    console().print(table if months else f"nothing is in {kept.folder}", soft_wrap=True)
    return Exit.OK


async def _tidied(root: Path, kept: Archive, retention: Retention) -> int:
    store = JsonFileStore(root)
    await store.open()
    try:
        return await Housekeeper(store, kept, retention, clock=lambda: datetime.now(UTC)).tidy()
    finally:
        await store.aclose()


def everyone(archive: Archive, files: TaskFiles) -> Iterator[TaskPacket]:
    """Each task once, the archived first: one that is being moved is in both places."""
    before, seen = archive.months(), dict[str, datetime]()

    def unseen(packets: Iterator[TaskPacket]) -> Iterator[TaskPacket]:
        for packet in packets:
            if seen.get(packet.task_id) != packet.created_at:
                seen[packet.task_id] = packet.created_at
                yield packet

    yield from unseen(archive.packets())
    yield from unseen(files.packets())
    if archive.months() != before:  # moved since the archive was read, and gone when the files were
        yield from unseen(archive.packets())
