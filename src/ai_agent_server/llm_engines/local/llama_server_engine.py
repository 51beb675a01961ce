"""A running llama-server, by its URL."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

import msgspec

from ai_agent_server.core.chat import ChatDelta, ChatRequest
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.llm_engines._llama_http import LlamaHTTP
from ai_agent_server.llm_engines.base import EngineSpec, ModelCard, Residency

__all__ = ("LlamaServerEngine",)


class _Meta(msgspec.Struct, frozen=True):
    n_ctx: int | None = None
    size: int | None = None


class _Status(msgspec.Struct, frozen=True):
    value: str = "loaded"


class _Model(msgspec.Struct, frozen=True):
    id: str
    meta: _Meta | None = None
    status: _Status = _Status()


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

    It cannot be told to load or unload: a plain llama-server holds its one model for as long as it runs.
    """

    class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Where it is: `http://127.0.0.1:8080`, with or without `/v1`."""

        base_url: str = "http://127.0.0.1:8080"
        prompt_cache: Literal["on", "off"] = "on"
        """Whether a prompt's prefix that a slot holds already is used again."""

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

    async def models(self) -> tuple[ModelCard, ...]:
        """What it serves; a router (several models) also says which of them are in memory."""
        listed = await self._http.get("/v1/models", _Models)
        return tuple(
            ModelCard(
                name=model.id,
                residency=_RESIDENCY.get(model.status.value, "unknown"),
                context_tokens=model.meta.n_ctx if model.meta else None,
                size_bytes=model.meta.size if model.meta else None,
            )
            for model in listed.data
        )

    async def load(self) -> None:
        """Nothing: it cannot be told."""

    async def unload(self) -> None:
        """Nothing: it cannot be told."""

    async def aclose(self) -> None:
        """Close every socket."""
        await self._http.aclose()
