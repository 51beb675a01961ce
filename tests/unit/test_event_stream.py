"""Streams of events whose client is gone before the first line."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from ai_agent_server.core.event_stream import EventStream


async def test_a_stream_that_cannot_even_begin_closes_what_it_would_have_told() -> None:
    closed = []

    async def frames() -> AsyncGenerator[bytes]:
        yield b"never"

    async def aclose() -> None:
        closed.append(True)

    async def send(_: Any) -> None:
        raise ConnectionResetError

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    stream = EventStream(frames(), about={}, write_timeout_s=1, aclose=aclose)
    scope: Any = {"type": "http"}
    with pytest.raises(ConnectionResetError):
        await stream(scope, receive, send)
    assert closed == [True]
