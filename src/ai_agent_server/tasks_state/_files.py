"""Task files: how a packet becomes text and comes back, with its large objects in files beside it."""

import hashlib
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.task_packet import (
    SCHEMA_VERSION,
    AnyTaskEvent,
    Canceled,
    Completed,
    Failed,
    FeedbackReceived,
    StepFinished,
    TaskPacket,
    TaskSummary,
)
from ai_agent_server.durable import place, sync_folder
from ai_agent_server.errors import CorruptTaskError, StoreUnusableError

BLOB_BYTES = 256 * 1024
"""A JSON object whose text is longer than this is kept in a file of its own."""
_REFERENCE = "$blob"
_ALGORITHM = "sha256:"


Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal; a blob's file has no other name."""


class Head(TaskSummary, frozen=True, kw_only=True):
    """What is read of a task's file at the start."""

    schema_version: int
    blobs: tuple[Digest, ...] = ()

    def summary(self) -> TaskSummary:
        """The summary alone: what is listed is encoded by its class."""
        return TaskSummary(**{name: getattr(self, name) for name in TaskSummary.__struct_fields__})


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a task's file that do not change any more, as they stand in it: encoded only once."""

    payload: msgspec.Raw
    history: tuple[msgspec.Raw, ...]
    blobs: frozenset[Digest] = frozenset()
    """Every blob that the file refers to."""


_encoder = msgspec.json.Encoder()
_packets = msgspec.json.Decoder(TaskPacket)
_heads = msgspec.json.Decoder(Head)
_parts = msgspec.json.Decoder(Written)


class Blobs:
    """Large JSON objects, each in a file named by the SHA-256 of its text, as long as a task uses it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._users: Counter[str] = Counter()
        # Held over the write too: a blob that one thread lets go of may be what another begins to use.
        self._lock = threading.Lock()

    def adopt(self, digests: Iterable[str]) -> None:
        """Count a task that was found on disk as a user."""
        with self._lock:
            self._users.update(digests)

    def keep(self, content: bytes) -> str:
        """Put `content` on disk if it is not there, count one user more, answer its digest."""
        digest = hashlib.sha256(content).hexdigest()
        with self._lock:
            if not self._users[digest]:
                place(self.root / digest, content)
                sync_folder(self.root)
            self._users[digest] += 1
        return digest

    def drop(self, digests: Iterable[str]) -> None:
        """Count one user less; what nobody uses is removed. A file that stays is swept at the next start."""
        with self._lock:
            for digest in digests:
                self._users[digest] -= 1
                if self._users[digest] <= 0:
                    del self._users[digest]
                    with suppress(OSError):
                        (self.root / digest).unlink()

    def read(self, digest: str) -> JSONObject:
        """The object. Raises `CorruptTaskError` when the file is not what its name says."""
        try:
            content = (self.root / digest).read_bytes()
        except FileNotFoundError as exc:
            raise CorruptTaskError(f"blob {digest} is missing") from exc
        if hashlib.sha256(content).hexdigest() != digest:
            raise CorruptTaskError(f"blob {digest} was changed")
        return msgspec.json.decode(content, type=dict)

    def sweep(self) -> None:
        """Remove what no task uses. Raises `OSError`."""
        for path in list(self.root.iterdir()):
            if not self._users[path.name]:
                path.unlink()


def encode(packet: TaskPacket, before: Written | None, blobs: Blobs) -> tuple[bytes, Written]:
    """The text of the packet's file. `before` is what the last write of the same task answered.

    Blobs that the new events need are on disk when this returns. Raises `OSError`; then no new blob
    is counted.
    """
    new: list[str] = []
    try:
        payload = before.payload if before else _spilled(packet.payload, new, blobs)
        earlier = before.history if before else ()
        history = (*earlier, *(_event(event, new, blobs) for event in packet.history[len(earlier) :]))
        document: dict[str, object] = msgspec.structs.asdict(packet)
        document["payload"], document["history"] = payload, history
        if packet.result is not None:
            document["result"] = _spilled(packet.result, new, blobs)
        digests = (before.blobs if before else frozenset()) | frozenset(new)
        if digests:
            document["blobs"] = sorted(digests)
        content = _encoder.encode(document)
    except BaseException:
        blobs.drop(new)
        raise
    if new:  # one task counts once as a user of a blob, however often it refers to it
        surplus = Counter(new)
        surplus.subtract(digests - (before.blobs if before else frozenset()))
        blobs.drop((+surplus).elements())
    return content, Written(payload=payload, history=history, blobs=digests)


def decode(content: bytes, blobs: Blobs) -> tuple[TaskPacket, Written]:
    """The packet in a file, and its parts as they stand there. Raises `CorruptTaskError`."""
    try:
        packet, written = _packets.decode(content), _parts.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise CorruptTaskError(str(exc)) from exc
    if packet.revision != len(packet.history):
        raise CorruptTaskError(f"revision is {packet.revision}, but there are {len(packet.history)} events")
    return (_joined(packet, written.blobs, blobs) if written.blobs else packet), written


def blobs_in(content: bytes) -> frozenset[str]:
    """The blobs that a file refers to; none when it cannot be read, and they stay."""
    try:
        return _parts.decode(content).blobs
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return frozenset()


def decode_head(content: bytes) -> Head:
    """The summary in a file. Raises `CorruptTaskError`, or `StoreUnusableError` for a newer form."""
    try:
        head = _heads.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise CorruptTaskError(str(exc)) from exc
    if head.created_at.tzinfo is None:
        raise CorruptTaskError("created_at has no time zone")
    if head.schema_version > SCHEMA_VERSION:
        raise StoreUnusableError(
            f"task {head.task_id} was written by a newer release "
            f"(form {head.schema_version}; this one reads {SCHEMA_VERSION})"
        )
    return head


def _event(event: AnyTaskEvent, new: list[str], blobs: Blobs) -> msgspec.Raw:
    text = _encoder.encode(event)
    fields = {name: getattr(event, name) for name in _OBJECTS if hasattr(event, name)}
    if len(text) <= BLOB_BYTES and not any(_is_reference(value) for value in fields.values()):
        return msgspec.Raw(text)
    document = msgspec.json.decode(text, type=dict[str, object])
    for name, value in fields.items():
        if value is not None:
            document[name] = _spilled(value, new, blobs)
    return msgspec.Raw(_encoder.encode(document))


_OBJECTS = ("output", "result")
"""The fields of events that hold a JSON object."""


def _spilled(value: JSONObject, new: list[str], blobs: Blobs) -> msgspec.Raw:
    """The text of `value`, or of a reference to its blob."""
    text = _encoder.encode(value)
    if len(text) <= BLOB_BYTES and not _is_reference(value):
        return msgspec.Raw(text)
    digest = blobs.keep(text)
    new.append(digest)
    return msgspec.Raw(_encoder.encode({_REFERENCE: _ALGORITHM + digest}))


def _is_reference(value: JSONObject | None) -> bool:
    # What a client sent in this form is kept as a blob itself, so that it cannot name another's.
    return value is not None and len(value) == 1 and _REFERENCE in value


def _joined(packet: TaskPacket, digests: frozenset[str], blobs: Blobs) -> TaskPacket:
    def whole(value: JSONObject | None) -> JSONObject | None:
        if not _is_reference(value):
            return value
        assert value is not None
        digest = str(value[_REFERENCE]).removeprefix(_ALGORITHM)
        if digest not in digests:
            raise CorruptTaskError(f"task {packet.task_id} refers to a blob that it does not list")
        return blobs.read(digest)

    def whole_event(event: AnyTaskEvent) -> AnyTaskEvent:
        match event:
            case StepFinished() | FeedbackReceived():
                return msgspec.structs.replace(event, output=whole(event.output))
            case Completed() | Failed() | Canceled():
                return msgspec.structs.replace(event, result=whole(event.result))
            case _:
                return event

    payload = whole(packet.payload)
    assert payload is not None
    return msgspec.structs.replace(
        packet,
        payload=payload,
        history=tuple(whole_event(event) for event in packet.history),
        result=whole(packet.result),
    )
