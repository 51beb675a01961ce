"""OpenAI's surface: POST /v1/chat/completions, GET /v1/models and /v1/models/{id}."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Literal, TypeAlias, get_args

import msgspec
import structlog
from litestar import Request, Response, get, post, route
from litestar.exceptions import NotFoundException
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from litestar.types import ASGIApp, Receive

from ai_agent_server.config.settings import Settings
from ai_agent_server.core.api_operations import Answer, Header, Operation
from ai_agent_server.core.api_schemas import JSON
from ai_agent_server.core.chat import ChatReply, ChatUsage, Tier
from ai_agent_server.core.event_stream import ClientLeftError, EventStream, WhileConnected
from ai_agent_server.core.request_body import body_of
from ai_agent_server.errors import AgentServerError, UnknownLLMError
from ai_agent_server.gateway import _openai_chat as wire
from ai_agent_server.gateway._asking import NO_LONGER_READ, tier_named
from ai_agent_server.gateway._errors import openai_body, openai_refusals, wire_error
from ai_agent_server.gateway._lane import Guard, JsonAnswer, Lane
from ai_agent_server.gateway.caller import CacheUse, caller_of
from ai_agent_server.gateway.serving import KeepAlive, ListedModel, Opened, Serving

__all__ = ("ModelCard", "ModelList", "OpenAIRoutes", "operations")

log = structlog.get_logger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
METHODS: tuple[Literal["DELETE", "GET", "HEAD", "PATCH", "POST", "PUT"], ...] = (
    "DELETE",
    "GET",
    "HEAD",
    "PATCH",
    "POST",
    "PUT",
)

AnyRequest: TypeAlias = Request[Any, Any, Any]


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A name that `model` may have: an LLM, a tier, `profile/role`, or `auto`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    """`local` or `api` for an LLM, `balancer` for a tier and `auto`, `orchestration` for a role."""
    context_length: int | None = None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Every name that `model` may have."""

    object: Literal["list"] = "list"
    data: tuple[ModelCard, ...]


class OpenAIRoutes:
    """The routes; what they answer is `Serving`'s."""

    def __init__(
        self,
        *,
        serving: Serving,
        settings: Callable[[], Settings],
        now_s: Callable[[], float],
        write_timeout_s: float,
    ) -> None:
        """`now_s` answers seconds since 1970."""
        self._serving, self._settings = serving, settings
        self._now_s, self._created = now_s, int(now_s())
        self._write_timeout_s = write_timeout_s
        self.chat_route: HTTPRouteHandler = post("/v1/chat/completions", status_code=200)(self.chat)

    def handlers(self) -> list[HTTPRouteHandler]:
        """The routes, and one for what is not there: its answer is in OpenAI's form."""
        return [
            self.chat_route,
            get("/v1/models")(self.models),
            # A role's name has a slash in it.
            get("/v1/models/{model:path}")(self.model),
            route("/v1/{rest:path}", http_method=METHODS)(self.nothing),
        ]

    def lane(self, app: ASGIApp, guard: Guard) -> Lane:
        """`app`, which has these routes, with chats answered before its router is asked."""
        return Lane(app, route=self.chat_route, answer=self._answered, guard=guard)

    async def chat(self, request: AnyRequest) -> ASGIApp:
        """Answer a conversation, whole or streamed."""
        return await self._answered(request.scope, request.receive)

    async def _answered(self, scope: Any, receive: Receive) -> ASGIApp:
        started_s = self._serving.now_s()
        limit_bytes = int(self._settings().server.max_body_mb * 1024 * 1024)
        asked = wire.ask(await body_of(scope, receive, limit_bytes))
        created = int(self._now_s())
        serve = self._serving.open if asked.stream else self._serving.whole
        try:
            async with WhileConnected(receive):
                answer = await serve(
                    asked.model,
                    asked.request,
                    caller_of(scope),
                    tier=tier_named(_header(scope, b"x-tier")),
                    started_s=started_s,
                    idempotency_key=_header(scope, b"idempotency-key"),
                )
        except ClientLeftError:
            return JsonAnswer(b"", headers={}, status=NO_LONGER_READ)
        if isinstance(answer, Opened):
            return EventStream(
                _frames(answer, created=created, include_usage=asked.include_usage),
                about={"request_id": answer.id, "surface": "chat"},
                write_timeout_s=self._write_timeout_s,
                headers=answer.headers,
                aclose=answer.aclose,
            )
        completion = wire.completion(answer.reply, request_id=answer.id, model=answer.model, created=created)
        return JsonAnswer(msgspec.json.encode(completion), headers=answer.headers)

    async def models(self, request: AnyRequest) -> Response[bytes]:
        """Every model, from what is known: a dead engine holds nothing up."""
        listed = self._serving.models(caller_of(request.scope))
        return _json(ModelList(data=tuple(self._card(model) for model in listed)))

    async def model(self, request: AnyRequest, model: FromPath[str]) -> Response[bytes]:
        """One model."""
        name = model.removeprefix("/")
        listed = self._serving.models(caller_of(request.scope))
        found = next((each for each in listed if each.id == name), None)
        if found is None:
            raise UnknownLLMError(name[:100], tuple(each.id for each in listed))
        return _json(self._card(found))

    async def nothing(self, rest: FromPath[str]) -> None:
        """There is no such route."""
        raise NotFoundException(rest)

    def _card(self, model: ListedModel) -> ModelCard:
        return ModelCard(
            id=model.id,
            created=self._created,
            owned_by=model.owned_by,
            context_length=model.context_tokens,
        )


async def _frames(opened: Opened, *, created: int, include_usage: bool) -> AsyncGenerator[bytes]:
    """The stream's frames. One that breaks says so, and ends without `[DONE]`."""
    chunks: wire.Chunks | None = None
    try:
        async with aclosing(opened.deltas) as deltas:
            async for delta in deltas:
                if isinstance(delta, KeepAlive):
                    yield KEEP_ALIVE
                    continue
                if chunks is None:
                    chunks = wire.Chunks(
                        request_id=opened.id, model=opened.model, created=created, include_usage=include_usage
                    )
                    yield chunks.first() + chunks.frames(delta)
                else:
                    frames = chunks.frames(delta)
                    if frames:
                        yield frames
    except AgentServerError as exc:
        error = wire_error(exc)
        log.warning("gateway.stream_broken", request_id=opened.id, code=error.code, llm=opened.model)
        yield b"data: " + openai_body(error) + b"\n\n"
        return
    if chunks is not None:
        yield chunks.end(opened.usage)


def operations() -> tuple[Operation, ...]:
    """The routes as the API's document tells them."""
    card = ModelCard(id="embedded", created=1795242888, owned_by="local", context_length=4096)
    text = {"type": "string"}
    reply = ChatReply(text="Blue.", finish_reason="stop", usage=ChatUsage(input_tokens=14, output_tokens=3))
    return (
        Operation(
            method="post",
            path="/v1/chat/completions",
            id="createChatCompletion",
            tag="llms",
            summary="Answer a conversation in OpenAI's form",
            about="`model` is an LLM, a tier, a role (`developer/planner`: the last user message becomes a "
            "task, its steps come as `reasoning_content`, its result as the answer), `auto`, or an alias of "
            "`gateway.aliases`. With `stream` the answer comes as chunks, and comments while nothing comes; "
            "one that broke ends with an error and without `[DONE]`. To close the connection ends the work.",
            query=None,
            headers=(
                Header("X-Tier", "Which LLMs should serve.", {"enum": list(get_args(Tier))}, example="main"),
                Header("X-Privacy", "`local`: it does not leave this machine.", text, example="local"),
                Header("X-Project", "The project that it is counted with.", text, example="shop"),
                Header(
                    "X-Cache",
                    "Whether the exact cache may answer; `refresh` asks an LLM and keeps what it says.",
                    {"enum": list(get_args(CacheUse))},
                    example="use",
                ),
            ),
            body=wire.ChatCompletionRequest,
            body_example={"model": "auto", "messages": [{"role": "user", "content": "Name a colour."}]},
            answers=(
                Answer(
                    status=200,
                    about="The whole answer, or its chunks.",
                    kind=wire.ChatCompletion,
                    is_also_streamed=True,
                    example=wire.completion(
                        reply, request_id="01a1fcd08cc97592", model="embedded", created=1795242888
                    ),
                    headers=(
                        Header("X-LLM", "The LLM that answered.", text, example="embedded"),
                        Header("X-Tier", "The tier that it was served as.", text, example="small"),
                        Header("X-Routing-Reason", "Why that LLM.", text, example="embedded: best of 2"),
                        Header("X-Overhead-Ms", "The server's own part of the wait.", text, example="0.61"),
                        Header(
                            "X-Cache",
                            "Where the cache was to be used: whether no LLM was asked for this answer; "
                            "`Age` is then its age in seconds.",
                            {"enum": ["hit", "miss"]},
                            example="miss",
                        ),
                    ),
                ),
            ),
            refusals=openai_refusals(),
        ),
        Operation(
            method="get",
            path="/v1/models",
            id="listModels",
            tag="llms",
            summary="Every name that `model` may have",
            query=None,
            answers=(
                Answer(
                    status=200,
                    about="LLMs, tiers, roles and `auto`.",
                    kind=ModelList,
                    example=ModelList(data=(card,)),
                ),
            ),
            refusals=openai_refusals(),
        ),
        Operation(
            method="get",
            path="/v1/models/{model}",
            id="readModel",
            tag="llms",
            summary="One of them",
            query=None,
            answers=(Answer(status=200, about="The model.", kind=ModelCard, example=card),),
            refusals=openai_refusals(),
        ),
    )


def _header(scope: Any, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _json(value: object) -> Response[bytes]:
    return Response(msgspec.json.encode(value), media_type=JSON)
