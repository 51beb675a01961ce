"""Tokens as an LLM counts them: `count_tokens` in Anthropic's SDK, the tier of a prompt near its limit."""

import asyncio
from pathlib import Path
from typing import Any

import anthropic

from tests.servers.llama_server_double import LlamaServerDouble
from tests.servers.process import ServerProcess, packaged, write_config

SOON_S = 60.0
HELLO: Any = [{"role": "user", "content": "Wie heißt die Hauptstadt von Österreich? 0123456789"}]


async def test_the_embedded_model_counts_what_it_will_read(tmp_path: Path) -> None:
    config = write_config(tmp_path, messaging={"enabled": False})
    async with (
        ServerProcess(tmp_path / "state", config) as server,
        anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        # Until the model is in memory it is an estimate.
        assert (await client.messages.count_tokens(model="auto", messages=HELLO)).input_tokens > 0
        answer = await client.messages.create(model="auto", messages=HELLO, max_tokens=4)
        async with asyncio.timeout(SOON_S):
            # A machine that is busy enough gets the estimate once more.
            while (
                await client.messages.count_tokens(model="auto", messages=HELLO)
            ).input_tokens != answer.usage.input_tokens:
                await asyncio.sleep(0.1)


async def test_the_count_decides_the_tier_and_what_fits(tmp_path: Path) -> None:
    async with LlamaServerDouble() as double:
        llm = {
            **packaged()["llms"]["embedded"],
            "engine": "local.llama_server",
            "model": "double-1",
            "context": 3000,
            "options": {"base_url": double.url},
        }
        config = write_config(tmp_path, llms={"double": llm}, messaging={"enabled": False})
        async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:

            async def until(words: int, counted: int, *wanted: str) -> None:
                """Until such a prompt is answered so: a machine that is busy enough keeps to the estimate."""
                double.prompt_tokens = counted
                messages = [{"role": "user", "content": "word " * words}]
                body = {"model": "auto", "messages": messages, "max_tokens": 20}
                async with asyncio.timeout(SOON_S):
                    while True:
                        answer = await http.post("/v1/chat/completions", json=body)
                        said = f"{answer.status_code} {answer.headers.get('x-tier')} {answer.text}"
                        if all(each in said for each in wanted):
                            return
                        await asyncio.sleep(0.1)

            # Estimated at about 2,400: more than a quick job may have.
            await until(1700, 1731, "200 small")
            await until(1700, 2100, "200 main")
            await until(1700, 2990, "400", "3010 tokens do not fit its context of 3000")
            await until(100, 99_999, "200 small")
