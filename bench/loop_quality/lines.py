"""What the measure of the loop keeps: its settings, and a line for each problem and arm."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec

from ai_agent_server.core.task_packet import Limits
from bench.lines import LineFile

Arm = Literal["one_call", "best_of_n", "loop"]
ARMS: tuple[Arm, ...] = get_args(Arm)
VERSION = 1
"""Of the measure itself; lines of another version are not comparable."""


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


class Lines(LineFile[Setup, Line]):
    """What a measurement of the loop has so far."""

    def __init__(self, path: Path, setup: Setup) -> None:
        super().__init__(path, setup, Line)

    def of(self, arm: Arm) -> dict[int, Line]:
        """The lines of an arm that has one a problem, by problem."""
        return {line.problem: line for line in self.lines if line.arm == arm}

    def draws(self) -> dict[int, tuple[Line, ...]]:
        """The draws of each problem in order; the one call is the first of them."""
        found: dict[int, tuple[Line, ...]] = {}
        for line in sorted(self.lines, key=lambda line: line.draw):
            if line.arm != "loop":
                found[line.problem] = (*found.get(line.problem, ()), line)
        return found


def missing(ids: Sequence[int], there: Iterable[int]) -> tuple[int, ...]:
    """Those of `ids` that are not there yet."""
    known = set(there)
    return tuple(problem for problem in ids if problem not in known)
