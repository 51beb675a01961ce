"""The arrows of the house: every implementation is under contract, and every contract can break."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ai_agent_server import agents, channels, cluster, llm_engines, memory_gauges, tasks_state
from ai_agent_server.discovery import kinds
from ai_agent_server.load_balancer import strategies

ROOT = Path(__file__).parents[2]
LINTER = Path(sys.executable).parent / "lint-imports"


def test_every_implementation_is_under_the_contract_of_independence() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (independence,) = [contract for contract in contracts if contract["type"] == "independence"]
    packages = (agents, channels, cluster, llm_engines, memory_gauges, strategies, tasks_state)
    found = {module for package in packages for module in kinds(package).values()}
    assert found <= set(independence["modules"]), "add the new file to the contract in pyproject.toml"


@pytest.mark.parametrize(
    ("module", "forbidden", "contract"),
    [
        ("errors", "ai_agent_server.core.chat", "errors <- values"),
        ("core/chat", "ai_agent_server.llm_engines.base", "errors <- values"),
        (
            "llm_engines/local/scripted_engine",
            "ai_agent_server.llm_engines.api.openai_engine",
            "knows its own base.py",
        ),
        ("core/orchestration_engine", "nats", "the engine names no implementation"),
        ("core/mcp_handler", "ai_agent_server.core.orchestration_engine", "handlers reach agents"),
        ("gateway/serving", "ai_agent_server.llm_engines.api.openai_engine", "handlers reach agents"),
        ("gateway/tiers", "time", "do no I/O"),
        ("load_balancer/strategies/resident_first", "time", "do no I/O"),
        ("core/next_step", "asyncio", "do no I/O"),
    ],
)
def test_an_arrow_that_points_the_wrong_way_breaks_its_contract(
    tmp_path: Path, module: str, forbidden: str, contract: str
) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "src" / "ai_agent_server" / f"{module}.py"
    file.write_text(file.read_text() + f"\nimport {forbidden}\n")
    seen = subprocess.run(
        [LINTER, "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src"), "COLUMNS": "300"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    broken = [line for line in seen.stdout.splitlines() if line.endswith("BROKEN")]
    assert seen.returncode == 1
    assert any(contract in line for line in broken), seen.stdout


def test_what_few_need_is_not_imported_at_the_start() -> None:
    """The SDK of the Model Context Protocol doubles the time and adds half the memory."""
    program = "import sys, ai_agent_server.app; print(sys.modules.keys() & {'mcp', 'mcp_types', 'xllamacpp'})"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout == "set()\n"
