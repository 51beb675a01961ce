"""The gateway as clients meet it: a real server process in front of doubles of model servers."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.servers.openai_double import OpenAIDouble
from tests.servers.ports import held_port
from tests.servers.process import SCRIPT, ServerProcess, packaged

TIMEOUTS = {"connect_s": 10, "first_token_s": 5, "idle_s": 2.5}
"""Short, since tests wait for them to run out; a busy machine is silent for less."""


class Gateway:
    """A server with the LLMs `first` (small) and `second` (main), each a double that listens in a test.

    `first` can see. Who names one of them gets it or an error; who does not may get the other. The role
    `desk/clerk` is a scripted LLM's, `desk/reader` that of `first`.
    """

    def __init__(self, process: ServerProcess, ports: tuple[int, int]) -> None:
        self.process, self.ports = process, ports

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self.process.url

    @asynccontextmanager
    async def doubles(self) -> AsyncIterator[tuple[OpenAIDouble, OpenAIDouble]]:
        """The two model servers, up for as long as the body."""
        first, second = (OpenAIDouble(port=port) for port in self.ports)
        async with first, second:
            await self.forget()
            yield first, second

    async def forget(self) -> None:
        """Close every circuit, whatever came before."""
        async with self.process.http() as http:
            for llm in ("first", "second"):
                answer = await http.patch(f"/api/v1/llms/{llm}", json={"toggle": True})
                assert answer.status_code == 200


def configuration(ports: tuple[int, int], **gateway: Any) -> dict[str, Any]:
    """A configuration whose LLMs are at `ports`."""

    def llm(port: int, tier: str, *capabilities: str) -> dict[str, Any]:
        return {
            "engine": "api.openai",
            "model": "double-1",
            "source": "local",
            "locked": True,
            "tier": tier,
            "context": 8192,
            "slots": 4,
            "capabilities": ["chat", "json_schema", "tools", *capabilities],
            "timeouts": TIMEOUTS,
            "options": {"base_url": f"http://127.0.0.1:{port}/v1"},
        }

    script = {
        **SCRIPT,
        "capabilities": ["chat"],
        # Nobody gets it who does not name it.
        "cost_per_million_input_usd": 999_999.0,
        "options": {"replies": ["the clerk's answer"]},
    }
    return packaged(
        llms={
            "first": llm(ports[0], "small", "vision"),
            "second": llm(ports[1], "main"),
            "script": {
                **script,
                "capabilities": ["chat", "json_schema"],
                "cost_per_million_input_usd": 999999.0,
            },
        },
        profiles={
            "desk": {
                "roles": {
                    "clerk": {"prompt": "clerk.md", "llm": "script", "description": "Answers."},
                    "reader": {"prompt": "clerk.md", "llm": "first", "description": "Asks `first`."},
                },
                "payload_schema": {
                    "type": "object",
                    "properties": {"task": {"type": "string"}, "context": {"type": "string"}},
                    "required": ["task"],
                    "additionalProperties": False,
                },
            }
        },
        balancer={
            "circuit": {"failures": 1_000_000, "cooldown_s": 1},
            "retry": {"attempts": 1, "backoff_s": 0.01},
            "max_wait_s": 60,
        },
        messaging={"enabled": False},
        gateway=gateway,
    )


@asynccontextmanager
async def running(folder: Path, **gateway: Any) -> AsyncIterator[Gateway]:
    """The server, from its start to its end."""
    (folder / "clerk.md").write_text("You are a clerk.")
    config = folder / "configuration.json"
    with held_port() as first, held_port() as second:
        config.write_text(json.dumps(configuration((first, second), **gateway)))
        async with ServerProcess(folder / "state", config) as process:
            yield Gateway(process, (first, second))
