"""Probes: what this machine has for the server to use.

They only look: no model is loaded, nothing is written.
"""

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

from ai_agent_server.core.chat import Capability

__all__ = (
    "GPU",
    "Found",
    "LocalModel",
    "LocalServer",
    "ServerKind",
    "Urls",
    "api_keys",
    "gpus",
    "lock_holder",
    "nats_greeting",
    "nats_server",
    "servers",
)

ServerKind = Literal["ollama", "llama-server", "vllm"]

PROBE_S = 2.0
"""A server on this machine that is silent for longer is as good as not there."""
MAX_MODELS = 32
MIB = 1024 * 1024

API_KEYS = (
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
    "OPENROUTER_API_KEY",
    "MISTRAL_API_KEY",
    "DEEPSEEK_API_KEY",
)
T = TypeVar("T")


class Urls(msgspec.Struct, frozen=True, kw_only=True):
    """Where local model servers are looked for."""

    ollama: str = "http://127.0.0.1:11434"
    llama_server: str = "http://127.0.0.1:8080"
    vllm: str = "http://127.0.0.1:8000"


class LocalModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a server on this machine has. None where the server does not say."""

    name: str
    size_bytes: int | None = None
    context_tokens: int | None = None
    capabilities: tuple[Capability, ...] = ("chat",)


class LocalServer(msgspec.Struct, frozen=True, kw_only=True):
    """A model server that answered on this machine."""

    kind: ServerKind
    url: str
    models: tuple[LocalModel, ...] = ()
    slots: int = 1


class GPU(msgspec.Struct, frozen=True, kw_only=True):
    """An NVIDIA GPU, as nvidia-smi tells it."""

    name: str
    memory_mb: int
    free_mb: int


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What was found, as `init` decides over it."""

    servers: tuple[LocalServer, ...] = ()
    gpus: tuple[GPU, ...] = ()
    memory_mb: int = 0
    """RAM of the machine."""
    api_keys: frozenset[str] = frozenset()
    """Names of the variables that are set; never their values."""
    engines: frozenset[str] = frozenset()
    """Kinds of engines that this installation has."""


def api_keys(environ: Mapping[str, str]) -> frozenset[str]:
    """Which of the well-known key variables are set."""
    return frozenset(name for name in API_KEYS if environ.get(name))


def memory_mb() -> int:
    """RAM of the machine, 0 where it cannot be told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB
    except (ValueError, OSError):
        return 0


def urls(environ: Mapping[str, str]) -> Urls:
    """Where to look; OLLAMA_HOST moves Ollama, as it does for Ollama itself."""
    said = environ.get("OLLAMA_HOST", "").strip()
    if not said:
        return Urls()
    parts = urlsplit(said if "//" in said else f"//{said}")
    with contextlib.suppress(ValueError):
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", None: "127.0.0.1"}.get(parts.hostname, parts.hostname)  # noqa: S104 - asked, not bound
        host = f"[{host}]" if host and ":" in host else host
        return Urls(ollama=f"{parts.scheme or 'http'}://{host}:{parts.port or 11434}")
    return Urls()


async def servers(where: Urls) -> tuple[LocalServer, ...]:
    """The model servers that answer on this machine."""
    # trust_env=False: a proxy from the environment must not be asked about this machine.
    async with httpx.AsyncClient(timeout=PROBE_S, trust_env=False) as http:
        asked = await asyncio.gather(
            _ollama(http, where.ollama.rstrip("/")),
            _llama_server(http, where.llama_server.rstrip("/")),
            _vllm(http, where.vllm.rstrip("/")),
        )
    return tuple(server for server in asked if server is not None)


class _OllamaTag(msgspec.Struct):
    name: str
    size: int | None = None


class _OllamaTags(msgspec.Struct):
    models: tuple[_OllamaTag, ...]


class _OllamaModel(msgspec.Struct):
    capabilities: tuple[str, ...] | None = None
    model_info: dict[str, Any] = {}


async def _ollama(http: httpx.AsyncClient, url: str) -> LocalServer | None:
    tags = await _ask(http, "GET", f"{url}/api/tags", _OllamaTags)
    if tags is None:
        return None
    models = [await _ollama_model(http, url, tag) for tag in tags.models[:MAX_MODELS]]
    return LocalServer(kind="ollama", url=url, models=tuple(models))


async def _ollama_model(http: httpx.AsyncClient, url: str, tag: _OllamaTag) -> LocalModel:
    # /api/show is a POST that only reads the model's description.
    shown = await _ask(http, "POST", f"{url}/api/show", _OllamaModel, {"model": tag.name}) or _OllamaModel()
    context = next(
        (v for k, v in shown.model_info.items() if k.endswith(".context_length") and isinstance(v, int)), None
    )
    return LocalModel(
        name=tag.name,
        size_bytes=tag.size,
        context_tokens=context,
        capabilities=_ollama_capabilities(tag.name, shown.capabilities),
    )


def _ollama_capabilities(name: str, said: tuple[str, ...] | None) -> tuple[Capability, ...]:
    if said is None:  # before Ollama 0.6.4 only the name tells
        return ("embeddings",) if "embed" in name else ("chat", "json_schema")
    if "completion" not in said:
        return ("embeddings",)
    more: tuple[Capability, ...] = ("tools", "vision")
    return ("chat", "json_schema", *(capability for capability in more if capability in said))


class _ListedModel(msgspec.Struct):
    id: str
    owned_by: str = ""
    max_model_len: int | None = None
    meta: dict[str, Any] | None = None


class _ModelList(msgspec.Struct):
    data: tuple[_ListedModel, ...]


class _GenerationSettings(msgspec.Struct):
    n_ctx: int | None = None


class _Props(msgspec.Struct):
    default_generation_settings: _GenerationSettings = msgspec.field(default_factory=_GenerationSettings)
    total_slots: int = 1
    modalities: dict[str, bool] = {}


async def _llama_server(http: httpx.AsyncClient, url: str) -> LocalServer | None:
    listed = await _ask(http, "GET", f"{url}/v1/models", _ModelList)
    if listed is None or not any(model.owned_by == "llamacpp" for model in listed.data):
        return None
    props = await _ask(http, "GET", f"{url}/props", _Props) or _Props()
    seen: tuple[Capability, ...] = ("vision",) if props.modalities.get("vision") else ()
    models = tuple(
        LocalModel(
            name=model.id,
            size_bytes=size if isinstance(size := (model.meta or {}).get("size"), int) else None,
            context_tokens=props.default_generation_settings.n_ctx,
            capabilities=("chat", "json_schema", "tools", *seen),
        )
        for model in listed.data[:MAX_MODELS]
    )
    return LocalServer(kind="llama-server", url=url, models=models, slots=max(1, props.total_slots))


async def _vllm(http: httpx.AsyncClient, url: str) -> LocalServer | None:
    listed = await _ask(http, "GET", f"{url}/v1/models", _ModelList)
    if listed is None or not any(model.owned_by == "vllm" for model in listed.data):
        return None
    models = tuple(
        LocalModel(name=model.id, context_tokens=model.max_model_len, capabilities=("chat", "json_schema"))
        for model in listed.data[:MAX_MODELS]
    )
    return LocalServer(kind="vllm", url=url, models=models, slots=8)


async def _ask(
    http: httpx.AsyncClient, method: str, url: str, kind: type[T], body: dict[str, str] | None = None
) -> T | None:
    """The answer as `kind`; None when nobody answers, or somebody else."""
    try:
        async with asyncio.timeout(PROBE_S):
            answer = await http.request(method, url, json=body)
        return msgspec.json.decode(answer.content, type=kind) if answer.status_code == 200 else None
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError, TimeoutError):
        return None


async def gpus() -> tuple[GPU, ...]:
    """The NVIDIA GPUs; none where nvidia-smi is not there or does not work."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        child = await asyncio.create_subprocess_exec(
            program, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        return ()
    try:
        async with asyncio.timeout(10 * PROBE_S):
            said, _ = await child.communicate()
    except TimeoutError:
        child.kill()
        await child.wait()
        return ()
    return _gpu_table(said.decode(errors="replace"))


def _gpu_table(text: str) -> tuple[GPU, ...]:
    found = []
    for line in text.splitlines():
        match [cell.strip() for cell in line.rsplit(",", 2)]:
            case [name, total, free] if total.isdecimal() and free.isdecimal():
                found.append(GPU(name=name, memory_mb=int(total), free_mb=int(free)))
    return tuple(found)


def nats_server() -> Path | None:
    """The nats-server program: the one of this installation, else one on the PATH."""
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    found = shutil.which("nats-server", path=places)
    return Path(found) if found else None


async def nats_greeting(url: str) -> str | None:
    """The version of the nats-server at `url`, "" where it does not say; None when nobody greets."""
    parts = urlsplit(url if "//" in url else f"nats://{url}")
    try:
        async with asyncio.timeout(PROBE_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 4222)
            try:
                line = await reader.readline()
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError, ValueError):
        return None
    if not line.startswith(b"INFO "):
        return None
    try:
        return str(msgspec.json.decode(line[5:]).get("version", ""))
    except (msgspec.DecodeError, AttributeError):
        return ""


def lock_holder(lock: Path, locks: Path = Path("/proc/locks")) -> int | None:
    """The process that holds the lock file, None when nobody does or nobody can tell.

    Read from the kernel's table (proc_locks(5)): trying the lock would keep a server that starts at
    that moment from getting it.
    """
    try:
        inode = lock.stat().st_ino
        table = locks.read_text(encoding="ascii")
    except OSError:
        return None
    for row in table.splitlines():
        cells = row.split()
        # The columns: number, kind, mode, access, process, device and inode, range.
        if len(cells) > 5 and cells[1] == "FLOCK" and cells[5].rpartition(":")[2] == str(inode):
            return int(cells[4])
    return None
