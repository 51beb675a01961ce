"""The LLM engine port: one reachable model server or library, spoken to in our own values."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Literal, Protocol, runtime_checkable

import msgspec

from ai_agent_server.core.chat import (
    ChatDelta,
    ChatReply,
    ChatRequest,
    ChatUsage,
    Decision,
    FinishReason,
    ToolCall,
    ToolCallDelta,
)
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.errors import EngineProtocolError

Residency = Literal["loaded", "loading", "unloaded", "unknown"]
Silence = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
"""Seconds."""


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model that an engine has. Sizes are what the engine says, None where it says nothing."""

    name: str
    residency: Residency = "unknown"
    memory_bytes: int | None = None
    context_tokens: int | None = None
    size_bytes: int | None = None
    needed_bytes: int | None = None
    """What it will take in memory as it is configured, where the engine can tell before it was loaded."""


class EngineTimeouts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long an engine may be silent, by phase, in seconds."""

    connect_s: Silence = 5.0
    first_token_s: Silence = 120.0
    idle_s: Silence = 45.0


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What every engine is built from; its own `Options` come beside it.

    An engine class is `Engine(spec: EngineSpec, options: Engine.Options)`; its inner `Options` is a
    frozen msgspec Struct with `forbid_unknown_fields=True`, decoded from `llms.<name>.options`.
    """

    name: str
    model: str
    context_tokens: int = 4096
    slots: int = 1
    timeouts: EngineTimeouts = EngineTimeouts()
    api_key: str | None = None

    def __repr__(self) -> str:
        return (
            f"EngineSpec(name={self.name!r}, model={self.model!r}, api_key={'***' if self.api_key else None})"
        )


class LLMEngine(Protocol):
    """One model server, spoken to for one configured model.

    Promises, tested on every implementation by tests/conformance/test_llm_engine.py: only
    `EngineError` children escape; the last delta has a finish_reason, or the stream raises; closing
    the iterator (or cancelling its task) closes the socket or frees the slot at once; many tasks may
    use it at the same time; `aclose` may be called twice. No call retries on its own: repeating
    is the balancer's decision.
    """

    def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        """Answer `request` piece by piece. An async generator, since it must be closeable."""
        ...

    async def models(self) -> tuple[ModelCard, ...]:
        """What the engine has. Never loads a model nor keeps one warm."""
        ...

    async def load(self) -> None:
        """Bring the configured model into memory; nothing where the engine cannot be told."""
        ...

    async def unload(self) -> None:
        """Give the configured model's memory back; nothing where the engine cannot be told."""
        ...

    async def aclose(self) -> None:
        """Close every socket and free what is held."""
        ...


@runtime_checkable
class EmbeddingEngine(Protocol):
    """What an engine can do beside, when an LLM on it has the capability `embeddings`.

    The promises are `LLMEngine`'s; tests/conformance/test_llm_engine.py holds every engine that has
    `embed` to them.
    """

    async def embed(self, request: EmbeddingRequest) -> EmbeddingReply:
        """A vector for each input, in their order. No input is cut in silence: one that does not fit
        is a `ContextOverflowError`."""
        ...


@runtime_checkable
class CountingEngine(Protocol):
    """What an engine can do beside, where its server counts tokens without answering."""

    async def count(self, request: ChatRequest) -> int | None:
        """The prompt's tokens as the model reads them, what its chat template adds included.

        None where that takes the model in memory and it is not there: nothing is loaded for it. Only
        `EngineError`s escape.
        """
        ...


class JoinedStream:
    """Joins deltas to a `ChatReply`; the one place that knows how. Its fields are what is known so far."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[str, str, list[str]]] = {}
        self.finish_reason: FinishReason | None = None
        self.usage = ChatUsage()
        self.model, self.llm = "", ""
        self.source: Literal["local", "api", ""] = ""
        self.decision: Decision | None = None

    def add(self, delta: ChatDelta) -> None:
        """Take the next delta."""
        self._text.append(delta.text)
        if delta.reasoning:
            self._reasoning.append(delta.reasoning)
        for part in delta.tool_calls:
            call_id, name, fragments = self._calls.get(part.index, ("", "", []))
            fragments.append(part.arguments)
            self._calls[part.index] = (part.id or call_id, part.name or name, fragments)
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.usage = delta.usage or self.usage
        self.model = delta.model or self.model
        self.llm = delta.llm or self.llm
        self.source = delta.source or self.source
        self.decision = delta.decision or self.decision

    def again(self) -> tuple[ChatDelta, ...]:
        """What came so far, in as few deltas as say it; nothing before the first."""
        parts = []
        if self._reasoning:
            parts.append(ChatDelta(reasoning="".join(self._reasoning)))
        if text := "".join(self._text):
            parts.append(ChatDelta(text=text))
        calls = tuple(
            ToolCallDelta(index=index, id=call_id, name=name, arguments="".join(fragments))
            for index, (call_id, name, fragments) in sorted(self._calls.items())
        )
        if calls or self.finish_reason is not None:
            usage = None if self.usage == ChatUsage() else self.usage
            parts.append(ChatDelta(tool_calls=calls, finish_reason=self.finish_reason, usage=usage))
        if parts:
            parts[0] = msgspec.structs.replace(
                parts[0], model=self.model, llm=self.llm, source=self.source, decision=self.decision
            )
        return tuple(parts)

    def reply(self, *, time_to_first_token_ms: float = 0.0, duration_ms: float = 0.0) -> ChatReply:
        """The whole answer. Raises `EngineProtocolError` when no delta said why the stream ended."""
        if self.finish_reason is None:
            raise EngineProtocolError("the stream ended without a finish_reason", engine=self.llm)
        return ChatReply(
            text="".join(self._text),
            finish_reason=self.finish_reason,
            tool_calls=tuple(
                ToolCall(id=call_id, name=name, arguments="".join(fragments))
                for _, (call_id, name, fragments) in sorted(self._calls.items())
            ),
            usage=self.usage,
            model=self.model,
            llm=self.llm,
            source=self.source,
            decision=self.decision,
            reasoning="".join(self._reasoning),
            time_to_first_token_ms=time_to_first_token_ms,
            duration_ms=duration_ms,
        )


async def chat(engine: LLMEngine, request: ChatRequest) -> ChatReply:
    """Answer `request` whole.

    Always streams from the engine: a streamed request that is closed frees its slot at once, an
    unstreamed one leaves llama.cpp generating to the end.
    """
    joined = JoinedStream()
    async with aclosing(engine.stream(request)) as deltas:
        async for delta in deltas:
            joined.add(delta)
    return joined.reply()
