"""The how-to pages of clients: what they show is written, and the client is run where it is installed."""

import asyncio
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.servers.process import SCRIPT, ServerProcess, outputs, write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOW_TO = Path(__file__).parents[2] / "doc" / "how_to"
PAGES = ("aider", "codex", "gemini_cli", "llm_cli", "open_webui", "openai_sdk", "opencode", "trae")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
URL = re.compile(r"http://127\.0\.0\.1:3160(/[a-z0-9/]*)?")
RUN_S = 100.0
SAID = "Blue, said the scripted model."
MARK, COMMAND = "MARK-7781", "echo MARK-$((7780+1))"
REPLIES: list[Any] = [
    {"when": MARK, "say": ["The command printed the mark."]},
    {"when": "USE_SHELL", "tool_calls": [{"name": "exec_command", "arguments": {"cmd": COMMAND}}]},
    {"when": "how much you like it", "say": [{"colour": "blue", "likeness": 0.9}]},
    SAID,
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServerProcess]:
    """A server with the LLMs that the pages name."""
    folder = tmp_path_factory.mktemp("how_to")
    llms = {
        "coder": {**SCRIPT, "tier": "main", "context": 200_000, "options": {"replies": REPLIES}},
        "vectors": {**SCRIPT, "capabilities": ["embeddings"]},
    }
    config = write_config(folder, llms=llms, messaging={"enabled": False})
    async with ServerProcess(folder / "state", config) as process:
        yield process


def blocks(page: str, language: str, server: ServerProcess) -> list[str]:
    """The page's blocks in a language, with the server where it is."""
    port = server.url.rpartition(":")[2]
    text = (HOW_TO / f"{page}.md").read_text().replace(":3160", f":{port}")
    return [body for name, body in BLOCK.findall(text) if name == language]


async def run(*command: str, folder: Path, **environ: str) -> str:
    """What a command prints, at home in a folder of its own."""
    child = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        # opencode goes by PWD.
        env={**os.environ, "HOME": str(folder), "PWD": str(folder), **environ},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await outputs(child, RUN_S)
    assert child.returncode == 0, out.decode()[-3000:]
    return out.decode()


def installed(command: str) -> str:
    """Where the client is; without it the test is skipped."""
    found = shutil.which(command)
    if found is None:
        pytest.skip(f"the client {command} is not installed")
    return found


@pytest.mark.parametrize("page", PAGES)
async def test_every_configuration_can_be_read_and_every_address_is_there(
    page: str, server: ServerProcess
) -> None:
    for text in blocks(page, "json", server):
        json.loads(text if text.lstrip().startswith("{") else f"{{{text}}}")
    for text in blocks(page, "toml", server):
        tomllib.loads(text)
    async with server.http() as http:
        for path in {*URL.findall((HOW_TO / f"{page}.md").read_text())} - {""}:
            shown = f"{path}/models" if path == "/v1" else path
            assert (await http.get(shown)).status_code != 404, path


async def test_the_program_for_openais_sdk_runs_as_it_stands(server: ServerProcess, tmp_path: Path) -> None:
    program = "\n".join(blocks("openai_sdk", "python", server))
    said = await run(sys.executable, "-c", program, folder=tmp_path)
    assert said.count(SAID) == 2
    assert "'developer/planner'" in said
    assert said.rstrip().endswith("16")


async def test_codex_answers_and_runs_a_command(server: ServerProcess, tmp_path: Path) -> None:
    codex = installed("codex")
    (tmp_path / ".codex").mkdir()
    (tmp_path / ".codex" / "config.toml").write_text(blocks("codex", "toml", server)[0])
    exec_ = (codex, "exec", "--skip-git-repo-check", "--json", "--sandbox", "read-only")
    assert SAID in await run(*exec_, "Name a colour.", folder=tmp_path)
    told = await run(*exec_, "Please USE_SHELL.", folder=tmp_path)
    assert MARK in told
    assert "The command printed the mark." in told


async def test_opencode_answers(server: ServerProcess, tmp_path: Path) -> None:
    opencode = installed("opencode")
    (tmp_path / "opencode.json").write_text(blocks("opencode", "json", server)[0])
    quiet = dict.fromkeys(
        (
            "OPENCODE_DISABLE_MODELS_FETCH",
            "OPENCODE_DISABLE_AUTOUPDATE",
            "OPENCODE_DISABLE_LSP_DOWNLOAD",
            "OPENCODE_DISABLE_DEFAULT_PLUGINS",
        ),
        "1",
    )
    homes = {
        f"XDG_{name}_HOME": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "CACHE", "STATE")
    }
    said = await run(opencode, "run", "--format", "json", "Name a colour.", folder=tmp_path, **quiet, **homes)
    assert SAID in said


async def test_the_commands_of_llm_run_as_they_stand(server: ServerProcess, tmp_path: Path) -> None:
    folder = Path(installed("llm")).parent
    (tmp_path / "extra-openai-models.yaml").write_text(blocks("llm_cli", "yaml", server)[0])
    (tmp_path / "report.txt").write_text("It went well.")
    (commands,) = blocks("llm_cli", "console", server)
    said = await run(
        "sh",
        "-eux",
        "-c",
        commands,
        folder=tmp_path,
        LLM_USER_PATH=str(tmp_path),
        PATH=f"{folder}{os.pathsep}{os.environ['PATH']}",
    )
    assert said.count(SAID) == 2
    assert '"likeness":0.9' in said.replace(" ", "")
