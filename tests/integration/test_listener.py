"""The listener of the serving process, on a real socket."""

import asyncio
import select
import socket

import pytest

from ai_agent_server import process


async def test_a_client_that_takes_nothing_is_dropped_though_nobody_writes_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "UNREAD_S", 2.0)
    with process._listen("127.0.0.1", 0) as listener, socket.socket() as client:
        listener.listen()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        served, _ = listener.accept()
        with served:
            served.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    served.send(bytes(65_536))
            gone = select.poll()
            gone.register(served, 0)  # errors alone
            assert await asyncio.to_thread(gone.poll, 60_000), "it is kept"
