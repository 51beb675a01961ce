"""What a model will take in llama.cpp's memory, foretold from its file's header. Pure.

The parts are llama.cpp's own (its log of a load names them); the constants were measured on its CPU build of
October 2026 over models of 4 to 40 blocks, 512 to 8192 tokens and 1 to 4 slots. `python -m bench.gpu_queue
--real` compares with a process's memory again. Left out is what grows with use: prompts that are kept
beside the slots, up to the option `prompt_cache_mb`.
"""

from collections.abc import Mapping

import msgspec

from ai_agent_server.llm_engines.local._gguf_header import Header, Tensor, Value

MIB = 2**20
MAX_BLOCKS = 1024
CELLS = 256
"""A slot's context is rounded up to so many tokens."""
KV_NUMBER_BYTES = 2
FLOAT_BYTES = 4
LIBRARIES_BYTES = 20 * MIB
"""Of the process: the pages of Python and llama.cpp that are touched."""
PROCESS_BYTES = 14 * MIB
TOKEN_BYTES = 238
MERGE_BYTES = 192
"""Of a vocabulary in memory, for each of its words and merges."""
BLOCK_BYTES = 82_000
"""The graph's own, for each block."""
GPU_RUNTIME_BYTES = 300 * MIB
"""What a GPU's driver takes for a process beside what is put there."""

SLIDES: Mapping[str, int] = {
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gpt-oss": 2,
    "olmo2": 4,
}
"""Architecture -> of so many blocks the last sees the whole context and the others a window of it, where
the file does not say itself which do."""
STATE_KEYS = ("ssm.", "wkv.", "shortconv.", "kda.")
"""Settings of models that keep a state in place of some of the context; how large is not computed here."""

Q4_0, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL, MXFP4 = 2, 8, 12, 13, 14, 20, 39
REPACKED: Mapping[str, frozenset[int]] = {
    "x86_64": frozenset({Q4_0, Q4_K, IQ4_NL, MXFP4}),
    "aarch64": frozenset({Q4_0, Q4_K, Q5_K, Q6_K, IQ4_NL, MXFP4, Q8_0}),
}
"""Processor -> kinds of weights that llama.cpp keeps a second time, in an order that suits it."""
REPACKED_ROWS = 8
"""A matrix is repacked where its rows are a multiple of this."""


class Needed(msgspec.Struct, frozen=True, kw_only=True):
    """What a model takes once it has read a prompt, in bytes."""

    weights: int
    repacked: int
    context: int
    """The keys and values of all slots."""
    compute: int
    """What one batch of tokens is computed in, and the scores that come out."""
    process: int
    """Whatever is loaded: the program, the vocabulary; on a GPU what the driver takes."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.repacked + self.context + self.compute + self.process


def needed(
    header: Header, *, context_tokens: int, slots: int, batch_tokens: int, on_gpu: bool, machine: str
) -> Needed | None:
    """What the model takes with `slots` contexts of `context_tokens` each, read in batches.

    `machine` is the processor, as `platform.machine()` says it. None where the header lacks what it takes
    to know, or the model keeps a state that this does not know the size of.
    """
    blocks, embedding = _whole(header, "block_count"), _whole(header, "embedding_length")
    heads, feed = _most(header, "attention.head_count"), _feed_forward(header)
    if not (0 < blocks <= MAX_BLOCKS and embedding and heads and feed) or _keeps_state(header):
        return None
    cells = _padded(context_tokens)
    words = header.lengths.get("tokenizer.ggml.tokens", 0)
    numbers = 5 * embedding + max(feed, 2 * heads * _head_length(header))
    windows = {_cells(header, block, cells, batch_tokens) for block in range(blocks)}
    mask_bytes = sum(windows) * KV_NUMBER_BYTES
    repacked = 0 if on_gpu else sum(each.size_bytes for each in header.tensors if _is_repacked(each, machine))
    return Needed(
        weights=header.data_bytes,
        repacked=repacked,
        context=slots * _context_bytes(header, blocks, cells, batch_tokens),
        compute=batch_tokens * (numbers * FLOAT_BYTES + mask_bytes) + 2 * slots * words * FLOAT_BYTES,
        process=GPU_RUNTIME_BYTES
        if on_gpu
        else LIBRARIES_BYTES
        + PROCESS_BYTES
        + words * TOKEN_BYTES
        + header.lengths.get("tokenizer.ggml.merges", 0) * MERGE_BYTES
        + blocks * BLOCK_BYTES,
    )


def _context_bytes(header: Header, blocks: int, cells: int, batch_tokens: int) -> int:
    """The keys and values of one slot."""
    if header.setting("attention.causal") is False:
        return 0
    heads, key_length = _most(header, "attention.head_count"), _head_length(header)
    # Where keys are made of a latent vector, values are read out of the same.
    latent = _whole(header, "attention.key_length_mla") > 0
    value_length = 0 if latent else _whole(header, "attention.value_length") or key_length
    return sum(
        _cells(header, block, cells, batch_tokens)
        * _of_block(header, "attention.head_count_kv", block, heads)
        * (key_length + value_length)
        * KV_NUMBER_BYTES
        for block in range(blocks)
    )


def _head_length(header: Header) -> int:
    even = _whole(header, "embedding_length") // _most(header, "attention.head_count")
    return _whole(header, "attention.key_length") or even


def _cells(header: Header, block: int, cells: int, batch_tokens: int) -> int:
    """How much of a context a block sees."""
    window = _whole(header, "attention.sliding_window")
    pattern = header.setting("attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        slides = block < len(pattern) and bool(pattern[block])
    else:
        every = pattern if isinstance(pattern, int) and pattern > 0 else SLIDES.get(header.architecture, 1)
        slides = block % every < every - 1
    return min(cells, _padded(window + batch_tokens)) if window and slides else cells


def _keeps_state(header: Header) -> bool:
    kept = tuple(f"{header.architecture}.{each}" for each in STATE_KEYS)
    return any(key.startswith(kept) for key in header.metadata)


def _feed_forward(header: Header) -> int:
    """How many numbers of a token are alive at once in the widest part of a block."""
    dense = _most(header, "feed_forward_length")
    experts = _whole(header, "expert_used_count") * _most(header, "expert_feed_forward_length")
    return 3 * max(dense, experts)


def _is_repacked(tensor: Tensor, machine: str) -> bool:
    return (
        tensor.kind in REPACKED.get(machine, frozenset())
        and len(tensor.shape) > 1
        and tensor.shape[1] % REPACKED_ROWS == 0
        and not tensor.name.startswith("token_embd")
    )


def _whole(header: Header, name: str) -> int:
    """A setting that is one number for all blocks; 0 where there is none."""
    return _count(header.setting(name))


def _most(header: Header, name: str) -> int:
    """The largest that any block has."""
    found = header.setting(name)
    return max(map(_count, found), default=0) if isinstance(found, tuple) else _count(found)


def _of_block(header: Header, name: str, block: int, otherwise: int) -> int:
    found = header.setting(name)
    if isinstance(found, tuple):
        return _count(found[block]) if block < len(found) else 0
    return _count(found) or otherwise


def _count(value: Value | None) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _padded(tokens: int) -> int:
    return -(-tokens // CELLS) * CELLS
