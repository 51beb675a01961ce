"""An engine without a model: it says what its options tell it to, and its answers say so (`scripted`).

For tests and benchmarks. Nothing uses it unless a configuration names it.
"""

import asyncio
import hashlib
import math
from collections import deque
from collections.abc import AsyncGenerator
from typing import Literal, assert_never

import msgspec

from ai_agent_server.core.chat import (
    ChatDelta,
    ChatRequest,
    ChatUsage,
    FinishReason,
    JSONObject,
    ToolCallDelta,
)
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.errors import (
    EngineAuthError,
    EngineBusyError,
    EngineError,
    EngineFailedError,
    EngineProtocolError,
    EngineRequestError,
    EngineTimeoutError,
    EngineUnreachableError,
)
from ai_agent_server.llm_engines import _vectors
from ai_agent_server.llm_engines.base import EngineSpec, ModelCard, Residency

__all__ = ("ScriptedEngine",)

MODEL = "scripted"
KEPT_REQUESTS = 10_000
DIMENSIONS = 16

Failure = Literal["unreachable", "timeout", "busy", "auth", "request", "failed", "protocol", "cut"]
"""Which error to raise; `cut` gives half of the text first."""


class ScriptedCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool call to answer with."""

    name: str
    arguments: JSONObject = msgspec.field(default_factory=dict)


class ScriptedReply(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to say to a prompt that contains `when` ("" is every prompt).

    `say` is taken in turn, round and round; an object is said as its JSON text.
    """

    when: str = ""
    say: tuple[str | JSONObject, ...] = ("",)
    tool_calls: tuple[ScriptedCall, ...] = ()
    finish_reason: FinishReason = "stop"
    fail: Failure | None = None


class ScriptedEngine:
    """Answers from a script. `requests` holds what was asked, oldest first, the last 10,000."""

    class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """The script.

        Plain strings in `replies` are answered in turn, round and round; a reply with `when` answers
        the prompts that contain it and goes before them, the first that fits. `delay_s` passes
        before the first token, then words come at `tokens_per_s` (0: all at once). `fail` fails
        the first `fail_first` requests (None: every one).
        """

        replies: tuple[str | ScriptedReply, ...] = ()
        delay_s: float = 0.0
        tokens_per_s: float = 0.0
        fail: Failure | None = None
        fail_first: int | None = None
        retry_after_s: float | None = None
        """What a `busy` failure asks for."""

    def __init__(self, spec: EngineSpec, options: Options) -> None:
        self.requests: deque[ChatRequest] = deque(maxlen=KEPT_REQUESTS)
        self._spec, self._options = spec, options
        self._rules = tuple(reply for reply in options.replies if isinstance(reply, ScriptedReply))
        plain = tuple(reply for reply in options.replies if isinstance(reply, str))
        self._plain = ScriptedReply(say=plain or ("",))
        self._turns = [0] * (len(self._rules) + 1)
        self._asked = 0
        self._residency: Residency = "unloaded"
        self._closed = False

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        """The next scripted answer."""
        if self._closed:
            raise EngineUnreachableError("the engine was closed", engine=self._spec.name)
        self.requests.append(request)
        self._asked += 1
        self._residency = "loaded"
        prompt = "\n".join(message.text for message in request.messages)
        reply, text = self._next(prompt)
        failure = reply.fail or self._scripted_failure()
        # Even at no delay the loop gets its turn, as with a real engine.
        await asyncio.sleep(self._options.delay_s)
        if failure is not None and failure != "cut":
            raise self._error(failure)
        words = _words(text) if self._options.tokens_per_s > 0 else [text]
        if failure == "cut":
            yield ChatDelta(text=text[: len(text) // 2 + 1], model=MODEL)
            raise EngineProtocolError("the stream ended without a finish_reason", engine=self._spec.name)
        for word in words:
            if word:
                yield ChatDelta(text=word, model=MODEL)
            if self._options.tokens_per_s > 0:
                await asyncio.sleep(1 / self._options.tokens_per_s)
        yield ChatDelta(
            tool_calls=tuple(
                ToolCallDelta(
                    index=index,
                    id=f"call-{self._asked}-{index}",
                    name=call.name,
                    arguments=msgspec.json.encode(call.arguments).decode(),
                )
                for index, call in enumerate(reply.tool_calls)
            ),
            finish_reason="tool_calls" if reply.tool_calls else reply.finish_reason,
            usage=ChatUsage(input_tokens=len(prompt.split()), output_tokens=len(text.split())),
            model=MODEL,
        )

    async def embed(self, request: EmbeddingRequest) -> EmbeddingReply:
        """Unit vectors that depend on the text alone: the same text, the same vector."""
        name = self._spec.name
        if self._closed:
            raise EngineUnreachableError("the engine was closed", engine=name)
        self._asked += 1
        self._residency = "loaded"
        failure = self._scripted_failure()
        await asyncio.sleep(self._options.delay_s)
        if failure is not None:
            raise self._error(failure)
        size = DIMENSIONS if request.dimensions is None else request.dimensions
        return EmbeddingReply(
            vectors=tuple(_vectors.packed(_direction(text, size), engine=name) for text in request.inputs),
            usage=ChatUsage(input_tokens=sum(len(text.split()) for text in request.inputs)),
            model=MODEL,
        )

    async def models(self) -> tuple[ModelCard, ...]:
        """The one it plays."""
        return (ModelCard(name=MODEL, residency=self._residency, context_tokens=self._spec.context_tokens),)

    async def load(self) -> None:
        """Pretend to hold the model."""
        self._residency = "loaded"

    async def unload(self) -> None:
        """Pretend to have let go of it."""
        self._residency = "unloaded"

    async def aclose(self) -> None:
        """Answer nothing more."""
        self._closed = True

    def _next(self, prompt: str) -> tuple[ScriptedReply, str]:
        index, reply = next(
            ((i, rule) for i, rule in enumerate(self._rules) if rule.when in prompt),
            (len(self._rules), self._plain),
        )
        said = reply.say[self._turns[index] % len(reply.say)] if reply.say else ""
        self._turns[index] += 1
        return reply, said if isinstance(said, str) else msgspec.json.encode(said).decode()

    def _scripted_failure(self) -> Failure | None:
        first = self._options.fail_first
        return self._options.fail if first is None or self._asked <= first else None

    def _error(self, failure: Failure) -> EngineError:
        name = self._spec.name
        match failure:
            case "unreachable":
                return EngineUnreachableError("scripted: connection refused", engine=name)
            case "timeout":
                return EngineTimeoutError("first_token", self._spec.timeouts.first_token_s, engine=name)
            case "busy":
                return EngineBusyError(
                    "scripted: busy", engine=name, status=503, retry_after_s=self._options.retry_after_s
                )
            case "auth":
                return EngineAuthError("scripted: no such key", engine=name, status=401)
            case "request":
                return EngineRequestError("scripted: bad request", engine=name, status=400)
            case "failed":
                return EngineFailedError("scripted: internal error", engine=name, status=500)
            case "protocol" | "cut":
                return EngineProtocolError("scripted: malformed answer", engine=name)
            case _:
                assert_never(failure)


def _direction(text: str, size: int) -> list[float]:
    """A unit vector out of the text's hash."""
    noise = hashlib.shake_128(text.encode("utf-8", "surrogatepass")).digest(size)
    numbers = [byte - 127.5 for byte in noise]
    length = math.hypot(*numbers)
    return [number / length for number in numbers]


def _words(text: str) -> list[str]:
    """`text` cut before each space; joined it is `text` again."""
    pieces = text.split(" ")
    return pieces[:1] + [" " + piece for piece in pieces[1:]]
