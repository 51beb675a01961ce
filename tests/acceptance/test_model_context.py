"""The Model Context Protocol as agents speak it: both eras over HTTP, and standard input and output."""

import asyncio
import os
import re
import shutil
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import httpx2
import pytest
from jsonschema import Draft202012Validator
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp_types import TextResourceContents

from tests.servers.ports import held_port
from tests.servers.process import ServerProcess, outputs, scripted, write_config

Era = Literal["auto", "legacy"]
ERAS = pytest.mark.parametrize("era", ["auto", "legacy"])
TEXT_TOOLS = ("classify", "extract", "rewrite", "summarize")
OWN_TOOLS = ("chat", "list_roles", "submit_task", "get_task", "cancel_task")
CLASSIFY = {"text": "I was charged twice.", "labels": ["billing", "bug"]}
PLAN = {"profile": "developer", "role": "planner", "payload": {"task": "Add two numbers."}, "scope": "role"}
LIMIT_S = 60
REPLIES = (
    {"when": "Labels:", "say": ['{"label": "billing"}']},
    {"when": "Fields:", "say": ['{"age": 36}']},
    {"when": "Summarize", "say": ["It rained."]},
    {"when": "Rewrite", "say": ["Yes, sir."]},
    "Hello.",
)


@asynccontextmanager
async def serving(
    folder: Path, *replies: Any, slow: bool = False, shutdown_s: float = 10.0, **environ: Any
) -> AsyncIterator[ServerProcess]:
    llms = scripted(*replies)
    if slow:
        llms["scripted"]["options"]["tokens_per_s"] = 5
    config = write_config(folder, llms=llms, server={"shutdown_s": shutdown_s})
    async with ServerProcess(folder / "state", config, **environ) as server:
        yield server


def client(server: ServerProcess, era: Era = "auto") -> Client:
    return Client(f"{server.url}/mcp", mode=era)


@ERAS
async def test_every_tool_tells_what_it_takes_answers_and_does(tmp_path: Path, era: Era) -> None:
    async with serving(tmp_path) as server, client(server, era) as agent:
        assert agent.protocol_version == ("2026-07-28" if era == "auto" else "2025-11-25")
        assert agent.instructions is not None
        assert "classify" in agent.instructions
        tools = (await agent.list_tools()).tools
        assert [tool.name for tool in tools] == [*TEXT_TOOLS, *OWN_TOOLS]
        for tool in tools:
            Draft202012Validator.check_schema(tool.input_schema)
            assert tool.output_schema is not None
            Draft202012Validator.check_schema(tool.output_schema)
            assert tool.output_schema["type"] == "object"
            assert tool.description
            assert len(tool.description) < 250
            assert tool.annotations is not None
            writes = tool.name in {"submit_task", "cancel_task"}
            assert tool.annotations.read_only_hint is not writes
            assert tool.annotations.destructive_hint == ((tool.name == "cancel_task") if writes else None)


@ERAS
async def test_each_tool_answers_in_its_form(tmp_path: Path, era: Era) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    async with serving(tmp_path, *REPLIES) as server, client(server, era) as agent:
        for name, arguments, found in (
            ("classify", CLASSIFY, {"label": "billing"}),
            ("extract", {"text": "Ada is 36.", "schema": schema}, {"age": 36}),
            ("summarize", {"text": "All day."}, {"summary": "It rained.", "pieces": 1, "complete": True}),
            ("rewrite", {"text": "Yep.", "instructions": "Formal."}, {"text": "Yes, sir."}),
        ):
            answer = await agent.call_tool(name, arguments)
            assert not answer.is_error
            assert answer.structured_content == found
            assert answer.meta is not None
            assert answer.meta["ai-agent-server/llm"] == "scripted"
        said = await agent.call_tool("chat", {"prompt": "Hello?", "system": "Be brief."})
        assert said.structured_content["text"] == "Hello."
        assert said.structured_content["llm"] == "scripted"


@ERAS
async def test_a_task_is_given_looked_at_and_ended(tmp_path: Path, era: Era) -> None:
    async with serving(tmp_path, '{"plan": ["Add them."]}') as server, client(server, era) as agent:
        roles = (await agent.call_tool("list_roles", {})).structured_content["roles"]
        assert {"profile": "developer", "role": "planner"}.items() <= roles[2].items()
        assert all("payload_schema" not in role for role in roles)
        (planner,) = (
            await agent.call_tool("list_roles", {"profile": "developer", "role": "planner"})
        ).structured_content["roles"]
        assert planner["payload_schema"]["required"] == ["task"]

        done = (await agent.call_tool("submit_task", PLAN)).structured_content
        assert (done["status"], done["is_final"]) == ("completed", True)
        assert done["result"]["output"] == {"plan": ["Add them."]}
        seen = await agent.call_tool("get_task", {"task_id": done["task_id"]})
        assert seen.structured_content == done
        # An ended task has ended: to end it again is no mistake.
        ended = await agent.call_tool("cancel_task", {"task_id": done["task_id"]})
        assert ended.structured_content == done
        same = PLAN | {"idempotency_key": "k-1"}
        first, second = [(await agent.call_tool("submit_task", same)).structured_content for _ in range(2)]
        assert first["task_id"] == second["task_id"]


@ERAS
async def test_tasks_are_resources_and_a_prompt_tells_how_to_give_one(tmp_path: Path, era: Era) -> None:
    async with serving(tmp_path, '{"plan": ["Add them."]}') as server:
        for connection in (f"{server.url}/mcp", bridge(server.url)):
            async with Client(connection, mode=era) as agent:
                task = (await agent.call_tool("submit_task", PLAN)).structured_content
                listed = (await agent.list_resources()).resources[0]
                assert listed.uri == f"task://{task['task_id']}"
                assert listed.title == "developer/planner, completed"
                (template,) = (await agent.list_resource_templates()).resource_templates
                assert template.uri_template == "task://{task_id}"
                (packet,) = (await agent.read_resource(listed.uri)).contents
                assert isinstance(packet, TextResourceContents)
                assert '"type":"task.completed"' in packet.text
                for uri in ("task://nobody", "file:///etc/passwd"):
                    with pytest.raises(MCPError, match="no such resource"):
                        await agent.read_resource(uri)
                (prompt,) = (await agent.list_prompts()).prompts
                told = await agent.get_prompt(prompt.name, {"task": "Add two numbers."})
                assert "Add two numbers." in str(told.messages[0].content)
                with pytest.raises(MCPError, match="with a `task`"):
                    await agent.get_prompt(prompt.name, {})


@ERAS
async def test_what_goes_wrong_is_told_to_the_model(tmp_path: Path, era: Era) -> None:
    async with serving(tmp_path, "no JSON") as server, client(server, era) as agent:
        for name, arguments, says in (
            ("classify", {"text": "x"}, "'labels' is missing at /labels"),
            ("classify", CLASSIFY, "no usable answer in 3 tries"),
            ("extract", {"text": "x"}, "choices: fields, schema"),
            ("chat", {"prompt": "x", "model": "gpt-0"}, "unknown LLM 'gpt-0'"),
            ("chat", {"prompt": "x", "temperature": "hot"}, "/temperature"),
            ("submit_task", PLAN | {"role": "plannr"}, "unknown role 'plannr'"),
            ("submit_task", PLAN | {"payload": {}}, "/payload/task"),
            ("get_task", {"task_id": "../../etc/passwd"}, "no such task"),
            ("list_roles", {"profile": "nobody"}, "unknown profile"),
        ):
            answer = await agent.call_tool(name, arguments)
            assert answer.is_error, name
            assert answer.structured_content is None
            (content,) = answer.content
            assert content.type == "text"
            assert says in content.text
        with pytest.raises(MCPError, match="unknown tool"):
            await agent.call_tool("translate", {})


@ERAS
async def test_whoever_waits_hears_how_far_it_is(tmp_path: Path, era: Era) -> None:
    heard: list[tuple[float, str]] = []

    async def told(progress: float, total: float | None, message: str | None) -> None:
        heard.append((progress, message or ""))

    async with serving(tmp_path, "word " * 500, slow=True) as server, client(server, era) as agent:
        call = asyncio.create_task(agent.call_tool("chat", {"prompt": "x"}, progress_callback=told))
        ends = time.monotonic() + LIMIT_S
        while len(heard) < 2:
            assert time.monotonic() < ends
            await asyncio.sleep(0.1)
        call.cancel()
        await asyncio.wait((call,))
    first, second = (progress for progress, _ in heard[:2])
    assert 0 < first < second
    assert "tokens written" in heard[1][1]


@ERAS
async def test_a_cancelled_call_ends_the_work(tmp_path: Path, era: Era) -> None:
    async with serving(tmp_path, "word " * 500, slow=True) as server, server.http() as http:
        for name, arguments in (
            ("rewrite", {"text": "x", "instructions": "Longer."}),
            ("chat", {"prompt": "x"}),
        ):
            async with client(server, era) as agent:
                await cancelled_call(agent, http, name, arguments)
                # The connection is of use all the same.
                assert (await agent.list_tools()).tools
        async with client(server, era) as agent:
            await cancelled_call(agent, http, "submit_task", PLAN)
        ends = time.monotonic() + LIMIT_S
        while (await tasks(http))[0]["status"] != "canceled":
            assert time.monotonic() < ends, await tasks(http)
            await asyncio.sleep(0.05)


async def test_a_look_that_is_given_up_leaves_the_task_alone(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, "word " * 500, slow=True) as server,
        server.http() as http,
        client(server) as agent,
    ):
        task = (await agent.call_tool("submit_task", PLAN | {"wait_s": 0})).structured_content
        assert not task["is_final"]
        await until_busy(http, busy=True)
        looking = asyncio.create_task(agent.call_tool("get_task", {"task_id": task["task_id"], "wait_s": 60}))
        await asyncio.sleep(0.5)
        looking.cancel()
        await asyncio.wait((looking,))
        assert (await tasks(http))[0]["status"] == "working"


async def test_a_task_outlives_the_server_that_stops_while_somebody_waits_for_it(tmp_path: Path) -> None:
    async with serving(tmp_path, "word " * 500, slow=True) as server:
        try:
            async with client(server) as agent, server.http() as http:
                waiting = asyncio.create_task(agent.call_tool("submit_task", PLAN))
                await until_busy(http, busy=True)
                (task,) = await tasks(http)
                assert await server.stop() == 0
                waiting.cancel()
                await asyncio.wait((waiting,))
        except* httpx2.HTTPError:
            pass  # the client finds nobody to tell that it leaves
        (file,) = (tmp_path / "state").rglob(f"{task['task_id']}.json")
        assert '"task.canceled"' not in file.read_text()


async def test_an_open_session_does_not_hold_the_stop_up(tmp_path: Path) -> None:
    async with serving(tmp_path, "x", shutdown_s=600.0) as server:
        try:
            async with client(server, "legacy") as agent:
                await agent.list_tools()
                # The session's own stream is open now, and nothing ever comes on it.
                assert await server.stop() == 0
        except* (MCPError, httpx2.HTTPError):
            pass  # the client finds nobody to tell that it leaves


async def test_many_first_requests_at_once_are_all_answered(tmp_path: Path) -> None:
    about = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    begin = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": about}
    accept = {"Accept": "application/json, text/event-stream"}
    async with serving(tmp_path, "x") as server, server.http() as http:
        gone = asyncio.create_task(http.post("/mcp", json=begin, headers=accept))
        await asyncio.sleep(0.05)
        gone.cancel()
        answers = await asyncio.gather(*(http.post("/mcp", json=begin, headers=accept) for _ in range(8)))
        assert {(answer.status_code, "serverInfo" in answer.text) for answer in answers} == {(200, True)}


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.4])
async def test_a_stop_while_the_first_request_waits_is_bounded(tmp_path: Path, after_s: float) -> None:
    ask = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    async with serving(tmp_path, "x") as server, server.http() as http:
        asked = asyncio.create_task(http.post("/mcp", json=ask))
        await asyncio.sleep(after_s)
        async with asyncio.timeout(20):
            assert await server.stop() == 0
        await asyncio.wait((asked,))


async def test_who_may_not_come_in_does_not(tmp_path: Path) -> None:
    ask = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    accept = {"Accept": "application/json, text/event-stream"}
    async with serving(tmp_path, "x") as server, server.http() as http:
        for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
            answer = await http.post("/mcp", json=ask, headers=accept | headers)
            assert answer.status_code == 403
        for path in ("/mcpx", "/mcp/nowhere"):
            assert (await http.post(path, json=ask, headers=accept)).status_code in {404, 405}
        for path in (
            "/.well-known/oauth-protected-resource",
            "/.well-known/oauth-protected-resource/mcp",
            "/.well-known/oauth-authorization-server",
            "/mcp/.well-known/openid-configuration",
        ):
            assert (await http.get(path)).status_code == 404
        too_large = await http.post(
            "/mcp", content=b" " * (9 * 2**20), headers=accept | {"Content-Type": "application/json"}
        )
        assert too_large.status_code == 413
        broken = await http.post("/mcp", content=b"{", headers=accept | {"Content-Type": "application/json"})
        assert broken.status_code == 400


async def test_a_key_is_asked_for_as_everywhere(tmp_path: Path) -> None:
    async with serving(tmp_path, *REPLIES, AI_AGENT_SERVER_API_KEY="sesame") as server:
        async with server.http() as http:
            answer = await http.post("/mcp", json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"})
            assert answer.status_code == 401
            assert (await http.get("/mcp/tools")).status_code == 401
            assert (await http.get("/.well-known/oauth-protected-resource/mcp")).status_code == 404
        keyed = httpx2.AsyncClient(headers={"Authorization": "Bearer sesame"}, timeout=LIMIT_S)
        async with keyed, Client(streamable_http_client(f"{server.url}/mcp", http_client=keyed)) as agent:
            called = await agent.call_tool("classify", CLASSIFY)
            assert called.structured_content == {"label": "billing"}


PAGE = Path(__file__).parents[2] / "doc" / "how_to" / "model_context_protocol.md"


async def test_what_the_page_shows_works(tmp_path: Path) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"^```sh\n(curl.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    async with serving(tmp_path, *REPLIES) as server:
        for words in ([sys.executable, "-c", program], ["sh", "-c", command]):
            if words[0] == "sh" and shutil.which("curl") is None:
                continue
            words[-1] = words[-1].replace("http://127.0.0.1:3160", server.url)
            child = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
            out, _ = await outputs(child, LIMIT_S)
            assert child.returncode == 0
            assert b"billing" in out


# --- standard input and output ---


def bridge(url: str, **environ: str) -> StdioServerParameters:
    return StdioServerParameters(
        command=sys.executable,
        args=["-m", "ai_agent_server", "mcp"],
        env={**os.environ, "AI_AGENT_SERVER_URL": url, **environ},
    )


@ERAS
async def test_over_standard_input_the_tools_are_the_same(tmp_path: Path, era: Era) -> None:
    async with serving(tmp_path, *REPLIES, AI_AGENT_SERVER_API_KEY="sesame") as server:
        parameters = bridge(server.url, AI_AGENT_SERVER_API_KEY="sesame")
        async with Client(parameters, mode=era) as agent:
            assert [tool.name for tool in (await agent.list_tools()).tools] == [*TEXT_TOOLS, *OWN_TOOLS]
            answer = await agent.call_tool("classify", CLASSIFY)
            assert answer.structured_content == {"label": "billing"}
            with pytest.raises(MCPError, match="unknown tool"):
                await agent.call_tool("translate", {})
        async with Client(bridge(server.url), mode=era) as stranger:
            answer = await stranger.call_tool("classify", CLASSIFY)
            assert answer.is_error
            assert "AI_AGENT_SERVER_API_KEY" in str(answer.content)


async def test_over_standard_input_progress_and_cancelling_go_through(tmp_path: Path) -> None:
    heard: list[str] = []

    async def told(progress: float, total: float | None, message: str | None) -> None:
        heard.append(message or "")

    async with (
        serving(tmp_path, "word " * 500, slow=True) as server,
        server.http() as http,
        Client(bridge(server.url)) as agent,
    ):
        call = asyncio.create_task(agent.call_tool("chat", {"prompt": "x"}, progress_callback=told))
        ends = time.monotonic() + LIMIT_S
        while not heard:
            assert time.monotonic() < ends
            await asyncio.sleep(0.1)
        call.cancel()
        await asyncio.wait((call,))
        await until_busy(http, busy=False)


async def test_where_no_server_answers_a_call_says_how_to_start_one(tmp_path: Path) -> None:
    with held_port() as port:
        await starts_one(port, tmp_path)


async def starts_one(port: int, folder: Path) -> None:
    async with Client(bridge(f"http://127.0.0.1:{port}")) as agent:
        assert [tool.name for tool in (await agent.list_tools()).tools] == [*TEXT_TOOLS, *OWN_TOOLS]
        answer = await agent.call_tool("classify", CLASSIFY)
        assert answer.is_error
        assert "ai-agent-server serve" in str(answer.content)
        # It may be started later.
        server = ServerProcess(folder / "state", write_config(folder, llms=scripted(*REPLIES)))
        try:
            await server.start(port)
            answer = await agent.call_tool("classify", CLASSIFY)
            assert answer.structured_content == {"label": "billing"}
        finally:
            await server.stop()


async def cancelled_call(
    agent: Client, http: httpx.AsyncClient, name: str, arguments: dict[str, Any]
) -> None:
    call = asyncio.create_task(agent.call_tool(name, arguments))
    await until_busy(http, busy=True)
    call.cancel()
    await asyncio.wait((call,))
    await until_busy(http, busy=False)


async def until_busy(http: httpx.AsyncClient, *, busy: bool) -> None:
    ends = time.monotonic() + LIMIT_S
    while time.monotonic() < ends:
        (llm,) = (await http.get("/api/v1/llms")).json()["items"]
        if (llm["in_flight"] > 0) == busy:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"in_flight is {llm['in_flight']}")


async def tasks(http: httpx.AsyncClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await http.get("/api/v1/tasks")).json()["items"]
    return found
