"""A client that believes nothing but the bytes that it got: asks in each form, and judges what came."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import aiohttp
import msgspec

from bench.stream_faults.trials import Surface, Trial

Verdict = Literal[
    "whole",  # the complete right answer with its clean end
    "error",  # an explicit error
    "truncated",  # a clean end on anything else: what must never be
    "torn",  # neither a clean end nor an error
]
PATHS: dict[Surface, str] = {
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
MAX_TOKENS = 1000


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a client saw."""

    verdict: Verdict
    detail: str = ""
    llm: str = ""


class _Answer:
    """What an answer comes to."""

    def __init__(self) -> None:
        self.text = self.arguments = ""
        self.has_error = self.has_end = False

    def is_right(self, trial: Trial) -> bool:
        """Whether it is all of the right answer and nothing else."""
        if not trial.calls_tool:
            return (self.text, self.arguments) == (trial.text, "")
        try:
            said = json.loads(self.arguments)
        except ValueError:
            return False
        return self.text == "" and said == {"note": trial.text}


async def ask(http: aiohttp.ClientSession, url: str, trial: Trial) -> Seen:
    """Send the trial's request, read what comes, judge."""
    answer, llm = _Answer(), ""
    try:
        async with http.post(url + PATHS[trial.surface], json=body(trial)) as response:
            llm = response.headers.get("x-llm", "")
            said = await response.read()
            is_ok = response.status == 200
    except aiohttp.ClientError as exc:
        return Seen(verdict="torn", detail=type(exc).__name__, llm=llm)
    if not is_ok:
        answer.has_error = "error" in json.loads(said)
    elif trial.streamed:
        _read_stream(trial.surface, said, answer)
    else:
        _read_whole(trial.surface, json.loads(said), answer)
    verdict: Verdict
    if answer.has_end and not answer.has_error:
        verdict = "whole" if answer.is_right(trial) else "truncated"
    else:
        verdict = "error" if answer.has_error and not answer.has_end else "torn"
    return Seen(verdict=verdict, detail=said[-300:].decode(errors="replace"), llm=llm)


def body(trial: Trial) -> dict[str, Any]:
    """The request."""
    schema = {"type": "object", "properties": {"note": {"const": trial.text}}, "required": ["note"]}
    common: dict[str, Any] = {"model": trial.engine, "stream": trial.streamed}
    said = [{"role": "user", "content": trial.prompt}]
    tool: dict[str, Any] = {"name": "keep", "description": "Keeps a note."}
    match trial.surface:
        case "chat":
            asked = {"messages": said, "max_tokens": MAX_TOKENS}
            tools: Any = [{"type": "function", "function": {**tool, "parameters": schema}}]
        case "responses":
            asked = {"input": said, "max_output_tokens": MAX_TOKENS}
            tools = [{"type": "function", **tool, "parameters": schema}]
        case _:
            asked = {"messages": said, "max_tokens": MAX_TOKENS}
            tools = [{**tool, "input_schema": schema}]
    return {**common, **asked, **({"tools": tools} if trial.calls_tool else {})}


def _events(said: bytes) -> Iterator[Any]:
    """The payload of each event that is there to its end."""
    *whole, _ = said.replace(b"\r\n", b"\n").split(b"\n\n")
    for event in whole:
        for line in event.split(b"\n"):
            if line.startswith(b"data: "):
                payload = line.removeprefix(b"data: ")
                yield "[DONE]" if payload == b"[DONE]" else json.loads(payload)


def _read_stream(surface: Surface, said: bytes, answer: _Answer) -> None:
    read = {"chat": _chat_event, "responses": _responses_event, "messages": _messages_event}[surface]
    for event in _events(said):
        read(event, answer)


def _chat_event(event: Any, answer: _Answer) -> None:
    if event == "[DONE]":
        answer.has_end = True
    elif "error" in event:
        answer.has_error = True
    else:
        for choice in event["choices"]:
            answer.text += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls") or ():
                answer.arguments += call["function"].get("arguments") or ""


def _responses_event(event: Any, answer: _Answer) -> None:
    match event["type"]:
        case "response.output_text.delta":
            answer.text += event["delta"]
        case "response.function_call_arguments.delta":
            answer.arguments += event["delta"]
        case "response.completed" | "response.incomplete":
            answer.has_end = True
            told = _Answer()
            _read_whole("responses", event["response"], told)
            if (told.text, told.arguments) != (answer.text, answer.arguments):
                answer.text = "its deltas and its end disagree"
        case "response.failed" | "error":
            answer.has_error = True


def _messages_event(event: Any, answer: _Answer) -> None:
    match event["type"]:
        case "content_block_delta":
            answer.text += event["delta"].get("text", "")
            answer.arguments += event["delta"].get("partial_json", "")
        case "message_stop":
            answer.has_end = True
        case "error":
            answer.has_error = True


def _read_whole(surface: Surface, said: Any, answer: _Answer) -> None:
    answer.has_end = True
    match surface:
        case "chat":
            message = said["choices"][0]["message"]
            answer.text = message["content"] or ""
            answer.arguments = "".join(
                call["function"]["arguments"] for call in message.get("tool_calls", ())
            )
        case "responses":
            for item in said["output"]:
                answer.text += "".join(part.get("text", "") for part in item.get("content", ()))
                answer.arguments += item.get("arguments", "")
        case _:
            for block in said["content"]:
                answer.text += block.get("text", "")
                answer.arguments += json.dumps(block["input"]) if block["type"] == "tool_use" else ""
