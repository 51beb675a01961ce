"""What a GGUF file says of its model before its weights: the metadata, and which tensors there are.

The form is version 2 or 3 of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, little-endian. A
file is somebody's download: whatever its bytes are, the answer is a `Header` or a `GGUFError`, and what
is kept of it is bounded.
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO, TypeAlias

import msgspec

MAX_PAIRS = 10_000
MAX_TENSORS = 100_000
MAX_STRINGS = 8_000_000
"""In all arrays together: eight times what a vocabulary of 256,000 words and its merges are."""
MAX_NAME_BYTES = 1024
KEPT_STRING_BYTES = 256
KEPT_NUMBERS = 1024
"""An array that is longer is no setting of each block: its length is kept, its numbers are not."""
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

Value: TypeAlias = bool | int | float | str | tuple[bool | int | float, ...]


class GGUFError(ValueError):
    """The file is no GGUF file that can be read; says where and why."""


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor's entry."""

    name: str
    shape: tuple[int, ...]
    """The length of a row first, as ggml has it."""
    kind: int
    """ggml's number for how its weights are stored."""
    size_bytes: int
    """Up to the next tensor, so with the padding."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What was found."""

    metadata: dict[str, Value]
    """Less the long strings and arrays."""
    lengths: dict[str, int]
    """Of every array."""
    tensors: tuple[Tensor, ...]
    data_bytes: int
    """All weights."""

    @property
    def architecture(self) -> str:
        """The kind of model, as `llama`; "" where the file does not say."""
        found = self.metadata.get("general.architecture")
        return found if isinstance(found, str) else ""

    def setting(self, name: str) -> Value | None:
        """What the architecture's own metadata has under `name`, as `block_count`."""
        return self.metadata.get(f"{self.architecture}.{name}")


def read_header(path: Path) -> Header:
    """The header of the file at `path`. Raises `GGUFError` and `OSError`.

    Reads files, and passes over a vocabulary: call it off the event loop.
    """
    with path.open("rb", buffering=1 << 20) as file:
        return _Reader(file, os.fstat(file.fileno()).st_size).header()


class _Reader:
    """A place in the file that never goes past its end."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        self._file, self._size_bytes = file, size_bytes
        self._at = 0
        self._strings_left = MAX_STRINGS

    def header(self) -> Header:
        if self._take(4) != b"GGUF":
            raise GGUFError("it does not begin with GGUF")
        version = self._number("I")
        if version not in {2, 3}:
            raise GGUFError(f"its version is {version}; 2 and 3, little-endian, can be read")
        tensor_count = self._bounded("Q", MAX_TENSORS, "tensors")
        pair_count = self._bounded("Q", MAX_PAIRS, "pairs of metadata")
        metadata: dict[str, Value] = {}
        lengths: dict[str, int] = {}
        for _ in range(pair_count):
            key, kind = self._name(), self._number("I")
            value = self._array(key, lengths) if kind == _ARRAY else self._value(kind)
            if value is not None:
                metadata[key] = value
        entries = [self._entry() for _ in range(tensor_count)]
        data_bytes = self._data_bytes(metadata) if entries else 0
        return Header(
            metadata=metadata, lengths=lengths, tensors=_sized(entries, data_bytes), data_bytes=data_bytes
        )

    def _entry(self) -> tuple[int, str, tuple[int, ...], int]:
        name, dimensions = self._name(), self._bounded("I", MAX_DIMENSIONS, "dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        kind = self._number("I")
        return self._number("Q"), name, shape, kind

    def _data_bytes(self, metadata: dict[str, Value]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise GGUFError(f"its general.alignment is {alignment!r}")
        return max(0, self._size_bytes - -(-self._at // alignment) * alignment)

    def _value(self, kind: int) -> Value | None:
        if kind == _STRING:
            length = self._number("Q")
            if length > KEPT_STRING_BYTES:
                self._skip(length)
                return None
            return self._take(length).decode("utf-8", "replace")
        return self._number(_scalar(kind))

    def _array(self, key: str, lengths: dict[str, int]) -> Value | None:
        kind, length = self._number("I"), self._number("Q")
        lengths[key] = length
        if kind == _STRING:
            if length > self._strings_left:
                raise GGUFError(f"{key[:80]!r} has {length} strings: no vocabulary has as many")
            self._strings_left -= length
            self._skip_strings(length)
            return None
        form = _scalar(kind)
        size_bytes = length * struct.calcsize(f"<{form}")
        if length > KEPT_NUMBERS:
            self._skip(size_bytes)
            return None
        return struct.unpack(f"<{length}{form}", self._take(size_bytes))

    def _skip_strings(self, count: int) -> None:
        """In a loop of its own: a vocabulary is most of the time that a header takes."""
        read, seek, left_bytes = self._file.read, self._file.seek, self._size_bytes - self._at
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            left_bytes -= 8 + length
            if left_bytes < 0:
                raise GGUFError(f"it ends inside of its header: {-left_bytes} bytes are missing of a string")
            seek(length, os.SEEK_CUR)
        self._at = self._size_bytes - left_bytes

    def _name(self) -> str:
        return self._take(self._bounded("Q", MAX_NAME_BYTES, "bytes of a name")).decode("utf-8", "replace")

    def _bounded(self, form: str, most: int, what: str) -> int:
        found = self._number(form)
        if found > most:
            raise GGUFError(f"at byte {self._at}: {found} {what}, where at most {most} are read")
        return found

    def _number(self, form: str) -> int:
        (found,) = struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))
        return found  # type: ignore[no-any-return]

    def _take(self, size_bytes: int) -> bytes:
        self._advance(size_bytes)
        taken = self._file.read(size_bytes)
        if len(taken) < size_bytes:
            raise GGUFError("it became shorter while it was read")
        return taken

    def _skip(self, size_bytes: int) -> None:
        self._advance(size_bytes)
        self._file.seek(size_bytes, os.SEEK_CUR)

    def _advance(self, size_bytes: int) -> None:
        if size_bytes > self._size_bytes - self._at:
            raise GGUFError(
                f"it ends inside of its header: at byte {self._at} there should be {size_bytes} more"
            )
        self._at += size_bytes


def _scalar(kind: int) -> str:
    form = _SCALARS.get(kind)
    if form is None:
        raise GGUFError(f"it has a value of the unknown kind {kind}")
    return form


def _sized(entries: list[tuple[int, str, tuple[int, ...], int]], data_bytes: int) -> tuple[Tensor, ...]:
    """The tensors in the order of the data. Sizes by place, so that a new kind of weights needs no table."""
    entries.sort()
    places = [at for at, *_ in entries]
    return tuple(
        Tensor(name=name, shape=shape, kind=kind, size_bytes=max(0, min(end, data_bytes) - at))
        for (at, name, shape, kind), end in zip(entries, [*places[1:], data_bytes], strict=False)
    )
