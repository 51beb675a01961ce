"""Clients that are gone: before the first line of their stream, or in the middle of work for them."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import uvicorn

from ai_agent_server.core.event_stream import ClientLeftError, EventStream, WhileConnected


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


async def test_a_client_that_left_before_it_was_watched_ends_the_work_all_the_same() -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientLeftError):
        async with asyncio.timeout(60), WhileConnected(receive):
            await asyncio.Event().wait()


async def test_work_that_ends_at_once_never_asks_after_its_client() -> None:
    async def receive() -> Any:
        raise AssertionError

    async with WhileConnected(receive):
        await asyncio.sleep(0)


async def test_a_client_that_does_not_read_the_end_is_cut_too() -> None:
    closed = asyncio.Event()

    async def frames() -> AsyncGenerator[bytes]:
        yield b"x" * 32 * 1024 * 1024  # more than the sockets between take

    async def aclose() -> None:
        closed.set()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await EventStream(frames(), about={}, write_timeout_s=0.1, aclose=aclose)(scope, receive, send)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: it\r\n\r\n")
            async with asyncio.timeout(30):
                await closed.wait()
        server.should_exit = True
        await serving
