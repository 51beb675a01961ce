"""`/v1/embeddings`: texts to vectors, by the LLMs that have the capability `embeddings`."""

import base64
import sys
from array import array
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from litestar import Request, Response, post
from litestar.handlers import HTTPRouteHandler

from ai_agent_server.config.settings import Settings
from ai_agent_server.core.api_operations import Answer, Operation
from ai_agent_server.core.api_schemas import JSON
from ai_agent_server.core.chat import ChatUsage, RouteHints
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.core.metrics_snapshot import Served
from ai_agent_server.core.packet_json import explained
from ai_agent_server.core.ports import Balancer
from ai_agent_server.core.request_body import read_body
from ai_agent_server.errors import (
    AgentServerError,
    ContextOverflowError,
    InvalidPacketError,
    MalformedPacketError,
    NoLLMError,
    ScopeError,
)
from ai_agent_server.gateway._asking import header_text, while_there
from ai_agent_server.gateway._errors import openai_refusals, wire_error
from ai_agent_server.gateway.answer_cache import AnswerCache
from ai_agent_server.gateway.caller import Accounts, Caller, caller_of
from ai_agent_server.gateway.serving import Route
from ai_agent_server.llm_engines.base import EmbeddingEngine
from ai_agent_server.load_balancer import estimate

__all__ = ("Embeddings", "EmbeddingsBody", "EmbeddingsDraft", "EmbeddingsRoutes", "operations")

AnyRequest: TypeAlias = Request[Any, Any, Any]

MAX_INPUTS = 2048
"""As many as OpenAI takes."""
Text = Annotated[str, msgspec.Meta(min_length=1)]


class EmbeddingsDraft(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/embeddings. Unknown fields are let pass."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    input: str | tuple[Any, ...]
    """A text, or up to 2048 of them; none is empty. Token numbers are refused: they are another model's."""
    encoding_format: Literal["float", "base64"] | None = None
    """`base64` is of little-endian float32, and what OpenAI's SDKs ask for."""
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=65_536)] | None = None
    """Shorter vectors, by engines that can cut them; refused by the others."""
    user: str | None = None


class EmbeddingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One input's vector, as numbers or as base64 of little-endian float32."""

    index: int
    embedding: tuple[float, ...] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingsUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens as the engine counted them."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsBody(msgspec.Struct, frozen=True, kw_only=True):
    """The vectors, in the order of the inputs."""

    data: tuple[EmbeddingRow, ...]
    model: str
    """The LLM that made them. Keep it beside them: vectors of two LLMs cannot be compared."""
    usage: EmbeddingsUsage
    object: Literal["list"] = "list"


_drafts = msgspec.json.Decoder(EmbeddingsDraft)


class Embeddings:
    """The way of a request for vectors through the gateway: route, limits, balancer, count."""

    def __init__(
        self,
        *,
        engine: EmbeddingEngine,
        balancer: Balancer,
        route: Callable[[str], Route],
        accounts: Accounts,
        cache: AnswerCache,
        observe: Callable[[Served], None],
        price: Callable[[str, ChatUsage], float],
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        """`route` says what a model's name means; `clock` is monotonic, in seconds."""
        self._engine, self._balancer, self._route = engine, balancer, route
        self._accounts, self._cache, self._observe, self._price = accounts, cache, observe, price
        self._clock, self._new_id = clock, new_id

    async def answer(self, draft: EmbeddingsDraft, caller: Caller) -> tuple[EmbeddingReply, dict[str, str]]:
        """The vectors, and what the answer's headers say. Counted however it ends, once."""
        started_s = self._clock()
        request = EmbeddingRequest(
            inputs=_inputs(draft.input),
            dimensions=draft.dimensions,
            route=self._hints(draft.model, caller),
        )
        tokens = sum(estimate.text_tokens(text) for text in request.inputs)
        kept = self._cache.vectors(request, caller)
        is_hit = kept is not None and kept.outcome == "hit"
        hold = self._accounts.reserve(caller, tokens=0 if is_hit else tokens, tier=None)
        reply, status = EmbeddingReply(vectors=()), "left"
        try:
            ask = partial(self._engine.embed, request)
            reply = await (ask() if kept is None else kept.reply(ask))
            status = "ok"
        except AgentServerError as exc:
            told = _too_long(exc) or exc
            status = wire_error(told).code or "failed"
            if told is exc:
                raise
            raise told from exc
        except Exception:
            status = "failed"
            raise
        finally:
            ended_s = self._clock()
            # What was kept is told as it was and costs nothing.
            usage = ChatUsage() if is_hit else reply.usage
            cost_usd = self._price(reply.llm, usage) if reply.llm else 0.0
            self._accounts.charge(
                caller,
                usage,
                llm=reply.llm,
                gpu_s=ended_s - started_s if reply.source == "local" and not is_hit else 0.0,
                cost_usd=cost_usd,
                hold=hold,
            )
            self._observe(
                Served(
                    surface="embeddings",
                    tier="",
                    llm=reply.llm,
                    source=reply.source,
                    status=status,
                    input_tokens=usage.input_tokens,
                    output_tokens=0,
                    cost_usd=cost_usd,
                    cache="" if kept is None else kept.outcome,
                    saved_tokens=reply.usage.input_tokens if is_hit else 0,
                    duration_ms=1000 * (ended_s - started_s),
                    time_to_first_token_ms=None,
                    overhead_ms=None,
                )
            )
        headers = {
            "x-request-id": self._new_id(),
            "openai-processing-ms": str(round(1000 * (ended_s - started_s))),
            "X-LLM": reply.llm,
            "X-Routing-Reason": header_text(reply.decision.reason if reply.decision else ""),
        }
        if kept is not None:
            headers["X-Cache"] = kept.outcome
        if is_hit and kept is not None:
            headers["Age"] = str(int(kept.age_s))
        return reply, {**headers, **self._accounts.headers(caller)}

    def _hints(self, model: str, caller: Caller) -> RouteHints:
        route = self._route(model)
        able = tuple(view.name for view in self._balancer.views() if "embeddings" in view.capabilities)
        if not able:
            raise InvalidPacketError(
                "no LLM here gives vectors: give one the capability `embeddings` in configuration.json",
                pointer="/model",
            )
        if route.kind == "role" or (route.kind == "llm" and route.model not in able):
            raise InvalidPacketError(f"{route.model!r} gives no vectors", pointer="/model", choices=able)
        if route.kind == "llm" and caller.allowed_llms and route.model not in caller.allowed_llms:
            raise ScopeError(f"this key may not use {route.model!r}")
        return RouteHints(
            llm=route.model if route.kind == "llm" else None,
            tier=route.tier if route.kind == "tier" else None,
            prefer=caller.prefer,
            allowed=caller.allowed_llms,
            privacy=caller.privacy,
            urgency=caller.priority,
            key=caller.key,
        )


class EmbeddingsRoutes:
    """The route."""

    def __init__(self, embeddings: Embeddings, *, settings: Callable[[], Settings]) -> None:
        self._embeddings, self._settings = embeddings, settings

    def handlers(self) -> list[HTTPRouteHandler]:
        """The route."""
        return [post("/v1/embeddings", status_code=200)(self.create)]

    async def create(self, request: AnyRequest) -> Response[bytes]:
        """The vectors of the inputs."""
        limit_bytes = int(self._settings().server.max_body_mb * 1024 * 1024)
        draft = _decoded(await read_body(request, limit_bytes))
        return await while_there(request, self._answer(draft, caller_of(request.scope)))

    async def _answer(self, draft: EmbeddingsDraft, caller: Caller) -> Response[bytes]:
        reply, headers = await self._embeddings.answer(draft, caller)
        return Response(
            msgspec.json.encode(_body(reply, as_numbers=draft.encoding_format != "base64")),
            media_type=JSON,
            headers=headers,
        )


def _decoded(body: bytes) -> EmbeddingsDraft:
    try:
        return _drafts.decode(body)
    except msgspec.ValidationError as exc:
        raise explained(exc, EmbeddingsDraft) from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise MalformedPacketError(
            "not JSON, not UTF-8, or nested too deep", expected="one JSON object"
        ) from exc


def _inputs(given: str | tuple[Any, ...]) -> tuple[str, ...]:
    inputs = (given,) if isinstance(given, str) else given
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise InvalidPacketError(
            f"{len(inputs)} inputs", pointer="/input", expected=f"between 1 and {MAX_INPUTS}"
        )
    for index, text in enumerate(inputs):
        at = "/input" if isinstance(given, str) else f"/input/{index}"
        if not isinstance(text, str):
            raise InvalidPacketError(
                "token numbers mean another text to each model",
                pointer=at,
                expected="text (in LangChain: check_embedding_ctx_length=False)",
            )
        if not text:
            raise InvalidPacketError("the text is empty", pointer=at, expected="at least one character")
    return inputs


def _body(reply: EmbeddingReply, *, as_numbers: bool) -> EmbeddingsBody:
    tokens = reply.usage.input_tokens
    return EmbeddingsBody(
        data=tuple(
            EmbeddingRow(
                index=index,
                embedding=_numbers(vector) if as_numbers else base64.b64encode(vector).decode(),
            )
            for index, vector in enumerate(reply.vectors)
        ),
        model=reply.llm,
        usage=EmbeddingsUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


def _numbers(vector: bytes) -> tuple[float, ...]:
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return tuple(floats)


def _too_long(error: AgentServerError) -> ContextOverflowError | None:
    """What a client understands, where nothing but an input's length keeps every LLM from serving."""
    if not isinstance(error, NoLLMError):
        return None
    able = {llm: why for llm, why in error.refusals.items() if not why.startswith("LB-5")}
    if not able or not any(why.startswith("LB-6") for why in able.values()):
        return None
    if any(why.startswith(("LB-8", "LB-9")) for why in able.values()):
        return None
    each = "; ".join(f"{llm}: {why}" for llm, why in able.items())
    return ContextOverflowError(f"an input is longer than the maximum context length ({each})")


def operations() -> tuple[Operation, ...]:
    """The route as the API's document tells it."""
    return (
        Operation(
            method="post",
            path="/v1/embeddings",
            id="createEmbeddings",
            tag="llms",
            summary="Turn texts into vectors",
            about="By an LLM with the capability `embeddings`. Nobody stands in for one that was named: "
            "vectors of two models cannot be compared.",
            query=None,
            body=EmbeddingsDraft,
            body_example={"model": "vectors", "input": ["a text", "another"]},
            answers=(
                Answer(
                    status=200,
                    about="A vector for each text, in their order.",
                    kind=EmbeddingsBody,
                    example=EmbeddingsBody(
                        data=(EmbeddingRow(index=0, embedding=(0.25, -0.5, 0.75)),),
                        model="vectors",
                        usage=EmbeddingsUsage(prompt_tokens=2, total_tokens=2),
                    ),
                ),
            ),
            refusals=openai_refusals(),
        ),
    )
