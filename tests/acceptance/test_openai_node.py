"""OpenAI's SDK for Node against a real server, where it is installed: `npm install --no-save openai`."""

import asyncio
import json
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.servers.process import SCRIPT, ServerProcess, outputs, write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

CASES = Path(__file__).parents[1] / "clients" / "openai_node.mjs"
MODULES = Path(os.environ.get("NODE_MODULES", Path(__file__).parents[2] / "node_modules"))
"""Where the SDK is installed."""
RUN_S = 100.0
ANSWER = "The answer is 42."
PARIS = {"city": "Paris"}
REPLIES: list[Any] = [
    {"when": "It is 21 C", "say": ["Mild."]},
    {"when": "weather", "tool_calls": [{"name": "weather", "arguments": PARIS}]},
    {"when": "A place", "say": [PARIS]},
    ANSWER,
]
SAW: dict[str, Any] = {
    "chat": [ANSWER, "stop", None, "scripted"],
    "chat_stream": [ANSWER, ["stop"]],
    "chat_stream_with_usage": [ANSWER, True],
    "chat_tool": ["tool_calls", "weather", PARIS],
    "chat_run_tools": "Mild.",
    "chat_schema": PARIS,
    "chat_role": ["productivity/rewrite", ANSWER],
    "chat_leaves": [2, "stop"],
    "responses": ["completed", ANSWER],
    "responses_stream": ["completed", ANSWER, ANSWER],
    "responses_tool": ["weather", PARIS],
    "responses_schema": PARIS,
    "embeddings": [[0, 1], True, True],
    "models": [True, "developer/planner"],
    "error_of_an_unknown_model": ["NotFoundError", 404, "model_not_found", "model"],
    "error_of_a_wrong_request": ["BadRequestError", 400, "invalid_value", "messages"],
    "error_of_an_engine": ["InternalServerError", 503, "llm_unavailable", None],
    "error_within_a_stream": ["APIError", None, "engine_answer_broken", None],
    "error_within_responses": ["response.failed", "server_error"],
}


def llms() -> dict[str, Any]:
    """One that answers, one that embeds, one of a single slow slot, one that breaks, one that is down."""
    options: dict[str, dict[str, Any]] = {
        "scripted": {"replies": REPLIES},
        "slow": {"replies": ["one two three four five six seven"], "tokens_per_s": 5},
        "broken": {"replies": ["one two three"], "fail": "cut"},
        "down": {"fail": "auth"},
    }
    found: dict[str, Any] = {
        name: {**SCRIPT, "locked": True, "options": each} for name, each in options.items()
    }
    # Nobody gets these who does not name them.
    for name in ("slow", "broken", "down"):
        found[name] |= {"cost_per_million_input_usd": 999_999.0, "slots": 1}
    return {**found, "vectors": {**SCRIPT, "locked": True, "capabilities": ["embeddings"]}}


async def node(*arguments: str) -> str:
    """What node prints."""
    child = await asyncio.create_subprocess_exec(
        "node", *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await outputs(child, RUN_S)
    assert child.returncode == 0, errors.decode()
    return output.decode()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServerProcess]:
    if shutil.which("node") is None or not (MODULES / "openai" / "index.mjs").is_file():
        pytest.skip("node, or OpenAI's package for it, is not installed: npm install --no-save openai")
    folder = tmp_path_factory.mktemp("node")
    config = write_config(folder, llms=llms(), messaging={"enabled": False})
    async with ServerProcess(folder / "state", config) as process:
        yield process


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def told(server: ServerProcess) -> dict[str, Any]:
    """What each case printed."""
    output = await node(str(CASES), server.url, (MODULES / "openai" / "index.mjs").as_uri())
    return {line["case"]: line for line in map(json.loads, output.splitlines())}


@pytest.mark.parametrize("name", SAW)
async def test_the_node_sdk_sees(told: dict[str, Any], name: str) -> None:
    assert told[name].get("saw", told[name]) == SAW[name]


async def test_the_program_of_the_page_runs(server: ServerProcess, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "doc" / "how_to" / "openai_sdk.md").read_text()
    (program,) = re.findall(r"^```js\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "node_modules").symlink_to(MODULES)
    script = tmp_path / "page.mjs"
    script.write_text(program.replace(":3160", ":" + server.url.rpartition(":")[2]))
    assert await node(str(script)) == f"{ANSWER}\n{ANSWER}"
