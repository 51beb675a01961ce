"""QA's prompts as they leave the server: whatever was written before, there is no code in them."""

import asyncio
import json
from pathlib import Path
from typing import Any

from tests.servers.llama_server_double import LlamaServerDouble
from tests.servers.process import ServerProcess, packaged, write_config

MARK = "zq_marker"
ANSWER = f"""```python
def add(a, b):
    {MARK} = a + b
    return {MARK}

def test_add():
    assert add(2, 2) == 5
```"""
"""Whoever is asked answers so: code that holds the example, and a test that it fails."""
TASK = {"task": "Add two numbers.", "entry_point": "add", "examples": ["assert add(1, 2) == 3"]}
WORKFLOW = {
    "makers": ["fast-coder", "debug"],
    "routes": {
        "fast-coder.done": [{"to": "qa"}],
        "debug.done": [{"to": "qa"}],
        "qa.disputed": [{"to": "qa", "at_most": 2, "since": ["fast-coder", "debug"]}],
        "qa.fail": [{"to": "debug", "at_most": 2, "feedback": True}],
    },
}
FINAL = {"completed", "failed"}


async def test_what_qa_is_really_sent_never_holds_code(tmp_path: Path) -> None:
    async with LlamaServerDouble(reply=ANSWER) as double:
        llm = {
            "engine": "local.llama_server",
            "model": "double-1",
            "source": "local",
            "capabilities": ["chat", "json_schema"],
            "options": {"base_url": double.url},
        }
        profiles = packaged()["profiles"]
        profiles["developer"]["roles"]["qa"]["options"] = {"blind_tests": "always"}
        profiles["developer"]["workflow"] = WORKFLOW
        config = write_config(tmp_path, llms={"double": llm}, profiles=profiles, messaging={"enabled": False})
        async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:
            answer = await http.post("/api/v1/developer/fast-coder", json={"payload": TASK})
            assert answer.status_code == 202, answer.text
            async with asyncio.timeout(60):
                while True:
                    packet = (await http.get(f"/api/v1/tasks/{answer.json()['task_id']}")).json()
                    if packet["status"] in FINAL:
                        break
                    await asyncio.sleep(0.05)
        bodies = [request.json for request in double.requests if request.path.endswith("/chat/completions")]
    # One task has one exchange at a time: the history says whose each request was.
    calls = [e["role"] for e in packet["history"] if e["type"] == "step.finished" and e.get("call")]
    assert len(calls) == len(bodies)
    sent: dict[str, list[str]] = {}
    for role, body in zip(calls, bodies, strict=True):
        sent.setdefault(role, []).append(json.dumps(body))
    assert len(sent["qa"]) >= 2, "it wrote tests, and looked again at the disputed one"
    assert all("add(1, 2) == 3" in prompt for prompt in sent["qa"])
    assert not any(MARK in prompt for prompt in sent["qa"])
    assert any(MARK in prompt for prompt in sent["debug"]), "the mark would be seen"
    assert _suites(packet) == {("assert add(2, 2) == 5",)}


def _suites(packet: dict[str, Any]) -> set[tuple[str, ...]]:
    """QA's tests after each of its visits: coders wrote one of their own each time."""
    return {
        tuple(e["output"]["tests"])
        for e in packet["history"]
        if e["type"] == "step.finished" and e["role"] == "qa" and e.get("output")
    }
