"""OpenAI's chat completions as values: what is read, what is refused and where, and what is written."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_agent_server.core.chat import (
    ChatDelta,
    ChatReply,
    ChatUsage,
    ImagePart,
    TextPart,
    ToolCall,
    ToolCallDelta,
)
from ai_agent_server.errors import InvalidPacketError
from ai_agent_server.gateway import _openai_chat as wire

USER = {"role": "user", "content": "hello"}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
FIND = {"type": "function", "function": {"name": "find", "description": "Finds."}}
PNG = "data:image/png;base64,iVBORw0KGgo="
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": fields}]}


def asked(**body: Any) -> wire.Asked:
    return wire.ask(json.dumps({"model": "first", "messages": [USER], **body}).encode())


def test_messages_of_every_role_are_read() -> None:
    request = asked(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "See"}, image(PNG)]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "nothing"}]},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "system", "content": "Go on.", "name": "host"},
        ],
    ).request  # fmt: skip
    assert [message.role for message in request.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "system",
    ]
    assert request.messages[1].parts == (
        TextPart(text="See"),
        ImagePart(media_type="image/png", content="iVBORw0KGgo="),
    )
    assert request.messages[2].tool_calls == (ToolCall(id="c1", name="look", arguments="{}"),)
    assert (request.messages[3].tool_call_id, request.messages[3].text) == ("c1", "nothing")
    assert request.messages[4].text == "No."


def test_what_steers_the_answer_is_read() -> None:
    request = asked(
        temperature=0.5, top_p=0.9, seed=7, stop="END", max_tokens=5, max_completion_tokens=9
    ).request
    assert (request.temperature, request.top_p, request.seed) == (0.5, 0.9, 7)
    assert request.stop == ("END",)
    assert request.max_tokens == 9
    assert asked(stop=["a", "b"]).request.stop == ("a", "b")


def test_unknown_keys_and_other_tools_are_tolerated() -> None:
    made = asked(
        store=True,
        metadata={"a": "b"},
        n=1,
        logprobs=False,
        parallel_tool_calls=False,
        tools=[{"type": "web_search"}, {"type": "custom", "custom": {"name": "x"}}, LOOK],
    )
    assert [tool.name for tool in made.request.tools] == ["look"]


@pytest.mark.parametrize(
    ("choice", "names", "meant"),
    [
        (None, ["look", "find"], "auto"),
        ("auto", ["look", "find"], "auto"),
        ("none", ["look", "find"], "none"),
        ("required", ["look", "find"], "required"),
        ({"type": "function", "function": {"name": "find"}}, ["find"], "required"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [LOOK]}},
            ["look"],
            "auto",
        ),
    ],
)
def test_the_tool_choice_leaves_the_tools_that_may_be_called(
    choice: Any, names: list[str], meant: str
) -> None:
    request = asked(tools=[LOOK, FIND], tool_choice=choice).request
    assert ([tool.name for tool in request.tools], request.tool_choice) == (names, meant)


def test_response_formats_become_schemas() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert asked(response_format={"type": "text"}).request.response_schema is None
    assert asked(response_format={"type": "json_object"}).request.response_schema == {"type": "object"}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert asked(response_format=wanted).request.response_schema == schema


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"x": value}
    return value


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"messages": []}, "/messages"),
        ({"messages": "hello"}, "/messages"),
        ({"messages": [{"content": "hello"}]}, "/messages/0/role"),
        ({"messages": [{"role": "robot", "content": "hello"}]}, "/messages/0/role"),
        ({"messages": [USER, {"role": "user"}]}, "/messages/1/content"),
        ({"messages": [{"role": "user", "content": 7}]}, "/messages/0/content"),
        (user({"type": "text"}), "/messages/0/content/0/text"),
        (user({"type": "input_audio"}), "/messages/0/content/0/type"),
        (user(image("https://x/y.png")), "/messages/0/content/0/image_url/url"),
        (user(image("data:text/html;base64,AAAA")), "/messages/0/content/0/image_url/url"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "/messages/0/tool_call_id"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
            "/messages/0/tool_calls/0/function",
        ),
        ({"model": ""}, "/model"),
        ({"model": None}, "/model"),
        ({"n": 2}, "/n"),
        ({"n": 0}, "/n"),
        ({"logprobs": True}, "/logprobs"),
        ({"functions": [{"name": "x"}]}, "/functions"),
        ({"modalities": ["text", "audio"]}, "/modalities"),
        ({"temperature": 2.1}, "/temperature"),
        ({"temperature": "hot"}, "/temperature"),
        ({"top_p": -1}, "/top_p"),
        ({"max_tokens": 0}, "/max_tokens"),
        ({"max_completion_tokens": 1.5}, "/max_completion_tokens"),
        ({"stop": ["x"] * 17}, "/stop"),
        ({"stream": "yes"}, "/stream"),
        ({"tools": [LOOK], "tool_choice": "maybe"}, "/tool_choice"),
        ({"tool_choice": "required"}, "/tool_choice"),
        ({"tools": [LOOK], "tool_choice": FIND}, "/tool_choice/function/name"),
        (function(name=""), "/tools/0/function/name"),
        (function(name="x", parameters=nested(100)), "/tools/0/function/parameters"),
        ({"response_format": {"type": "xml"}}, "/response_format/type"),
        ({"response_format": {"type": "json_schema"}}, "/response_format/json_schema"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(body: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidPacketError) as caught:
        asked(**body)
    assert caught.value.pointer == pointer


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "a"}',
        b'{"model": "\xff", "messages": []}',
        b'{"model": "a", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000,
        b'{"model": "a", "messages": [{"role": "user", "content": "x"}], "tools": ' + b"[" * 100_000,
        b'{"model": "a", "messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}",
    ],
)
def test_what_cannot_be_read_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidPacketError):
        wire.ask(raw)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = ("messages", "tools", "tool_choice", "response_format", "stop", "stream_options", "n", "seed", "top_p")


@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=4))
def test_whatever_stands_in_a_known_key_is_read_or_refused(body: dict[str, Any]) -> None:
    raw = msgspec.json.encode({"model": "first", "messages": [USER]} | body)
    try:
        made = wire.ask(raw)
    except InvalidPacketError:
        return
    msgspec.json.encode(made)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_read_or_refused(raw: bytes) -> None:
    with pytest.raises(InvalidPacketError):
        wire.ask(raw)


def frames(written: bytes) -> list[Any]:
    return [
        "[DONE]" if event == b"data: [DONE]" else json.loads(event.removeprefix(b"data: "))
        for event in written.split(b"\n\n")
        if event
    ]


def written(*deltas: ChatDelta, include_usage: bool) -> list[Any]:
    chunks = wire.Chunks(request_id="r1", model="first", created=5, include_usage=include_usage)
    usage = ChatUsage(input_tokens=3, output_tokens=4, cached_tokens=2)
    return frames(chunks.first() + b"".join(map(chunks.frames, deltas)) + chunks.end(usage))


def test_a_stream_begins_with_its_role_and_ends_with_its_reason() -> None:
    first, *middle, last, done = written(
        ChatDelta(text="Hé\u2028"),
        ChatDelta(reasoning="hm"),
        ChatDelta(finish_reason="stop"),
        include_usage=False,
    )
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert {key: first[key] for key in ("id", "object", "created", "model")} == {
        "id": "chatcmpl-r1",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": "first",
    }
    assert [chunk["choices"][0]["delta"] for chunk in middle] == [
        {"content": "Hé\u2028"},
        {"reasoning_content": "hm"},
    ]
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert done == "[DONE]"
    assert not any("usage" in chunk for chunk in (first, *middle, last))


def test_the_usage_comes_last_and_only_to_who_asked() -> None:
    *chunks, usage, done = written(ChatDelta(finish_reason="stop"), include_usage=True)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert done == "[DONE]"


def test_a_tool_call_is_named_once() -> None:
    _, start, more, _, _ = written(
        ChatDelta(tool_calls=(ToolCallDelta(index=0, id="c1", name="look", arguments=""),)),
        ChatDelta(tool_calls=(ToolCallDelta(index=0, arguments='{"a"'),)),
        ChatDelta(finish_reason="tool_calls"),
        include_usage=False,
    )
    assert start["choices"][0]["delta"]["tool_calls"] == [
        {"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": ""}}
    ]
    assert more["choices"][0]["delta"]["tool_calls"] == [{"index": 0, "function": {"arguments": '{"a"'}}]


def test_a_whole_answer_has_every_key_that_is_required() -> None:
    reply = ChatReply(
        text="",
        finish_reason="tool_calls",
        tool_calls=(ToolCall(id="c1", name="look", arguments="{}"),),
        usage=ChatUsage(input_tokens=3, output_tokens=4),
    )
    answer = json.loads(
        msgspec.json.encode(wire.completion(reply, request_id="r1", model="first", created=5))
    )
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
    }
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "tool_calls", None)
    assert answer["usage"]["total_tokens"] == 7
