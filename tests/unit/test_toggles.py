"""What was switched at run time: kept in a file, until the configuration says otherwise."""

import asyncio
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ai_agent_server.config.toggles import Toggles
from ai_agent_server.errors import StoreFullError, StoreUnusableError

ON = {"a": True, "b": True}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "llm_toggles.json"


@contextmanager
def no_space() -> Iterator[None]:
    """No file of this process may grow: to a writer it is as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


async def test_a_switch_survives_a_restart(path: Path) -> None:
    await Toggles(path).keep("a", False, True)

    assert Toggles(path).over(ON) == {"a": False}
    assert Toggles(path).over({"b": True}) == {}


async def test_a_switch_holds_only_over_what_it_was_set_over(path: Path) -> None:
    toggles = Toggles(path)
    await toggles.keep("a", False, True)

    assert toggles.over({"a": False}) == {}
    assert toggles.over(ON) == {"a": False}


async def test_what_the_configuration_overruled_is_forgotten_for_good(path: Path) -> None:
    toggles = Toggles(path)
    await toggles.keep("a", False, True)
    await toggles.keep("b", False, True)
    await toggles.forget({"a": False})

    assert toggles.over(ON) == {"b": False}, "what is not configured now is kept"
    assert Toggles(path).over(ON) == {"b": False}


async def test_switches_at_the_same_time_are_all_kept(path: Path) -> None:
    toggles = Toggles(path)
    names = [f"llm-{n}" for n in range(16)]
    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(toggles.keep(name, False, True))

    configured = dict.fromkeys(names, True)
    assert toggles.over(configured) == Toggles(path).over(configured) == dict.fromkeys(names, False)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


async def test_who_is_cancelled_leaves_the_file_and_what_is_known_the_same(path: Path) -> None:
    toggles = Toggles(path)
    for n in range(20):
        keeping = asyncio.create_task(toggles.keep(f"llm-{n}", False, True))
        await asyncio.sleep(0)
        keeping.cancel()
        await asyncio.wait((keeping,))
    await toggles.keep("a", False, True)
    configured = {f"llm-{n}": True for n in range(20)} | ON
    async with asyncio.timeout(60):
        while toggles.over(configured) != Toggles(path).over(configured):
            await asyncio.sleep(0.01)

    assert toggles.over(ON) == {"a": False}


async def test_a_full_disk_refuses_the_switch_and_keeps_those_before(path: Path) -> None:
    toggles = Toggles(path)
    await toggles.keep("a", False, True)
    with no_space(), pytest.raises(StoreFullError):
        await toggles.keep("b", False, True)

    assert toggles.over(ON) == Toggles(path).over(ON) == {"a": False}
    await toggles.keep("b", False, True)
    assert Toggles(path).over(ON) == {"a": False, "b": False}


async def test_a_folder_that_fails_is_no_reason_to_refuse_a_configuration(path: Path) -> None:
    toggles = Toggles(path)
    await toggles.keep("a", False, True)
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("a file where the folder should be")
    await toggles.forget({"a": False})

    assert toggles.over({"a": False}) == {}


async def test_a_folder_that_cannot_be_used_refuses_the_switch(path: Path) -> None:
    toggles = Toggles(path)
    path.parent.write_text("a file where the folder should be")
    with pytest.raises(StoreUnusableError, match="state"):
        await toggles.keep("a", False, True)

    assert toggles.over(ON) == {}


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": false}', b"[]", b'{"a": "\xff"}', b"\xff"])
async def test_a_file_that_cannot_be_read_counts_as_none(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    toggles = Toggles(path)

    assert toggles.over(ON) == {}
    await toggles.keep("a", False, True)
    assert Toggles(path).over(ON) == {"a": False}


async def test_the_file_is_its_owners_alone(path: Path) -> None:
    await Toggles(path).keep("a", False, True)

    assert path.stat().st_mode & 0o077 == 0
