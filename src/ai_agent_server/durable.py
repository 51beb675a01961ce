"""What makes bytes safe on a disk, and the words for when it fails. Blocking; for threads."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ai_agent_server.errors import StoreError, StoreFullError, StoreUnusableError

TEMPORARY = ".tmp"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
# EFBIG is a limit on file size (ulimit -f): as for a quota, what helps is space.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The error numbers of a disk without space."""


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path`, or leave there what was; it is safe when this returns.

    The folder is made where it is missing. Raises `OSError`.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    place(path, content)
    sync_folder(path.parent)


@contextmanager
def translated(path: Path | str) -> Iterator[None]:
    """Turn what the system says about `path` into the store's errors."""
    try:
        yield
    except OSError as exc:
        raise meaning(exc, path) from exc


def meaning(problem: OSError, path: Path | str) -> StoreError:
    """The store's error for what the system says about `path`."""
    where = problem.filename or path
    if problem.errno in FULL:
        return StoreFullError(f"no space left for {where}: {problem.strerror}")
    return StoreUnusableError(f"{where}: {problem.strerror}")


def place(path: Path | str, content: bytes, *, sync: bool = True, suffix: str = TEMPORARY) -> None:
    """Put `content` at `path` whole, or leave there what was. It survives a crash after `sync_folder`.

    Without `sync` it survives the end of the process alone. `suffix` is the temporary file's. Raises
    `OSError`; the temporary file is gone then.
    """
    temporary = beside(path, content, sync=sync, suffix=suffix)
    try:
        os.rename(temporary, path)  # noqa: PTH104  (a Path takes half as long again as all the calls here)
    except OSError:
        with suppress(OSError):
            Path(temporary).unlink()
        raise


def beside(path: Path | str, content: bytes, *, sync: bool, suffix: str = TEMPORARY) -> str:
    """Write `content` to a temporary file beside `path`, and answer where.

    Raises `OSError`; the temporary file is gone then.
    """
    temporary = os.fspath(path) + suffix
    try:
        descriptor = os.open(temporary, _NEW, 0o600)
        try:
            write_all(descriptor, content)
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        with suppress(OSError):
            Path(temporary).unlink()
        raise
    return temporary


def write_all(descriptor: int, content: bytes) -> None:
    """Write every byte. Raises `OSError`; a part may be written then."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_files(files: Iterable[str]) -> None:
    """Make files, or that they are gone, survive a power cut, each folder once. Raises `OSError`."""
    folders: set[str] = set()
    for file in files:
        folders.add(os.path.dirname(file))  # noqa: PTH120  (no Path of each of thousands)
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for folder in folders:
        sync_folder(folder)


def sync_folder(folder: Path | str) -> None:
    """Make what was created, renamed or removed in `folder` survive a crash. Raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
