"""The state folder: its lock, its layout, what is in it at the start, and each task's file. Blocking."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from ai_agent_server.core.task_packet import TaskPacket, TaskSummary, is_task_id
from ai_agent_server.durable import (
    FULL,
    TEMPORARY,
    beside,
    meaning,
    place,
    sync_folder,
    translated,
)
from ai_agent_server.errors import (
    CorruptTaskError,
    StoreError,
    StoreFullError,
    StoreUnusableError,
    TaskNotFoundError,
)
from ai_agent_server.tasks_state._files import Blobs, Written, blobs_in, decode, decode_head, encode
from ai_agent_server.tasks_state._journal import Frame, Journal, frames, segments
from ai_agent_server.tasks_state._lock import FolderLock

_PROBE_BYTES = 4096
_LATE = f".late{TEMPORARY}"
"""A late file's; the task's next file may be prepared already, under the other name."""
_ROOM_BYTES = 64 * 1024 * 1024
_ROOM_FILES = 10_000
"""With less than this left on the disk no file is late: what was taken could lack the space for it."""
_T = TypeVar("_T")
SHARDS = tuple(f"{number:02x}" for number in range(256))

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
    problem: str = ""
    """Why files are behind the journal."""


class Change(msgspec.Struct, kw_only=True, eq=False):
    """A change of one task's file that is prepared, and takes place with `TaskFolder.commit`."""

    task_id: str
    content: bytes = b""
    """What the file is to hold; b"" removes it."""
    temporary: str | None = None
    """The new file, beside the old one; None where the file is to follow with `TaskFolder.catch_up`."""
    written: Written | None = None
    gained: frozenset[str] = frozenset()
    """Blobs that it counts as a user of, if it takes place."""
    lost: frozenset[str] = frozenset()
    """Blobs that it lets go of, if it takes place."""
    problem: StoreError | None = None


class TaskFolder:
    """`tasks_state/<shard>/<task_id>.json`, `blobs/<sha256>`, `journal/`, `corrupt/`, `lock` below `root`.

    For threads: every method blocks. What changes something is called by one thread at a time.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tasks = root / "tasks_state"
        self.corrupt = root / "corrupt"
        self._blobs = Blobs(root / "blobs")
        self._lock = FolderLock(root)
        self._journal = Journal(root / "journal", self._file, self.catch_up, self._write_again)
        self._late: dict[str, bytes] = {}
        """What the journal has and a file does not say yet, b"" where the file is to be gone."""

    @property
    def is_behind(self) -> bool:
        """Whether a file is older than what the journal has of its task."""
        return bool(self._late)

    def open(self) -> Found:
        """Lock the folder and read it. What is no task is moved to `corrupt/`, never overwritten.

        On a disk without space every task is shown as the journal has it, and nothing is taken until
        there is space for the files. Raises `StoreUnusableError`.
        """
        with translated(self.root):
            if self.root.exists() and not self.root.is_dir():
                raise StoreUnusableError(f"{self.root} is not a folder")
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire()
            with suppress(StoreFullError):  # ended tasks can be read, and deleted to make space
                self.probe()
            for folder in (self._tasks, self._blobs.root, self._journal.folder):
                folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self.root)
            for path in list(self._tasks.iterdir()):
                if path.name not in SHARDS or not path.is_dir():
                    self.move_aside(path, "not a folder of task files")
            # All of them now: one made later would have to be safe before the first file in it.
            for name in SHARDS:
                (self._tasks / name).mkdir(mode=0o700, exist_ok=True)
            sync_folder(self._tasks)
            found = Found(summaries=[], live=[], problem=self._replay())
            for name in SHARDS:
                self._scan(self._tasks / name, found)
            self._take_late(found)
            found.corrupt = len(list(self.corrupt.iterdir())) if self.corrupt.is_dir() else 0
            if not found.corrupt:  # a blob may belong to a task that somebody is yet to repair
                self._blobs.sweep()
        return found

    def settle(self) -> None:
        """Leave nothing but task files, safe themselves. Raises `StoreError` children."""
        with translated(self._journal.folder):
            self._journal.close()

    def close(self) -> None:
        """Let go of the lock."""
        self._lock.release()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep servers away meanwhile. Raises `StoreUnusableError` when one has the folder."""
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def path(self, task_id: str) -> Path:
        """Where a task's file is. `task_id` is canonical."""
        return Path(self._file(task_id))

    def has_room(self) -> bool:
        """Whether files may be late: there is space for all of them and much more."""
        try:
            left = os.statvfs(self.root)
        except OSError:
            return False
        files = left.f_favail if left.f_files else _ROOM_FILES  # 0 of 0: as many as there is space for
        return left.f_bavail * left.f_frsize >= _ROOM_BYTES and files >= _ROOM_FILES

    def write(self, packet: TaskPacket, before: Written | None, *, late: bool = False) -> Change:
        """Prepare that the task's file says `packet`; `before` is what its last write answered.

        A `late` file follows with `catch_up`. Raises `StoreError` children; nothing is left then.
        """
        try:
            return self._with_space(lambda: self._written(packet, before, late=late))
        except OSError as exc:
            raise meaning(exc, self.path(packet.task_id)) from exc

    def commit(self, changes: Sequence[Change]) -> None:
        """Make changes of different tasks take place, safe with one fsync; `problem` says which did not.

        The journal comes first. What fails before it leaves nothing, and what fails after it makes
        the files themselves safe and ends the journal: no start finds what was refused. Where the
        journal cannot be ended, what it has is true, and the file follows.
        """
        try:
            self._with_space(
                lambda: self._journal.append([Frame(change.task_id, change.content) for change in changes])
            )
        except OSError as exc:
            for change in changes:
                if not (exc.errno in FULL and self._removed_at_once(change)):
                    change.problem = meaning(exc, self.path(change.task_id))
        else:
            for change in changes:
                try:
                    self._take_place(change)
                except OSError as exc:
                    change.problem = meaning(exc, self.path(change.task_id))
            if refused := [change for change in changes if change.problem]:
                try:
                    self._journal.settle(refused=True)
                except OSError as exc:
                    log.warning("store.journal_not_settled", problem=str(exc))
                    for change in refused:
                        self._late[change.task_id] = change.content
                        change.problem = None
        for change in changes:
            if change.temporary and (change.problem or change.task_id in self._late):
                with suppress(OSError):
                    Path(change.temporary).unlink()
            self._blobs.drop(change.gained if change.problem else change.lost)

    def catch_up(self, most: int | None = None) -> None:
        """Put late files in place, the oldest first. Raises the first `OSError`, after the others."""
        problem: OSError | None = None
        for task_id, content in list(self._late.items())[:most]:
            file = self._file(task_id)
            try:
                self._put(file, content)
            except OSError as exc:
                exc.filename = exc.filename or file
                problem = problem or exc
            else:
                del self._late[task_id]
        if problem is not None:
            raise problem

    def read(self, task_id: str) -> TaskPacket:
        """The packet in the task's file. Raises `TaskNotFoundError` or `CorruptTaskError`."""
        with translated(self.path(task_id)):
            content = self._content(task_id)
            if content is None:
                raise TaskNotFoundError(task_id)
            return decode(content, self._blobs)[0]

    def remove(self, task_id: str) -> Change:
        """Prepare that the task's file goes, and the blobs that only it used."""
        with translated(self.path(task_id)):
            return Change(task_id=task_id, lost=blobs_in(self._content(task_id) or b""))

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

    def _written(self, packet: TaskPacket, before: Written | None, *, late: bool) -> Change:
        content, written = encode(packet, before, self._blobs)
        gained = written.blobs - before.blobs if before else written.blobs
        try:
            temporary = None if late else beside(self._file(packet.task_id), content, sync=False)
        except OSError:
            self._blobs.drop(gained)
            raise
        return Change(
            task_id=packet.task_id,
            content=content,
            temporary=temporary,
            written=written,
            gained=gained,
        )

    def _take_place(self, change: Change) -> None:
        if change.temporary is not None:
            os.rename(change.temporary, self._file(change.task_id))  # noqa: PTH104  (as in `durable`)
        elif change.content:
            self._late[change.task_id] = change.content
            return
        else:
            self.path(change.task_id).unlink(missing_ok=True)
        self._late.pop(change.task_id, None)

    def _write_again(self, contents: Mapping[str, bytes]) -> None:
        for task_id, content in contents.items():
            try:
                is_ahead = not self._is_older(task_id, content, again=True)
            except OSError:  # it cannot even be read
                is_ahead = False
            if not is_ahead:
                self._late.setdefault(task_id, content)

    def _removed_at_once(self, change: Change) -> bool:
        """Whether it was a removal that needs no frame, there being none of its task: it makes space."""
        if change.content or self._journal.names(change.task_id):
            return False
        path = self.path(change.task_id)
        try:
            path.unlink(missing_ok=True)
            sync_folder(path.parent)
        except OSError:
            return False
        return True

    def _content(self, task_id: str) -> bytes | None:
        """What the task's file says, or is about to; None where it is not there."""
        late = self._late.get(task_id)
        if late is not None:
            return late or None
        try:
            return self.path(task_id).read_bytes()
        except FileNotFoundError:
            return None

    def _file(self, task_id: str) -> str:
        # The shard is of the id's tail: the head of a UUIDv7 is the time, the same for all of a day.
        return f"{self._tasks}/{task_id[-2:]}/{task_id}.json"

    def _put(self, file: str, content: bytes) -> None:
        """Make the file say what is safe in the journal; what a person put in its way is moved aside."""
        if not content:
            Path(file).unlink(missing_ok=True)
            return
        try:
            place(file, content, sync=False, suffix=_LATE)
        except (IsADirectoryError, NotADirectoryError, FileNotFoundError):
            path = Path(file)
            for folder in (path, path.with_name(path.name + _LATE)):
                if folder.is_dir():
                    self.move_aside(folder, "not a file")
            if not path.parent.is_dir():
                if path.parent.exists():
                    self.move_aside(path.parent, "not a folder of task files")
                path.parent.mkdir(mode=0o700)
                sync_folder(self._tasks)
            place(path, content, sync=False, suffix=_LATE)

    def _with_space(self, work: Callable[[], _T]) -> _T:
        """What `work` answers; where there is no space, once more without what the journal takes."""
        nothing_to_free = self._journal.is_empty
        try:
            return work()
        except OSError as exc:
            if exc.errno not in FULL or nothing_to_free:
                raise
            self._journal.settle()
            return work()

    def _replay(self) -> str:
        """Bring the files to where the journal is that a crash left, and end it.

        Answers why it could not, for want of space.
        """
        left = segments(self._journal.folder)
        if not left:
            return ""
        newest: dict[str, bytes] = {}
        new_again: set[str] = set()
        broken: set[Path] = set()
        for path in left:
            for frame, is_after_broken in frames(path.read_bytes()):
                if frame.content and newest.get(frame.task_id) == b"":
                    new_again.add(frame.task_id)
                newest[frame.task_id] = frame.content
                if is_after_broken:
                    broken.add(path)
        again = self._journal.is_suspect
        for task_id, content in newest.items():
            if self._is_older(task_id, content, whatever=task_id in new_again, again=again):
                self._late[task_id] = content
        changed, problem = len(self._late), ""
        self._journal.adopt(left, newest, end=lambda path: self._end_segment(path, is_broken=path in broken))
        try:
            self._journal.settle()
        except OSError as exc:
            if exc.errno not in FULL:
                raise
            problem = str(exc)
            log.warning("store.journal_kept", tasks=len(self._late), problem=problem)
        log.warning("store.journal_replayed", segments=len(left), tasks=len(newest), changed=changed)
        return problem

    def _is_older(self, task_id: str, content: bytes, *, whatever: bool = False, again: bool = False) -> bool:
        """Whether the task's file does not say what its last frame says, and is not ahead of it.

        It is never ahead with `whatever`; with `again` one that says the same counts as older.
        """
        path = self.path(task_id)
        try:
            there = path.read_bytes()
        except FileNotFoundError:
            there = b""
        except IsADirectoryError:
            self.move_aside(path, "not a file")
            there = b""
        if content and there and not whatever:
            with suppress(CorruptTaskError):
                if decode_head(there).revision > decode_head(content).revision:
                    return False
        return again or there != content

    def _end_segment(self, path: Path, *, is_broken: bool) -> None:
        # It may be out of the way since a try that failed after that.
        if is_broken and path.exists():
            self.move_aside(path, "a part that is broken, with whole ones behind it")
        else:
            path.unlink(missing_ok=True)

    def _scan(self, shard: Path, found: Found) -> None:
        for path in list(shard.iterdir()):
            if path.name.endswith(TEMPORARY) and path.is_file():
                path.unlink()
                continue
            if path.name.removesuffix(".json") in self._late:
                continue
            try:
                self._take(path, found)
            except CorruptTaskError as exc:
                self.move_aside(path, str(exc))

    def _take_late(self, found: Found) -> None:
        for task_id, content in self._late.items():
            if content:
                try:
                    self._admit(task_id, content, found)
                except CorruptTaskError:
                    log.exception("store.task_unreadable", task_id=task_id)

    def _take(self, path: Path, found: Found) -> None:
        task_id = path.name.removesuffix(".json")
        if not is_task_id(task_id) or path != self.path(task_id) or not path.is_file():
            raise CorruptTaskError("not the name of a task file in this folder")
        self._admit(task_id, path.read_bytes(), found)

    def _admit(self, task_id: str, content: bytes, found: Found) -> None:
        head = decode_head(content)
        if head.task_id != task_id:
            raise CorruptTaskError(f"it holds the task {head.task_id}")
        if not head.status.is_final:
            packet, written = decode(content, self._blobs)
            found.live.append(Stored(packet=packet, written=written))
        self._blobs.adopt(head.blobs)
        found.summaries.append(head.summary())

    def move_aside(self, path: Path, why: str) -> Path:
        """Move what is no task file to `corrupt/`, and answer where it is now. Raises `OSError`."""
        self.corrupt.mkdir(mode=0o700, exist_ok=True)
        target, number = self.corrupt / path.name, 0
        while target.exists():
            number += 1
            target = self.corrupt / f"{path.name}.{number}"
        path.rename(target)
        log.error("store.file_moved_aside", file=str(path), to=str(target), why=why)
        return target
