"""A double of llama.cpp's llama-server: OpenAI's wire with its own accent, recorded from a real one."""

from typing import Any

from tests.servers.http_double import Out, Request
from tests.servers.openai_double import OpenAIDouble


class LlamaServerDouble(OpenAIDouble):
    """Error codes are integers; comments keep the socket warm; the role comes with `content: null`.

    `knows_tools` is whether the model's chat template does: where not, tools are left out in silence.
    """

    async def other(self, request: Request, out: Out) -> None:
        """`/props` and `/health`."""
        if request.path == "/props":
            caps = {"supports_tools": self.knows_tools, "supports_system_role": True}
            await out.whole(200, {"total_slots": 1, "chat_template_caps": caps})
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
