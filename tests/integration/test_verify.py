"""`tasks verify`: what it finds in a state folder, what it leaves alone, what it moves aside."""

import asyncio
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.task_packet import (
    Completed,
    Hop,
    LLMCall,
    Started,
    StepFinished,
    StepStarted,
    Submitted,
    TaskPacket,
)
from ai_agent_server.errors import StoreUnusableError
from ai_agent_server.tasks_state._verify import mend, verify
from ai_agent_server.tasks_state.json_file_store import JsonFileStore
from tests.acceptance.test_cli import cli
from tests.servers.process import ServerProcess, scripted, write_config

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
ID = "01936f2a-7c1e-7b3a-9d55-2f4be0a1c9d7"
OTHER = "01936f2a-7c1e-7b3a-9d55-2f4be0a1c9d8"
CALL = LLMCall(
    llm="small", model="m", source="local", input_tokens=7, output_tokens=3, finish_reason="stop",
    time_to_first_token_ms=1.0, duration_ms=2.0, prompt_sha256="0" * 64, cost_usd=0.1,
)  # fmt: skip


async def kept(root: Path, task_id: str = ID, *, result: JSONObject | None = None) -> Path:
    """A folder with one more task in it, which ended well after a step; its file."""
    store = JsonFileStore(root)
    await store.open()
    packet, _ = await store.create(
        TaskPacket(
            task_id=task_id, context_id=task_id, profile="developer", role="planner",
            payload={"task": "add"}, created_at=NOW, idempotency_key=f"key-{task_id}",
        ),
        [Submitted(at=NOW, via="rest")],
    )  # fmt: skip
    await store.append(
        task_id,
        [
            Started(at=NOW, generation=1),
            StepStarted(at=NOW, step=1, role="planner", attempt=1, hop=Hop(on="entry", why="sent")),
            StepFinished(at=NOW, step=1, role="planner", outcome="done", call=CALL),
            Completed(at=NOW, result=result or {"outcome": "done"}),
        ],
        expected_revision=packet.revision,
    )
    await store.aclose()
    return Path(store.location(task_id))


def _set(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for part in path[:-1]:
            document = document[part]
        document[path[-1]] = to

    return change


def _drop_event(document: Any) -> None:
    del document["history"][1]


def _late_event(document: Any) -> None:
    end = document["history"][-1]
    document["history"].append({**end, "seq": end["seq"] + 1})
    document["revision"] += 1


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_set("status", to="working"), "status is working, its history makes it completed"),
        (_set("status", to="finished"), "Invalid enum value 'finished'"),
        (_set("reason", to="internal"), "reason is internal, its history makes it None"),
        (_set("usage", "input_tokens", to=8), "usage is .*input_tokens=8.* makes it .*input_tokens=7"),
        (_set("usage", "cost_usd", to=0.2), "usage is"),
        (_set("result", to={}), "result is {}, its history makes it"),
        (_set("history", 2, "seq", to=9), "event 3 has the seq 9"),
        (_set("history", 2, "step", to=2), "step 2 began .event 3. after step 0"),
        (_set("history", 3, "role", to="qa"), "step 1 of qa ended .event 4., which was not under way"),
        (_set("history", 0, "type", to="task.began"), "Invalid value"),
        (_set("revision", to=6), "revision is 6, but there are 5 events"),
        (_set("task_id", to=OTHER), f"it holds the task {OTHER}"),
        (_drop_event, "revision is 5, but there are 4 events"),
        (_late_event, "it has ended .completed.; nothing follows"),
    ],
)
async def test_a_file_that_is_not_what_its_history_says_is_found(
    tmp_path: Path, damage: Callable[[Any], None], problem: str
) -> None:
    path = await kept(tmp_path)
    assert verify(tmp_path).faults == ()
    document = json.loads(path.read_bytes())
    damage(document)
    path.write_text(json.dumps(document))

    (fault,) = verify(tmp_path, sleep=lambda _: None).faults

    assert (fault.task_id, fault.file) == (ID, f"tasks_state/d7/{ID}.json")
    assert re.search(problem, fault.problem)


async def test_a_blob_that_is_gone_or_changed_is_found(tmp_path: Path) -> None:
    await kept(tmp_path, result={"text": "x" * 300_000})
    (blob,) = (tmp_path / "blobs").iterdir()
    assert verify(tmp_path).faults == ()
    blob.write_bytes(b"{}")
    (fault,) = verify(tmp_path, sleep=lambda _: None).faults
    assert "was changed" in fault.problem
    blob.unlink()
    (fault,) = verify(tmp_path, sleep=lambda _: None).faults
    assert "is missing" in fault.problem


async def test_what_is_no_task_file_is_found(tmp_path: Path) -> None:
    path = await kept(tmp_path)
    (path.parent / "notes.txt").write_text("mine")
    path.rename(tmp_path / "tasks_state" / "00" / path.name)
    files = {fault.file for fault in verify(tmp_path, sleep=lambda _: None).faults}
    assert files == {"tasks_state/d7/notes.txt", f"tasks_state/00/{ID}.json"}


async def test_two_tasks_with_one_idempotency_key_are_found(tmp_path: Path) -> None:
    await kept(tmp_path)
    path = await kept(tmp_path, OTHER)
    path.write_text(path.read_text().replace(f"key-{OTHER}", f"key-{ID}"))
    (fault,) = verify(tmp_path, sleep=lambda _: None).faults
    assert fault.problem == f"its idempotency key is that of task {ID}"


async def test_mending_moves_aside_and_changes_nothing(tmp_path: Path) -> None:
    path, good = await kept(tmp_path), await kept(tmp_path, OTHER)
    broken = path.read_bytes().replace(b'"completed"', b'"working"', 1)
    path.write_bytes(broken)
    before = good.read_bytes()

    (fault,) = mend(tmp_path).faults

    assert Path(fault.moved_to).read_bytes() == broken
    assert not path.exists()
    assert good.read_bytes() == before
    assert (again := verify(tmp_path)).faults == ()
    assert (again.tasks, again.set_aside) == (1, 1)


async def test_a_folder_with_a_server_is_verified_and_not_mended(tmp_path: Path) -> None:
    config = write_config(tmp_path, llms=scripted("ok", delay_s=0.05), messaging={"enabled": False})
    state = tmp_path / "state"
    server = ServerProcess(state, config)
    async with server, server.http() as http:
        for number in range(12):
            body = {"payload": {"text": f"text {number}"}}
            assert (await http.post("/api/v1/productivity/summarize", json=body)).status_code == 202
        tasks = 0
        async with asyncio.timeout(120):
            while tasks < 12:  # a file may be a moment later than the answer
                ran = await cli("tasks", "verify", "--state-dir", str(state), "--json", cwd=tmp_path)
                assert (ran.code, ran.json["faults"]) == (0, []), ran
                tasks = ran.json["tasks"]
        refused = await cli("tasks", "verify", "--mend", "--state-dir", str(state), cwd=tmp_path)
        assert refused.code == 2
        assert f"in use by another server (pid {server.pid})" in refused.errors
        await server.kill()
    assert verify(state).faults == ()
    if list((state / "journal").iterdir()):
        with pytest.raises(StoreUnusableError, match="was not stopped cleanly"):
            mend(state)
    shown = await cli("tasks", "verify", "--state-dir", str(state), cwd=tmp_path)
    assert shown.out.endswith("nothing is wrong\n")


async def test_a_folder_that_is_none_is_said_so(tmp_path: Path) -> None:
    ran = await cli("tasks", "verify", "--state-dir", str(tmp_path), cwd=tmp_path)
    assert ran.code == 2
    assert "is no state folder" in ran.errors
