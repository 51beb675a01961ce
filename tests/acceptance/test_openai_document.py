"""The document of OpenAI's surface holds for a real server, whatever it is sent."""

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.servers.process import SCRIPT, ServerProcess, outputs, write_config

LIMIT_S = 280


@pytest.mark.parametrize(
    ("paths", "operations"), [("responses|embeddings", 2), ("chat/completions|models.*", 3)]
)
async def test_whatever_schemathesis_sends_the_answer_is_documented(
    tmp_path: Path, paths: str, operations: int
) -> None:
    llms: dict[str, Any] = {"chat": SCRIPT, "vectors": {**SCRIPT, "capabilities": ["embeddings"]}}
    config = write_config(tmp_path, llms=llms, messaging={"enabled": False})
    async with ServerProcess(tmp_path / "state", config) as server:
        document = f"{server.url}/api/v1/openapi.json"
        schemathesis = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "schemathesis.cli", "--no-color", "run", document,
            "--include-path-regex", f"^/v1/({paths})$",
            # What a schema cannot say (which models there are) is refused, and should be.
            "--checks", "all", "--exclude-checks", "positive_data_acceptance",
            "--phases", "examples,coverage,fuzzing", "--max-examples", "15", "--seed", "1",
            "--generation-database", "none", "--request-timeout", "30", "--warnings", "off",
            cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await outputs(schemathesis, LIMIT_S)
    assert schemathesis.returncode == 0, output.decode()
    tested = re.search(r"Tested: (\d+)", output.decode())
    assert tested
    assert int(tested[1]) == operations
