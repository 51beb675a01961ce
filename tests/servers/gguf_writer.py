"""GGUF files made from a real one: with fewer blocks, of another shape, with more words."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

ALIGNMENT = 32
STRING, ARRAY, UINT32 = 8, 9, 4
Q4_0, Q4_1 = 2, 3
SCALE_BYTES = 2
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
BLOCK: Mapping[int, tuple[int, int]] = {0: (1, 4), 1: (1, 2), Q4_0: (32, 18), Q4_1: (32, 20), 8: (32, 34)}
"""ggml's type -> weights in a block, bytes of it: F32, F16, Q4_0, Q4_1, Q8_0."""


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor's entry in the header."""

    name: str
    shape: tuple[int, ...]
    kind: int
    at: int = 0
    """In the data, in bytes."""

    @property
    def size_bytes(self) -> int:
        weights, taken_bytes = BLOCK[self.kind]
        total = 1
        for length in self.shape:
            total *= length
        return total // weights * taken_bytes


class GGUF(msgspec.Struct, frozen=True, kw_only=True):
    """A file's header, its metadata still as bytes (type and value)."""

    metadata: dict[str, bytes]
    tensors: tuple[Tensor, ...]
    data_at: int = 0

    def with_numbers(self, **numbers: int) -> "GGUF":
        """The same, with other numbers under `llama.<name>`."""
        changed = {f"llama.{name}": struct.pack("<II", UINT32, value) for name, value in numbers.items()}
        return msgspec.structs.replace(self, metadata={**self.metadata, **changed})

    def header(self) -> bytes:
        """The header's bytes, padded to where the data begins."""
        out = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.metadata))]
        out += [text(key) + value for key, value in self.metadata.items()]
        at = 0
        for tensor in self.tensors:
            out.append(text(tensor.name))
            out.append(
                struct.pack(f"<I{len(tensor.shape)}QIQ", len(tensor.shape), *tensor.shape, tensor.kind, at)
            )
            at = padded(at + tensor.size_bytes)
        whole = b"".join(out)
        return whole + bytes(padded(len(whole)) - len(whole))

    def write(self, target: Path, data: Callable[[Tensor], bytes] | None = None) -> Path:
        """Write it with each tensor's `data`; with none a file of holes, whose weights are all 0."""
        with target.open("wb") as file:
            file.write(self.header())
            for tensor in self.tensors:
                if data is None:
                    file.seek(padded(tensor.size_bytes), 1)
                else:
                    file.write(data(tensor).ljust(padded(tensor.size_bytes), b"\0"))
            file.truncate(file.tell())
        return target


def shortened(source: Path, target: Path, blocks: int, *, repacked: bool = False) -> Path:
    """The model of `source` with its first `blocks` alone: loads, runs, and writes words without sense.

    `repacked` has its Q4_1 weights as Q4_0, less what is added to each block of them; llama.cpp keeps those a
    second time in another order.
    """
    whole = source.read_bytes()
    header = parsed(whole)
    places = {each.name: each for each in header.tensors if (_block(each.name) or 0) < blocks}
    kept = tuple(
        msgspec.structs.replace(each, kind=Q4_0) if repacked and each.kind == Q4_1 else each
        for each in places.values()
    )
    short = msgspec.structs.replace(header, tensors=kept).with_numbers(block_count=blocks)

    def data(tensor: Tensor) -> bytes:
        place = places[tensor.name]
        at = header.data_at + place.at
        raw = whole[at : at + place.size_bytes]
        return raw if place.kind == tensor.kind else _without_minimum(raw)

    return short.write(target, data)


def _without_minimum(raw: bytes) -> bytes:
    """Blocks of Q4_1 (scale, minimum, weights) as blocks of Q4_0 (scale, weights)."""
    (_, before), (_, after) = BLOCK[Q4_1], BLOCK[Q4_0]
    out = bytearray(len(raw) // before * after)
    for at in range(after):
        out[at::after] = raw[at if at < SCALE_BYTES else at + SCALE_BYTES :: before]
    return bytes(out)


def parsed(whole: bytes) -> GGUF:
    """The header of a file that is known to be well made."""
    tensor_count, pair_count = struct.unpack_from("<QQ", whole, 8)
    at, metadata, tensors = 24, {}, []
    for _ in range(pair_count):
        key, began = _string(whole, at)
        at = began + 4 + _value_bytes(whole, began + 4, _uint32(whole, began))
        metadata[key] = whole[began:at]
    for _ in range(tensor_count):
        name, at = _string(whole, at)
        dims = _uint32(whole, at)
        *shape, kind, offset = struct.unpack_from(f"<{dims}QIQ", whole, at + 4)
        at += 4 + 8 * dims + 12
        tensors.append(Tensor(name=name, shape=tuple(shape), kind=kind, at=offset))
    return GGUF(metadata=metadata, tensors=tuple(tensors), data_at=padded(at))


def text(value: str) -> bytes:
    """A string as a header has it."""
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def padded(at: int) -> int:
    """The next place where data may begin."""
    return -(-at // ALIGNMENT) * ALIGNMENT


def _block(name: str) -> int | None:
    kind, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if kind == "blk" else None


def _uint32(whole: bytes, at: int) -> int:
    (value,) = struct.unpack_from("<I", whole, at)
    return int(value)


def _string(whole: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", whole, at)
    return whole[at + 8 : at + 8 + length].decode(), at + 8 + length


def _value_bytes(whole: bytes, at: int, kind: int) -> int:
    if kind in SCALAR_BYTES:
        return SCALAR_BYTES[kind]
    if kind == STRING:
        return _string(whole, at)[1] - at
    assert kind == ARRAY
    inner, length = struct.unpack_from("<IQ", whole, at)
    if inner in SCALAR_BYTES:
        return 12 + int(length) * SCALAR_BYTES[inner]
    end = at + 12
    for _ in range(length):
        end += _value_bytes(whole, end, inner)
    return end - at
