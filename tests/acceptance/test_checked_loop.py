"""A checked loop in a profile of the user's own, as the how-to writes it down."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx

from tests.servers.process import ServerProcess, scripted

HOW_TO = Path(__file__).parents[2] / "doc" / "how_to" / "checked_loop.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPT = re.compile(r"`(clerk/\w+\.md)`.*?^```markdown\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LETTER = "Dear Sir, our invoice AB-0042 of 3 May 2026 over 120.50 euros is due."
RECORD = {"number": "AB-0042", "date": "2026-05-03", "total": 120.5}
VAT = {
    "task": "Write a function that adds VAT of 20 percent.",
    "entry_point": "add_vat",
    "examples": ["assert add_vat(10) == 12", "assert add_vat(0) == 0"],
}
FINAL = {"completed", "failed", "canceled", "rejected"}


def configuration(folder: Path, *replies: Any) -> Path:
    """The files of the how-to; with `replies` its LLM is a scripted one."""
    text = HOW_TO.read_text()
    written = next(content for kind, content in BLOCK.findall(text) if kind == "json")
    for name, prompt in PROMPT.findall(text):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(prompt)
    if replies:
        document = json.loads(written)
        document["llms"] = {"embedded": scripted(*replies)["scripted"]}
        written = json.dumps(document)
    path = folder / "configuration.json"
    path.write_text(written)
    return path


async def ended(http: httpx.AsyncClient, role: str, payload: dict[str, Any]) -> dict[str, Any]:
    answer = await http.post(f"/api/v1/clerk/{role}", json={"payload": payload})
    assert answer.status_code == 202, answer.text
    async with asyncio.timeout(120):
        while True:
            packet: dict[str, Any] = (await http.get(f"/api/v1/tasks/{answer.json()['task_id']}")).json()
            if packet["status"] in FINAL:
                return packet
            await asyncio.sleep(0.1)


def told(packet: dict[str, Any]) -> list[str]:
    """Each step's role and outcome."""
    return [f"{e['role']}.{e['outcome']}" for e in packet["history"] if e["type"] == "step.finished"]


def code(body: str) -> str:
    return f"```python\ndef add_vat(net):\n    return {body}\n```"


async def test_a_record_is_repaired_until_it_obeys_the_schema(tmp_path: Path) -> None:
    config = configuration(
        tmp_path,
        {"when": "You copy", "say": [RECORD | {"number": "42", "date": "3 May 2026"}]},
        {"when": "/number: '42' does not match", "say": [RECORD | {"date": "3 May 2026"}]},
        {"when": "/date: '3 May 2026' is not a 'date'", "say": [RECORD]},
    )
    async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:
        packet = await ended(http, "extract", {"text": LETTER})
    assert told(packet) == [
        "extract.done", "validate.fail", "repair.done", "validate.fail", "repair.done", "validate.pass",
    ]  # fmt: skip
    assert packet["status"] == "completed"
    assert packet["result"]["output"] == RECORD
    assert packet["result"]["verdict"] == "pass"
    hops = [e["hop"] for e in packet["history"] if e["type"] == "step.started"]
    assert "does not match" in hops[2]["why"]
    assert packet["usage"] | {"calls": 3, "feedback_hops": 2} == packet["usage"]


async def test_a_record_that_nobody_can_repair_fails_with_the_best_there_was(tmp_path: Path) -> None:
    better = RECORD | {"date": "soon"}
    config = configuration(
        tmp_path,
        {"when": "You copy", "say": [RECORD | {"number": "42", "date": "soon", "total": -1}]},
        {"when": "You correct", "say": [better, better | {"number": "?"}, better | {"total": 0}]},
    )
    async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:
        packet = await ended(http, "extract", {"text": LETTER})
    assert told(packet).count("validate.fail") == 4
    assert (packet["status"], packet["reason"]) == ("failed", "max_debug")
    assert packet["result"]["output"] == better
    assert packet["result"]["verdict"] == "fail"
    assert packet["result"]["tests"]["failing"] == ["/date: 'soon' is not a 'date'"]


async def test_code_of_any_profile_is_accepted_because_it_ran(tmp_path: Path) -> None:
    config = configuration(
        tmp_path,
        {"when": "actual: 30.0", "say": [code("net * 1.2")]},
        {"when": "VAT", "say": [code("net * 3.0")]},
    )
    async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:
        packet = await ended(http, "formula", VAT)
        rejected = await ended(http, "formula", VAT | {"examples": ["it should add 20 percent"]})
    assert told(packet) == ["formula.done", "run.fail", "mend.done", "run.pass"]
    assert packet["status"] == "completed"
    assert "net * 1.2" in packet["result"]["artifact"]["content"]
    assert packet["result"]["tests"]["tier"] in {"bubblewrap", "landlock"}
    assert packet["result"]["tests"]["anchors_passed"] == 2
    assert (rejected["status"], rejected["reason"]) == ("rejected", "invalid_payload")


async def test_the_embedded_model_goes_round_both_loops(tmp_path: Path) -> None:
    """What a model of 135M makes of it is its own affair; what is said of it has to be true."""
    config = configuration(tmp_path)
    async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:
        record = await ended(http, "extract", {"text": LETTER})
        formula = await ended(http, "formula", VAT)
    for packet, check in ((record, "validate"), (formula, "run")):
        steps = told(packet)
        assert steps[1].startswith(f"{check}.")
        assert (packet["status"] == "completed") == (steps[-1] == f"{check}.pass")
        assert (packet["status"] == "completed") == (packet["result"]["verdict"] == "pass")
        assert packet["usage"]["calls"] <= 16
        assert packet["status"] == "completed" or packet["reason"]
    assert set(record["result"]["output"]) == {"number", "date", "total"}
    if record["status"] == "completed":
        assert re.fullmatch("[A-Z]{2}-[0-9]{4}", record["result"]["output"]["number"])
