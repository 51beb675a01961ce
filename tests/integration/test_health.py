"""What /health says of the parts: a fault is told, and what somebody chose is no fault."""

from pathlib import Path

from ai_agent_server.app import running
from tests.servers.process import SCRIPT, write_config


async def test_an_llm_that_was_switched_off_is_no_fault_and_all_of_them_are(tmp_path: Path) -> None:
    llms = {"one": SCRIPT, "two": {**SCRIPT, "toggle": False}}
    config = write_config(tmp_path, llms=llms, messaging={"enabled": False})
    async with running(config=config, state_dir=tmp_path / "state", environ={}) as (server, _):
        assert (await server.health()).status == "ok"
        await server.balancer.set_toggle("one", False)
        report = await server.health()
    assert (report.status, report.components["engines"].status) == ("down", "down")
    assert report.components["nats"].detail.startswith("off")


async def test_files_that_were_moved_aside_are_told(tmp_path: Path) -> None:
    shard = tmp_path / "state" / "tasks_state" / "00"
    shard.mkdir(parents=True)
    (shard / "0197a000-0000-7000-8000-000000000000.json").write_text("{")
    config = write_config(tmp_path, llms={"one": SCRIPT}, messaging={"enabled": False})
    async with running(config=config, state_dir=tmp_path / "state", environ={}) as (server, _):
        report = await server.health()
    assert (report.status, report.components["store"].status) == ("degraded", "degraded")
    assert "1 broken" in report.components["store"].detail
