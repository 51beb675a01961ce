"""The log: JSON lines or a terminal's, and never a variable of a frame that failed."""

import io
import json
from collections.abc import Iterator

import pytest
import structlog

from ai_agent_server import log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def fail(prompt: str, *, api_key: str) -> None:
    raise ValueError(f"{len(prompt) + len(api_key)} characters")


def logged(stream: io.StringIO) -> str:
    log.configure("info", stream=stream)
    events = structlog.get_logger("test")
    try:
        fail("SECRET-" + "PROMPT", api_key="SECRET-" + "KEY")
    except ValueError:
        events.exception("step.broke", role="coder")
    events.debug("step.seen")
    return stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_traceback_tells_where_it_failed_and_no_variable(stream: type[io.StringIO]) -> None:
    text = logged(stream())

    assert "step.broke" in text
    assert "ValueError: 23 characters" in text
    assert "in fail" in text
    assert "SECRET-PROMPT" not in text
    assert "SECRET-KEY" not in text
    assert "step.seen" not in text


def test_elsewhere_than_on_a_terminal_an_event_is_a_line_of_json() -> None:
    (line,) = logged(io.StringIO()).splitlines()
    event = json.loads(line)

    assert (event["event"], event["role"], event["level"]) == ("step.broke", "coder", "error")
