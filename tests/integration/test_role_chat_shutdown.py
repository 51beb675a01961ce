"""A server that stops while a role answers as a chat partner."""

import asyncio
from pathlib import Path

import httpx

from tests.servers.process import SCRIPT, ServerProcess, write_config


async def test_a_role_that_is_under_way_does_not_hold_the_server_up(tmp_path: Path) -> None:
    slow = {**SCRIPT, "options": {"replies": ["one two three"], "delay_s": 60}}
    config = write_config(
        tmp_path, llms={"scripted": slow}, server={"shutdown_s": 1}, messaging={"enabled": False}
    )
    body = {"model": "developer/planner", "stream": True, "messages": [{"role": "user", "content": "Add."}]}
    async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            pieces = answer.aiter_bytes()
            said = await anext(pieces)
            stopping = asyncio.create_task(server.stop())
            try:
                async for piece in pieces:
                    said += piece
            except httpx.HTTPError:
                pass
        code = await stopping
    assert code == 0
    assert b"[DONE]" not in said
