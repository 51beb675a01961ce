"""Which LLMs were switched on or off at run time: a small file in the state folder, kept over a restart."""

import asyncio
import os
from pathlib import Path

import msgspec
import structlog

log = structlog.get_logger(__name__)


class Toggles:
    """The switches. A file that cannot be read counts as none; writing is whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = asyncio.Lock()
        self._set: dict[str, bool] = {}

    def read(self) -> dict[str, bool]:
        """LLM name -> on or off, for those that were switched."""
        try:
            self._set = msgspec.json.decode(self._path.read_bytes(), type=dict[str, bool])
        except FileNotFoundError:
            self._set = {}
        except (OSError, msgspec.DecodeError) as exc:
            log.warning("toggles.unreadable", path=str(self._path), error=str(exc))
            self._set = {}
        return dict(self._set)

    async def keep(self, name: str, on: bool) -> None:
        """Write down that `name` was switched."""
        async with self._lock:
            self._set = {**self._set, name: on}
            await asyncio.to_thread(self._write, msgspec.json.encode(self._set))

    def _write(self, text: bytes) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
