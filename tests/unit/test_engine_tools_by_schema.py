"""Tools for a model whose template knows none: told in words, held to by a schema, read back."""

import json
from typing import Any

import jsonschema
import pytest

from ai_agent_server.core.chat import ChatRequest, Message, TextPart, Tool, ToolCall, message
from ai_agent_server.errors import EngineProtocolError
from ai_agent_server.llm_engines._tools_by_schema import read, without_tools
from ai_agent_server.llm_engines.base import EngineSpec, chat
from ai_agent_server.llm_engines.local.llama_server_engine import LlamaServerEngine
from tests.servers.llama_server_double import LlamaServerDouble

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = (Tool(name="weather", parameters=CITY), Tool(name="clock"))
CALL = {"name": "weather", "arguments": {"city": "Paris"}}


def ask(*before: Message, **rest: Any) -> ChatRequest:
    return ChatRequest(messages=(*before, message("user", "Weather?")), tools=TOOLS, **rest)


@pytest.mark.parametrize(
    ("choice", "written", "fits"),
    [
        ("auto", CALL, True),
        ("auto", {"name": "clock", "arguments": {}}, True),
        ("auto", {"reply": "No idea."}, True),
        ("required", CALL, True),
        ("required", {"reply": "No idea."}, False),
        ("auto", {"name": "weather", "arguments": {}}, False),
        ("auto", {"name": "rm", "arguments": {}}, False),
    ],
)
def test_the_schema_allows_a_call_and_words_only_where_they_may_be(
    choice: Any, written: Any, fits: bool
) -> None:
    asked = without_tools(ask(tool_choice=choice))
    assert asked.response_schema is not None
    assert jsonschema.Draft202012Validator(asked.response_schema).is_valid(written) is fits
    assert asked.tools == ()


def test_the_tools_are_told_in_the_one_system_message() -> None:
    for request in (ask(), ask(message("system", "Be brief."))):
        system, *rest = without_tools(request).messages
        assert system.role == "system"
        assert "weather" in system.text
        assert [turn.role for turn in rest] == ["user"]
    assert system.text.startswith("Be brief.")


def test_calls_and_results_of_before_are_told_in_words() -> None:
    before = (
        Message(
            role="assistant", parts=(), tool_calls=(ToolCall(id="a", name="clock", arguments='{"z":1}'),)
        ),
        Message(role="tool", parts=(TextPart(text="12:00"),), tool_call_id="a"),
    )
    _, called, result, _ = without_tools(ask(*before)).messages
    assert json.loads(called.text) == {"name": "clock", "arguments": {"z": 1}}
    assert (result.role, result.text) == ("user", "Result of the tool: 12:00")


def test_what_was_written_is_a_call_or_words() -> None:
    text, (call,) = read(json.dumps(CALL), ask(), engine="it")
    assert (text, call.name, json.loads(call.arguments)) == ("", "weather", {"city": "Paris"})
    assert read('{"reply": "No idea."}', ask(), engine="it") == ("No idea.", ())
    with pytest.raises(EngineProtocolError):
        read('{"name": "weath', ask(), engine="it")


@pytest.mark.parametrize("knows_tools", [True, False])
async def test_a_llama_server_calls_tools_whether_its_template_knows_them_or_not(knows_tools: bool) -> None:
    async with LlamaServerDouble() as double:
        double.knows_tools = knows_tools
        engine = LlamaServerEngine(
            EngineSpec(name="it", model="m"), LlamaServerEngine.Options(base_url=double.url)
        )
        for _ in range(2):
            reply = await chat(engine, ask())
            assert [(call.name, json.loads(call.arguments)) for call in reply.tool_calls] == [
                ("weather", {"city": "Paris"})
            ]
            assert reply.finish_reason == "tool_calls"
        assert double.paths().count("/props?model=m") == 1
        assert ("tools" in double.requests[-1].json) is knows_tools
        await engine.aclose()
