"""The Model Context Protocol's server: the text tools, a chat, and tasks, for agents that call tools.

The SDK speaks both eras of the protocol on the one endpoint; what a tool does is ours.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import anyio
import mcp_types as types
import msgspec
import structlog
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.exceptions import MCPError

from ai_agent_server.config.settings import RoleSettings, Settings
from ai_agent_server.core.chat import ChatDelta, ChatRequest, JSONObject, Message, message
from ai_agent_server.core.intake import PayloadCheck
from ai_agent_server.core.ports import Orchestration
from ai_agent_server.core.task_packet import (
    InputRequired,
    Progress,
    TaskDraft,
    TaskPacket,
    TaskStatus,
    is_task_id,
)
from ai_agent_server.errors import (
    AgentServerError,
    InvalidPacketError,
    InvalidTransitionError,
    ScopeError,
    TaskNotFoundError,
    UnknownRoleError,
)
from ai_agent_server.gateway._mcp_reading import Reading
from ai_agent_server.gateway._mcp_tools import INSTRUCTIONS, OWN_TOOLS, OwnTool, definitions
from ai_agent_server.gateway.caller import Caller, caller_of
from ai_agent_server.gateway.serving import Serving
from ai_agent_server.gateway.tool_runner import ToolRunner, ToolWork
from ai_agent_server.llm_engines.base import JoinedStream

__all__ = ("ContextServer",)

log = structlog.get_logger(__name__)

NAME = "ai-agent-server"
PROGRESS_S = 4.0
"""Clients give up on a tool that is silent for long; the bound that we promise is 5 s."""
MAX_SESSIONS = 256
SESSION_IDLE_S = 1800.0
CANCEL_S = 5.0
"""How long the end of cancelled work is waited for."""

Context = Any
T = TypeVar("T")
Say = Callable[[], str]


class ContextServer:
    """What `/mcp` answers."""

    def __init__(
        self,
        *,
        runner: ToolRunner,
        serving: Serving,
        orchestration: Orchestration,
        settings: Callable[[], Settings],
        version: str,
        max_body_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        """`clock` is monotonic, in seconds."""
        self._runner, self._serving, self._orchestration = runner, serving, orchestration
        self._settings, self._clock = settings, clock
        self._checks = {name: PayloadCheck(tool.parameters, at="") for name, tool in OWN_TOOLS.items()}
        reading = Reading(orchestration)
        self.sessions = StreamableHTTPSessionManager(
            Server(
                NAME,
                version=version,
                title="AI-Agent-Server",
                instructions=INSTRUCTIONS,
                on_list_tools=self._list,
                on_call_tool=self._call,
                on_list_resources=reading.resources,
                on_list_resource_templates=reading.templates,
                on_read_resource=reading.read,
                on_list_prompts=reading.prompts,
                on_get_prompt=reading.prompt,
                get_tool_input_schema=self._input_schema,
            ),
            session_idle_timeout=SESSION_IDLE_S,
            max_sessions=MAX_SESSIONS,
            max_request_body_size=max_body_bytes,
        )

    # What the protocol asks for

    async def _list(
        self, _context: Context, _params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=list(self._definitions().values()))

    def _definitions(self) -> dict[str, types.Tool]:
        return definitions(tuple(self._runner.tools().values()))

    def _input_schema(self, name: str) -> Mapping[str, Any] | None:
        tool = self._definitions().get(name)
        return tool.input_schema if tool is not None else None

    async def _call(self, context: Context, params: types.CallToolRequestParams) -> types.CallToolResult:
        """Run a tool; what goes wrong in it is told to the model, which may do better then."""
        arguments = params.arguments or {}
        caller = caller_of(context.request.scope)
        try:
            if params.name in self._runner.tools():
                return await self._text_tool(context, params.name, arguments, caller)
            own = OWN_TOOLS.get(params.name)
            if own is None:
                raise MCPError(code=types.INVALID_PARAMS, message=f"unknown tool {params.name[:80]!r}")
            self._checks[own.name](arguments)
            return await self._own(context, own, arguments, caller)
        except AgentServerError as exc:
            log.info("mcp.tool_failed", tool=params.name, error=type(exc).__name__)
            return _failed(exc)

    async def _text_tool(
        self, context: Context, name: str, arguments: JSONObject, caller: Caller
    ) -> types.CallToolResult:
        work = ToolWork()
        run = self._runner.run(name, arguments, caller, surface="mcp", work=work)
        answer = await self._told(context, run, work.told)
        return _done(
            answer.output,
            about={"llm": answer.llm, "calls": answer.calls, "usage": msgspec.to_builtins(answer.usage)},
        )

    async def _own(
        self, context: Context, tool: OwnTool, arguments: JSONObject, caller: Caller
    ) -> types.CallToolResult:
        match tool.name:
            case "chat":
                return await self._chat(context, arguments, caller)
            case "list_roles":
                return _done(self._roles(arguments))
            case "submit_task":
                _may_run_tasks(caller)
                return await self._submit(context, arguments, caller)
            case "get_task":
                _may_run_tasks(caller)
                return await self._get(context, arguments)
            case "cancel_task":
                _may_run_tasks(caller)
                return _done(_task(await self._end(_checked_id(arguments["task_id"]))))

    # A chat

    async def _chat(self, context: Context, arguments: JSONObject, caller: Caller) -> types.CallToolResult:
        said: tuple[Message, ...] = (message("user", arguments["prompt"]),)
        if arguments.get("system"):
            said = (message("system", arguments["system"]), *said)
        request = ChatRequest(
            messages=said,
            max_tokens=arguments.get("max_tokens"),
            temperature=arguments.get("temperature"),
        )
        joined = JoinedStream()
        pieces = 0

        async def answer() -> None:
            nonlocal pieces
            opened = await self._serving.open(arguments.get("model", "auto"), request, caller, surface="mcp")
            try:
                async for delta in opened.deltas:
                    if isinstance(delta, ChatDelta):
                        joined.add(delta)
                        pieces += 1
            finally:
                await opened.aclose()

        await self._told(context, answer(), lambda: f"{pieces} tokens written")
        reply = joined.reply()
        return _done(
            {
                "text": reply.text,
                "llm": reply.llm,
                "finish_reason": reply.finish_reason,
                "input_tokens": reply.usage.input_tokens,
                "output_tokens": reply.usage.output_tokens,
            }
        )

    # Tasks

    def _roles(self, arguments: JSONObject) -> JSONObject:
        """Every role in a line; with a profile and a role the whole of it."""
        profiles = self._settings().profiles
        profile, role = arguments.get("profile"), arguments.get("role")
        if profile is not None and profile not in profiles:
            raise UnknownRoleError("profile", profile, tuple(profiles))
        if role is not None and profile is not None and role not in profiles[profile].roles:
            raise UnknownRoleError("role", role, tuple(profiles[profile].roles))
        found = [
            _role(profile_name, name, settings, profiles[profile_name].payload_schema, whole=role is not None)
            for profile_name in profiles
            for name, settings in profiles[profile_name].roles.items()
            if profile in (None, profile_name) and role in (None, name)
        ]
        return {"roles": found}

    async def _submit(self, context: Context, arguments: JSONObject, caller: Caller) -> types.CallToolResult:
        local = "local" in (caller.privacy, arguments.get("privacy"))
        draft = TaskDraft(
            payload=arguments["payload"],
            profile=arguments["profile"],
            role=arguments["role"],
            scope=arguments.get("scope", "workflow"),
            privacy="local" if local else "any",
        )
        packet, _ = await self._orchestration.submit(
            draft,
            via="rest",
            idempotency_key=arguments.get("idempotency_key"),
            sender=caller.sender,
        )
        wait_s = float(arguments.get("wait_s", 45))

        async def ended() -> TaskPacket:
            try:
                return await self._ended(packet, wait_s, told)
            except asyncio.CancelledError:
                await self._cancelled(packet.task_id)
                raise

        told = _TaskTold()
        return _done(_task(await self._told(context, ended(), told.say) if wait_s else packet))

    async def _get(self, context: Context, arguments: JSONObject) -> types.CallToolResult:
        packet = await self._orchestration.read(_checked_id(arguments["task_id"]))
        wait_s = float(arguments.get("wait_s", 0))
        if wait_s and not packet.status.is_final:
            told = _TaskTold()
            packet = await self._told(context, self._ended(packet, wait_s, told), told.say)
        return _done(_task(packet))

    async def _ended(self, packet: TaskPacket, wait_s: float, told: "_TaskTold") -> TaskPacket:
        """The task as soon as it ended or asks something, or as it is after `wait_s`."""
        following = asyncio.create_task(self._follow(packet.task_id, told))
        try:
            return await self._orchestration.wait(packet.task_id, wait_s)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def _follow(self, task_id: str, told: "_TaskTold") -> None:
        async for event in self._orchestration.follow(task_id):
            told.see(event)

    async def _end(self, task_id: str) -> TaskPacket:
        """The task, which has ended now if it had not before."""
        try:
            return await self._orchestration.cancel(task_id)
        except InvalidTransitionError:
            return await self._orchestration.read(task_id)

    async def _cancelled(self, task_id: str) -> None:
        """The caller gave up: so does the task, unless it is the server that stops; then it goes on later."""
        if self._orchestration.status().accepting:
            await self._end(task_id)

    # Whoever waits is told

    async def _told(self, context: Context, work: Coroutine[Any, Any, T], say: Say) -> T:
        """What `work` answers; while it goes on, the client hears how far it is. Cancelled with the call."""
        started_s = self._clock()
        working = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({working}, timeout=PROGRESS_S))[0]:
                await context.session.report_progress(round(self._clock() - started_s, 1), None, say())
            return working.result()
        finally:
            if not working.done():
                working.cancel()
                # The SDK cancels again and again until its own scope is left.
                with anyio.CancelScope(shield=True):
                    await asyncio.wait({working}, timeout=CANCEL_S)


class _TaskTold:
    """What a task does now, in words."""

    def __init__(self) -> None:
        self._now = "queued"

    def see(self, event: object) -> None:
        """The task's next event."""
        match event:
            case Progress():
                self._now = f"{event.role} on {event.llm}: {event.output_tokens} tokens written"
            case InputRequired():
                self._now = "it asks something"
            case _:
                role, step = getattr(event, "role", ""), getattr(event, "step", 0)
                self._now = f"step {step}: {role}" if role else self._now

    def say(self) -> str:
        """It."""
        return self._now


def _failed(exc: AgentServerError) -> types.CallToolResult:
    """An error as the model reads it: what is wrong, and what would be right."""
    words = [str(exc)]
    if isinstance(exc, InvalidPacketError) and exc.choices:
        words.append(f"choices: {', '.join(exc.choices[:50])}")
    return types.CallToolResult(
        content=[types.TextContent(type="text", text="; ".join(words))], is_error=True
    )


def _done(found: JSONObject, *, about: JSONObject | None = None) -> types.CallToolResult:
    """A result as the program reads it, and as the model does; `about` is for neither, but for who looks."""
    result = types.CallToolResult(
        content=[types.TextContent(type="text", text=msgspec.json.encode(found).decode())],
        structured_content=found,
    )
    if about:
        result.meta = {f"{NAME}/{key}": value for key, value in about.items()}
    return result


def _role(
    profile: str, name: str, role: RoleSettings, payload_schema: JSONObject | None, *, whole: bool
) -> JSONObject:
    found: JSONObject = {"profile": profile, "role": name, "description": role.description}
    if whole:
        found["payload_schema"] = role.payload_schema or payload_schema
        found["result_schema"] = role.result_schema
    return found


def _task(packet: TaskPacket) -> JSONObject:
    found: JSONObject = {
        "task_id": packet.task_id,
        "profile": packet.profile,
        "role": packet.role,
        "status": packet.status.value,
        "is_final": packet.status.is_final,
        "output_tokens": packet.usage.output_tokens,
    }
    if packet.reason is not None:
        found["reason"] = packet.reason
    if packet.result is not None:
        found["result"] = packet.result
    if packet.error is not None:
        found["error"] = packet.error.message
    if packet.status is TaskStatus.INPUT_REQUIRED:
        asked = [event.question for event in packet.history if isinstance(event, InputRequired)]
        found["question"] = asked[-1] if asked else ""
    return found


def _may_run_tasks(caller: Caller) -> None:
    if "tasks" not in caller.scopes:
        raise ScopeError("this key may not run tasks")


def _checked_id(task_id: str) -> str:
    if not is_task_id(task_id):
        raise TaskNotFoundError(task_id[:64])
    return task_id
