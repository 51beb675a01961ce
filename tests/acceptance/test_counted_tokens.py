"""Tokens as an LLM counts them: `count_tokens` in Anthropic's SDK, the tier of a prompt near its limit."""

from pathlib import Path
from typing import Any

import anthropic

from tests.servers.llama_server_double import LlamaServerDouble
from tests.servers.process import ServerProcess, packaged, write_config

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
        counted = await client.messages.count_tokens(model="auto", messages=HELLO)
        assert counted.input_tokens == answer.usage.input_tokens


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

            async def asked(words: int, counted: int) -> tuple[int, str, str]:
                double.prompt_tokens = counted
                messages = [{"role": "user", "content": "word " * words}]
                body = {"model": "auto", "messages": messages, "max_tokens": 20}
                answer = await http.post("/v1/chat/completions", json=body)
                return answer.status_code, answer.headers.get("x-tier", ""), answer.text

            # Estimated at about 2,400: more than a quick job may have.
            status, tier, _ = await asked(1700, 1731)
            assert (status, tier) == (200, "small")
            status, tier, _ = await asked(1700, 2100)
            assert (status, tier) == (200, "main")
            status, _, told = await asked(1700, 2990)
            assert status == 400
            assert "3010 tokens do not fit its context of 3000" in told
            status, tier, _ = await asked(100, 99_999)
            assert (status, tier) == (200, "small")
