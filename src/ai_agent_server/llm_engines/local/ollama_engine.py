"""Ollama, through the `ollama` client."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import httpx
import msgspec
import ollama

from ai_agent_server.core.chat import (
    ChatDelta,
    ChatRequest,
    ChatUsage,
    FinishReason,
    ImagePart,
    JSONObject,
    Message,
    ToolCallDelta,
    tokens_said,
)
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.errors import (
    EngineError,
    EngineProtocolError,
    EngineRequestError,
    EngineTimeoutError,
    EngineUnreachableError,
)
from ai_agent_server.llm_engines import _tools_by_schema as tools_by_schema
from ai_agent_server.llm_engines import _vectors
from ai_agent_server.llm_engines._pace import Pace
from ai_agent_server.llm_engines._refusal import in_stream, refusal, retry_after_s
from ai_agent_server.llm_engines._sse import Lines
from ai_agent_server.llm_engines.base import EngineSpec, EngineTimeouts, ModelCard

__all__ = ("OllamaEngine",)

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class OllamaEngine:
    """One model of one Ollama.

    `num_ctx` is always the configured context: another one would make Ollama load the model anew.
    """

    class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Where it is, and how the model is held."""

        base_url: str = "http://127.0.0.1:11434"
        keep_alive: str | int | None = None
        """How long the model stays in memory unused: `10m`, seconds, -1 for ever. By default Ollama's own."""
        think: bool | str | None = None
        load_timeout_s: float = 300.0
        model_options: JSONObject = msgspec.field(default_factory=dict)
        """Ollama's options (`num_gpu`, say), the same for each request, so that none reloads."""

    def __init__(self, spec: EngineSpec, options: Options) -> None:
        self._spec, self._options = spec, options
        self._client = _Client(spec, options.base_url)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        """Answer `request`. Ollama cannot be told to call a tool: where it must, a grammar holds it to it."""
        if request.tools and request.tool_choice == "required":
            deltas = tools_by_schema.stream(request, self._stream, engine=self._spec.name)
        else:
            deltas = self._stream(request)
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta

    async def embed(self, request: EmbeddingRequest) -> EmbeddingReply:
        """The vectors of the inputs. Ollama is told not to cut what is too long: it does so in silence."""
        name = self._spec.name
        pace = self._pace(self._spec.timeouts.first_token_s)
        with self._translated(connecting=True):
            async with pace.waiting():
                answer = await self._client.embed(
                    self._spec.model,
                    request.inputs,
                    truncate=False,
                    options=self._load_options(),
                    keep_alive=self._options.keep_alive,
                    dimensions=request.dimensions,
                )
        vectors = tuple(_vectors.packed(vector, engine=name) for vector in answer.embeddings)
        return EmbeddingReply(
            vectors=_vectors.checked(vectors, request, engine=name),
            usage=ChatUsage(input_tokens=tokens_said(answer.prompt_eval_count)),
            model=answer.model or "",
        )

    async def models(self) -> tuple[ModelCard, ...]:
        """What is installed, and what of it is in memory: on the GPU where any of it is."""
        pace = self._pace(self._spec.timeouts.connect_s)
        with self._translated(connecting=True):
            async with pace.waiting():
                installed = (await self._client.list()).models
                running = {model.model: model for model in (await self._client.ps()).models}
        cards = []
        for model in installed:
            held = running.get(model.model)
            cards.append(
                ModelCard(
                    name=model.model or "",
                    residency="loaded" if held else "unloaded",
                    memory_bytes=int(held.size_vram or held.size or 0) if held else None,
                    context_tokens=held.context_length if held else None,
                    size_bytes=int(model.size) if model.size is not None else None,
                )
            )
        return tuple(cards)

    async def load(self) -> None:
        """Bring the model into memory, with the context that requests will ask for."""
        await self._hold(self._options.keep_alive)

    async def unload(self) -> None:
        """Give its memory back."""
        await self._hold(0)

    async def aclose(self) -> None:
        """Close every socket."""
        await self._client.close()  # type: ignore[no-untyped-call]  # theirs has no annotations

    async def _hold(self, keep_alive: str | int | None) -> None:
        pace = self._pace(self._options.load_timeout_s)
        with self._translated(connecting=True):
            async with pace.waiting():
                await self._client.generate(
                    self._spec.model, prompt="", keep_alive=keep_alive, options=self._load_options()
                )

    async def _stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta, None]:
        pace = Pace(self._spec.timeouts, self._spec.name)
        answer = _Answer(self._spec.name, f"call-{len(request.messages)}")
        async with aclosing(self._client.lines(self._body(request), engine=self._spec.name)) as lines:
            while True:
                with self._translated(connecting=not answer.began):
                    async with pace.waiting():
                        line = await anext(lines, None)
                if line is None:
                    break
                delta = answer.take(line)
                if answer.progressed:
                    pace.progress()
                if delta is not None:
                    yield delta
        if not answer.done:
            raise EngineProtocolError("the stream ended without done", engine=self._spec.name)

    def _pace(self, first_token_s: float) -> Pace:
        return Pace(
            msgspec.structs.replace(self._spec.timeouts, first_token_s=first_token_s), self._spec.name
        )

    def _load_options(self) -> JSONObject:
        return {**self._options.model_options, "num_ctx": self._spec.context_tokens}

    def _body(self, request: ChatRequest) -> JSONObject:
        options = self._load_options()
        for name, value in (
            ("num_predict", request.max_tokens),
            ("temperature", request.temperature),
            ("top_p", request.top_p),
            ("seed", request.seed),
            ("stop", list(request.stop) or None),
        ):
            if value is not None:
                options[name] = value
        body: JSONObject = {
            "model": self._spec.model,
            "messages": [_message(message, request.messages) for message in request.messages],
            "stream": True,
            "options": options,
        }
        if request.tools and request.tool_choice != "none":
            body["tools"] = [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": tool.parameters or {"type": "object", "properties": {}},
                    },
                }
                for tool in request.tools
            ]
        if request.response_schema is not None:
            body["format"] = request.response_schema
        if self._options.keep_alive is not None:
            body["keep_alive"] = self._options.keep_alive
        if self._options.think is not None:
            body["think"] = self._options.think
        return body

    @contextmanager
    def _translated(self, *, connecting: bool = False) -> Iterator[None]:
        if connecting and self._client.is_closed:
            raise EngineUnreachableError("the engine was closed", engine=self._spec.name)
        try:
            yield
        # The client reads an answer's JSON as it comes: one of another shape is a ValueError
        # (pydantic), a TypeError or an AttributeError.
        except (
            ollama.RequestError,
            ollama.ResponseError,
            ConnectionError,
            httpx.HTTPError,
            httpx.InvalidURL,
            httpx.StreamError,
            msgspec.MsgspecError,
            ValueError,
            TypeError,
            AttributeError,
        ) as exc:
            raise translate(exc, spec=self._spec, connecting=connecting) from exc


class _Client(ollama.AsyncClient):
    """The client, given a body of our own.

    Its typed `chat` leaves out what its Tool type does not know of a JSON Schema (anyOf, nested
    properties), and reads an image that is the name of a file from the disk. Its reader of lines breaks
    at U+2028 or U+0085 in a text.
    """

    def __init__(self, spec: EngineSpec, base_url: str) -> None:
        timeouts: EngineTimeouts = spec.timeouts
        super().__init__(
            base_url,
            # An empty header, where there is no key, keeps it from sending OLLAMA_API_KEY to any server.
            headers={"Authorization": f"Bearer {spec.api_key}" if spec.api_key else "Bearer"},
            timeout=httpx.Timeout(None, connect=timeouts.connect_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=16),
            # What a local server is asked must not leave the machine by a proxy or a redirect.
            trust_env=False,
            follow_redirects=False,
        )

    @property
    def is_closed(self) -> bool:
        """Whether it was closed; to use it then is a RuntimeError."""
        return bool(self._client.is_closed)

    async def lines(self, body: JSONObject, *, engine: str) -> AsyncGenerator[ollama.ChatResponse, None]:
        """The lines of a streamed chat."""
        found = Lines(engine=engine)
        async with self._client.stream("POST", "/api/chat", json=body) as answer:
            try:
                answer.raise_for_status()
            except httpx.HTTPStatusError:
                await answer.aread()
                raise ollama.ResponseError(answer.text, answer.status_code) from None
            async for piece in _ended(answer.aiter_bytes()):
                for line in filter(None, found.feed(piece)):
                    fields = msgspec.json.decode(line)
                    if "error" in fields:
                        raise ollama.ResponseError(fields["error"])
                    yield ollama.ChatResponse(**fields)


async def _ended(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """`pieces`, and the end of a last line that has none."""
    async for piece in pieces:
        yield piece
    yield b"\n"


class _Answer:
    """Folds the lines of one answer into deltas."""

    def __init__(self, engine: str, call_prefix: str) -> None:
        self._engine, self._prefix = engine, call_prefix
        self._calls = 0
        self.began = self.done = self.progressed = False

    def take(self, line: ollama.ChatResponse) -> ChatDelta | None:
        """The line's delta, None when it carries no answer."""
        self.began = True
        message = line.message
        calls = tuple(
            ToolCallDelta(
                index=self._calls + offset,
                # Ollama's calls had no id for long. This one is unique in its conversation, which only grows.
                id=f"{self._prefix}-{self._calls + offset}",
                name=call.function.name,
                arguments=msgspec.json.encode(call.function.arguments).decode(),
            )
            for offset, call in enumerate(message.tool_calls or ())
        )
        self._calls += len(calls)
        self.done = bool(line.done)
        self.progressed = bool(message.content or message.thinking or calls or self.done)
        if not (message.content or calls or self.done):
            return None
        return ChatDelta(
            text=message.content or "",
            tool_calls=calls,
            finish_reason=self._finish(line.done_reason) if self.done else None,
            usage=ChatUsage(
                input_tokens=tokens_said(line.prompt_eval_count), output_tokens=tokens_said(line.eval_count)
            )
            if self.done
            else None,
            model=line.model or "",
        )

    def _finish(self, said: str | None) -> FinishReason:
        # Old versions do not say why they are done.
        reason = _FINISH.get(said or "stop")
        if reason is None:
            raise EngineProtocolError(f"unknown done_reason {said!r}", engine=self._engine)
        return "tool_calls" if self._calls and reason == "stop" else reason


def _message(message: Message, conversation: tuple[Message, ...]) -> JSONObject:
    wire: JSONObject = {"role": message.role, "content": message.text}
    images = [part.content for part in message.parts if isinstance(part, ImagePart)]
    if images:
        wire["images"] = images
    if message.tool_calls:
        wire["tool_calls"] = [
            {"function": {"name": call.name, "arguments": _arguments(call.arguments)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        # Ollama knows a result by its tool's name.
        wire["tool_name"] = next(
            (
                call.name
                for turn in conversation
                for call in turn.tool_calls
                if call.id == message.tool_call_id
            ),
            message.tool_call_id,
        )
    return wire


def _arguments(text: str) -> Any:
    """Arguments as the object that Ollama wants; what a model wrote and is none stays readable to it."""
    try:
        arguments = msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        return {"text": text}
    return arguments if isinstance(arguments, dict) else {"value": arguments}


def translate(exc: Exception, *, spec: EngineSpec, connecting: bool) -> EngineError:
    """Our error for one that the client raised or let through. `connecting`: no answer began yet."""
    name, secret = spec.name, spec.api_key
    match exc:
        case ollama.ResponseError() if exc.status_code < 0:
            return in_stream(str(exc.error), engine=name, secret=secret)
        case ollama.ResponseError():
            # The client drops the headers, but not the error that it made its own of.
            headers = (
                exc.__context__.response.headers if isinstance(exc.__context__, httpx.HTTPStatusError) else {}
            )
            return refusal(
                exc.status_code,
                str(exc.error),
                engine=name,
                retry_after_s=retry_after_s(headers),
                secret=secret,
            )
        case ollama.RequestError():
            return EngineRequestError(str(exc.error), engine=name)
        case httpx.ConnectTimeout() | httpx.PoolTimeout():
            return EngineTimeoutError("connect", spec.timeouts.connect_s, engine=name)
        case httpx.TimeoutException():
            return EngineTimeoutError("idle", spec.timeouts.idle_s, engine=name)
        case httpx.UnsupportedProtocol() | httpx.LocalProtocolError() | httpx.InvalidURL():
            return EngineRequestError(f"cannot be asked: {exc}", engine=name)
        case ConnectionError() | httpx.ConnectError() | httpx.ProxyError():
            return EngineUnreachableError("cannot be reached; is Ollama running?", engine=name)
        case httpx.TransportError() if connecting:
            return EngineUnreachableError(
                f"the connection was lost before an answer began ({type(exc).__name__})", engine=name
            )
        case httpx.HTTPError() | httpx.StreamError():
            return EngineProtocolError(f"the answer was cut ({type(exc).__name__})", engine=name)
        case _:
            return EngineProtocolError(f"the answer is malformed ({type(exc).__name__})", engine=name)
