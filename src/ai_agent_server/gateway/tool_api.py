"""The text tools as plain HTTP: a listing with their schemas, and a POST for each. JSON in, JSON out."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, get_args

import msgspec
from litestar import Request, Response, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from ai_agent_server.config.settings import Settings
from ai_agent_server.core.api_operations import Answer, Header, Operation
from ai_agent_server.core.api_schemas import JSON
from ai_agent_server.core.chat import ChatUsage, JSONObject, Tier
from ai_agent_server.core.packet_json import decode
from ai_agent_server.core.request_body import read_body
from ai_agent_server.errors import (
    ContextOverflowError,
    EngineBusyError,
    EngineError,
    EngineRequestError,
    InvalidOutputError,
    LimitExceededError,
    NoLLMError,
    UnknownToolError,
)
from ai_agent_server.gateway._asking import tier_of, while_there
from ai_agent_server.gateway.caller import Caller, caller_of
from ai_agent_server.gateway.tool_runner import ReadyTool, ToolRunner, ToolWork

__all__ = ("ToolApi", "ToolCall", "ToolListing", "listing", "operations")

PATH = "/mcp/tools"

AnyRequest: TypeAlias = Request[Any, Any, Any]


class ListedTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool and where it is called. The schemas are JSON Schemas."""

    name: str
    title: str
    description: str
    endpoint: str
    parameters: JSONObject
    result: JSONObject
    """Of `output` in the answer."""


class ToolListing(msgspec.Struct, frozen=True, kw_only=True):
    """Every tool."""

    tools: tuple[ListedTool, ...]


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a call. `output` obeys the tool's result schema, always."""

    tool: str
    output: JSONObject
    llm: str
    """The LLM that answered; the last one where there were several exchanges."""
    calls: int
    """Exchanges with an LLM; more than one for a long text, or where an answer had to be asked for again."""
    usage: ChatUsage


def listing(tools: Sequence[ReadyTool]) -> ToolListing:
    """The tools as the listing shows them."""
    return ToolListing(
        tools=tuple(
            ListedTool(
                name=ready.tool.card.name,
                title=ready.tool.card.title,
                description=ready.tool.card.description,
                endpoint=f"{PATH}/{ready.tool.card.name}",
                parameters=ready.parameters,
                result=ready.tool.card.result,
            )
            for ready in tools
        )
    )


class ToolApi:
    """`GET /mcp/tools` and `POST /mcp/tools/{name}`."""

    def __init__(self, runner: ToolRunner, *, settings: Callable[[], Settings]) -> None:
        self._runner, self._settings = runner, settings

    def handlers(self) -> list[HTTPRouteHandler]:
        """The routes."""
        return [get(PATH)(self.list), post(f"{PATH}/{{tool:str}}", status_code=200)(self.call)]

    async def list(self) -> Response[bytes]:
        """The tools with their schemas."""
        return Response(msgspec.json.encode(listing(tuple(self._runner.tools().values()))), media_type=JSON)

    async def call(self, request: AnyRequest, tool: FromPath[str]) -> Response[bytes]:
        """Call a tool; it ends with the client's connection."""
        tier = tier_of(request)
        limit_bytes = int(self._settings().server.max_body_mb * 1024 * 1024)
        arguments = decode(await read_body(request, limit_bytes), dict[str, Any])
        caller = caller_of(request.scope)
        return await while_there(request, self._answer(tool, arguments, caller, tier))

    async def _answer(
        self, tool: str, arguments: JSONObject, caller: Caller, tier: Tier | None
    ) -> Response[bytes]:
        work = ToolWork()
        answer = await self._runner.run(tool, arguments, caller, tier=tier, work=work)
        called = ToolCall(
            tool=answer.tool, output=answer.output, llm=answer.llm, calls=answer.calls, usage=answer.usage
        )
        return Response(msgspec.json.encode(called), media_type=JSON, headers=work.headers)


def operations() -> tuple[Operation, ...]:
    """The routes as the API's document tells them."""
    example = ListedTool(
        name="classify",
        title="Classify a text",
        description="Choose which of your labels fits a text.",
        endpoint=f"{PATH}/classify",
        parameters={"type": "object", "required": ["text", "labels"]},
        result={"type": "object", "properties": {"label": {"type": "string"}}},
    )
    return (
        Operation(
            method="get",
            path=PATH,
            id="listTools",
            tag="tools",
            summary="The tools with their schemas",
            query=None,
            answers=(
                Answer(
                    status=200, about="Every tool.", kind=ToolListing, example=ToolListing(tools=(example,))
                ),
            ),
        ),
        Operation(
            method="post",
            path=f"{PATH}/{{tool}}",
            id="callTool",
            tag="tools",
            summary="Call a tool",
            about="The body is what the listing says under `parameters`; `output` is what it says under "
            "`result`, always: an answer of another form is asked for again, twice at most, and told as a "
            "problem then. A text that is long for one exchange is summarized in pieces that are merged, and "
            "rewritten part by part. To close the connection ends the work. A small LLM serves unless "
            "`X-Tier` or `tier` in the body asks for main.",
            query=None,
            headers=(
                Header("X-Tier", "Which LLMs should serve.", {"enum": list(get_args(Tier))}, example="main"),
            ),
            body=dict,
            body_example={"text": "I was charged twice.", "labels": ["billing", "bug", "praise"]},
            answers=(
                Answer(
                    status=200,
                    about="What came of it.",
                    kind=ToolCall,
                    example=ToolCall(
                        tool="classify",
                        output={"label": "billing"},
                        llm="embedded",
                        calls=1,
                        usage=ChatUsage(input_tokens=58, output_tokens=7),
                    ),
                    headers=(
                        Header("X-LLM", "The LLM that answered.", {"type": "string"}, example="embedded"),
                        Header("X-Tier", "The tier that served.", {"type": "string"}, example="small"),
                    ),
                ),
            ),
            problems=(
                UnknownToolError,
                InvalidOutputError,
                NoLLMError,
                ContextOverflowError,
                EngineRequestError,
                EngineBusyError,
                EngineError,
                LimitExceededError,
            ),
        ),
    )
