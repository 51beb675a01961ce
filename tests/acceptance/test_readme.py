"""What the README and the tutorial tell a user to type is typed here, against a running server."""

import asyncio
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.servers.process import ServerProcess, scripted, write_config

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "doc").rglob("*.md")])
TUTORIALS = sorted((ROOT / "doc" / "tutorial").glob("*.md"))
RUN_S = 280.0

SH = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^]]*\]\(([^)\s#]+)(?:#[^)]*)?\)")
MAKE = re.compile(r"^make ([a-z]+)", re.MULTILINE)

# Every function that the documents ask for, so that what they show does complete.
SOLUTIONS = """```python
def larger(a, b):
    return a if a > b else b

def add(a, b):
    return a + b
```"""
REPLIES = (
    {"when": "You plan code", "say": [{"plan": ["compare, or add"]}]},
    {"when": "You test python", "say": ["assert True"]},
    {"say": [SOLUTIONS]},
)


def script(document: Path) -> str:
    """The shell blocks of a document as one script. Blocks for make are not run from inside a test."""
    blocks = [block for block in SH.findall(document.read_text()) if not MAKE.search(block)]
    return "".join(blocks)


@pytest.mark.parametrize("document", [ROOT / "README.md", *TUTORIALS], ids=lambda path: path.name)
async def test_the_commands_of_a_document_work_in_the_order_they_stand_in(
    document: Path, tmp_path: Path
) -> None:
    commands = script(document)
    assert ".venv/bin/ai-agent-server" in commands
    if "curl" in commands and shutil.which("curl") is None:
        pytest.skip("there is no curl here; .ci/run installs it")
    # A folder as the reader has it after `make install`, with our own .venv in it.
    checkout = tmp_path / "ai-agent-server"
    checkout.mkdir()
    (checkout / ".venv").symlink_to(ROOT / ".venv")
    config = write_config(tmp_path, llms=scripted(*REPLIES), messaging={"enabled": False})
    async with ServerProcess(tmp_path / "state", config) as server:
        port = server.url.rpartition(":")[2]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("AI_AGENT_SERVER_")}
        child = await asyncio.create_subprocess_exec(
            "sh", "-eux", "-c", commands.replace(":3160", f":{port}"),
            cwd=checkout,
            env={**kept, "AI_AGENT_SERVER_PORT": port, "XDG_STATE_HOME": str(tmp_path / "xdg")},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            async with asyncio.timeout(RUN_S):
                said, _ = await child.communicate()
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
    assert child.returncode == 0, said.decode()
    assert "completed" in said.decode()


def test_every_make_target_that_the_documents_name_is_there() -> None:
    there = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for document in DOCUMENTS for target in MAKE.findall(document.read_text())}
    named |= {t for document in DOCUMENTS for t in re.findall(r"`make ([a-z]+)[^`]*`", document.read_text())}
    assert {"demo", "test"} <= named <= there


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_between_the_documents_leads_somewhere(document: Path) -> None:
    targets = [link for link in LINK.findall(document.read_text()) if "://" not in link]
    missing = [link for link in targets if not (document.parent / link).exists()]
    assert not missing


def test_the_default_port_of_the_documents_is_the_servers() -> None:
    from ai_agent_server.cli.serve import DEFAULT_PORT

    for document in DOCUMENTS:
        assert set(re.findall(r"127\.0\.0\.1:(31\d\d)", document.read_text())) <= {str(DEFAULT_PORT)}
