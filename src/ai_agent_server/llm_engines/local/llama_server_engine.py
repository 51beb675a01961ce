"""A running llama-server, by its URL."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

import msgspec

from ai_agent_server.core.chat import ChatDelta, ChatRequest
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.errors import EngineFailedError, EngineTimeoutError, ModelNotFoundError
from ai_agent_server.llm_engines._llama_http import LlamaHTTP
from ai_agent_server.llm_engines.base import EngineSpec, ModelCard, Residency

__all__ = ("LlamaServerEngine",)

LOOK_S = 0.2
"""Between two looks at a router that was told to load or unload."""


class _Meta(msgspec.Struct, frozen=True):
    n_ctx: int | None = None
    size: int | None = None


class _Status(msgspec.Struct, frozen=True):
    value: str


class _Model(msgspec.Struct, frozen=True):
    id: str
    meta: _Meta | None = None
    status: _Status | None = None
    """Of a router: a server of one model has it in memory."""


class _Models(msgspec.Struct, frozen=True):
    data: tuple[_Model, ...] = ()


_RESIDENCY: dict[str, Residency] = {
    "loaded": "loaded",
    "loading": "loading",
    "downloading": "loading",
    "unloaded": "unloaded",
    "sleeping": "unloaded",
}


class LlamaServerEngine:
    """One model of a llama-server that somebody else runs.

    One in router mode (started without a model) is told to load and unload; start it with
    `--no-models-autoload`, so that nobody but the balancer does. A plain one holds its one model for as
    long as it runs.
    """

    class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Where it is, `http://127.0.0.1:8080` with or without `/v1`, and how it is used."""

        base_url: str = "http://127.0.0.1:8080"
        prompt_cache: Literal["on", "off"] = "on"
        """Whether a prompt's prefix that a slot holds already is used again."""
        load_timeout_s: float = 300.0

    def __init__(self, spec: EngineSpec, options: Options) -> None:
        self._spec, self._options = spec, options
        self._http = LlamaHTTP(
            options.base_url.rstrip("/").removesuffix("/v1"),
            engine=spec.name,
            timeouts=spec.timeouts,
            api_key=spec.api_key,
        )

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        """Answer `request`."""
        extra = {"cache_prompt": self._options.prompt_cache == "on"}
        async with aclosing(self._http.stream(request, self._spec.model, extra)) as deltas:
            async for delta in deltas:
                yield delta

    async def embed(self, request: EmbeddingRequest) -> EmbeddingReply:
        """The vectors of the inputs; the server has to be started with `--embeddings`."""
        return await self._http.embed(request, self._spec.model)

    async def count(self, request: ChatRequest) -> int | None:
        """The prompt's tokens; None where a router does not have the model in memory."""
        if await self._status() not in {None, "loaded"}:
            return None
        return await self._http.count(request, self._spec.model)

    async def models(self) -> tuple[ModelCard, ...]:
        """What it serves; a router (several models) also says which of them are in memory."""
        listed = await self._http.get("/v1/models", _Models)
        return tuple(
            ModelCard(
                name=model.id,
                residency=_RESIDENCY.get(model.status.value, "unknown") if model.status else "loaded",
                context_tokens=model.meta.n_ctx if model.meta else None,
                size_bytes=model.meta.size if model.meta else None,
            )
            for model in listed.data
        )

    async def load(self) -> None:
        """Have a router bring the model into memory; nothing on a server of one model."""
        status = await self._status()
        if status == "unloaded":
            await self._tell("/models/load")
        if status is not None and await self._settled("loading", "downloading") == "unloaded":
            raise EngineFailedError(
                "the model did not load: llama-server's log says why", engine=self._spec.name
            )

    async def unload(self) -> None:
        """Have a router give the model's memory back; nothing on a server of one model."""
        status = await self._status()
        if status is not None and status != "unloaded":
            await self._tell("/models/unload")
            await self._settled("loading", "loaded", "sleeping")

    async def _tell(self, path: str) -> None:
        await self._http.post(path, {"model": self._spec.model}, self._options.load_timeout_s)

    async def _settled(self, *passing: str) -> str | None:
        """The model's status once it is none of these: the router answers at once, and then does it."""
        try:
            async with asyncio.timeout(self._options.load_timeout_s):
                while True:
                    status = await self._status()
                    if status not in passing:
                        return status
                    await asyncio.sleep(LOOK_S)
        except TimeoutError as exc:
            raise EngineTimeoutError("connect", self._options.load_timeout_s, engine=self._spec.name) from exc

    async def _status(self) -> str | None:
        """What a router says of the model; None on a server of one model."""
        listed = (await self._http.get("/v1/models", _Models)).data
        if not any(model.status for model in listed):
            return None
        for model in listed:
            if model.id == self._spec.model and model.status is not None:
                return model.status.value
        raise ModelNotFoundError(f"the router has no model {self._spec.model!r}", engine=self._spec.name)

    async def aclose(self) -> None:
        """Close every socket."""
        await self._http.aclose()
