"""A double of Ollama: NDJSON chat, `/api/tags`, `/api/ps`, loads that take time, errors as bare strings."""

import asyncio
import json
from typing import Any

from tests.servers.http_double import HTTPDouble, Out, Request, example, pieces, vector

SIZE, SIZE_VRAM = 2_019_393_189, 1_800_000_000


class OllamaDouble(HTTPDouble):
    """One installed model, `double-1`. `loaded` is the num_ctx it is in memory with, None for unloaded.

    Another num_ctx, or none, loads it anew, as Ollama does: `loads` counts. `load_s` is how long that takes.
    """

    load_s = 0.0
    loads = 0
    loaded: int | None = None

    async def answer(self, request: Request, out: Out) -> None:
        """Answer one request."""
        route = (request.method, request.path)
        if await self.refuse(out):
            return
        if route == ("GET", "/api/tags"):
            model = {"name": "double-1", "model": "double-1", "size": SIZE, "digest": "abc", "details": {}}
            await out.whole(200, {"models": [model]})
        elif route == ("GET", "/api/ps"):
            held = {
                "name": "double-1",
                "model": "double-1",
                "size": SIZE,
                "size_vram": SIZE_VRAM,
                "context_length": self.loaded,
                "expires_at": "2026-01-01T00:00:00Z",
            }
            await out.whole(200, {"models": [held] if self.loaded else []})
        elif route == ("POST", "/api/generate"):
            await self._generate(request.json, out)
        elif route == ("POST", "/api/chat"):
            await self._load(request.json)
            await self._chat(request.json, out)
        elif route == ("POST", "/api/embed"):
            await self._load(request.json)
            await self._embed(request.json, out)
        else:
            await out.whole(404, {"error": "not found"})

    def error(self, status: int, message: str, code: str) -> Any:
        """A bare string."""
        return {"error": message}

    async def _load(self, body: Any) -> None:
        wanted = body.get("options", {}).get("num_ctx", 4096)
        if self.loaded != wanted:
            self.loads += 1
            await asyncio.sleep(self.load_s)
            self.loaded = wanted

    async def _generate(self, body: Any, out: Out) -> None:
        if body.get("keep_alive") == 0 and not body.get("prompt"):
            self.loaded = None
            reason = "unload"
        else:
            await self._load(body)
            reason = "load"
        await out.whole(200, {"model": body["model"], "response": "", "done": True, "done_reason": reason})

    def _messages(self, body: Any) -> tuple[list[Any], str]:
        tools = body.get("tools")
        if tools and body["messages"][-1]["role"] != "tool":
            function = tools[0]["function"]
            call = {"function": {"name": function["name"], "arguments": example(function["parameters"])}}
            return [{"content": "", "tool_calls": [call]}], "stop"
        text = json.dumps(example(body["format"])) if "format" in body else self.text(body)
        words = pieces(text)
        shown = words[: body["options"].get("num_predict", len(words))]
        return [{"content": word} for word in shown], "stop" if len(shown) == len(words) else "length"

    async def _chat(self, body: Any, out: Out) -> None:
        out.begin("application/x-ndjson")
        head = {"model": body["model"], "created_at": "2026-01-01T00:00:00Z"}
        if self.fault == "ok_then_error":
            await self._send(out, {"error": "it broke at once"})
            await out.end()
            return
        messages, reason = self._messages(body)
        for index, message in enumerate(messages):
            if index == 2 and await self._fault(out):
                return
            await self._send(out, {**head, "message": {"role": "assistant", **message}, "done": False})
            await asyncio.sleep(self.piece_s)
        await self._send(
            out,
            {
                **head,
                "message": {"role": "assistant", "content": ""},
                "done": True,
                "done_reason": reason,
                "total_duration": 5,
                "load_duration": 1,
                "prompt_eval_count": 11,
                "eval_count": len(messages),
            },
        )
        await out.end()

    async def _embed(self, body: Any, out: Out) -> None:
        vectors = [vector(text)[: body.get("dimensions")] for text in body["input"]]
        if self.fault == "misshapen":
            vectors.pop()
        answer = {"model": body["model"], "embeddings": vectors, "prompt_eval_count": 11}
        content = json.dumps(answer).encode()
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

    async def _fault(self, out: Out) -> bool:
        match self.fault:
            case "stall":
                await asyncio.Event().wait()
            case "cut":
                await out.piece(b'{"model":"double-1","mess')
                out.cut()
            case "unfinished":
                await out.end()
            case "malformed":
                await out.piece(b'{"model": oops\n')
                await out.end()
            case "misshapen":
                await out.piece(b'["no object"]\n')
                await out.end()
            case "error_in_stream":
                await self._send(out, {"error": "it broke in the middle"})
                await out.end()
            case _:
                return False
        return True

    async def _send(self, out: Out, line: Any) -> None:
        content = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        await out.piece(content[:20])
        await out.piece(content[20:])
