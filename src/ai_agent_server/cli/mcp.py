"""`mcp`: the Model Context Protocol on standard input and output, for clients that start their servers."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import mcp_types as types
import msgspec
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.shared.exceptions import MCPError

from ai_agent_server import __version__
from ai_agent_server.assembly import ready_tools
from ai_agent_server.cli import Exit
from ai_agent_server.cli.options import ServerURL, address
from ai_agent_server.config import settings as configuration
from ai_agent_server.config.settings import API_KEY, environment
from ai_agent_server.errors import ClientError, ServerRefusedError, ServerUnreachableError
from ai_agent_server.gateway._mcp_tools import INSTRUCTIONS, definitions

__all__ = ("mcp",)

REFUSALS = frozenset({401, 403, 429, 503})
CONNECT_S = 5.0
CALL_S = 3600.0
"""The longest that a call may take; progress is told all the while, and whoever called may cancel."""


def mcp(*, server: ServerURL = None) -> int:
    """Speak the Model Context Protocol on standard input and output, for clients that know no URL.

    Every call goes to the server of the URL; start it with `ai-agent-server serve`. It may be started
    later: until then each call says so.
    """
    # Standard output is the protocol's; what the SDK logs goes nowhere near it.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    asyncio.run(_Bridge(address(server), environment().get(API_KEY) or None).serve())
    return Exit.OK


class _Bridge:
    """Passes on what a client asks to the server's own endpoint, and back what it answers.

    Each call has a connection of its own: a server that was restarted is simply there again.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._packaged = definitions(tuple(ready_tools(configuration.load(None), None).values()))

    async def serve(self) -> None:
        """Until standard input ends."""
        server: Server[Any] = Server(
            "ai-agent-server",
            version=__version__,
            title="AI-Agent-Server",
            instructions=INSTRUCTIONS,
            on_list_tools=self._list,
            on_call_tool=self._call,
            on_list_resources=self._resources,
            on_list_resource_templates=self._templates,
            on_read_resource=self._read,
            on_list_prompts=self._prompts,
            on_get_prompt=self._prompt,
        )
        async with stdio_server() as (read, write):
            await server.run(read, write, server.create_initialization_options())

    async def _list(
        self, _context: Any, _params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        """The server's tools; those of this version where none answers yet."""
        try:
            async with self._asking() as client:
                return types.ListToolsResult(tools=(await client.list_tools()).tools)
        except ClientError as exc:
            sys.stderr.write(f"warning: {exc}\n")
            return types.ListToolsResult(tools=list(self._packaged.values()))

    async def _call(self, context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        async def told(progress: float, total: float | None, message: str | None) -> None:
            await context.session.report_progress(progress, total, message)

        try:
            async with self._asking() as client:
                return await client.call_tool(params.name, params.arguments, progress_callback=told)
        except ClientError as exc:
            return types.CallToolResult(
                content=[types.TextContent(type="text", text=str(exc))], is_error=True
            )

    async def _resources(
        self, _context: Any, params: types.PaginatedRequestParams | None
    ) -> types.ListResourcesResult:
        async with self._reading() as client:
            return await client.list_resources(cursor=params.cursor if params is not None else None)

    async def _templates(
        self, _context: Any, _params: types.PaginatedRequestParams | None
    ) -> types.ListResourceTemplatesResult:
        async with self._reading() as client:
            return await client.list_resource_templates()

    async def _read(self, _context: Any, params: types.ReadResourceRequestParams) -> types.ReadResourceResult:
        async with self._reading() as client:
            return await client.read_resource(params.uri)

    async def _prompts(
        self, _context: Any, _params: types.PaginatedRequestParams | None
    ) -> types.ListPromptsResult:
        async with self._reading() as client:
            return await client.list_prompts()

    async def _prompt(self, _context: Any, params: types.GetPromptRequestParams) -> types.GetPromptResult:
        async with self._reading() as client:
            return await client.get_prompt(params.name, params.arguments)

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[Client]:
        """As `_asking`, for what has no other answer than an error of the protocol."""
        try:
            async with self._asking() as client:
                yield client
        except ClientError as exc:
            raise MCPError(types.INTERNAL_ERROR, str(exc)) from exc

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[Client]:
        """A client of the server. Raises `ClientError` where there is none or it refuses, else `MCPError`."""
        refusals: list[ServerRefusedError] = []

        async def look(response: httpx2.Response) -> None:
            # The SDK tells of no status: what refused the call at the door has to be seen here.
            if response.status_code in REFUSALS:
                refusals.append(_refusal(response.status_code, await response.aread()))

        http = httpx2.AsyncClient(
            headers=self._headers,
            timeout=httpx2.Timeout(CALL_S, connect=CONNECT_S),
            event_hooks={"response": [look]},
            trust_env=False,
        )
        try:
            async with http, Client(streamable_http_client(f"{self._url}/mcp", http_client=http)) as client:
                yield client
        except (httpx2.HTTPError, MCPError, ExceptionGroup) as exc:
            raise (refusals[0] if refusals else self._meant(exc)) from exc

    def _meant(self, exc: Exception) -> Exception:
        """What is behind `exc`, which the SDK's task groups may have wrapped."""
        match exc:
            case ExceptionGroup():
                return self._meant(exc.exceptions[0])
            case httpx2.HTTPError():
                problem = f"{exc or type(exc).__name__}; start one with `ai-agent-server serve`"
                return ServerUnreachableError(self._url, problem)
            case _:
                return exc


class _Problem(msgspec.Struct, frozen=True, kw_only=True):
    title: str = "The server refused the call"
    detail: str = ""


def _refusal(status: int, body: bytes) -> ServerRefusedError:
    try:
        told = msgspec.json.decode(body, type=_Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        told = _Problem()
    detail = told.detail or told.title
    if status == 401:
        detail += f"; set {API_KEY} to the server's key where this command is started"
    return ServerRefusedError(status, told.title, detail=detail)
