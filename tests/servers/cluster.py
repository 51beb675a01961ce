"""Servers that share their tasks over one NATS, each a process of its own, and an LLM that counts."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.servers.listener import listening
from tests.servers.nats import NatsServer
from tests.servers.process import ServerProcess, write_config

STEPS = ("first", "second", "third")
"""The roles of the profile `chain`: each asks the LLM once, and no sandbox is needed."""
CHAIN = {
    "roles": {role: {"agent": "prompt", "prompt": "chain.md"} for role in STEPS},
    "workflow": {
        "routes": {
            "first.done": [{"to": "second"}],
            "second.done": [{"to": "third"}],
            "third.done": [{"to": "end"}],
        }
    },
}
LEASE_S = 2.0
FINAL = frozenset({"completed", "failed", "canceled", "rejected"})


class CountingLLM:
    """An OpenAI-compatible server on a socket: counts the requests of each task, answers after `delay_s`.

    The task is recognised by the word `#n#` that a test puts into its payload. While `gate` is closed
    nobody is answered. `fault` says what goes wrong with a task's n-th request, "" for nothing:
    `reset`, `error`, `malformed`, `cut`, or `silent` (nothing comes any more).
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.fault: Callable[[str, int], str] = lambda _task, _nth: ""
        self.asked: dict[str, int] = {}
        self.answered: dict[str, int] = {}
        """How many answers went out whole."""
        self.left = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: requests come one after the other."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length")
                )
                body = json.loads(await reader.readexactly(length))
                said = " ".join(str(message["content"]) for message in body["messages"])
                if not await self._answer(said.partition("#")[2].partition("#")[0], reader, writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, task: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on after one request."""
        self.asked[task] = self.asked.get(task, 0) + 1
        fault = self.fault(task, self.asked[task])
        gone = asyncio.create_task(reader.read(1))
        ready = asyncio.create_task(self._ready(for_ever=fault == "silent"))
        try:
            await asyncio.wait((gone, ready), return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                self.left += 1
                return False
        finally:
            for waiting in (gone, ready):
                waiting.cancel()
            await asyncio.gather(gone, ready, return_exceptions=True)
        whole = _streamed("done")
        match fault:
            case "reset":
                writer.transport.abort()
                return False
            case "error":
                writer.write(b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n")
            case "malformed":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {not json\n\n")
            case "cut":
                writer.write(whole[: len(whole) // 2])
            case _:
                self.answered[task] = self.answered.get(task, 0) + 1
                writer.write(whole)
        await writer.drain()
        return fault in {"", "error"}

    async def _ready(self, *, for_ever: bool) -> None:
        await asyncio.sleep(self.delay_s)
        await self.gate.wait()
        if for_ever:
            await asyncio.Event().wait()


def _streamed(text: str) -> bytes:
    base = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "double"}
    chunks = (
        {**base, "choices": [{"index": 0, "delta": {"role": "assistant", "content": text}}]},
        {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {**base, "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}},
    )
    body = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    body += b"data: [DONE]\n\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(body)
    return head + body


@asynccontextmanager
async def counting_llm(delay_s: float = 0.0) -> AsyncIterator[CountingLLM]:
    """One that runs on loopback."""
    llm = CountingLLM(delay_s)
    async with listening(llm.answer) as address:
        llm.url = f"{address}/v1"
        yield llm


class Cluster:
    """A nats-server (or several), an LLM, and servers `a`, `b`, ... that share their tasks."""

    def __init__(
        self, folder: Path, nats_url: str, credentials: str, llm: CountingLLM, **changes: Any
    ) -> None:
        self.folder = folder
        self.llm = llm
        self.servers: dict[str, ServerProcess] = {}
        self._credentials = credentials
        (folder / "chain.md").write_text("Do it, and say that it is done: $payload")
        self.config = write_config(
            folder,
            llms={
                "double": {
                    "engine": "api.openai",
                    "model": "double",
                    "source": "api",
                    "capabilities": ["chat", "json_schema", "tools"],
                    "slots": 64,
                    "options": {"base_url": llm.url},
                }
            },
            messaging={"url": nats_url, "credentials": {"env": "NATS_LOGIN"}},
            profiles={"chain": CHAIN},
            **{"cluster": {"enabled": True, "lease_s": LEASE_S}} | changes,
        )

    async def start(self, name: str) -> ServerProcess:
        """Start the server `name`, with the state folder that it had before if it had one."""
        server = ServerProcess(self.folder / name, self.config, NATS_LOGIN=self._credentials)
        self.servers[name] = await server.start()
        return server

    async def submit(self, name: str, task: str) -> str:
        """Give the task `task` to the server `name`; answers its id."""
        async with self.servers[name].http() as http:
            answer = await http.post(
                "/api/v1/chain/first",
                json={"payload": {"task": f"Do it. #{task}#"}},
                headers={"Idempotency-Key": task},
            )
        assert answer.status_code in {200, 202}, answer.text
        task_id: str = answer.json()["task_id"]
        return task_id

    async def ended(self, name: str, task_id: str, within_s: float = 60.0) -> dict[str, Any]:
        """The packet, as the server `name` has it once it has ended."""
        async with asyncio.timeout(within_s), self.servers[name].http() as http:
            while True:
                with_state: dict[str, Any] = (await http.get(f"/api/v1/tasks/{task_id}")).json()
                if with_state.get("status") in FINAL:
                    return with_state
                await asyncio.sleep(0.1)

    async def read(self, name: str, task_id: str) -> dict[str, Any]:
        """The packet, as the server `name` has it."""
        async with self.servers[name].http() as http:
            packet: dict[str, Any] = (await http.get(f"/api/v1/tasks/{task_id}")).json()
            return packet

    async def until(self, name: str, task_id: str, **fields: Any) -> dict[str, Any]:
        """The packet once its `fields` are as given."""
        async with asyncio.timeout(60):
            while True:
                packet = await self.read(name, task_id)
                if all(packet.get(field) == value for field, value in fields.items()):
                    return packet
                await asyncio.sleep(0.05)

    def client(self, name: str) -> httpx.AsyncClient:
        """A client of the server `name`."""
        return self.servers[name].http()


@asynccontextmanager
async def a_cluster(
    folder: Path, *names: str, delay_s: float = 0.0, nats: NatsServer | None = None, **changes: Any
) -> AsyncIterator[Cluster]:
    """The servers `names` over one nats-server; all that still run are killed at the end."""
    own = nats or NatsServer(folder / "nats")
    if nats is None:
        own.start()
    async with AsyncExitStack() as stack:
        stack.callback(own.kill)
        llm = await stack.enter_async_context(counting_llm(delay_s))
        cluster = Cluster(folder, own.url, own.credentials, llm, **changes)
        try:
            for name in names:
                await cluster.start(name)
            yield cluster
        finally:
            for server in cluster.servers.values():
                await server.kill()


def in_order(packet: dict[str, Any]) -> None:
    """Fails where the history has a hole, or a step with two results."""
    history = packet["history"]
    assert [event["seq"] for event in history] == list(range(1, packet["revision"] + 1))
    finished = [event["step"] for event in history if event["type"] == "step.finished"]
    assert len(finished) == len(set(finished)), "a step has two results"
    ends = [event["type"] for event in history if event["type"] in {"task.completed", "task.failed"}]
    assert len(ends) <= 1
