"""The tools of the Model Context Protocol as a model sees them: names, sentences, schemas, hints."""

from collections.abc import Sequence
from typing import Literal

import mcp_types as types
import msgspec

from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.task_packet import TaskStatus
from ai_agent_server.gateway.tool_runner import ReadyTool

__all__ = ("INSTRUCTIONS", "OWN_TOOLS", "OwnTool", "definitions")

INSTRUCTIONS = (
    "Local language models and agents for work that need not cost your own tokens. For a quick job on a "
    "text use classify, extract, summarize or rewrite: their answers always have the form you ask for. "
    "chat asks a local model anything. submit_task gives whole jobs (plan, write, test and debug code) to "
    "the agents that list_roles names; it waits a while, then get_task with wait_s tells the rest."
)

OwnName = Literal["chat", "submit_task", "get_task", "cancel_task", "list_roles"]


class OwnTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that is no job on a text. `parameters` and `result` are JSON Schemas."""

    name: OwnName
    title: str
    description: str
    parameters: JSONObject
    result: JSONObject
    reads_only: bool = False
    destroys: bool = False
    repeats_safely: bool = False


_TASK_ID: JSONObject = {"type": "string", "description": "As submit_task answered it."}
_WAIT: JSONObject = {
    "type": "number",
    "minimum": 0,
    "maximum": 600,
    "description": "Seconds to wait for the end.",
}
_NAME: JSONObject = {"type": "string", "minLength": 1, "maxLength": 63}
_TASK: JSONObject = {
    "type": "object",
    "properties": {
        "task_id": {"type": "string"},
        "profile": {"type": "string"},
        "role": {"type": "string"},
        "status": {"enum": [status.value for status in TaskStatus]},
        "is_final": {"type": "boolean", "description": "Nothing will change any more."},
        "output_tokens": {"type": "integer"},
        "reason": {"type": "string", "description": "Why it ended otherwise than completed."},
        "result": {"type": "object", "description": "What came of it, or the best there was."},
        "error": {"type": "string"},
        "question": {"type": "string", "description": "What the task asks, where it waits for input."},
    },
    "required": ["task_id", "profile", "role", "status", "is_final", "output_tokens"],
    "additionalProperties": False,
}

OWN_TOOLS: dict[str, OwnTool] = {
    tool.name: tool
    for tool in (
        OwnTool(
            name="chat",
            title="Ask a model",
            description="Ask a language model of this server and get its answer as text.",
            reads_only=True,
            parameters={
                "type": "object",
                "properties": {
                    "prompt": {"type": "string", "minLength": 1, "maxLength": 1_000_000},
                    "system": {"type": "string", "maxLength": 100_000, "description": "How to behave."},
                    "model": {
                        "type": "string",
                        "maxLength": 127,
                        "default": "auto",
                        "description": "auto, small, main, or a configured LLM's name.",
                    },
                    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 100_000},
                    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
                },
                "required": ["prompt"],
                "additionalProperties": False,
            },
            result={
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "llm": {"type": "string"},
                    "finish_reason": {"enum": ["stop", "length", "tool_calls", "content_filter"]},
                    "input_tokens": {"type": "integer"},
                    "output_tokens": {"type": "integer"},
                },
                "required": ["text", "llm", "finish_reason", "input_tokens", "output_tokens"],
                "additionalProperties": False,
            },
        ),
        OwnTool(
            name="list_roles",
            title="List the agents",
            description="List the roles that take tasks; with `profile` and `role` also their payloads.",
            reads_only=True,
            parameters={
                "type": "object",
                "properties": {"profile": _NAME, "role": _NAME},
                "additionalProperties": False,
            },
            result={
                "type": "object",
                "properties": {
                    "roles": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {
                                "profile": {"type": "string"},
                                "role": {"type": "string"},
                                "description": {"type": "string"},
                                "payload_schema": {"type": ["object", "null"]},
                                "result_schema": {"type": ["object", "null"]},
                            },
                            "required": ["profile", "role", "description"],
                        },
                    }
                },
                "required": ["roles"],
                "additionalProperties": False,
            },
        ),
        OwnTool(
            name="submit_task",
            title="Give a task to the agents",
            description="Give a job to an agent, such as developer/planner for code that is planned, "
            'written, tested and debugged: payload {"task": ...}. Waits up to wait_s for its end; '
            "cancelling this call cancels the task.",
            parameters={
                "type": "object",
                "properties": {
                    "profile": _NAME,
                    "role": _NAME,
                    "payload": {"type": "object", "description": 'As list_roles tells; often {"task": ...}.'},
                    "wait_s": {**_WAIT, "default": 45},
                    "scope": {
                        "enum": ["workflow", "role"],
                        "default": "workflow",
                        "description": "role: this role alone, no others after it.",
                    },
                    "privacy": {
                        "enum": ["any", "local"],
                        "default": "any",
                        "description": "local: no model outside this machine sees it.",
                    },
                    "idempotency_key": {
                        "type": "string",
                        "pattern": "^[!-~]{1,255}$",
                        "description": "The same key again answers the same task.",
                    },
                },
                "required": ["profile", "role", "payload"],
                "additionalProperties": False,
            },
            result=_TASK,
        ),
        OwnTool(
            name="get_task",
            title="Look at a task",
            description="How a task stands, and its result when it ended; with wait_s it waits for that.",
            reads_only=True,
            parameters={
                "type": "object",
                "properties": {"task_id": _TASK_ID, "wait_s": {**_WAIT, "default": 0}},
                "required": ["task_id"],
                "additionalProperties": False,
            },
            result=_TASK,
        ),
        OwnTool(
            name="cancel_task",
            title="End a task",
            description="End a task now. What it made so far stays in its history.",
            destroys=True,
            repeats_safely=True,
            parameters={
                "type": "object",
                "properties": {"task_id": _TASK_ID},
                "required": ["task_id"],
                "additionalProperties": False,
            },
            result=_TASK,
        ),
    )
}


def definitions(text_tools: Sequence[ReadyTool]) -> dict[str, types.Tool]:
    """Every tool by name, always in the same order."""
    found = {
        ready.tool.card.name: types.Tool(
            name=ready.tool.card.name,
            title=ready.tool.card.title,
            description=ready.tool.card.description,
            input_schema=ready.parameters,
            output_schema=ready.tool.card.result,
            annotations=types.ToolAnnotations(
                title=ready.tool.card.title, read_only_hint=True, open_world_hint=False
            ),
        )
        for ready in text_tools
    }
    for tool in OWN_TOOLS.values():
        found[tool.name] = types.Tool(
            name=tool.name,
            title=tool.title,
            description=tool.description,
            input_schema=tool.parameters,
            output_schema=tool.result,
            annotations=types.ToolAnnotations(
                title=tool.title,
                read_only_hint=tool.reads_only,
                destructive_hint=None if tool.reads_only else tool.destroys,
                idempotent_hint=None if tool.reads_only else tool.repeats_safely,
                open_world_hint=False,
            ),
        )
    return found
