"""A double of an OpenAI-compatible server: `/v1/chat/completions` as SSE, `/v1/embeddings`, `/v1/models`."""

import asyncio
import base64
import json
from array import array
from typing import Any

from tests.servers.http_double import HTTPDouble, Out, Request, example, pieces, vector


class OpenAIDouble(HTTPDouble):
    """As the API reference has it: a role first, `usage: null` until the last event but `[DONE]`."""

    knows_tools = True
    knows_base64 = True
    prompt_tokens = 11
    """Whatever is asked."""

    async def answer(self, request: Request, out: Out) -> None:
        """Answer one request."""
        if self.api_key is not None and request.headers.get("authorization") != f"Bearer {self.api_key}":
            await out.whole(401, self.error(401, "no such key", "invalid_api_key"))
        elif (request.method, request.path) == ("GET", "/v1/models"):
            if not await self.refuse(out):
                await out.whole(200, self.listing())
        elif (request.method, request.path) == ("POST", "/v1/chat/completions"):
            if not await self.refuse(out):
                await self._chat(request.json, out)
        elif (request.method, request.path) == ("POST", "/v1/embeddings"):
            if not await self.refuse(out):
                await self._embed(request.json, out)
        else:
            await self.other(request, out)

    async def other(self, request: Request, out: Out) -> None:
        """Answer what is not OpenAI's."""
        await out.whole(404, self.error(404, "unknown path", "not_found"))

    def listing(self) -> Any:
        """What `/v1/models` answers."""
        return {
            "object": "list",
            "data": [{"id": "double-1", "object": "model", "created": 1700000000, "owned_by": "double"}],
        }

    def error(self, status: int, message: str, code: str) -> Any:
        """All four keys, the code a string."""
        return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}

    def event(self, choices: list[Any], usage: Any, model: str) -> Any:
        """One event's object."""
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1700000000,
            "model": model,
            "choices": choices,
            "usage": usage,
        }

    def deltas(self, body: Any) -> tuple[list[Any], str]:
        """The answer's deltas, and why it ends."""
        tools = body.get("tools") if self.knows_tools else None
        if tools and body.get("tool_choice") != "none" and body["messages"][-1]["role"] != "tool":
            function = tools[0]["function"]
            arguments = json.dumps(example(function["parameters"]))
            half = len(arguments) // 2
            return [
                _call({"index": 0, "id": "call_x", "type": "function"}, name=function["name"], arguments=""),
                _call({"index": 0}, arguments=arguments[:half]),
                _call({"index": 0}, arguments=arguments[half:]),
            ], "tool_calls"
        text = self.text(body)
        if "response_format" in body:
            text = json.dumps(example(body["response_format"]["json_schema"]["schema"]))
        words = pieces(text)
        limit = body.get("max_tokens", body.get("max_completion_tokens"))
        shown = words if limit is None else words[:limit]
        return [{"content": word} for word in shown], "stop" if len(shown) == len(words) else "length"

    async def _chat(self, body: Any, out: Out) -> None:
        model = body["model"]
        out.begin("text/event-stream")
        if self.fault == "ok_then_error":
            await self._send(out, self.error(500, "it broke at once", "server_error"))
            await out.end()
            return
        await self.opening(out, model)
        deltas, finish = self.deltas(body)
        for index, delta in enumerate(deltas):
            if index == 2 and await self._fault(out):
                return
            choice = {"index": 0, "delta": delta, "finish_reason": None, "logprobs": None}
            await self._send(out, self.event([choice], None, model))
            await asyncio.sleep(self.piece_s)
        await self._send(out, self.event([{"index": 0, "delta": {}, "finish_reason": finish}], None, model))
        if body.get("stream_options", {}).get("include_usage"):
            usage = {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": len(deltas),
                "total_tokens": self.prompt_tokens + len(deltas),
            }
            await self._send(out, self.event([], usage, model))
        await out.piece(b"data: [DONE]\n\n")
        await out.end()

    async def _embed(self, body: Any, out: Out) -> None:
        vectors = [vector(text)[: body.get("dimensions")] for text in body["input"]]
        if self.fault == "misshapen":
            vectors.pop()
        as_base64 = self.knows_base64 and body["encoding_format"] == "base64"
        rows = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(array("f", each).tobytes()).decode() if as_base64 else each,
            }
            for index, each in enumerate(vectors)
        ]
        content = json.dumps(
            {
                "object": "list",
                # Nothing says that they come in order.
                "data": rows[::-1],
                "model": body["model"],
                "usage": {"prompt_tokens": 11, "total_tokens": 11},
            }
        ).encode()
        out.begin("application/json")
        match self.fault:
            case "cut":
                await out.piece(content[:30])
                out.cut()
                return
            case "malformed":
                await out.piece(content[:-1])
            case _:
                await out.piece(content)
        await out.end()

    async def opening(self, out: Out, model: str) -> None:
        """What comes before the first word."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        await self._send(out, self.event([choice], None, model))

    async def _fault(self, out: Out) -> bool:
        match self.fault:
            case "stall":
                await asyncio.Event().wait()
            case "cut":
                await out.piece(b'data: {"choices":[{"ind')
                out.cut()
            case "unfinished":
                await out.end()
            case "malformed":
                await out.piece(b'data: {"choices": [oops\n\n')
                await out.end()
            case "misshapen":
                await out.piece(b'data: {"choices": [{"index": 0, "delta": {"content": 5}}]}\n\n')
                await out.end()
            case "error_in_stream":
                await self._send(out, self.error(500, "it broke in the middle", "server_error"))
                await out.end()
            case _:
                return False
        return True

    async def _send(self, out: Out, event: Any) -> None:
        # In two writes, so that an event never comes whole by luck.
        content = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
        await out.piece(content[:20])
        await out.piece(content[20:])


def _call(start: dict[str, Any], **function: str) -> dict[str, Any]:
    return {"tool_calls": [{**start, "function": function}]}
