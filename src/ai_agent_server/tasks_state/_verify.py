"""The state folder read by somebody who does not own it, each task checked. Blocking; changes nothing.

A server may be at work in it meanwhile: files are whole at every moment, the journal may be ahead of
some, and what looks wrong is looked at again before it is called so.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from ai_agent_server.core.task_packet import TaskPacket, is_task_id
from ai_agent_server.core.verification import faults
from ai_agent_server.durable import TEMPORARY, translated
from ai_agent_server.errors import CorruptTaskError, StoreUnusableError
from ai_agent_server.tasks_state._archive import ARCHIVE, Archive
from ai_agent_server.tasks_state._files import Blobs, decode, decode_head
from ai_agent_server.tasks_state._folder import SHARDS, TaskFolder
from ai_agent_server.tasks_state._journal import frames, segments

LOOK_AGAIN_S = 0.5
"""A change that was under way is over after this long."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Something wrong with a file."""

    file: str
    """Below the state folder."""
    problem: str
    task_id: str = ""
    moved_to: str = ""
    """Where it was moved, "" where it still is."""


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What the folder holds, and what is wrong with it."""

    root: str
    tasks: int = 0
    live: int = 0
    events: int = 0
    ahead: int = 0
    """Tasks of which the journal has a newer state than the file."""
    archived: int = 0
    """Tasks in the archive."""
    set_aside: int = 0
    """Files that lie in `corrupt/`."""
    faults: tuple[Fault, ...] = ()


class TaskFiles:
    """Each task's newest state below `root`: what its file says, or what the journal has after that."""

    def __init__(self, root: Path) -> None:
        """Raises `StoreUnusableError` when nothing at `root` is a state folder."""
        self.root = root
        self.folder = TaskFolder(root)
        self.tasks = root / "tasks_state"
        self._blobs = Blobs(root / "blobs")
        self._journal: dict[str, bytes] = {}
        if not self.tasks.is_dir():
            raise StoreUnusableError(f"{root} is no state folder: there is no {self.tasks.name}/ in it")
        self.look()

    def look(self) -> None:
        """Read the journal as it is now."""
        newest: dict[str, bytes] = {}
        folder = self.root / "journal"
        for path in segments(folder) if folder.is_dir() else ():
            with suppress(FileNotFoundError):  # the server was done with it
                newest.update((frame.task_id, frame.content) for frame, _ in frames(path.read_bytes()))
        self._journal = newest

    def task_ids(self) -> Iterator[str]:
        """Every task that there is, oldest file name first."""
        there = {path.stem for path in self.tasks.glob("*/*.json") if is_task_id(path.stem)}
        yield from sorted(there | {task_id for task_id, content in self._journal.items() if content})

    def newest(self, task_id: str) -> tuple[bytes | None, bool]:
        """What the task's file is to say, and whether only the journal says so; None: it is gone."""
        frame = self._journal.get(task_id)
        try:
            content = self.folder.path(task_id).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return frame or None, bool(frame)
        if not frame or frame == content:
            return (None if frame == b"" else content), False
        with suppress(CorruptTaskError):
            if decode_head(content).revision >= decode_head(frame).revision:
                return content, False
        return frame, True

    def packet(self, content: bytes) -> TaskPacket:
        """The packet in a file, whole. Raises `CorruptTaskError`."""
        packet, written = decode(content, self._blobs)
        for digest in written.blobs:
            if not (self._blobs.root / digest).is_file():
                raise CorruptTaskError(f"blob {digest} is missing")
        return packet

    def packets(self) -> Iterator[TaskPacket]:
        """Every task, whole. Raises `CorruptTaskError`."""
        for task_id in self.task_ids():
            content, _ = self.newest(task_id)
            if content is not None:
                yield self.packet(content)

    def strangers(self) -> Iterator[Path]:
        """What lies among the task files and is none."""
        for entry in sorted(self.tasks.iterdir()):
            if entry.name not in SHARDS or not entry.is_dir():
                yield entry
                continue
            for path in sorted(entry.iterdir()):
                is_ours = is_task_id(path.stem) and path == self.folder.path(path.stem) and path.is_file()
                if not is_ours and not path.name.endswith(TEMPORARY):
                    yield path


def verify(root: Path, *, sleep: Callable[[float], None] = time.sleep) -> Verified:
    """Check every task below `root`. Raises `StoreUnusableError`, also for a newer release's files."""
    with translated(root):
        return _verified(root, sleep)


def _verified(root: Path, sleep: Callable[[float], None]) -> Verified:
    files = TaskFiles(root)
    keys: dict[str, str] = {}
    tasks = live = events = ahead = 0
    doubtful: list[str] = []
    for task_id in files.task_ids():
        content, is_ahead = files.newest(task_id)
        if content is None:
            continue
        tasks += 1
        ahead += is_ahead
        try:
            packet = _checked(files, task_id, content, keys)
        except CorruptTaskError:
            doubtful.append(task_id)
            continue
        live += not packet.status.is_final
        events += packet.revision
    found = []
    if doubtful:
        sleep(LOOK_AGAIN_S)
        files.look()
    for task_id in doubtful:
        content, _ = files.newest(task_id)
        if content is not None:
            try:
                _checked(files, task_id, content, keys)
            except CorruptTaskError as exc:
                file = str(files.folder.path(task_id).relative_to(root))
                found.append(Fault(task_id=task_id, file=file, problem=str(exc)))
    found += [
        Fault(file=str(path.relative_to(root)), problem="not the name of a task file in this folder")
        for path in files.strangers()
    ]
    archived, archive_faults = _archived(root)
    found += archive_faults
    corrupt = files.folder.corrupt
    return Verified(
        root=str(root),
        tasks=tasks,
        live=live,
        events=events,
        ahead=ahead,
        archived=archived,
        set_aside=len(list(corrupt.iterdir())) if corrupt.is_dir() else 0,
        faults=tuple(found),
    )


def _archived(root: Path) -> tuple[int, list[Fault]]:
    """How many tasks the archive has, and what is wrong with it."""
    archive, tasks, found = Archive(root / ARCHIVE), 0, []
    try:
        for packet in archive.packets():
            tasks += 1
            if wrong := faults(packet):
                file = str(Path(archive.place(packet.task_id)).relative_to(root))
                found.append(Fault(task_id=packet.task_id, file=file, problem="; ".join(wrong)))
    except CorruptTaskError as exc:
        found.append(Fault(file=ARCHIVE, problem=str(exc)))
    return tasks, found


def mend(root: Path) -> Verified:
    """The same, with every faulty file moved to `corrupt/`; nothing is removed, nothing written anew.

    The archive is left as it is.

    Raises `StoreUnusableError` while a server has the folder, or left a journal that its next start
    has to bring into the files first.
    """
    files = TaskFiles(root)
    with files.folder.locked():
        if (root / "journal").is_dir() and segments(root / "journal"):
            raise StoreUnusableError(
                f"{root} was not stopped cleanly: start the server once and stop it, then mend"
            )
        found = verify(root)
        moved = tuple(
            msgspec.structs.replace(
                fault, moved_to=str(files.folder.move_aside(root / fault.file, fault.problem))
            )
            if (root / fault.file).is_relative_to(files.tasks)
            else fault
            for fault in found.faults
        )
        set_aside = found.set_aside + sum(bool(fault.moved_to) for fault in moved)
        return msgspec.structs.replace(found, faults=moved, set_aside=set_aside)


def _checked(files: TaskFiles, task_id: str, content: bytes, keys: dict[str, str]) -> TaskPacket:
    decode_head(content)
    packet = files.packet(content)
    wrong = list(faults(packet))
    if packet.task_id != task_id:
        wrong.append(f"it holds the task {packet.task_id}")
    if packet.idempotency_key is not None:
        owner = keys.setdefault(packet.idempotency_key, task_id)
        if owner != task_id:
            wrong.append(f"its idempotency key is that of task {owner}")
    if wrong:
        raise CorruptTaskError("; ".join(wrong))
    return packet
