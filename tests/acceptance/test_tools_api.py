"""The text tools as a program calls them: a real server, plain HTTP, answers that hold or say why not."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.servers.process import ServerProcess, outputs, scripted, write_config

LABELS = ["billing", "bug"]
CLASSIFY = {"text": "I was charged twice.", "labels": LABELS}
LIMIT_S = 60


@asynccontextmanager
async def serving(folder: Path, *replies: Any, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    config = write_config(folder, llms=scripted(*replies), **changes)
    async with ServerProcess(folder / "state", config) as server, server.http() as http:
        yield http


def problem(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_the_listing_has_each_tool_with_its_schemas(tmp_path: Path) -> None:
    async with serving(tmp_path) as http:
        tools = (await http.get("/mcp/tools")).json()["tools"]
        assert [tool["name"] for tool in tools] == ["classify", "extract", "rewrite", "summarize"]
        for tool in tools:
            Draft202012Validator.check_schema(tool["parameters"])
            Draft202012Validator.check_schema(tool["result"])
            assert tool["endpoint"] == f"/mcp/tools/{tool['name']}"
            assert tool["parameters"]["properties"]["tier"]["default"] == "small"


async def test_each_tool_answers_in_its_form(tmp_path: Path) -> None:
    replies = (
        {"when": "Labels:", "say": ['{"label": "billing"}']},
        {"when": "Fields:", "say": ['{"age": 36}']},
        {"when": "Summarize", "say": ["It rained."]},
        {"when": "Rewrite", "say": ["Yes, sir."]},
    )
    fields = {"age": {"type": "integer"}}
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    async with serving(tmp_path, *replies) as http:
        for name, arguments, output in (
            ("classify", CLASSIFY, {"label": "billing"}),
            ("extract", {"text": "Ada is 36.", "fields": fields}, {"age": 36}),
            ("extract", {"text": "Ada is 36.", "schema": schema}, {"age": 36}),
            (
                "summarize",
                {"text": "It rained all day."},
                {"summary": "It rained.", "pieces": 1, "complete": True},
            ),
            ("rewrite", {"text": "Yep.", "instructions": "Formal."}, {"text": "Yes, sir."}),
        ):
            answer = await http.post(f"/mcp/tools/{name}", json=arguments)
            assert answer.status_code == 200, answer.text
            called = answer.json()
            assert (called["tool"], called["output"]) == (name, output)
            assert (called["llm"], called["calls"]) == ("scripted", 1)
            assert called["usage"]["output_tokens"] > 0
            assert answer.headers["x-llm"] == "scripted"
            assert answer.headers["x-tier"] == "small"


async def test_main_is_asked_for_by_header_or_by_argument(tmp_path: Path) -> None:
    async with serving(tmp_path, '{"label": "bug"}') as http:
        by_header = await http.post("/mcp/tools/classify", json=CLASSIFY, headers={"X-Tier": "main"})
        by_argument = await http.post("/mcp/tools/classify", json={**CLASSIFY, "tier": "main"})
        wrong = await http.post("/mcp/tools/classify", json=CLASSIFY, headers={"X-Tier": "big"})
    assert by_header.headers["x-tier"] == by_argument.headers["x-tier"] == "main"
    assert wrong.status_code == 422
    assert problem(wrong)["choices"] == ["small", "main"]


async def test_an_answer_of_another_form_is_asked_for_again(tmp_path: Path) -> None:
    async with serving(tmp_path, "billing, I think", '{"label": "refund"}', '{"label": "billing"}') as http:
        called = (await http.post("/mcp/tools/classify", json=CLASSIFY)).json()
    assert called["output"] == {"label": "billing"}
    assert called["calls"] == 3


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ("I cannot do that.", "no JSON object"),
        ("", "no JSON object"),
        ('{"label": "refund"}', "'refund' is not one of"),
        ('{"label": "bil', "no JSON object"),
        ({"say": ['{"label": "bil'], "finish_reason": "length"}, "cut off"),
        ({"say": [""], "finish_reason": "content_filter"}, "content filter"),
    ],
)
async def test_what_stays_of_another_form_is_an_error_that_says_what_is_wrong(
    tmp_path: Path, reply: Any, says: str
) -> None:
    async with serving(tmp_path, reply) as http:
        answer = await http.post("/mcp/tools/classify", json=CLASSIFY)
    assert answer.status_code == 502
    told = problem(answer)
    assert told["type"].endswith("#invalid-output")
    assert "classify" in told["detail"]
    assert says in told["detail"]


async def test_a_stream_that_is_cut_is_repeated_and_never_taken_for_an_answer(tmp_path: Path) -> None:
    cut = {**scripted('{"label": "billing"}')["scripted"]}
    cut["options"] = {**cut["options"], "fail": "cut", "fail_first": 2}
    config = write_config(tmp_path, llms={"scripted": cut})
    async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:
        answer = await http.post("/mcp/tools/classify", json=CLASSIFY)
        assert answer.json()["output"] == {"label": "billing"}
    cut["options"]["fail_first"] = None
    config = write_config(tmp_path, llms={"scripted": cut})
    async with ServerProcess(tmp_path / "state2", config) as server, server.http() as http:
        answer = await http.post("/mcp/tools/classify", json=CLASSIFY)
        assert answer.status_code == 502
        assert problem(answer)["type"].endswith("#engine-failed")


@pytest.mark.parametrize(
    ("name", "arguments", "status", "pointer"),
    [
        ("classify", {"text": "x"}, 422, "/labels"),
        ("classify", {"text": "x", "labels": ["a"]}, 422, "/labels"),
        ("classify", {"text": "x", "labels": ["a", "b"], "tiers": "main"}, 422, "/tiers"),
        ("classify", [1], 422, None),
        ("extract", {"text": "x"}, 422, "/fields"),
        (
            "extract",
            {"text": "x", "schema": {"type": "object", "properties": {"a": {"pattern": "(a+)+$"}}}},
            422,
            "/schema/properties/a/pattern",
        ),
        ("rewrite", {"text": "x", "instructions": ""}, 422, "/instructions"),
        ("translate", {"text": "x"}, 404, None),
    ],
)
async def test_arguments_of_another_form_are_refused_where_they_are_wrong(
    server_of_nothing: httpx.AsyncClient, name: str, arguments: Any, status: int, pointer: str | None
) -> None:
    answer = await server_of_nothing.post(f"/mcp/tools/{name}", json=arguments)
    assert answer.status_code == status, answer.text
    assert problem(answer).get("pointer") == pointer


@pytest.fixture
async def server_of_nothing(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(tmp_path, "never asked for") as http:
        yield http


async def test_no_llm_is_said_with_the_reason(tmp_path: Path) -> None:
    llms = scripted("x")
    llms["scripted"]["toggle"] = False
    config = write_config(tmp_path, llms=llms)
    async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:
        answer = await http.post("/mcp/tools/classify", json=CLASSIFY)
    assert answer.status_code == 503
    assert problem(answer)["type"].endswith("#no-llm")


async def test_a_long_text_is_summarized_in_pieces_that_are_merged(tmp_path: Path) -> None:
    replies = (
        {"when": "what was written of its parts", "say": ["All of it."]},
        {"when": "Summarize", "say": ["A part."]},
    )
    text = "\n\n".join(f"Paragraph {n} says that thing number {n} happened." for n in range(400))
    async with serving(tmp_path, *replies) as http:
        called = (await http.post("/mcp/tools/summarize", json={"text": text})).json()
    assert called["output"]["summary"] == "All of it."
    assert called["output"]["pieces"] == called["calls"] >= 4


async def test_a_client_that_leaves_frees_the_slot(tmp_path: Path) -> None:
    slow = scripted("word " * 500)
    slow["scripted"]["options"]["tokens_per_s"] = 20
    config = write_config(tmp_path, llms=slow)
    async with ServerProcess(tmp_path / "state", config) as server, server.http() as http:
        text = "One sentence of many. " * 2000
        async with asyncio.TaskGroup() as group:
            call = group.create_task(http.post("/mcp/tools/summarize", json={"text": text}))
            await _until_busy(http, busy=True)
            call.cancel()
        await _until_busy(http, busy=False)


async def _until_busy(http: httpx.AsyncClient, *, busy: bool) -> None:
    ends = time.monotonic() + LIMIT_S
    while time.monotonic() < ends:
        (llm,) = (await http.get("/api/v1/llms")).json()["items"]
        if (llm["in_flight"] > 0) == busy:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"in_flight is {llm['in_flight']}")


async def test_whatever_schemathesis_sends_a_tool_the_answer_is_documented(tmp_path: Path) -> None:
    async with serving(tmp_path, '{"label": "billing"}') as http:
        address = str(http.base_url).rstrip("/")
        schemathesis = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "schemathesis.cli", "--no-color", "run", f"{address}/api/v1/openapi.json",
            "--include-path-regex", "^/mcp/tools", "--phases", "examples,coverage,fuzzing",
            # What a body must hold the tool's own schema says; a script for an LLM has no better answer.
            "--checks", "all", "--exclude-checks", "positive_data_acceptance,not_a_server_error",
            "--max-examples", "20", "--seed", "1", "--generation-database", "none",
            "--request-timeout", "30", "--warnings", "off",
            cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await outputs(schemathesis, 280)
    assert schemathesis.returncode == 0, output.decode()
    assert "Tested: 2" in output.decode()
