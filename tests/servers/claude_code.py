"""A request as Claude Code 2.1.329 sends it in the middle of its work: its shape and size, our own words."""

import itertools
from typing import Any

_REQUESTS = itertools.count(1)
_BUILT_IN = (
    *("Agent", "Bash", "Edit", "ListAgents", "NotebookEdit", "Read", "ReportFindings", "ScheduleWakeup"),
    *("SendMessage", "Skill", "TaskStop", "TodoWrite", "ToolSearch", "WebFetch", "Workflow", "Write"),
)
_DEFERRED = ("mcp__tracker__search", "mcp__tracker__create", "mcp__tracker__close", "mcp__wiki__read")
_CACHED = {"cache_control": {"type": "ephemeral"}}


def request_of_claude_code(*, model: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The body and the headers. No two are the same: each has its own session and attribution."""
    number = next(_REQUESTS)
    session = f"46b34afb-0332-46c2-8103-{number:012d}"
    tools = [_tool(name) for name in _BUILT_IN]
    tools += [_tool(name) | {"defer_loading": True} for name in _DEFERRED]
    tools += [
        {"name": "DeferredToolPlaceholder", "description": "Reserved.", "input_schema": {"type": "object"}}
        | {"defer_loading": True},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    ]
    body = {
        "model": model,
        "messages": _messages(),
        "system": [
            _text(f"x-anthropic-billing-header: cc_version=2.1.329.{number}; cch={number:05x};"),
            _text("You are a coding agent on the command line.") | _CACHED,
            _text(_prose("How you work: ", 14_000)) | _CACHED,
        ],
        "tools": tools,
        "metadata": {"user_id": f'{{"device_id":"4c53","account_uuid":"","session_id":"{session}"}}'},
        "max_tokens": 32_000,
        "thinking": {"type": "adaptive", "display": "updates"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
    }
    headers = {
        "Accept": "application/json",
        "Authorization": "Bearer sk-local",
        "User-Agent": "claude-cli/2.1.329 (external, cli)",
        "X-Claude-Code-Session-Id": session,
        "X-Stainless-Lang": "js",
        "X-Stainless-Retry-Count": "0",
        "X-Stainless-Timeout": "600",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,"
        "context-management-2025-06-27,mid-conversation-tool-changes-2026-07-01,effort-2025-11-24",
        "anthropic-dangerous-direct-browser-access": "true",
        "anthropic-version": "2023-06-01",
        "x-app": "cli",
        "Content-Type": "application/json",
    }
    return body, headers


def _messages() -> list[dict[str, Any]]:
    search = {"type": "tool_use", "id": "toolu_01", "name": "ToolSearch", "input": {"query": "tracker"}}
    found = [{"type": "tool_reference", "tool_name": "mcp__tracker__search"}]
    removed = {"type": "tool_reference", "name": "SendMessage"}
    return [
        {
            "role": "user",
            "content": [
                _text(f"<system-reminder>\n{_prose('Of this project: ', 6_000)}\n</system-reminder>"),
                _text("Find the ticket, then fix src/app.py."),
            ],
        },
        {
            "role": "system",
            "content": [
                _text("# Environment\n - Primary working directory: /work\n") | _CACHED,
                {"type": "tool_removal", "tool": removed},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "First the ticket.", "signature": "EqQBCgYIAxgC"},
                _text("I will look for the ticket."),
                search,
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_01", "content": found, **_CACHED},
                _text("<system-reminder>\nNothing else changed.\n</system-reminder>"),
            ],
        },
    ]


def _text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def _tool(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "description": _prose(f"{name}: ", 1_400),
        "input_schema": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {
                "file_path": {"type": "string", "description": "The absolute path of the file."},
                "offset": {"type": "integer", "exclusiveMinimum": 0, "description": "The first line."},
                "mode": {"type": "string", "enum": ["default", "all"], "default": "default"},
                "edits": {
                    "type": "array",
                    "items": {"type": "object", "properties": {"old": {"type": "string"}}},
                },
            },
            "required": ["file_path"],
            "additionalProperties": False,
        },
    }


def _prose(start: str, size: int) -> str:
    sentence = (
        'Read a file before you change it; answer in short sentences, and never guess ("why?") a path.\n'
    )
    return (start + sentence * (size // len(sentence) + 1))[:size]
