"""The gateway's surfaces, built from the server's parts: the forms in which other programs ask for an LLM."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.handlers import ASGIRouteHandler, HTTPRouteHandler
from litestar.types import ASGIApp

from ai_agent_server.config.settings import Settings
from ai_agent_server.core.api_operations import Operation
from ai_agent_server.core.metrics import Metrics
from ai_agent_server.core.ports import Orchestration
from ai_agent_server.gateway import anthropic_api, embeddings_api, openai_api, responses_api, tool_api
from ai_agent_server.gateway._errors import openai_form, refused
from ai_agent_server.gateway._lane import Guard
from ai_agent_server.gateway.answer_cache import AnswerCache
from ai_agent_server.gateway.anthropic_api import AnthropicApi, anthropic_form
from ai_agent_server.gateway.caller import Accounts
from ai_agent_server.gateway.embeddings_api import Embeddings, EmbeddingsRoutes
from ai_agent_server.gateway.model_context import ModelContext
from ai_agent_server.gateway.openai_api import OpenAIRoutes
from ai_agent_server.gateway.responses_api import ResponsesRoutes
from ai_agent_server.gateway.serving import Serving
from ai_agent_server.gateway.tool_runner import ReadyTool, ToolRunner
from ai_agent_server.load_balancer.balanced_engine import BalancedEngine
from ai_agent_server.tracing.base import Tracer

__all__ = ("Surfaces", "operations", "surfaces_for")


class Surfaces(msgspec.Struct, frozen=True, kw_only=True):
    """What the application needs of them."""

    serving: Serving
    model_context: ModelContext
    """It answers while it is entered."""
    handlers: list[HTTPRouteHandler | ASGIRouteHandler]
    lane: Callable[[ASGIApp], ASGIApp]
    """Around the application: what it answers before the application's router is asked."""
    refused: Callable[[Request[Any, Any, Any], Exception], Response[bytes] | None]


def operations() -> tuple[Operation, ...]:
    """What the surfaces add to the API's document."""
    return (
        *openai_api.operations(),
        *responses_api.operations(),
        *anthropic_api.operations(),
        *embeddings_api.operations(),
        *tool_api.operations(),
    )


def surfaces_for(
    *,
    balancer: BalancedEngine,
    orchestration: Orchestration,
    accounts: Accounts,
    guard: Guard,
    cache: AnswerCache,
    settings: Callable[[], Settings],
    tools: Callable[[], Mapping[str, ReadyTool]],
    metrics: Metrics,
    tracer: Tracer | None,
    version: str,
    max_body_bytes: int,
    clock: Callable[[], float],
    now_s: Callable[[], float],
    new_id: Callable[[], str],
    write_timeout_s: float,
) -> Surfaces:
    """Every surface. `clock` is monotonic; `now_s` answers seconds since 1970."""
    serving = Serving(
        llm=balancer,
        balancer=balancer,
        orchestration=orchestration,
        accounts=accounts,
        cache=cache,
        settings=settings,
        observe=metrics.served,
        price=balancer.cost_usd,
        tracer=tracer,
        clock=clock,
        new_id=new_id,
    )
    embeddings = Embeddings(
        engine=balancer,
        balancer=balancer,
        route=serving.route,
        accounts=accounts,
        cache=cache,
        observe=metrics.served,
        price=balancer.cost_usd,
        clock=clock,
        new_id=new_id,
    )
    chat = OpenAIRoutes(serving=serving, settings=settings, now_s=now_s, write_timeout_s=write_timeout_s)
    responses = ResponsesRoutes(
        serving=serving, settings=settings, new_id=new_id, now_s=now_s, write_timeout_s=write_timeout_s
    )
    messages = AnthropicApi(serving, settings=settings, write_timeout_s=write_timeout_s)
    runner = ToolRunner(serving, tools=tools, tiers=lambda: settings().gateway.tiers, views=balancer.views)
    model_context = ModelContext(
        lambda server: server(
            runner=runner,
            serving=serving,
            orchestration=orchestration,
            settings=settings,
            version=version,
            max_body_bytes=max_body_bytes,
            clock=clock,
        )
    )
    return Surfaces(
        serving=serving,
        model_context=model_context,
        handlers=[
            *chat.handlers(),
            *responses.handlers(),
            *EmbeddingsRoutes(embeddings, settings=settings).handlers(),
            *messages.handlers(),
            *tool_api.ToolApi(runner, settings=settings).handlers(),
            model_context.handler(),
        ],
        lane=lambda app: chat.lane(app, guard),
        refused=refused({"/v1": openai_form, "/v1/messages": anthropic_form(new_id)}),
    )
