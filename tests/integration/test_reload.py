"""The whole server in one process: its start, its configuration read again while it works, its health."""

import asyncio
import json
import os
import stat
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from ai_agent_server import app
from ai_agent_server.app import Server, StoreWatch, running, try_reload
from ai_agent_server.channels.nats_channel import NatsChannel
from ai_agent_server.core.ports import Component
from ai_agent_server.core.task_packet import StepFinished, TaskDraft, TaskPacket
from ai_agent_server.errors import ConfigurationError, SandboxError, StoreUnusableError
from ai_agent_server.llm_engines.local.scripted_engine import ScriptedEngine
from ai_agent_server.tasks_state.base import StoreHealth
from ai_agent_server.tasks_state.memory_store import MemoryStore
from tests.servers.api import serving
from tests.waiting import until

DEADLINE_S = 60.0


class Configuration:
    """A configuration.json with one profile of one role, on one scripted LLM."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config" / "configuration.json"
        self.prompt = self.path.with_name("say.md")
        self.state = folder / "state"
        self.path.parent.mkdir()
        self.prompt.write_text("Say it.")
        self.write()

    def write(self, llm: str = "one", *, toggle: bool = True, **changes: Any) -> None:
        engine = {"engine": "local.scripted", "model": "m", "source": "local"}
        spare = engine | {"options": {"replies": ["from the spare"]}}
        document = {
            "llms": {
                llm: engine | {"toggle": toggle, "options": {"replies": [f"from {llm}"]}},
                "spare": spare,
            },
            "profiles": {"team": {"roles": {"echo": {"agent": "prompt", "llm": llm, "prompt": "say.md"}}}},
            "messaging": {"enabled": False},
            "sandbox": {"tier": "unsafe"},
        }
        # As editors do: the file is never seen half written.
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(document | changes))
        draft.replace(self.path)

    def running(self) -> Any:
        return running(config=self.path, state_dir=self.state, environ={})


@pytest.fixture
def configuration(tmp_path: Path) -> Configuration:
    return Configuration(tmp_path)


async def ask(server: Server) -> TaskPacket:
    draft = TaskDraft(payload={"text": "x"}, profile="team", role="echo")
    packet, _ = await server.engine.submit(draft, via="rest")
    return await server.engine.wait(packet.task_id, DEADLINE_S)


def toggle_of(server: Server, name: str = "one") -> bool:
    (view,) = [view for view in server.balancer.views() if view.name == name]
    return view.toggle


@pytest.fixture
def slow_closing(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Engines that close when it is set, as a llama.cpp child that takes its time."""
    may_close, close = asyncio.Event(), ScriptedEngine.aclose

    async def slowly(engine: ScriptedEngine) -> None:
        await may_close.wait()
        await close(engine)

    monkeypatch.setattr(ScriptedEngine, "aclose", slowly)
    return may_close


async def test_a_task_that_comes_while_an_old_engine_closes_runs_on_the_new_one(
    configuration: Configuration, slow_closing: asyncio.Event
) -> None:
    async with configuration.running() as (server, _):
        configuration.write("two")
        try:
            async with asyncio.timeout(DEADLINE_S):
                report = await server.reload()
            packet = await ask(server)
        finally:
            slow_closing.set()
    assert "/llms/two" in report.changed
    assert packet.status == "completed"
    assert b"from two" in msgspec.json.encode(packet)


async def test_a_reload_whose_asker_left_is_whole_or_not_there(configuration: Configuration) -> None:
    async with configuration.running() as (server, _):
        for turn in range(30):
            llm = f"llm-{turn}"
            configuration.write(llm)
            reload = asyncio.create_task(server.reload())
            for _step in range(turn):
                await asyncio.sleep(0.0005)
            reload.cancel()
            await asyncio.wait((reload,))
            balanced = {view.name for view in server.balancer.views()}
            assert balanced == set(server.settings.llms)
            assert (await ask(server)).status == "completed"
        await server.reload()
        assert llm in server.settings.llms


def calls(packets: list[TaskPacket]) -> list[tuple[str, str]]:
    """Which LLM each step asked, and where that runs."""
    steps = [event for packet in packets for event in packet.history if isinstance(event, StepFinished)]
    return [(step.call.llm, step.call.source) for step in steps if step.call]


def an_llm(name: str, *, source: str = "local", delay_s: float = 0.0) -> dict[str, Any]:
    return {
        "engine": "local.scripted",
        "model": "m",
        "source": source,
        "slots": 1,
        "options": {"replies": [f"from {name}"], "delay_s": delay_s},
    }


async def test_a_task_that_waits_for_an_llm_which_a_reload_takes_away_goes_where_its_role_goes_now(
    configuration: Configuration,
) -> None:
    # As many requests as tasks: who asks again has asked once.
    gateway = {"limits": {"profiles": {"team": [{"per_s": 3600, "requests": 3}]}}}
    configuration.write(llms={"one": an_llm("one", delay_s=1.0)}, gateway=gateway)
    async with configuration.running() as (server, _):
        asked = [asyncio.create_task(ask(server)) for _ in range(3)]
        await until(lambda: server.balancer.waiting == 2)
        configuration.write("two", gateway=gateway)
        await server.reload()
        ended = await asyncio.gather(*asked)
    assert [(packet.status, packet.error) for packet in ended] == [("completed", None)] * 3
    assert sorted(calls(ended)) == [("one", "local"), ("two", "local"), ("two", "local")]


async def test_what_a_private_role_wrote_goes_to_no_api_because_of_a_reload(
    configuration: Configuration,
) -> None:
    def profiles(privacy: str, llm: str) -> dict[str, Any]:
        role = {"agent": "prompt", "prompt": "say.md", "llm": "quick"}
        roles = {"echo": role, "secret": role | {"privacy": privacy}, "last": role | {"llm": llm}}
        routes = {"echo.done": [{"to": "secret"}], "secret.done": [{"to": "last"}]}
        return {"team": {"roles": roles, "workflow": {"routes": routes}}}

    quick, slow = an_llm("quick") | {"slots": 2}, an_llm("slow", delay_s=1.0)
    configuration.write(llms={"quick": quick, "slow": slow}, profiles=profiles("local", "slow"))
    async with configuration.running() as (server, _):
        asked = [asyncio.create_task(ask(server)) for _ in range(2)]
        await until(lambda: server.balancer.waiting == 1)
        cloud = an_llm("cloud", source="api")
        configuration.write(llms={"quick": quick, "cloud": cloud}, profiles=profiles("any", "cloud"))
        await server.reload()
        ended = await asyncio.gather(*asked)
    assert [packet.status for packet in ended] == ["completed"] * 2
    assert sorted(calls(ended)) == [("quick", "local")] * 5 + [("slow", "local")]


@pytest.mark.parametrize("broken", [b"Say \xff it.", None])
async def test_a_prompt_that_cannot_be_read_refuses_the_reload_and_the_next_save_is_seen(
    configuration: Configuration, broken: bytes | None
) -> None:
    async with configuration.running() as (server, _):
        if broken is None:
            configuration.prompt.unlink()
        else:
            configuration.prompt.write_bytes(broken)
        with pytest.raises(ConfigurationError) as caught:
            await server.reload()
        assert caught.value.pointer == "/profiles/team/roles/echo/prompt"
        await try_reload(server)

        configuration.write("two")
        await asyncio.sleep(0.2)
        assert set(server.settings.llms) == {"one", "spare"}
        assert (await ask(server)).status == "completed"

        configuration.prompt.write_text("Say it again.")

        def saved() -> bool:
            return "two" in server.settings.llms

        async with asyncio.timeout(DEADLINE_S):
            while not saved():
                configuration.write("two")
                await asyncio.sleep(0.5)


async def test_a_fault_in_a_reload_ends_neither_the_watch_nor_the_server(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with configuration.running() as (server, _):
        with monkeypatch.context() as faulty:
            faulty.setattr(app, "profiles_for", lambda *_: 1 / 0)
            await try_reload(server)
            configuration.write("two")
            await asyncio.sleep(0.5)
        async with asyncio.timeout(DEADLINE_S):
            while "three" not in server.settings.llms:
                configuration.write("three")
                await asyncio.sleep(0.5)


async def test_a_toggle_changed_in_the_file_wins_over_a_switch_before_it(
    configuration: Configuration,
) -> None:
    async with configuration.running() as (server, _):
        await server.balancer.set_toggle("one", False)
        await server.reload()
        assert not toggle_of(server), "nothing changed in the file"
    async with configuration.running() as (server, _):
        assert not toggle_of(server), "kept over a restart"

        configuration.write(toggle=False)
        assert "/llms/one/toggle" in (await server.reload()).changed
        assert not toggle_of(server)
        configuration.write(toggle=True)
        await server.reload()
        assert toggle_of(server), "the switch was forgotten"
    async with configuration.running() as (server, _):
        assert toggle_of(server)
        await server.balancer.set_toggle("one", False)
    configuration.write(toggle=False)
    async with configuration.running() as (server, _):
        assert not toggle_of(server)
    configuration.write(toggle=True)
    async with configuration.running() as (server, _):
        assert toggle_of(server), "changed while nothing ran"


async def test_a_switch_that_cannot_be_kept_is_refused_over_http(configuration: Configuration) -> None:
    async with (
        configuration.running() as (server, application),
        serving(application) as address,
        httpx.AsyncClient(base_url=address, timeout=DEADLINE_S) as http,
    ):
        kept = configuration.state / "llm_toggles.json"
        kept.mkdir()  # nothing can be put in its place
        answer = await http.patch("/api/v1/llms/one", json={"toggle": False})
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/problem+json"
        assert toggle_of(server)

        kept.rmdir()
        assert (await http.patch("/api/v1/llms/one", json={"toggle": False})).status_code == 200
        assert not toggle_of(server)


async def test_a_mistake_at_the_second_llm_makes_no_engine_at_all(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = ScriptedEngine.__init__

    def counted(engine: ScriptedEngine, *args: Any) -> None:
        made.append("engine")
        make(engine, *args)

    async with configuration.running() as (server, _):
        monkeypatch.setattr(ScriptedEngine, "__init__", counted)
        good = {"engine": "local.scripted", "model": "m", "source": "local"}
        configuration.write(llms={"one": good, "wrong": good | {"options": {"reply": 1}}})
        with pytest.raises(ConfigurationError, match="reply"):
            await server.reload()
        assert not made


class Looked(MemoryStore):
    """A store that counts how often it is looked at."""

    looks = 0

    async def health(self) -> StoreHealth:
        self.looks += 1
        await asyncio.sleep(0)
        return await super().health()


async def test_many_who_ask_for_health_look_at_the_store_once_a_second(tmp_path: Path) -> None:
    now_s = 0.0
    store = Looked(tmp_path)
    await store.open()
    watch = StoreWatch(store, lambda: now_s)
    assert watch.gauge() is None
    answers = await asyncio.gather(*(watch.look() for _ in range(20)))
    assert {answer.ok for answer in answers} == {True}
    now_s = 0.9
    await watch.look()
    assert store.looks == 1
    now_s = 1.0
    await watch.look()
    assert watch.gauge() is not None
    assert store.looks == 2
    await store.aclose()


async def test_health_says_that_messaging_ended_and_what_waits_for_it(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration.write(messaging={"enabled": True})
    async with configuration.running() as (server, _):
        assert (await server.health()).components["nats"].status == "ok"

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of somebody's prompt")

    async def said() -> Component:
        async with asyncio.timeout(DEADLINE_S):
            while (await server.health()).components["nats"].status == "ok":
                await asyncio.sleep(0.01)
        await ask(server)
        nats: Component = (await server.health()).components["nats"]
        return nats

    monkeypatch.setattr(NatsChannel, "subscribe", broken)
    found: Component | BaseException | None = None
    # What ended messaging is raised once more at the end.
    with pytest.raises(ZeroDivisionError):
        async with configuration.running() as (server, _):
            (found,) = await asyncio.gather(said(), return_exceptions=True)
    assert isinstance(found, Component)
    assert found.detail.startswith("no messages are carried (ZeroDivisionError); connected")
    assert found.detail.endswith("; tasks with events to publish: 1")
    assert "restart" in found.advice


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none"])
async def test_a_state_folder_that_cannot_be_made_refuses_the_start(
    configuration: Configuration, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnusableError, match=f"the state folder .*{place} cannot be made: [A-Z]"):
        async with running(config=configuration.path, state_dir=tmp_path / place, environ={}):
            pass


async def test_a_start_that_fails_leaves_no_other_part_of_it_running(
    configuration: Configuration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file, program = tmp_path / "pid", tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $$ > {pid_file}.new\nmv {pid_file}.new {pid_file}\nexec sleep 600\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    async def fails(_: str) -> Awaitable[None]:
        await until(pid_file.exists)
        raise SandboxError("the helper broke")

    monkeypatch.setattr(app, "choose_sandbox", fails)
    with pytest.raises(SandboxError, match="the helper broke"):
        async with configuration.running():
            pass
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
