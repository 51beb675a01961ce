"""The Model Context Protocol's own conformance suite, where it and a Node that runs it are installed.

`npm install --no-save @modelcontextprotocol/conformance@0.2.0-alpha.12 node@22`; NODE_MODULES says where, if
not here. The scenarios are those that ask for no tool, prompt or resource made for the suite, and for
nothing that this server does not say it has (logging, completions, subscriptions).
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.servers.process import ServerProcess, outputs, write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODULES = Path(os.environ.get("NODE_MODULES", Path(__file__).parents[2] / "node_modules"))
NODE = MODULES / "node" / "bin" / "node"
SUITE = MODULES / "@modelcontextprotocol" / "conformance" / "dist" / "index.js"
RUN_S = 60.0
BOTH = (
    "tools-list",
    "resources-list",
    "prompts-list",
    "server-sse-multiple-streams",
    "dns-rebinding-protection",
)
SCENARIOS = {
    "2025-11-25": (*BOTH, "server-initialize", "server-session-lifecycle", "ping", "server-sse-polling"),
    "2026-07-28": (
        *BOTH,
        "server-stateless",
        "caching",
        "http-header-validation",
        "sep-2164-resource-not-found",
    ),
}
NEEDS_A_TOOL = "Not testable: server does not list the diagnostic tool"
"""What some checks of `server-stateless` say, which has others that need none."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServerProcess]:
    if not NODE.is_file() or not SUITE.is_file():
        pytest.skip("the conformance suite of the Model Context Protocol, or its Node, is not installed")
    folder = tmp_path_factory.mktemp("conformance")
    config = write_config(folder, messaging={"enabled": False})
    async with ServerProcess(folder / "state", config) as process:
        yield process


@pytest.mark.parametrize(
    ("revision", "scenario"),
    [(revision, scenario) for revision, scenarios in SCENARIOS.items() for scenario in scenarios],
)
async def test_the_protocols_own_suite_finds_nothing_wrong(
    server: ServerProcess, revision: str, scenario: str
) -> None:
    child = await asyncio.create_subprocess_exec(
        str(NODE), str(SUITE), "server", "--url", f"{server.url}/mcp", "--scenario", scenario,
        "--spec-version", revision,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await outputs(child, RUN_S)
    told = output.decode()
    assert re.search(r"Passed: \d+/\d+", told), told
    faults = re.findall(r"^ *Error: (.*)$", told, re.MULTILINE)
    if scenario == "server-stateless":
        assert [fault for fault in faults if not fault.startswith(NEEDS_A_TOOL)] == []
    else:
        assert child.returncode == 0, told
