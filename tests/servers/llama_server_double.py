"""A double of llama.cpp's llama-server: OpenAI's wire with its own accent, recorded from a real one."""

import asyncio
from typing import Any

from tests.servers.http_double import Out, Request
from tests.servers.openai_double import OpenAIDouble


class LlamaServerDouble(OpenAIDouble):
    """One model, or as a router those in `router`, each with its status.

    Error codes are integers; comments keep the socket warm; the role comes with `content: null`.

    A router answers at once when it is told to load, and does it within `load_s`; what it is asked for it
    loads by itself. `broken` models end while they load.

    `knows_tools` is whether the model's chat template does: where not, tools are left out in silence.
    """

    load_s = 0.0
    broken = False

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        self.router: dict[str, str] = {}
        self._moving: set[asyncio.Task[None]] = set()

    def text(self, body: Any) -> str:
        """A router's child is there, or comes."""
        if self.router:
            self.router[body["model"]] = "loaded"
        return super().text(body)

    async def _move(self, model: str, to: str) -> None:
        await asyncio.sleep(self.load_s)
        self.router[model] = to

    async def _told(self, request: Request, out: Out) -> None:
        model, loads = request.json["model"], request.path == "/models/load"
        status = self.router.get(model)
        if status is None or (status == "unloaded") != loads:
            problem = "model is not found" if status is None else f"model is already {status}"
            await out.whole(400, self.error(400, problem, "invalid_request_error"))
            return
        if loads:
            self.router[model] = "loading"
        task = asyncio.create_task(self._move(model, "loaded" if loads and not self.broken else "unloaded"))
        self._moving.add(task)
        task.add_done_callback(self._moving.discard)
        await out.whole(200, {"success": True})

    async def other(self, request: Request, out: Out) -> None:
        """`/props`, `/health`, the count of a prompt, and what a router is told."""
        if self.router and request.path in {"/models/load", "/models/unload"}:
            if not await self.refuse(out):
                await self._told(request, out)
        elif request.path.partition("?")[0] == "/props":
            caps = {"supports_tools": self.knows_tools, "supports_system_role": True}
            await out.whole(200, {"total_slots": 1, "chat_template_caps": caps})
        elif request.path == "/v1/chat/completions/input_tokens":
            if not await self.refuse(out):
                counted = {"input_tokens": self.prompt_tokens, "object": "response.input_tokens"}
                await out.whole(200, counted)
        elif request.path == "/health":
            await out.whole(200, {"status": "ok"})
        else:
            await out.whole(404, self.error(404, "File Not Found", "not_found_error"))

    def error(self, status: int, message: str, code: str) -> Any:
        """The code is the status, the type says what it is."""
        kind = "exceed_context_size_error" if code == "context_length_exceeded" else code
        return {"error": {"code": status, "message": message, "type": kind}}

    def listing(self) -> Any:
        """With what the file says of itself."""
        if self.router:
            return {
                "object": "list",
                "data": [
                    {"id": name, "object": "model", "status": {"value": status}}
                    for name, status in self.router.items()
                ],
            }
        meta = {"n_ctx": 4096, "n_ctx_train": 8192, "size": 96576768}
        return {
            "object": "list",
            "data": [{"id": "double-1", "object": "model", "owned_by": "llamacpp", "meta": meta}],
        }

    def event(self, choices: list[Any], usage: Any, model: str) -> Any:
        """No usage key where there is none; timings with it."""
        event = super().event(choices, usage, model)
        del event["usage"]
        if usage is not None:
            event |= {"usage": usage, "timings": {"prompt_n": 11, "predicted_per_second": 79.7}}
        return event

    async def opening(self, out: Out, model: str) -> None:
        """A comment, then the role."""
        await out.piece(b":\n\n")
        choice = {"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}
        await self._send(out, self.event([choice], None, model))
