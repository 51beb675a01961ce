"""The pure parts of the command line: what stands in its arguments, and what may reach the terminal."""

from pathlib import Path

import pytest

from ai_agent_server.cli.serve import check_binding, default_state_dir
from ai_agent_server.cli.tasks import TaskOptions, addressed, payload
from ai_agent_server.cli.view import printable
from ai_agent_server.errors import ConfigurationError, InvalidPacketError


def test_what_stands_after_run_is_read_as_address_and_task() -> None:
    assert addressed(("Add two numbers",)) == ("developer", "planner", "Add two numbers")
    assert addressed(("productivity/summarize", "x")) == ("productivity", "summarize", "x")
    assert addressed(("developer/qa",)) == ("developer", "qa", None)
    with pytest.raises(InvalidPacketError, match="quotes"):
        addressed(("Add", "two", "numbers"))


def test_a_payload_is_put_together_in_the_order_of_the_options(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("long", encoding="utf-8")
    made = payload(
        '{"task": "a", "language": "python"}',
        document='{"task": "b", "code": "c"}',
        fields=("n=1", "words=yes no", f"context=@{tmp_path}/text"),
        examples=("assert f()",),
    )
    assert made == {
        "task": "a", "language": "python", "code": "c", "n": 1, "words": "yes no", "context": "long",
        "examples": ["assert f()"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "document", "fields", "said"),
    [
        (None, None, (), "say what is wanted"),
        ("{1", None, (), "no JSON"),
        ("[" * 100_000, "[" * 100_000, (), "no JSON"),
        ("x", "[1]", (), "no JSON object"),
        ("x", None, ("=1",), "not NAME=VALUE"),
        ("x", None, ("a=@/no/such/file",), "cannot be read"),
    ],
)
def test_a_payload_that_cannot_be_made_says_why(
    text: str | None, document: str | None, fields: tuple[str, ...], said: str
) -> None:
    with pytest.raises(InvalidPacketError, match=said):
        payload(text, document=document, fields=fields)


def test_bytes_that_are_no_text_are_refused_before_anything_is_sent() -> None:
    with pytest.raises(InvalidPacketError, match="not UTF-8"):
        TaskOptions().draft("caf\udce9")


def test_nothing_beyond_this_machine_without_a_key() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_binding(host, has_key=False)
    check_binding("0.0.0.0", has_key=True)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ConfigurationError, match="a key is needed"):
            check_binding(host, has_key=False)


def test_the_state_folder_follows_the_base_directory_specification() -> None:
    assert default_state_dir({"XDG_STATE_HOME": "/x"}) == Path("/x/ai-agent-server")
    relative = default_state_dir({"XDG_STATE_HOME": "relative"})
    assert relative == Path.home() / ".local/state/ai-agent-server"


def test_a_models_text_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\u202ec\nd\te\r\nf") == "a\ufffd[2Jb\ufffd\ufffdc\nd\te\nf"
