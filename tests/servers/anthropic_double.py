"""A double of Anthropic's server: `/v1/messages` as named events, `/v1/models`."""

import asyncio
import json
from typing import Any

from tests.servers.http_double import HTTPDouble, Out, Request, example, pieces

VERSION = "2026-10-21"
ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


class AnthropicDouble(HTTPDouble):
    """As the API reference has it: pings, cumulative usage, a block for each piece of content.

    It refuses what the API refuses: no version, no max_tokens, sampling parameters, turns that do not
    begin with the user, blank text, a tool's result that no call asked for.
    """

    thinks = False
    """Whether a thinking block goes before the answer."""

    async def answer(self, request: Request, out: Out) -> None:
        """Answer one request."""
        if self.api_key is not None and request.headers.get("authorization") != f"Bearer {self.api_key}":
            await out.whole(401, self.error(401, "invalid x-api-key", ""))
        elif request.headers.get("anthropic-version") != VERSION:
            await out.whole(400, self.error(400, "anthropic-version: header is required", ""))
        elif (request.method, request.path.partition("?")[0]) == ("GET", "/v1/models"):
            if not await self.refuse(out):
                await out.whole(200, self.listing())
        elif (request.method, request.path) == ("POST", "/v1/messages"):
            if await self.refuse(out):
                return
            if mistake := self.mistake(request.json):
                await out.whole(400, self.error(400, mistake, ""))
            else:
                await self._messages(request.json, out)
        else:
            await out.whole(404, self.error(404, "Not Found", ""))

    def listing(self) -> Any:
        """What `/v1/models` answers."""
        model = {
            "type": "model",
            "id": "double-1",
            "display_name": "Double 1",
            "created_at": "2026-01-01T00:00:00Z",
            "lifecycle": "active",
            "max_input_tokens": 200_000,
        }
        return {"data": [model], "has_more": False, "first_id": "double-1", "last_id": "double-1"}

    def error(self, status: int, message: str, code: str) -> Any:
        """The object that every error has. The words are the API's own where they say what it is."""
        if code == "model_not_found":
            message = "model: nope"
        elif code == "context_length_exceeded":
            message = "prompt is too long: 9000 tokens > 4096 maximum"
        kind = ERROR_TYPES.get(status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}

    async def _refuse(self, out: Out, status: int, message: str, code: str) -> None:
        # An overloaded API says so with a status of its own.
        await super()._refuse(out, 529 if status == 503 else status, message, code)

    def mistake(self, body: Any) -> str:
        """What is wrong with `body`, "" where nothing is."""
        if not isinstance(body.get("max_tokens"), int):
            return "max_tokens: Field required"
        for name in ("temperature", "top_p", "top_k"):
            if name in body:
                return f"{name}: this model does not take it"
        turns = body["messages"]
        if not turns or turns[0]["role"] != "user":
            return "messages: first message must use the user role"
        calls: set[str] = set()
        for at, turn in enumerate(turns):
            results = {b["tool_use_id"] for b in turn["content"] if b["type"] == "tool_result"}
            if results != calls:
                return f"messages.{at}: tool_use ids and tool_result blocks do not agree"
            if any(b["type"] == "text" and not b["text"].strip() for b in turn["content"]):
                return f"messages.{at}: text content blocks must contain non-whitespace text"
            calls = {b["id"] for b in turn["content"] if b["type"] == "tool_use"}
        return ""

    def blocks(self, body: Any) -> tuple[list[tuple[Any, list[Any]]], str]:
        """The answer's blocks, each as it starts and its deltas, and why the answer ends."""
        choice = body.get("tool_choice", {}).get("type", "auto")
        last = body["messages"][-1]["content"][-1]
        if body.get("tools") and choice != "none" and last["type"] != "tool_result":
            tool = body["tools"][0]
            arguments = json.dumps(example(tool["input_schema"]))
            half = len(arguments) // 2
            start = {"type": "tool_use", "id": "toolu_1", "name": tool["name"], "input": {}}
            deltas = ["", arguments[:half], arguments[half:]]
            return [(start, [{"type": "input_json_delta", "partial_json": d} for d in deltas])], "tool_use"
        text = self.text(body)
        if wanted := body.get("output_config", {}).get("format"):
            text = json.dumps(example(wanted["schema"]))
        words = pieces(text)
        shown = words[: body["max_tokens"]]
        found = [({"type": "text", "text": ""}, [{"type": "text_delta", "text": word} for word in shown])]
        return found, "end_turn" if len(shown) == len(words) else "max_tokens"

    async def _messages(self, body: Any, out: Out) -> None:
        out.begin("text/event-stream; charset=utf-8")
        if self.fault == "ok_then_error":
            await self._send(out, self.error(500, "it broke at once", ""))
            await out.end()
            return
        usage = {
            "input_tokens": 7,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": 1,
        }
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        await self._send(out, {"type": "message_start", "message": message})
        await self._send(out, {"type": "ping"})
        blocks, stop_reason = self.blocks(body)
        if self.thinks:
            thought = {"type": "thinking_delta", "thinking": "Hm."}
            signature = {"type": "signature_delta", "signature": "EqQB"}
            blocks.insert(0, ({"type": "thinking", "thinking": "", "signature": ""}, [thought, signature]))
        written = 0
        for index, (start, deltas) in enumerate(blocks):
            await self._send(out, {"type": "content_block_start", "index": index, "content_block": start})
            for delta in deltas:
                if written == 2 and await self._fault(out):
                    return
                written += 1
                await self._send(out, {"type": "content_block_delta", "index": index, "delta": delta})
                await asyncio.sleep(self.piece_s)
            await self._send(out, {"type": "content_block_stop", "index": index})
        end = {"stop_reason": stop_reason, "stop_sequence": None}
        await self._send(out, {"type": "message_delta", "delta": end, "usage": {"output_tokens": written}})
        await self._send(out, {"type": "message_stop"})
        await out.end()

    async def _fault(self, out: Out) -> bool:
        start = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
        match self.fault:
            case "stall":
                await asyncio.Event().wait()
            case "cut":
                await out.piece(start)
                out.cut()
            case "unfinished":
                await out.end()
            case "malformed":
                await out.piece(start + b"oops\n\n")
                await out.end()
            case "misshapen":
                await out.piece(start + b'{"type": "text_delta", "text": 5}}\n\n')
                await out.end()
            case "error_in_stream":
                await self._send(out, self.error(500, "it broke in the middle", ""))
                await out.end()
            case _:
                return False
        return True

    async def _send(self, out: Out, event: Any) -> None:
        # In two writes, so that an event never comes whole by luck.
        content = f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
        await out.piece(content[:20])
        await out.piece(content[20:])
