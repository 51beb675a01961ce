"""The write-ahead journal: what makes many changes of task files safe with one fsync. Blocking; for threads.

A segment is a row of frames: magic, length and CRC-32 of what follows, a task's id, the whole content
of its file (none: the task is deleted). The magic is no UTF-8, so no content can pretend to be a frame.
"""

import errno
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from zlib import crc32

import msgspec
import structlog

from ai_agent_server.core.task_packet import is_task_id
from ai_agent_server.durable import sync_files, sync_folder, write_all

SUFFIX = ".log"
SEGMENT_BYTES = 32 * 1024 * 1024
"""From here on the journal goes on in another segment, and the files that this one names are synced."""
_SUSPECT = "suspect"
"""A file that says so to the next start, which would find in memory what is not on the disk."""
_BACKLOG = 4
"""A segment is at most so many times as long: then its writer waits for the checkpoint of the one before."""
_MAGIC = b"\xfftj1"
_HEADER = struct.Struct(">4sII")
_ID_BYTES = 36

log = structlog.get_logger(__name__)


class Frame(msgspec.Struct, frozen=True):
    """One change: the content that the task's file is to have, b"" where it is to be gone."""

    task_id: str
    content: bytes


class _Segment(msgspec.Struct, kw_only=True, eq=False):
    path: Path
    descriptor: int
    size_bytes: int = 0
    task_ids: set[str]
    end: Callable[[Path], None]
    """What becomes of it when the files that it names are safe."""
    is_suspect: bool = False
    """Whether an fsync of its files failed. Linux says so once: the next one succeeds, and what was to be
    written may be lost (https://wiki.postgresql.org/wiki/Fsync_Errors)."""


class Journal:
    """Frames in `folder/<number>.log`, until the files that they name are safe themselves.

    Owned by one thread at a time. `file_of` says where a task's file is; `catch_up` brings every file
    to its last frame, and raises `OSError` where it cannot; `write_again` is given the last frames that
    `catch_up` is to write once more, whatever the files seem to say.
    """

    def __init__(
        self,
        folder: Path,
        file_of: Callable[[str], str],
        catch_up: Callable[[], None],
        write_again: Callable[[Mapping[str, bytes]], None],
        *,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self.folder = folder
        self._file_of = file_of
        self._catch_up = catch_up
        self._write_again = write_again
        self._segment_bytes = segment_bytes
        self._number = 0
        self._segment: _Segment | None = None
        self._older: list[_Segment] = []
        self._checkpoint: threading.Thread | None = None
        self._doubtful = False

    @property
    def is_suspect(self) -> bool:
        """Whether an fsync of files that it names failed, now or in the run before."""
        return (self.folder / _SUSPECT).exists()

    @property
    def is_empty(self) -> bool:
        """Whether it takes no space that `settle` could free."""
        return self._segment is None and not self._older

    def names(self, task_id: str) -> bool:
        """Whether a start would find something of this task in it."""
        return any(task_id in segment.task_ids for segment in (self._segment, *self._older) if segment)

    def adopt(self, left: Sequence[Path], task_ids: Iterable[str], *, end: Callable[[Path], None]) -> None:
        """Take over the segments that a crash left, oldest first, with what removes one at its end.

        `settle` ends them; until then nothing is taken. Raises `OSError`.
        """
        named = set(task_ids)
        for path in left:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            size_bytes = os.fstat(descriptor).st_size
            self._older.append(
                _Segment(path=path, descriptor=descriptor, size_bytes=size_bytes, task_ids=named, end=end)
            )
            self._number = max(self._number, int(path.stem) if path.stem.isdecimal() else 0)
        self._doubtful = True

    def append(self, frames: Sequence[Frame]) -> None:
        """Make the frames safe, all with one fsync. The files may be changed when this returns.

        Raises `OSError`; then none of them is in the journal any more.
        """
        if self._doubtful:
            self.settle()
        self._go_on()
        content = b"".join(_encoded(frame) for frame in frames)
        try:
            segment = self._segment or self._begin()
            write_all(segment.descriptor, content)
            os.fdatasync(segment.descriptor)
        except OSError:
            self._doubtful = True
            self._cut()
            self.settle()
            raise
        segment.size_bytes += len(content)
        segment.task_ids.update(frame.task_id for frame in frames)

    def settle(self, *, refused: bool = False) -> None:
        """Bring the files up to date, make them safe themselves, and remove the journal.

        With `refused` the newest frames say what did not become true. Raises `OSError`; then nothing is
        taken until this succeeds.
        """
        self._doubtful = True
        self._join()
        if refused and any(segment.is_suspect for segment in self._older):
            raise OSError(errno.EIO, "files are to be written again from the journal")
        self._doubt()
        self._catch_up()
        if self._segment is not None:
            self._older.append(self._segment)
            self._segment = None
        while self._older:
            self._retire(self._older[0])
            del self._older[0]
        self._clear()
        self._doubtful = False

    def close(self) -> None:
        """Settle, and let go; what cannot be settled stays for the next start. Raises `OSError`."""
        try:
            self.settle()
            with suppress(OSError):  # somebody else's file in it is left alone
                self.folder.rmdir()
        finally:
            for segment in self._older:
                os.close(segment.descriptor)
            self._older.clear()

    def _begin(self) -> _Segment:
        self._number += 1
        path = self.folder / f"{self._number:08}{SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        segment = _Segment(path=path, descriptor=os.open(path, flags, 0o600), task_ids=set(), end=_unlink)
        self._segment = segment
        sync_folder(self.folder)
        return segment

    def _cut(self) -> None:
        """Take away what was refused, so that no start finds it should `settle` fail."""
        if self._segment is not None:
            with suppress(OSError):
                os.ftruncate(self._segment.descriptor, self._segment.size_bytes)
                os.fdatasync(self._segment.descriptor)

    def _go_on(self) -> None:
        """Leave a full segment to a checkpoint in the background, one at a time."""
        segment = self._segment
        if segment is None or segment.size_bytes < self._segment_bytes:
            return
        if self._checkpoint is not None and self._checkpoint.is_alive():
            if segment.size_bytes < _BACKLOG * self._segment_bytes:
                return
            self._join()
        self._doubt()
        self._catch_up()
        self._older.append(segment)
        self._segment = None
        self._checkpoint = threading.Thread(target=self._retire_older, name="task-checkpoint", daemon=True)
        self._checkpoint.start()

    def _doubt(self) -> None:
        """Have every file of a suspect segment written again."""
        suspect = [segment for segment in self._older if segment.is_suspect]
        if not suspect:
            return
        newest: dict[str, bytes] = {}
        for segment in (*self._older, self._segment):
            if segment is not None and segment.path.exists():
                for frame, _ in frames(segment.path.read_bytes()[: segment.size_bytes]):
                    newest[frame.task_id] = frame.content
        named = set().union(*(segment.task_ids for segment in suspect))
        self._write_again({task_id: newest[task_id] for task_id in named & newest.keys()})
        for segment in suspect:
            segment.is_suspect = False

    def _join(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.join()
            self._checkpoint = None

    def _retire_older(self) -> None:
        while self._older:
            try:
                self._retire(self._older[0])
            except OSError as exc:
                # It stays, and with it all that it keeps safe; the next checkpoint tries again.
                log.warning("store.checkpoint_failed", segment=str(self._older[0].path), problem=str(exc))
                return
            del self._older[0]
        with suppress(OSError):
            self._clear()

    def _clear(self) -> None:
        (self.folder / _SUSPECT).unlink(missing_ok=True)

    def _retire(self, segment: _Segment) -> None:
        try:
            sync_files(self._file_of(task_id) for task_id in segment.task_ids)
        except OSError:
            segment.is_suspect = True
            with suppress(OSError):
                (self.folder / _SUSPECT).touch()
            raise
        # Its unlink is safe before the next one's: what is left is always the journal's newer part.
        segment.end(segment.path)
        sync_folder(self.folder)
        os.close(segment.descriptor)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def segments(folder: Path) -> list[Path]:
    """The segments that a crash left, oldest first."""
    return sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)


def frames(content: bytes) -> Iterator[tuple[Frame, bool]]:
    """The whole frames of a segment, in order, each with whether something broken lies before it.

    What is broken at the end is a write that a crash cut off, and is left out: nobody was told of it.
    """
    broken = False
    offset = 0
    while offset < len(content):
        frame = _frame_at(content, offset)
        if frame is None:
            broken = True
            following = content.find(_MAGIC, offset + 1)
            offset = following if following >= 0 else len(content)
            continue
        yield frame, broken
        broken = False
        offset += _HEADER.size + _ID_BYTES + len(frame.content)


def _encoded(frame: Frame) -> bytes:
    task_id = frame.task_id.encode("ascii")
    length = _ID_BYTES + len(frame.content)
    check = crc32(frame.content, crc32(task_id, length))
    return b"".join((_HEADER.pack(_MAGIC, length, check), task_id, frame.content))


def _frame_at(content: bytes, offset: int) -> Frame | None:
    body = offset + _HEADER.size
    if body + _ID_BYTES > len(content):
        return None
    magic, length, check = _HEADER.unpack_from(content, offset)
    if magic != _MAGIC or length < _ID_BYTES or body + length > len(content):
        return None
    if crc32(memoryview(content)[body : body + length], length) != check:
        return None
    task_id = content[body : body + _ID_BYTES].decode("ascii", "replace")
    return Frame(task_id, content[body + _ID_BYTES : body + length]) if is_task_id(task_id) else None
