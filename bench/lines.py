"""What a measurement has so far, one JSON line each after the settings, so that a rerun goes on with it."""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Generic, Self, TypeVar

import msgspec

S = TypeVar("S", bound=msgspec.Struct)
L = TypeVar("L", bound=msgspec.Struct)


class RefusedError(Exception):
    """The measurement cannot go on like this; says why."""


def differences(one: S, other: S) -> tuple[str, ...]:
    """The names of the settings that are not the same."""
    names = type(one).__struct_fields__
    return tuple(name for name in names if getattr(one, name) != getattr(other, name))


class LineFile(Generic[S, L]):
    """A file of lines, taken by one measurement at a time. Its first line is all that they depend on."""

    def __init__(self, path: Path, setup: S, line: type[L]) -> None:
        """Open or make `path`. Raises `RefusedError` where it was made otherwise, or is in use."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("a+b")
        try:
            self._take(path)
            self.lines = self._read(path, setup, line)
        except BaseException:
            self._file.close()
            raise

    def _take(self, path: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise RefusedError(f"{path} is being written by another run") from exc

    def _read(self, path: Path, setup: S, line: type[L]) -> list[L]:
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
            made = msgspec.json.decode(head, type=type(setup))
            lines = [msgspec.json.decode(each, type=line) for each in rest]
        except msgspec.DecodeError as exc:
            raise RefusedError(f"{path} is not a file of this measure: {exc}") from exc
        if differing := differences(made, setup):
            was = ", ".join(f"{name} was {getattr(made, name)!r}" for name in differing)
            raise RefusedError(f"{path} was made with other settings ({was}); choose another --out")
        return lines

    def _write(self, value: S | L) -> None:
        self._file.write(msgspec.json.encode(value) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, line: L) -> None:
        """Keep `line`; it is on the disk when this answers."""
        self._write(line)
        self.lines.append(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
