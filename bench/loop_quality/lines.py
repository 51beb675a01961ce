"""Lines: what was measured so far, one JSON line each, kept so that a rerun goes on where it stopped."""

import fcntl
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self, get_args

import msgspec

from ai_agent_server.core.task_packet import Limits

Arm = Literal["one_call", "best_of_n", "loop"]
ARMS: tuple[Arm, ...] = get_args(Arm)
VERSION = 1
"""Of the measure itself; lines of another version are not comparable."""


class RefusedError(Exception):
    """The measurement cannot go on like this; says why."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """All that a line depends on beside its problem and arm: the first line of a file."""

    version: int = VERSION
    llm: str
    engine: str
    model: str
    problems: str
    """Positions in the order of the ids, `100:300`."""
    seed: int
    temperature: float
    """Of every draw of best_of_n after its first."""
    limits: Limits
    """Of a task of the loop."""
    tier: str
    """Of the sandbox."""
    llm_sha256: str
    profile_sha256: str
    program_sha256: str
    data_sha256: str
    at_once: int = 1
    """Problems at the same time: what the seconds depend on."""


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One problem through one arm; of best_of_n one draw of it, from the second on."""

    problem: int
    arm: Arm
    draw: int = 1
    visible: bool
    """The visible example holds."""
    right: bool
    """Every assertion holds, the hidden ones too."""
    completed: bool = False
    """The loop called it completed."""
    first_right: bool = False
    """Every assertion held already for the loop's first version."""
    past_limit: bool = False
    calls: int
    tokens: int
    seconds: float
    ended: str
    """`completed`, or why not."""
    path: tuple[str, ...] = ()
    """The loop's steps, `qa.fail`."""
    code: str = ""


def differences(one: Setup, other: Setup) -> tuple[str, ...]:
    """The names of the settings that are not the same."""
    return tuple(name for name in Setup.__struct_fields__ if getattr(one, name) != getattr(other, name))


class Lines:
    """A file of lines, taken by one measurement at a time."""

    def __init__(self, path: Path, setup: Setup) -> None:
        """Open or make `path`. Raises `RefusedError` where it was made otherwise, or is in use."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("a+b")
        try:
            self._take(path)
            self._lines = self._read(path, setup)
        except BaseException:
            self._file.close()
            raise

    def _take(self, path: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise RefusedError(f"{path} is being written by another run") from exc

    def _read(self, path: Path, setup: Setup) -> list[Line]:
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            # The last run was killed while it wrote.
            self._file.truncate(len(whole))
        if not whole:
            self._write(setup)
            return []
        head, *rest = whole.splitlines()
        try:
            made = msgspec.json.decode(head, type=Setup)
            lines = [msgspec.json.decode(line, type=Line) for line in rest]
        except msgspec.DecodeError as exc:
            raise RefusedError(f"{path} is not a file of this measure: {exc}") from exc
        if differing := differences(made, setup):
            was = ", ".join(f"{name} was {getattr(made, name)!r}" for name in differing)
            raise RefusedError(f"{path} was made with other settings ({was}); choose another --out")
        return lines

    def _write(self, value: Setup | Line) -> None:
        self._file.write(msgspec.json.encode(value) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, line: Line) -> None:
        """Keep `line`; it is on the disk when this answers."""
        self._write(line)
        self._lines.append(line)

    def of(self, arm: Arm) -> dict[int, Line]:
        """The lines of an arm that has one a problem, by problem."""
        return {line.problem: line for line in self._lines if line.arm == arm}

    def draws(self) -> dict[int, tuple[Line, ...]]:
        """The draws of each problem in order; the one call is the first of them."""
        found: dict[int, tuple[Line, ...]] = {}
        for line in sorted(self._lines, key=lambda line: line.draw):
            if line.arm != "loop":
                found[line.problem] = (*found.get(line.problem, ()), line)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def missing(ids: Sequence[int], there: Iterable[int]) -> tuple[int, ...]:
    """Those of `ids` that are not there yet."""
    known = set(there)
    return tuple(problem for problem in ids if problem not in known)
