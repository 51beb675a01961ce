"""Small files written whole: what was or what is new, and nothing beside it."""

from pathlib import Path

import pytest

from ai_agent_server.durable import write_whole


def test_the_content_is_there_alone_and_for_the_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "mark.json"
    write_whole(path, b"long ago, and longer")
    write_whole(path, b"now")
    assert path.read_bytes() == b"now"
    assert [each.name for each in path.parent.iterdir()] == ["mark.json"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_write_that_fails_leaves_nothing_beside_what_was(tmp_path: Path) -> None:
    path = tmp_path / "mark.json"
    path.mkdir()  # nothing can be renamed onto a folder
    with pytest.raises(OSError, match="directory"):
        write_whole(path, b"now")
    assert [each.name for each in tmp_path.iterdir()] == ["mark.json"]
