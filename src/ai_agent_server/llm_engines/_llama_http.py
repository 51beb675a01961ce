"""llama.cpp's HTTP server as its clients see it: OpenAI's form, less what llama.cpp leaves out in silence."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from urllib.parse import quote

import msgspec

from ai_agent_server.core.chat import ChatDelta, ChatRequest, JSONObject
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.errors import EngineRequestError
from ai_agent_server.llm_engines import _openai_wire as wire
from ai_agent_server.llm_engines import _tools_by_schema as tools_by_schema
from ai_agent_server.llm_engines._server_http import ServerHTTP
from ai_agent_server.llm_engines.base import EngineTimeouts


class _Capabilities(msgspec.Struct, frozen=True):
    supports_tools: bool = True


class _Props(msgspec.Struct, frozen=True):
    chat_template_caps: _Capabilities = _Capabilities()


class _Counted(msgspec.Struct, frozen=True):
    input_tokens: int


class LlamaHTTP(ServerHTTP):
    """A client of one llama.cpp server at `base_url` (no `/v1`)."""

    def __init__(
        self, base_url: str, *, engine: str, timeouts: EngineTimeouts, api_key: str | None = None
    ) -> None:
        # It closes a kept connection after five seconds or a hundred requests.
        super().__init__(base_url, engine=engine, timeouts=timeouts, api_key=api_key, keep_alive=False)
        self._template_has_tools: bool | None = None

    async def stream(
        self, request: ChatRequest, model: str, extra: JSONObject
    ) -> AsyncGenerator[ChatDelta, None]:
        """Answer `request`; `extra` goes into the body as it is.

        llama.cpp looks whether its client is still there when it has something to say, and else once a
        second of silence; asked for progress, it has after every batch of the prompt.

        A model whose chat template knows no tools (llama.cpp would leave them out in silence)
        is held to a call by a grammar; its answer then comes in one piece.
        """
        plain, extra = super().stream, {**extra, "return_progress": True}
        if await self._asks_in_words(request, model):
            deltas = tools_by_schema.stream(
                request, lambda asked: plain(asked, model, extra), engine=self._engine
            )
        else:
            deltas = plain(request, model, extra)
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta

    async def count(self, request: ChatRequest, model: str) -> int:
        """The prompt's tokens, as the model's template makes it. A llama-server of before 2026 cannot tell
        them: `EngineRequestError`."""
        if await self._asks_in_words(request, model):
            request = tools_by_schema.without_tools(request)
        body = wire.payload(request, model, max_tokens_field="max_tokens")
        return (await self.ask("/v1/chat/completions/input_tokens", body, _Counted)).input_tokens

    async def embed(self, request: EmbeddingRequest, model: str) -> EmbeddingReply:
        """The vectors of the inputs. llama.cpp cannot shorten them."""
        if request.dimensions is not None:
            raise EngineRequestError("llama.cpp cannot shorten its vectors", engine=self._engine)
        return await super().embed(request, model)

    async def _asks_in_words(self, request: ChatRequest, model: str) -> bool:
        """Whether the model has to be told of its tools by the prompt."""
        return bool(request.tools) and request.tool_choice != "none" and not await self._has_tools(model)

    async def _has_tools(self, model: str) -> bool:
        if self._template_has_tools is None:
            # A router wants to know whose; a server of one model takes no notice.
            props = await self.get(f"/props?model={quote(model, safe='')}", _Props)
            self._template_has_tools = props.chat_template_caps.supports_tools
        return self._template_has_tools
