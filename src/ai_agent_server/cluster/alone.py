"""Leases and shelf of a server that shares its tasks with nobody: all is its own, in its state folder."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from ai_agent_server.cluster.base import Left, Peers
from ai_agent_server.durable import translated, write_whole

__all__ = ("Alone", "FileShelf")


class Alone:
    """Everything is this server's own: the state folder's lock has settled it."""

    holder = ""

    def may_take(self, holder: str) -> bool:  # noqa: ARG002  (the port's name)
        """Always: also what a server of a cluster held, whose state folder this is now."""
        return True

    def peers(self) -> Peers:
        """Nobody."""
        return Peers(holder="")

    async def aclose(self) -> None:
        """Nobody waits for it."""


class FileShelf:
    """A shelf that is a file, which nobody else looks at."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def read(self) -> bytes | None:
        """See `Shelf.read`."""

        def read() -> bytes | None:
            with translated(self._path):
                return self._path.read_bytes() if self._path.exists() else None

        return await asyncio.to_thread(read)

    async def put(self, content: bytes) -> None:
        """See `Shelf.put`."""

        def put() -> None:
            with translated(self._path):
                write_whole(self._path, content)

        await asyncio.to_thread(put)

    def is_own(self, holder: str) -> bool:  # noqa: ARG002  (the port's name)
        """Always: also what it had when it was one of a cluster."""
        return True

    async def left(self) -> Sequence[Left]:
        """Nobody left anything."""
        return ()

    async def replace(self, left: Left, content: bytes) -> bool:  # noqa: ARG002  (the port's names)
        """There is nothing to replace."""
        return False
