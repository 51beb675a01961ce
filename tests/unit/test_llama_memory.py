"""What a model will take, foretold: llama.cpp's own figures for models of these shapes are in the tables."""

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_agent_server.llm_engines.local._gguf_header import Header, Tensor, Value
from ai_agent_server.llm_engines.local._llama_memory import Needed, needed

MIB = 2**20
SMOLLM: dict[str, Value] = {
    "block_count": 30,
    "embedding_length": 576,
    "feed_forward_length": 1536,
    "attention.head_count": 9,
    "attention.head_count_kv": 3,
}
WIDE: dict[str, Value] = {
    "block_count": 4,
    "embedding_length": 2048,
    "feed_forward_length": 8192,
    "attention.head_count": 32,
    "attention.head_count_kv": 8,
}
LONG_HEADS: dict[str, Value] = {
    **SMOLLM,
    "block_count": 4,
    "attention.head_count": 32,
    "attention.head_count_kv": 8,
    "attention.key_length": 128,
    "attention.value_length": 128,
}
GEMMA: dict[str, Value] = {
    "block_count": 12,
    "embedding_length": 1152,
    "feed_forward_length": 6912,
    "attention.head_count": 4,
    "attention.head_count_kv": 1,
    "attention.key_length": 256,
    "attention.value_length": 256,
    "attention.sliding_window": 512,
}
EXPERTS: dict[str, Value] = {
    "block_count": 4,
    "embedding_length": 1024,
    "feed_forward_length": 3072,
    "expert_feed_forward_length": 768,
    "expert_used_count": 8,
    "attention.head_count": 16,
    "attention.head_count_kv": 4,
    "attention.key_length": 128,
    "attention.value_length": 128,
}


def header(architecture: str, said: dict[str, Value], *tensors: Tensor, words: int = 0) -> Header:
    metadata: dict[str, Value] = {f"{architecture}.{name}": value for name, value in said.items()}
    return Header(
        metadata={"general.architecture": architecture, **metadata},
        lengths={"tokenizer.ggml.tokens": words},
        tensors=tensors,
        data_bytes=sum(each.size_bytes for each in tensors),
    )


def need(of: Header, **load: Any) -> Needed:
    found = maybe(of, **load)
    assert found is not None
    return found


def maybe(
    of: Header, *, tokens: int = 1024, slots: int = 1, on_gpu: bool = False, machine: str = "x86_64"
) -> Needed | None:
    return needed(of, context_tokens=tokens, slots=slots, batch_tokens=512, on_gpu=on_gpu, machine=machine)


@pytest.mark.parametrize(
    ("model", "tokens", "slots", "context_mib", "compute_mib"),
    [
        (("llama", SMOLLM), 1024, 2, 45.0, 15.6),
        (("llama", SMOLLM), 8192, 4, 720.0, 22.6),
        (("llama", SMOLLM), 1000, 1, 22.5, 15.6),
        (("llama", WIDE), 8192, 1, 64.0, 76.0),
        (("llama", LONG_HEADS), 512, 1, 8.0, 22.1),
        (("llama", LONG_HEADS), 8192, 1, 128.0, 29.6),
        (("gemma3", GEMMA), 4096, 2, 36.0, 56.8),
        (("gemma3", GEMMA), 8192, 1, 26.0, 60.8),
        (("qwen3moe", EXPERTS), 2048, 1, 16.0, 48.0),
    ],
)
def test_context_and_computation_are_what_llama_cpp_reserves(
    model: tuple[str, dict[str, Value]], tokens: int, slots: int, context_mib: float, compute_mib: float
) -> None:
    found = need(header(*model), tokens=tokens, slots=slots)
    assert found.context / MIB == context_mib
    assert found.compute / MIB == pytest.approx(compute_mib, rel=0.02)


def test_the_file_says_which_blocks_see_a_window_alone() -> None:
    pattern = {**GEMMA, "attention.sliding_window_pattern": (True,) * 6 + (False,) * 6}
    assert need(header("gemma4", pattern), tokens=8192).context == 6 * (8192 + 1024) * 512 * 2
    every_third = {**GEMMA, "attention.sliding_window_pattern": 3}
    assert need(header("gemma3", every_third), tokens=8192).context == (4 * 8192 + 8 * 1024) * 512 * 2


def test_a_window_of_a_model_whose_pattern_nobody_knows_counts_as_the_whole_context() -> None:
    assert need(header("novel", GEMMA), tokens=8192).context == 12 * 8192 * 512 * 2


def test_each_block_has_its_own_heads() -> None:
    some = {**SMOLLM, "block_count": 3, "attention.head_count_kv": (3, 0, 1)}
    assert need(header("llama", some)).context == 4 * 1024 * 128 * 2


def test_a_model_that_only_reads_keeps_no_context() -> None:
    assert need(header("bert", {**SMOLLM, "attention.causal": False})).context == 0


def test_keys_made_of_a_latent_vector_are_values_too() -> None:
    latent = {
        **SMOLLM,
        "block_count": 1,
        "attention.head_count_kv": 1,
        "attention.key_length": 576,
        "attention.value_length": 512,
        "attention.key_length_mla": 192,
    }
    assert need(header("deepseek2", latent)).context == 1024 * 576 * 2


def test_weights_that_suit_the_processor_in_another_order_are_there_twice() -> None:
    tensors = (
        Tensor(name="token_embd.weight", shape=(256, 64), kind=2, size_bytes=1),
        Tensor(name="blk.0.attn_norm.weight", shape=(256,), kind=0, size_bytes=10),
        Tensor(name="blk.0.attn_q.weight", shape=(256, 64), kind=2, size_bytes=100),
        Tensor(name="blk.0.attn_k.weight", shape=(256, 12), kind=2, size_bytes=1000),
        Tensor(name="blk.0.ffn_up.weight", shape=(256, 64), kind=8, size_bytes=10_000),
    )
    model = header("llama", SMOLLM, *tensors)
    assert need(model).weights == 11_111
    assert need(model).repacked == 100
    assert need(model, machine="aarch64").repacked == 10_100
    assert need(model, machine="riscv64").repacked == 0
    assert need(model, on_gpu=True).repacked == 0


def test_a_vocabulary_is_part_of_the_process_and_no_part_of_a_gpu() -> None:
    small, large = header("llama", SMOLLM, words=50_000), header("llama", SMOLLM, words=150_000)
    assert need(large).process - need(small).process == pytest.approx(22.7 * MIB, rel=0.01)
    assert need(large, on_gpu=True).process == need(small, on_gpu=True).process


@pytest.mark.parametrize(
    "said",
    [
        {},
        {**SMOLLM, "block_count": 0},
        {**SMOLLM, "block_count": sys.maxsize},
        {**SMOLLM, "embedding_length": "many"},
        {name: value for name, value in SMOLLM.items() if name != "attention.head_count"},
        {**SMOLLM, "ssm.conv_kernel": 4},
    ],
)
def test_a_model_that_it_cannot_tell_of_is_left_to_the_guess(said: dict[str, Value]) -> None:
    assert maybe(header("llama", said)) is None


NUMBER = st.integers(-(2**63), 2**64) | st.integers(0, 100) | st.booleans() | st.floats()
VALUE = NUMBER | st.just("many") | st.tuples(NUMBER, NUMBER)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            (
                *GEMMA,
                "attention.sliding_window_pattern",
                "expert_used_count",
                "expert_feed_forward_length",
                "attention.key_length_mla",
                "attention.causal",
            ),
            VALUE,
        ),
    ),
    st.integers(1, 10**6),
    st.integers(1, 64),
)
def test_whatever_the_file_says_there_is_an_answer_that_is_no_less_than_nothing(
    said: dict[str, Value], tokens: int, slots: int
) -> None:
    found = maybe(header("llama", said), tokens=tokens, slots=slots)
    assert found is None or min(found.context, found.compute, found.process) >= 0
