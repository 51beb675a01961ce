"""A server on machines with two tiers, one, and none: what it accepts, and how it says what it ran."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from ai_agent_server.sandbox.landlock import Landlock
from tests.servers.process import PROGRAM, ServerProcess, scripted, write_config

REFUSED = (sys.executable, "-B", str(Path(__file__).parent / "namespaces_refused.py"))
NOTHING = (*REFUSED, "--no-landlock")
TASK = {
    "task": "Add two numbers.",
    "entry_point": "add",
    "examples": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"],
}
REPLIES = (
    {"when": "You are a python programmer", "say": ["```python\ndef add(a, b):\n    return a + b\n```"]},
    {"when": "You test python", "say": ["assert add(2, 2) == 4"]},
    {"when": "You are a rust programmer", "say": ["```rust\nfn add(a: i32, b: i32) -> i32 { a + b }\n```"]},
    {"when": "rust", "say": [{"problems": []}]},
)
FINAL = {"completed", "failed", "canceled", "rejected"}


def configuration(folder: Path, tier: str = "auto") -> Path:
    return write_config(folder, llms=scripted(*REPLIES), messaging={"enabled": False}, sandbox={"tier": tier})


async def ended(http: httpx.AsyncClient, payload: dict[str, Any]) -> dict[str, Any]:
    answer = await http.post("/api/v1/developer/fast-coder", json={"payload": payload})
    assert answer.status_code == 202, answer.text
    async with asyncio.timeout(60):
        while True:
            packet: dict[str, Any] = (await http.get(f"/api/v1/tasks/{answer.json()['task_id']}")).json()
            if packet["status"] in FINAL:
                return packet
            await asyncio.sleep(0.05)


async def sandbox_of(http: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await http.get("/health")).json()["components"]["sandbox"]
    return found


async def doctor(program: tuple[str, ...], config: Path) -> dict[str, Any]:
    """What doctor says of the sandbox on such a machine."""
    arguments = ("doctor", "--config", str(config), "--state-dir", str(config.parent / "state"), "--json")
    child = await asyncio.create_subprocess_exec(
        *program, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    out, _ = await child.communicate()
    checks: list[dict[str, Any]] = json.loads(out)["checks"]
    return next(check for check in checks if check["part"] == "sandbox")


async def test_the_tier_that_ran_it_is_on_the_artifact_in_health_and_in_doctor(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:
        packet = await ended(http, TASK)
        health = await sandbox_of(http)
    tier = packet["result"]["tests"]["tier"]
    assert tier in {"bubblewrap", "landlock"}
    assert (packet["status"], health["status"]) == ("completed", "ok")
    assert health["detail"].startswith(f"{tier}: ")
    assert (await doctor(PROGRAM, config))["detail"] == health["detail"]


async def test_where_namespaces_are_refused_the_second_tier_runs_it(tmp_path: Path) -> None:
    if not (await Landlock().probe()).works:
        pytest.skip("this kernel has no Landlock")
    config = configuration(tmp_path)
    async with ServerProcess(tmp_path / "state", config, program=REFUSED) as server, server.http() as http:
        packet = await ended(http, TASK)
        health = await sandbox_of(http)
    assert (packet["status"], packet["result"]["tests"]["tier"]) == ("completed", "landlock")
    assert health["detail"].startswith("landlock: ")
    assert (await doctor(REFUSED, config))["detail"] == health["detail"]


async def test_where_no_tier_works_no_code_is_accepted(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    async with ServerProcess(tmp_path / "state", config, program=NOTHING) as server, server.http() as http:
        packet = await ended(http, TASK)
        health = (await http.get("/health")).json()
    assert (packet["status"], packet["reason"]) == ("failed", "sandbox_unavailable")
    assert "return a + b" in packet["result"]["artifact"]["content"]
    assert packet["result"]["verdict"] == "unverified"
    assert (health["status"], health["components"]["sandbox"]["status"]) == ("degraded", "degraded")
    assert health["components"]["sandbox"]["detail"].startswith("none: ")
    said = await doctor(NOTHING, config)
    assert said["status"] == "fail"
    assert said["advice"]


async def test_unsafe_is_taken_when_it_is_written_out_and_said_wherever_it_ran(tmp_path: Path) -> None:
    config = configuration(tmp_path, "unsafe")
    async with ServerProcess(tmp_path / "state", config, program=NOTHING) as server, server.http() as http:
        packet = await ended(http, TASK)
        health = await sandbox_of(http)
    assert (packet["status"], packet["result"]["tests"]["tier"]) == ("completed", "unsafe")
    assert health["status"] == "degraded"
    assert (await doctor(NOTHING, config))["status"] == "warn"


async def test_what_cannot_be_run_here_is_read_and_said_to_be_unverified(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:
        packet = await ended(http, {"task": "Add two numbers.", "language": "rust"})
    assert packet["status"] == "completed"
    assert packet["result"]["verdict"] == "unverified"
    assert "fn add" in packet["result"]["artifact"]["content"]
    hops = [e["hop"] for e in packet["history"] if e["type"] == "step.started"]
    assert [hop["on"] for hop in hops] == ["entry", "fast-coder.done"]
    finished = [e for e in packet["history"] if e["type"] == "step.finished"]
    assert "cannot be run here" in finished[-1]["why"]
