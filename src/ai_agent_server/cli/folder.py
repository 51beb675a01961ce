"""`tasks verify`: what is done with a state folder itself, whether or not a server is at work in it."""

from typing import Annotated

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from ai_agent_server.cli import Exit
from ai_agent_server.cli.options import AsJSON, StateDir, console, print_json, state_folder
from ai_agent_server.tasks_state import _verify
from ai_agent_server.tasks_state._verify import Verified

__all__ = ("verify",)


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
    if found.set_aside:
        notes.append(f"{found.set_aside} files in corrupt/")
    wrong = f"{len(found.faults)} wrong" if found.faults else "nothing is wrong"
    out.print(f"{'; '.join(notes)}: {wrong}", soft_wrap=True)
