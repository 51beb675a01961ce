"""Clients that are cut off, and a server that is killed meanwhile: nothing seen twice, nothing run twice."""

import asyncio
import random
from pathlib import Path

from bench.readers import repeat, storm

from ai_agent_server.tasks_state._verify import TaskFiles, verify
from tests.servers.process import ServerProcess, scripted, write_config


async def test_readers_see_each_event_once_and_a_repeated_submission_runs_once(tmp_path: Path) -> None:
    config = write_config(tmp_path, llms=scripted("short", delay_s=0.02), messaging={"enabled": False})
    server = await ServerProcess(tmp_path / "state", config).start()
    rng = random.Random(1)
    try:
        sending = asyncio.create_task(repeat(lambda: server.url, keys=20, copies=10, rng=rng))
        await asyncio.sleep(0.3)
        await server.kill()
        server = await ServerProcess(tmp_path / "state", config).start()
        made = await sending
        assert len(set(made.values())) == 20
        reading = asyncio.create_task(
            storm(lambda: server.url, sorted(made.values())[:2], disconnects=60, rng=rng)
        )
        await asyncio.sleep(0.1)
        await server.kill()
        server = await ServerProcess(tmp_path / "state", config).start()
        assert await reading >= 4
        async with server.http() as http, asyncio.timeout(60):
            for task_id in made.values():
                while (await http.get(f"/api/v1/tasks/{task_id}")).json()["status"] != "completed":
                    await asyncio.sleep(0.1)
        assert await server.stop() == 0
    finally:
        await server.kill()
    packets = list(TaskFiles(server.state_dir).packets())
    assert {packet.task_id for packet in packets} == set(made.values())
    assert {(packet.status, packet.usage.calls) for packet in packets} == {("completed", 1)}
    assert verify(server.state_dir).faults == ()
