"""A running vLLM, by its URL; put to sleep and woken where it was started so that it can be."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

import msgspec

from ai_agent_server.core.chat import ChatDelta, ChatRequest, JSONObject
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.errors import EngineRequestError
from ai_agent_server.llm_engines import _openai_wire as wire
from ai_agent_server.llm_engines._server_http import ServerHTTP
from ai_agent_server.llm_engines.base import EngineSpec, ModelCard

__all__ = ("VLLMEngine",)


PROMPT_FIELDS = ("model", "messages", "tools", "chat_template_kwargs")
"""What of a request the prompt is made of."""


class _Model(msgspec.Struct, frozen=True):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct, frozen=True):
    data: tuple[_Model, ...] = ()


class _Sleeping(msgspec.Struct, frozen=True):
    is_sleeping: bool


class _Tokenized(msgspec.Struct, frozen=True):
    count: int


class VLLMEngine:
    """One model of a vLLM that somebody else runs.

    vLLM takes its share of the card when it starts, whatever the model: give `memory_mb`. It leaves the card
    only asleep, which takes `--enable-sleep-mode` and VLLM_SERVER_DEV_MODE=1 in its environment; without
    them it cannot be told, and holds its memory for as long as it runs.
    """

    class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Where it is, `http://127.0.0.1:8000` with or without `/v1`, and how it is used."""

        base_url: str = "http://127.0.0.1:8000"
        sleep_level: Literal[0, 1, 2] = 1
        """1 keeps the weights in RAM and wakes within seconds; 2 keeps nothing and reads them again; 0 never
        puts it to sleep."""
        load_timeout_s: float = 300.0
        extra_body: JSONObject = msgspec.field(default_factory=dict)
        """Goes into each request as it is."""

    def __init__(self, spec: EngineSpec, options: Options) -> None:
        self._spec, self._options = spec, options
        self._http = ServerHTTP(
            options.base_url.rstrip("/").removesuffix("/v1"),
            engine=spec.name,
            timeouts=spec.timeouts,
            api_key=spec.api_key,
        )
        self._moving = asyncio.Lock()
        self._put_to_sleep = False

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        """Answer `request`; wakes what was put to sleep here."""
        if self._put_to_sleep:
            await self.load()
        stream = self._http.stream(request, self._spec.model, self._options.extra_body)
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                yield delta

    async def embed(self, request: EmbeddingRequest) -> EmbeddingReply:
        """The vectors of the inputs; vLLM has to be started for an embedding model."""
        if self._put_to_sleep:
            await self.load()
        return await self._http.embed(request, self._spec.model)

    async def count(self, request: ChatRequest) -> int:
        """The prompt's tokens, which vLLM knows asleep too."""
        asked = wire.payload(request, self._spec.model, max_tokens_field="max_tokens")
        whole = {**asked, **self._options.extra_body}
        body = {name: whole[name] for name in PROMPT_FIELDS if name in whole}
        return (await self._http.ask("/tokenize", body, _Tokenized)).count

    async def models(self) -> tuple[ModelCard, ...]:
        """What it serves. All of it is in memory unless it sleeps."""
        listed = await self._http.get("/v1/models", _Models)
        asleep = await self._asleep()
        return tuple(
            ModelCard(
                name=model.id,
                residency="unloaded" if asleep else "loaded",
                context_tokens=model.max_model_len,
            )
            for model in listed.data
        )

    async def load(self) -> None:
        """Wake it; nothing where it is awake or cannot sleep."""
        async with self._moving:
            if await self._asleep():
                await self._wake()
            self._put_to_sleep = False

    async def unload(self) -> None:
        """Put it to sleep; nothing where it sleeps or cannot."""
        async with self._moving:
            if self._options.sleep_level and await self._asleep() is False:
                self._put_to_sleep = True
                await self._tell(f"/sleep?level={self._options.sleep_level}")

    async def aclose(self) -> None:
        """Close every socket."""
        await self._http.aclose()

    async def _wake(self) -> None:
        if self._options.sleep_level < 2:
            await self._tell("/wake_up")
            return
        # Its weights are gone: memory for them, then they, then memory for the rest.
        await self._tell("/wake_up?tags=weights")
        await self._tell("/collective_rpc", {"method": "reload_weights"})
        await self._tell("/wake_up?tags=kv_cache")

    async def _asleep(self) -> bool | None:
        """None where it cannot sleep."""
        try:
            return (await self._http.get("/is_sleeping", _Sleeping)).is_sleeping
        except EngineRequestError as exc:
            if exc.status == 404:
                return None  # it was not started so that it can
            raise

    async def _tell(self, path: str, body: JSONObject | None = None) -> None:
        await self._http.post(path, body, self._options.load_timeout_s)
