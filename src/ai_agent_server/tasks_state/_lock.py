"""A folder that belongs to one server at a time. Blocking; for threads."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from ai_agent_server.durable import translated
from ai_agent_server.errors import StoreUnusableError


class FolderLock:
    """A folder that one server has at a time: `lock`, with the owner's pid in it."""

    def __init__(self, root: Path) -> None:
        self._path = root / "lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Raises `StoreUnusableError` that names the owner, or says why there is no lock."""
        with translated(self._path):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                os.close(descriptor)
                raise StoreUnusableError(
                    f"{self._path.parent} is in use by another server (pid {owner or 'unknown'}); "
                    "stop it, or give this one a state folder of its own"
                ) from exc
            except OSError:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        with suppress(OSError):  # on a full disk it is still our lock, only without a name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go. The file stays: removing it would let two servers each lock a file of their own."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
