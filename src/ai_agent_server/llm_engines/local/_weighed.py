"""A model's file on the scales: how large it is, and what llama.cpp will take for it in memory."""

import platform
from pathlib import Path
from typing import TypeAlias

import msgspec
import structlog

from ai_agent_server.llm_engines.local import _gguf
from ai_agent_server.llm_engines.local._gguf_header import GGUFError, Header, read_header
from ai_agent_server.llm_engines.local._llama_memory import needed

GPU_NODES = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""Of NVIDIA's driver and of AMD's."""

Stamp: TypeAlias = tuple[tuple[str, int, int], ...]
"""Each file's path, size in bytes and time of change in ns."""

log = structlog.get_logger(__name__)


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is to be loaded."""

    llm: str
    context_tokens: int
    slots: int
    batch_tokens: int
    on_gpu: bool


class Weighed(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of a model before it was loaded."""

    stamp: Stamp
    load: Load
    size_bytes: int
    needed_bytes: int | None
    """None where its header says too little."""


def weighed(path: Path, load: Load, last: Weighed | None) -> Weighed:
    """The model at `path`, with its shards; `last` again where neither it nor its load is another.

    Reads files: call it off the event loop. Raises `OSError`.
    """
    files = _gguf.parts(path)
    stats = [(str(file), file.stat()) for file in files]
    stamp = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    if last is not None and (last.stamp, last.load) == (stamp, load):
        return last
    return Weighed(
        stamp=stamp,
        load=load,
        size_bytes=sum(size_bytes for _, size_bytes, _ in stamp),
        needed_bytes=_needed_bytes(files, load),
    )


def a_gpu_is_here() -> bool:
    """Whether this machine has a GPU that llama.cpp might use. Reads files."""
    return any(node.exists() for node in GPU_NODES)


def _needed_bytes(files: tuple[Path, ...], load: Load) -> int | None:
    try:
        header = _joined([read_header(file) for file in files])
    except GGUFError as exc:
        log.warning("engine.file_not_understood", llm=load.llm, problem=str(exc))
        return None
    found = needed(
        header,
        context_tokens=load.context_tokens,
        slots=load.slots,
        batch_tokens=load.batch_tokens,
        on_gpu=load.on_gpu,
        machine=platform.machine(),
    )
    if found is None:
        log.info("engine.memory_guessed", llm=load.llm, architecture=header.architecture)
        return None
    return found.total


def _joined(shards: list[Header]) -> Header:
    """Shards as one: the first has the metadata, each has its tensors."""
    return msgspec.structs.replace(
        shards[0],
        tensors=tuple(tensor for shard in shards for tensor in shard.tensors),
        data_bytes=sum(shard.data_bytes for shard in shards),
    )
