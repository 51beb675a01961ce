"""The how-to page for Claude Code: its configuration and its environment work as they stand there."""

import asyncio
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import anthropic
import pytest

from tests.servers.process import SCRIPT, ServerProcess, outputs, packaged

PAGE = (Path(__file__).parents[2] / "doc" / "how_to" / "claude_code.md").read_text()
(CONFIGURATION,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
ENVIRONMENT = dict(re.findall(r"^export (\w+)=(\S+)$", PAGE, re.MULTILINE))
CLAUDE = shutil.which("claude")
RUN_S = 100.0

REPLIES: list[Any] = [
    {"when": "cargo-42", "say": ["The cargo is forty-two."]},
    {"when": "Read the note", "tool_calls": [{"name": "Read", "arguments": {"file_path": "NOTE"}}]},
    "Hello.",
]


def configured(folder: Path) -> Path:
    """The page's configuration over the packaged one; a script plays the model, which is not here."""
    told = json.loads(CONFIGURATION)
    assert set(told["llms"]) == {ENVIRONMENT["ANTHROPIC_MODEL"]}
    played = {
        **SCRIPT,
        "options": json.loads(json.dumps({"replies": REPLIES}).replace("NOTE", str(folder / "note.txt"))),
    }
    for name, llm in told["llms"].items():
        told["llms"][name] = {**llm, **{key: played[key] for key in ("engine", "model", "options")}}
    path = folder / "configuration.json"
    path.write_text(json.dumps(packaged(**told)))
    return path


def environment(server: ServerProcess) -> dict[str, str]:
    """What the page exports, for this server."""
    return {**ENVIRONMENT, "ANTHROPIC_BASE_URL": server.url}


def test_the_pages_figures_agree_with_each_other() -> None:
    llms = json.loads(CONFIGURATION)["llms"]
    context = str(llms[ENVIRONMENT["ANTHROPIC_MODEL"]]["context"])
    assert ENVIRONMENT["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == context
    assert ENVIRONMENT["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:3160"


async def test_an_sdk_with_the_pages_environment_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ServerProcess(tmp_path / "state", configured(tmp_path)) as server:
        for name, value in environment(server).items():
            monkeypatch.setenv(name, value)
        async with anthropic.AsyncAnthropic(max_retries=0) as client:
            for model in (ENVIRONMENT["ANTHROPIC_MODEL"], "claude-haiku-5"):
                message = await client.messages.create(
                    model=model, max_tokens=9, messages=[{"role": "user", "content": "Hi."}]
                )
                assert [block.type for block in message.content] == ["text"]
                assert message.model == ENVIRONMENT["ANTHROPIC_MODEL"]


@pytest.mark.skipif(CLAUDE is None, reason="Claude Code is not installed")
async def test_claude_code_reads_a_file_and_answers(tmp_path: Path) -> None:
    assert CLAUDE is not None
    (tmp_path / "note.txt").write_text("cargo-42\n")
    async with ServerProcess(tmp_path / "state", configured(tmp_path)) as server:
        child = await asyncio.create_subprocess_exec(
            *(CLAUDE, "-p", "Read the note.", "--allowedTools", "Read"),
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path),
                "DISABLE_AUTOUPDATER": "1",
                "IS_SANDBOX": "1",
                **environment(server),
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await outputs(child, RUN_S)
    assert child.returncode == 0, out.decode()
    assert "The cargo is forty-two." in out.decode()
