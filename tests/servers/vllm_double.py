"""A double of vLLM's OpenAI server, as its documentation has it: sleep and wake, and no tools of its own."""

import asyncio
from typing import Any

from tests.servers.http_double import Out, Request
from tests.servers.openai_double import OpenAIDouble


class VLLMDouble(OpenAIDouble):
    """`development` is whether it was started so that it can sleep; `asleep` what is off the card.

    After level 2 the weights that are woken are empty until they are read again: it answers nonsense.
    """

    development = True
    wake_s = 0.0

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        self.asleep: set[str] = set()
        self.emptied = False

    async def other(self, request: Request, out: Out) -> None:
        """The tokenizer, and the development paths."""
        path, _, query = request.path.partition("?")
        if path == "/tokenize":
            if not await self.refuse(out):
                tokens = list(range(self.prompt_tokens))
                counted = {"count": len(tokens), "max_model_len": 8192, "tokens": tokens}
                await out.whole(200, counted)
            return
        match request.method, path:
            case _ if not self.development or await self.refuse(out):
                await out.whole(404, {"detail": "Not Found"})
            case "GET", "/is_sleeping":
                await out.whole(200, {"is_sleeping": bool(self.asleep)})
            case "POST", "/sleep":
                self.asleep = {"weights", "kv_cache"}
                self.emptied = query == "level=2"
                await out.whole(200, None)
            case "POST", "/wake_up":
                await asyncio.sleep(self.wake_s)
                self.asleep -= {query.removeprefix("tags=")} if query else self.asleep
                await out.whole(200, None)
            case "POST", "/collective_rpc":
                if request.json["method"] == "reload_weights" and "weights" not in self.asleep:
                    self.emptied = False
                await out.whole(200, {"results": [None]})
            case _:
                await out.whole(404, {"detail": "Not Found"})

    def text(self, body: Any) -> str:
        """Nothing of use from weights that are not there."""
        return "!!!!" if self.emptied or self.asleep else super().text(body)

    def listing(self) -> Any:
        """With its context."""
        return {
            "object": "list",
            "data": [{"id": "double-1", "object": "model", "owned_by": "vllm", "max_model_len": 8192}],
        }
