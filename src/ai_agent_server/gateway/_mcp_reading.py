"""What a client of the Model Context Protocol reads: tasks as resources, and a prompt that gives one."""

from typing import Any

import mcp_types as types
import msgspec
from mcp.shared.exceptions import MCPError

from ai_agent_server.core.ports import Orchestration
from ai_agent_server.core.task_packet import TaskPacket, is_task_id
from ai_agent_server.errors import InvalidPacketError, StoreError, TaskNotFoundError
from ai_agent_server.gateway.caller import caller_of
from ai_agent_server.tasks_state.base import TaskFilter, TaskPage

__all__ = ("Reading",)

SCHEME = "task://"
PAGE = 50
JSON = "application/json"
DELEGATE = types.Prompt(
    name="delegate",
    title="Delegate a coding task",
    description="Let the server's own agents plan, write, test and debug a piece of code.",
    arguments=[types.PromptArgument(name="task", description="What is wanted, in words.", required=True)],
)


class Reading:
    """Tasks, for keys that may run them; nobody else sees that there are any."""

    def __init__(self, orchestration: Orchestration) -> None:
        self._orchestration = orchestration

    async def resources(
        self, context: Any, params: types.PaginatedRequestParams | None
    ) -> types.ListResourcesResult:
        """The tasks, newest first, in pages."""
        if not _may_read(context):
            return types.ListResourcesResult(resources=[])
        page = await self._page(params.cursor if params is not None else None)
        return types.ListResourcesResult(
            resources=[
                types.Resource(
                    uri=f"{SCHEME}{task.task_id}",
                    name=task.task_id,
                    title=f"{task.profile}/{task.role}, {task.status}",
                    mime_type=JSON,
                )
                for task in page.items
            ],
            next_cursor=page.next_cursor,
        )

    async def templates(
        self, _context: Any, _params: types.PaginatedRequestParams | None
    ) -> types.ListResourceTemplatesResult:
        """A task by its id."""
        return types.ListResourceTemplatesResult(
            resource_templates=[
                types.ResourceTemplate(
                    uri_template=f"{SCHEME}{{task_id}}",
                    name="task",
                    title="A task with its whole history",
                    description="What was asked, each step with its LLM and why that one, and the result.",
                    mime_type=JSON,
                )
            ]
        )

    async def read(self, context: Any, params: types.ReadResourceRequestParams) -> types.ReadResourceResult:
        """The task's packet."""
        packet = await self._packet(params.uri) if _may_read(context) else None
        if packet is None:
            raise MCPError(types.INVALID_PARAMS, "there is no such resource", {"uri": params.uri[:200]})
        text = msgspec.json.encode(packet).decode()
        return types.ReadResourceResult(
            contents=[types.TextResourceContents(uri=params.uri, mime_type=JSON, text=text)]
        )

    async def prompts(
        self, _context: Any, _params: types.PaginatedRequestParams | None
    ) -> types.ListPromptsResult:
        """The one there is."""
        return types.ListPromptsResult(prompts=[DELEGATE])

    async def prompt(self, _context: Any, params: types.GetPromptRequestParams) -> types.GetPromptResult:
        """It, with the task filled in."""
        task = (params.arguments or {}).get("task", "").strip()
        if params.name != DELEGATE.name or not task:
            raise MCPError(types.INVALID_PARAMS, f"the only prompt is {DELEGATE.name!r}, with a `task`")
        text = (
            "Do not write this code yourself. Call submit_task with profile `developer`, role `planner` and "
            'the payload {"task": ...}; put each example that I give into `examples` as a Python assert, and '
            "the name of the function into `entry_point`. While it has not ended call get_task with wait_s. "
            f"Then show me the code and say what its tests showed.\n\nThe task: {task}"
        )
        content = types.TextContent(type="text", text=text)
        return types.GetPromptResult(messages=[types.PromptMessage(role="user", content=content)])

    async def _page(self, cursor: str | None) -> TaskPage:
        try:
            return await self._orchestration.list(TaskFilter(), limit=PAGE, cursor=cursor)
        except InvalidPacketError as exc:
            raise MCPError(types.INVALID_PARAMS, exc.problem) from exc

    async def _packet(self, uri: str) -> TaskPacket | None:
        task_id = uri.removeprefix(SCHEME)
        if not uri.startswith(SCHEME) or not is_task_id(task_id):
            return None
        try:
            return await self._orchestration.read(task_id)
        except TaskNotFoundError:
            return None
        except StoreError as exc:
            raise MCPError(types.INTERNAL_ERROR, "the task cannot be read now") from exc


def _may_read(context: Any) -> bool:
    return "tasks" in caller_of(context.request.scope).scopes
