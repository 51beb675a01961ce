"""The process that holds llama.cpp: loads one model, serves it on loopback, ends with its parent.

A process of its own because xllamacpp holds the interpreter's lock while it loads (a second for a
small model, a minute for a large one) and because a crash in native code must not take the tasks along.
Reads one JSON line, `Order`, from standard input; answers one, `Ready`, on standard output; ends when
standard input does.
"""

import os
import sys

import msgspec

BATCH_TOKENS = 64
"""What a processor reads of a prompt between two looks at who still waits for the answer. One core reads
SmolLM2-135M so in 0.4 s; with 512 it was 3 s, and the reading as a whole no faster."""
GPU_BATCH_TOKENS = 512
"""A GPU reads these in less, and fewer at a time would leave it idle."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to load."""

    path: str
    alias: str
    context_tokens: int
    slots: int
    threads: int
    gpu_layers: int
    prompt_cache_mb: int
    api_key: str
    pooling: str = ""
    """How the tokens' vectors become a text's: `` for chat alone, `model` as the file says, or its name."""


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """Where it is served, or why not."""

    address: str = ""
    problem: str = ""
    on_gpu: bool = False
    """Whether a GPU may hold some of it, so that the process's own memory says little."""


def may_use_gpu(gpu_layers: int, kinds: list[str]) -> bool:
    """Whether layers may be put on a device of one of these kinds, by ggml's names."""
    return gpu_layers != 0 and any(kind.endswith("GPU") for kind in kinds)


def batch_tokens(pooling: str, context_tokens: int, slots: int, *, on_gpu: bool) -> int:
    """How much is read at once; a text that becomes a vector goes through whole or not at all."""
    if pooling:
        return context_tokens
    return GPU_BATCH_TOKENS if on_gpu else max(BATCH_TOKENS, slots)


def main() -> None:
    """Load, serve, wait."""
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    # llama.cpp may print: whatever it prints goes to stderr, so that `answers` carries our line alone.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        import xllamacpp  # noqa: PLC0415 - after the redirection, since it prints

        params = xllamacpp.CommonParams()
        params.model.path = order.path
        params.model_alias = {order.alias}
        params.n_ctx = order.context_tokens * order.slots
        params.n_parallel = order.slots
        params.n_gpu_layers = order.gpu_layers
        params.cpuparams.n_threads = order.threads
        params.cpuparams_batch.n_threads = order.threads
        kinds = [device["type"].name for device in xllamacpp.get_device_info()]
        on_gpu = may_use_gpu(order.gpu_layers, kinds)
        params.n_batch = params.n_ubatch = batch_tokens(
            order.pooling, order.context_tokens, order.slots, on_gpu=on_gpu
        )
        if order.pooling:
            params.embedding = True
            if order.pooling != "model":
                params.pooling_type = getattr(
                    xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{order.pooling.upper()}"
                )
        params.cache_ram_mib = order.prompt_cache_mb
        params.warmup = False
        params.ui = False
        params.verbosity = 1
        params.api_keys = [order.api_key]
        try:
            server = xllamacpp.Server(params)
            ready = Ready(address=server.listening_address, on_gpu=on_gpu)
        except RuntimeError as exc:
            ready = Ready(problem=str(exc))
        answers.write(msgspec.json.encode(ready) + b"\n")
    if ready.address:
        sys.stdin.buffer.read()
    # No destructors: the system takes the memory back faster, and nothing is left to save.
    os._exit(0)


if __name__ == "__main__":
    main()
