"""Problems: MBPP's, each with one visible example and the assertions that stay hidden."""

import hashlib
from pathlib import Path

import msgspec

from ai_agent_server.core.chat import JSONObject

DATA = Path(__file__).parents[1] / "data" / "mbpp" / "sanitized-mbpp.jsonl"


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One problem as the file has it. `code` is a person's solution."""

    task_id: int
    prompt: str
    code: str
    test_list: tuple[str, ...]
    test_imports: tuple[str, ...] = ()

    @property
    def visible(self) -> str:
        """The assertion that every arm is shown."""
        return self.test_list[0]

    @property
    def hidden(self) -> tuple[str, ...]:
        """The assertions that only score."""
        return self.test_list[1:]

    @property
    def payload(self) -> JSONObject:
        """The task as every arm gets it."""
        return {"task": self.prompt, "examples": [self.visible]}


def load(path: Path = DATA) -> tuple[Problem, ...]:
    """Every problem, in the order of the ids."""
    lines = path.read_bytes().splitlines()
    return tuple(sorted((msgspec.json.decode(line, type=Problem) for line in lines), key=lambda p: p.task_id))


def sha256(path: Path = DATA) -> str:
    """What names this set of problems."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def positions(text: str, count: int) -> range:
    """`100:300` as positions among `count` problems; either end may be left out. Raises `ValueError`."""
    first, colon, last = text.partition(":")
    if not colon:
        raise ValueError(f"{text!r} is not FROM:TO, say 100:300")
    start, stop = int(first or 0), int(last or count)
    if not 0 <= start < stop <= count:
        raise ValueError(f"{text!r} is not within 0:{count}, or holds nothing")
    return range(start, stop)
