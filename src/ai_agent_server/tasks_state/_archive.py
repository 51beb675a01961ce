"""The archive: ended tasks that left the state folder's files, one JSON line each. Blocking; for threads.

`archive/YYYY-MM.jsonl.gz` has the tasks that ended in that month, and `zcat` reads it. A batch is one
gzip member, and is in the archive from when its line in `YYYY-MM.index` is safe: what a kill left
behind that is cut off by the next batch, and its tasks are still where they were.
"""

import gzip
import os
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import msgspec

from ai_agent_server.core.task_packet import TaskPacket, is_task_id
from ai_agent_server.durable import sync_folder, translated, write_all
from ai_agent_server.errors import CorruptTaskError, StoreUnusableError

ARCHIVE = "archive"
"""The folder below the state folder."""
_TEXT = ".jsonl.gz"
_INDEX = ".index"
_TASK_ID = re.compile(rb'"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"')
_lines = msgspec.json.Encoder()
_packets = msgspec.json.Decoder(TaskPacket)


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A line of an index: the tasks of one gzip member, and where that ends."""

    end_bytes: int
    task_ids: tuple[str, ...]


class Month(msgspec.Struct, frozen=True, kw_only=True):
    """What one file of the archive holds."""

    file: str
    tasks: int
    size_bytes: int


class _Contents(msgspec.Struct, frozen=True):
    """What is remembered of an index, eight bytes a task: the file's time and size, and the marks."""

    stamp: tuple[int, int]
    marks: "array[int]"


_batches = msgspec.json.Decoder(Batch)


class Archive:
    """The archive in `folder`, which need not be there yet. Changed by one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._contents: dict[Path, _Contents] = {}

    def add(self, packets: Sequence[TaskPacket]) -> None:
        """Keep ended tasks; they are safe when this returns. Raises `StoreError` children.

        Of those of different months some may be kept when it raises.
        """
        with translated(self.folder):
            for month, batch in groupby(sorted(packets, key=_month), key=_month):
                self._append(month, tuple(batch))

    def place(self, task_id: str) -> str:
        """The file that has the task, "" when none has. Raises `StoreError` children."""
        if not is_task_id(task_id):
            return ""
        with translated(self.folder):
            for index in self._indexes():
                if self._may_name(index, task_id) and f'"{task_id}"'.encode() in _whole_lines(index):
                    return str(self._text(index))
        return ""

    def _may_name(self, index: Path, task_id: str) -> bool:
        """False where the index does not. It is read again only where the file has changed."""
        status = index.stat()
        stamp = status.st_mtime_ns, status.st_size
        known = self._contents.get(index)
        if known is None or known.stamp != stamp:
            marks = sorted(map(_mark, _TASK_ID.findall(_whole_lines(index))))
            known = self._contents[index] = _Contents(stamp, array("Q", marks))
        mark = _mark(task_id.encode())
        at = bisect_left(known.marks, mark)
        return at < len(known.marks) and known.marks[at] == mark

    def read(self, task_id: str) -> TaskPacket | None:
        """The task as it was when it was archived, the newest if its id was used again."""
        found = None
        with translated(self.folder):
            for index in self._indexes():
                start = 0
                for batch in self._read_index(index):
                    if task_id in batch.task_ids:
                        held = self._member(self._text(index), start, batch)
                        found = next((packet for packet in held if packet.task_id == task_id), found)
                    start = batch.end_bytes
        return found

    def last_batches(self) -> Iterator[TaskPacket]:
        """What was added last in each month: a kill may have left it in the state folder too."""
        with translated(self.folder):
            for index in self._indexes():
                batches = self._read_index(index)
                if batches:
                    start = batches[-2].end_bytes if len(batches) > 1 else 0
                    yield from self._member(self._text(index), start, batches[-1])

    def packets(self) -> Iterator[TaskPacket]:
        """Every task, the oldest month first. Raises `CorruptTaskError` for a file that was changed."""
        with translated(self.folder):
            for index in self._indexes():
                start = 0
                for batch in self._read_index(index):
                    yield from self._member(self._text(index), start, batch)
                    start = batch.end_bytes

    def months(self) -> tuple[Month, ...]:
        """What there is."""
        with translated(self.folder):
            return tuple(
                Month(
                    file=str(self._text(index)),
                    tasks=sum(len(batch.task_ids) for batch in batches),
                    size_bytes=batches[-1].end_bytes if batches else 0,
                )
                for index in self._indexes()
                for batches in (self._read_index(index),)
            )

    def _append(self, month: str, packets: Sequence[TaskPacket]) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(self.folder.parent)
        text, index = self.folder / f"{month}{_TEXT}", self.folder / f"{month}{_INDEX}"
        batches = self._read_index(index) if index.exists() else ()
        kept_bytes = batches[-1].end_bytes if batches else 0
        content = gzip.compress(b"".join(_lines.encode(packet) + b"\n" for packet in packets), mtime=0)
        _write_at(text, kept_bytes, content)
        line = _lines.encode(
            Batch(end_bytes=kept_bytes + len(content), task_ids=tuple(packet.task_id for packet in packets))
        )
        _write_at(index, len(_whole_lines(index)) if index.exists() else 0, line + b"\n")

    def _indexes(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{_INDEX}"))

    def _text(self, index: Path) -> Path:
        return index.with_name(index.name.removesuffix(_INDEX) + _TEXT)

    def _read_index(self, index: Path) -> tuple[Batch, ...]:
        try:
            return tuple(map(_batches.decode, _whole_lines(index).splitlines()))
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise CorruptTaskError(f"{index}: {exc}") from exc

    def _member(self, text: Path, start: int, batch: Batch) -> list[TaskPacket]:
        try:
            with text.open("rb") as file:
                file.seek(start)
                lines = gzip.decompress(file.read(batch.end_bytes - start)).splitlines()
            found = list(map(_packets.decode, lines))
        except (EOFError, gzip.BadGzipFile, msgspec.DecodeError, UnicodeDecodeError, ValueError) as exc:
            raise CorruptTaskError(f"{text} at byte {start}: {exc}") from exc
        except FileNotFoundError as exc:
            raise CorruptTaskError(f"{text} is missing") from exc
        if tuple(packet.task_id for packet in found) != batch.task_ids:
            raise CorruptTaskError(f"{text} at byte {start}: not the tasks that its index names")
        return found


def _mark(task_id: bytes) -> int:
    """The half of a UUID that is random."""
    return int(task_id.replace(b"-", b"")[16:], 16)


def _month(packet: TaskPacket) -> str:
    return f"{packet.updated_at or packet.created_at:%Y-%m}"


def _whole_lines(index: Path) -> bytes:
    """The index without a last line that a kill cut off."""
    content = index.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _write_at(path: Path, offset: int, content: bytes) -> None:
    """Make `content` what follows the first `offset` bytes of the file, safely. Raises `OSError`."""
    is_new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_size < offset:
            raise StoreUnusableError(f"{path} is shorter than what was written to it")
        os.ftruncate(descriptor, offset)
        os.lseek(descriptor, offset, os.SEEK_SET)
        write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        sync_folder(path.parent)
