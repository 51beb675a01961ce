"""The state folder: its lock, its layout, what is in it at the start, and each task's file. Blocking."""

import os
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog

from ai_agent_server.core.task_packet import TaskPacket, TaskSummary
from ai_agent_server.errors import CorruptTaskError, StoreFullError, StoreUnusableError, TaskNotFoundError
from ai_agent_server.tasks_state._disk import (
    TEMPORARY,
    FolderLock,
    place,
    remove,
    sync_folder,
    translated,
)
from ai_agent_server.tasks_state._files import Blobs, Written, blobs_in, decode, decode_head, encode
from ai_agent_server.tasks_state._index import is_canonical

_PROBE_BYTES = 4096
_SHARDS = tuple(f"{number:02x}" for number in range(256))

log = structlog.get_logger(__name__)


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """A task, and the parts of its file that stay as they are."""

    packet: TaskPacket
    written: Written


class Found(msgspec.Struct, kw_only=True):
    """What the folder held at the start: every task's summary, and the live ones whole."""

    summaries: list[TaskSummary]
    live: list[Stored]
    corrupt: int = 0
    """How many files lie in `corrupt/`."""


class TaskFolder:
    """`tasks_state/<shard>/<task_id>.json`, `blobs/<sha256>`, `corrupt/` and `lock` below `root`.

    For threads: every method blocks. Different tasks may be written at the same time, one task only
    by one thread at a time.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tasks = root / "tasks_state"
        self._corrupt = root / "corrupt"
        self._blobs = Blobs(root / "blobs")
        self._lock = FolderLock(root)

    def open(self) -> Found:
        """Lock the folder and read it. What is no task is moved to `corrupt/`, never overwritten.

        Raises `StoreUnusableError`.
        """
        with translated(self.root):
            if self.root.exists() and not self.root.is_dir():
                raise StoreUnusableError(f"{self.root} is not a folder")
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire()
            with suppress(StoreFullError):  # ended tasks can be read, and deleted to make space
                self.probe()
            for folder in (self._tasks, self._blobs.root):
                folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self.root)
            for path in list(self._tasks.iterdir()):
                if path.name not in _SHARDS or not path.is_dir():
                    self._move_aside(path, "not a folder of task files")
            # All of them now: one made later would have to be safe before the first file in it.
            for name in _SHARDS:
                (self._tasks / name).mkdir(mode=0o700, exist_ok=True)
            sync_folder(self._tasks)
            found = Found(summaries=[], live=[])
            for name in _SHARDS:
                self._scan(self._tasks / name, found)
            found.corrupt = len(list(self._corrupt.iterdir())) if self._corrupt.is_dir() else 0
            if not found.corrupt:  # a blob may belong to a task that somebody is yet to repair
                self._blobs.sweep()
        return found

    def close(self) -> None:
        """Let go of the lock."""
        self._lock.release()

    def path(self, task_id: str) -> Path:
        """Where a task's file is. `task_id` is canonical."""
        # The shard is of the id's tail: the head of a UUIDv7 is the time, the same for all of a day.
        return self._tasks / task_id[-2:] / f"{task_id}.json"

    def write(self, packet: TaskPacket, before: Written | None) -> Written:
        """Make the task's file say `packet`; `before` is what the last write answered.

        Raises `StoreError` children; the file is as it was then, and its next write may succeed.
        """
        path = self.path(packet.task_id)
        with translated(path):
            content, written = encode(packet, before, self._blobs)
            try:
                place(path, content)
            except OSError:
                self._blobs.drop(written.blobs - before.blobs if before else written.blobs)
                raise
            sync_folder(path.parent)
        return written

    def read(self, task_id: str) -> TaskPacket:
        """The packet in the task's file. Raises `TaskNotFoundError` or `CorruptTaskError`."""
        path = self.path(task_id)
        with translated(path):
            try:
                content = path.read_bytes()
            except FileNotFoundError as exc:
                raise TaskNotFoundError(task_id) from exc
            return decode(content, self._blobs)[0]

    def remove(self, task_id: str) -> None:
        """Remove the task's file, and the blobs that only it used."""
        path = self.path(task_id)
        with translated(path):
            try:
                digests = blobs_in(path.read_bytes())
            except FileNotFoundError:
                return
            remove(path)
        self._blobs.drop(digests)

    def probe(self) -> int:
        """Write a little, and answer how many bytes are free. Raises `StoreError` children."""
        path = self.root / f"probe{TEMPORARY}"
        with translated(self.root):
            try:
                path.write_bytes(bytes(_PROBE_BYTES))
            finally:
                path.unlink(missing_ok=True)
            free = os.statvfs(self.root)
            return free.f_bavail * free.f_frsize

    def _scan(self, shard: Path, found: Found) -> None:
        for path in list(shard.iterdir()):
            if path.name.endswith(TEMPORARY) and path.is_file():
                path.unlink()
                continue
            try:
                self._take(path, found)
            except CorruptTaskError as exc:
                self._move_aside(path, str(exc))

    def _take(self, path: Path, found: Found) -> None:
        task_id = path.name.removesuffix(".json")
        if not is_canonical(task_id) or path != self.path(task_id) or not path.is_file():
            raise CorruptTaskError("not the name of a task file in this folder")
        content = path.read_bytes()
        head = decode_head(content)
        if head.task_id != task_id:
            raise CorruptTaskError(f"it holds the task {head.task_id}")
        if not head.status.is_final:
            packet, written = decode(content, self._blobs)
            found.live.append(Stored(packet=packet, written=written))
        self._blobs.adopt(head.blobs)
        found.summaries.append(head.summary())

    def _move_aside(self, path: Path, why: str) -> None:
        self._corrupt.mkdir(mode=0o700, exist_ok=True)
        target, number = self._corrupt / path.name, 0
        while target.exists():
            number += 1
            target = self._corrupt / f"{path.name}.{number}"
        path.rename(target)
        log.error("store.file_moved_aside", file=str(path), to=str(target), why=why)
