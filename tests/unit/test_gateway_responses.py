"""Responses requests and answers, with the types of OpenAI's own SDK as the judge of every shape."""

import contextlib
import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from ai_agent_server.core.chat import (
    ChatDelta,
    ChatRequest,
    ChatUsage,
    ImagePart,
    Message,
    TextPart,
    ToolCall,
    ToolCallDelta,
    message,
)
from ai_agent_server.errors import InvalidPacketError, MalformedPacketError
from ai_agent_server.gateway._responses_events import Answer, frame
from ai_agent_server.gateway._responses_wire import Translated, decode, translate

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": {"type": "text"}}
NAMESPACE = {
    "type": "namespace",
    "name": "mcp__files",
    "description": "Files.",
    "tools": [{"type": "function", "name": "read", "parameters": {"type": "object"}}],
}


def translated(**body: Any) -> Translated:
    return translate(decode(json.dumps({"model": "small", "input": "Hi", **body}).encode()))


def asked(**body: Any) -> ChatRequest:
    return translated(**body).request


def refused(**body: Any) -> InvalidPacketError:
    with pytest.raises(InvalidPacketError) as caught:
        translated(**body)
    return caught.value


def told(*deltas: ChatDelta, **body: Any) -> list[dict[str, Any]]:
    """Every event of an answer, judged by the SDK's types, as JSON."""
    draft = decode(json.dumps({"model": "small", "input": "Hi", **body}).encode())
    ids = (f"id-{number}" for number in itertools.count())
    answer = Answer(
        draft, translate(draft), model=lambda: "small", new_id=lambda: next(ids), now=lambda: 1_700_000_000.5
    )
    events = answer.opening()
    for delta in deltas:
        events += answer.take(delta)
    events += answer.ending()[0]
    return judged([frame(event) for event in events])


def judged(frames: list[bytes]) -> list[dict[str, Any]]:
    seen = []
    for number, raw in enumerate(frames):
        name, data = raw.decode().removesuffix("\n\n").split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        assert type(EVENTS.validate_python(event)).model_fields["type"].annotation is not None
        seen.append(event)
    return seen


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


FIELDS = [
    "model",
    "input",
    "instructions",
    "stream",
    "max_output_tokens",
    "temperature",
    "top_p",
    "tools",
    "tool_choice",
    "text",
    "reasoning",
    "metadata",
    "previous_response_id",
    "conversation",
    "prompt",
    "background",
    "parallel_tool_calls",
]
KINDS = [
    "message",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "reasoning",
    "function",
    "custom",
    "namespace",
    "user",
    "assistant",
    "developer",
    "input_text",
    "input_image",
    "json_schema",
    "allowed_tools",
]
END = ChatDelta(finish_reason="stop", usage=ChatUsage(input_tokens=7, output_tokens=3, cached_tokens=5))


def test_a_text_is_a_users_message_after_the_instructions() -> None:
    request = asked(instructions="Be brief.", max_output_tokens=9, temperature=0.5, top_p=0.9)
    assert request.messages == (message("system", "Be brief."), message("user", "Hi"))
    assert (request.max_tokens, request.temperature, request.top_p) == (9, 0.5, 0.9)


def test_items_become_turns_and_calls_made_at_once_are_one_turn() -> None:
    request = asked(
        tools=[WEATHER, NAMESPACE],
        input=[
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [], "encrypted_content": "x"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
            {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
            {
                "type": "function_call",
                "call_id": "2",
                "name": "read",
                "namespace": "mcp__files",
                "arguments": "{}",
            },
            {"type": "something_new", "arguments": {"an": "object"}},
            {"type": "function_call_output", "call_id": "1", "output": "21 C"},
            {
                "type": "function_call_output",
                "call_id": "2",
                "output": [
                    {"type": "input_text", "text": "a file"},
                    {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="},
                ],
            },
        ],
    )
    assert request.messages == (
        message("system", "Be brief."),
        message("user", "Weather?"),
        Message(
            role="assistant",
            parts=(TextPart(text="I look."),),
            tool_calls=(
                ToolCall(id="1", name="weather", arguments="{}"),
                ToolCall(id="2", name="mcp__files__read", arguments="{}"),
            ),
        ),
        Message(role="tool", parts=(TextPart(text="21 C"),), tool_call_id="1"),
        Message(
            role="tool",
            parts=(
                TextPart(text="a file"),
                ImagePart(media_type="image/png", content="iVBORw0KGgo="),
            ),
            tool_call_id="2",
        ),
    )


def test_instructions_are_one_message_at_the_beginning_and_later_ones_are_told_by_the_user() -> None:
    request = asked(
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Use tools."},
            {"role": "system", "content": "No jokes."},
            {"role": "user", "content": "Hi"},
            {"role": "developer", "content": "It is late."},
            {"role": "user", "content": "Go on"},
        ],
    )
    assert request.messages == (
        message("system", "Be brief.\n\nUse tools.\n\nNo jokes."),
        message("user", "Hi"),
        message("user", "<system-reminder>\nIt is late.\n</system-reminder>"),
        message("user", "Go on"),
    )


def test_what_is_only_told_is_asked() -> None:
    request = asked(instructions="Be brief.", input=[{"role": "developer", "content": "Say hi."}])
    assert request.messages == (message("system", "Be brief."), message("user", "Say hi."))


def test_a_custom_call_of_an_earlier_turn_is_told_as_the_function_that_stands_for_it() -> None:
    request = asked(
        tools=[PATCH],
        input=[
            {"role": "user", "content": "Mend it."},
            {"type": "custom_tool_call", "call_id": "1", "name": "apply_patch", "input": 'a "patch"'},
            {"type": "custom_tool_call_output", "call_id": "1", "output": "done"},
        ],
    )
    (call,) = request.messages[1].tool_calls
    assert json.loads(call.arguments) == {"input": 'a "patch"'}
    assert request.tools[0].parameters["required"] == ["input"]


def test_hosted_tools_are_left_out_and_not_shown_as_there() -> None:
    found = translated(tools=[{"type": "web_search"}, WEATHER, NAMESPACE, {"type": "from_the_future"}])
    assert [tool.name for tool in found.request.tools] == ["weather", "mcp__files__read"]
    assert [tool["type"] for tool in found.echoed_tools] == ["function", "namespace"]


def test_a_long_nested_name_is_cut_to_one_that_is_its_own() -> None:
    spaces = [{**NAMESPACE, "name": f"a_space_{n}_" + 60 * "x"} for n in range(2)]
    names = [tool.name for tool in asked(tools=spaces).tools]
    assert len({*names}) == 2
    assert all(len(name) <= 64 for name in names)


@pytest.mark.parametrize(
    ("choice", "tools", "how"),
    [
        ("none", ["weather", "mcp__files__read"], "none"),
        ("required", ["weather", "mcp__files__read"], "required"),
        ({"type": "function", "name": "weather"}, ["weather"], "required"),
        (
            {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "weather"}],
            },
            ["weather"],
            "auto",
        ),
    ],
)
def test_a_choice_of_tools_is_kept(choice: Any, tools: list[str], how: str) -> None:
    request = asked(tools=[WEATHER, NAMESPACE], tool_choice=choice)
    assert ([tool.name for tool in request.tools], request.tool_choice) == (tools, how)


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        (None, None),
        ({"format": {"type": "text"}}, None),
        ({"format": {"type": "json_object"}}, {"type": "object"}),
        (
            {"format": {"type": "json_schema", "name": "x", "schema": {"type": "string"}}},
            {"type": "string"},
        ),
    ],
)
def test_a_format_is_the_schema_that_the_answer_obeys(text: Any, schema: Any) -> None:
    assert asked(text=text).response_schema == schema


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"previous_response_id": "resp_1"}, "/previous_response_id"),
        ({"conversation": "conv_1"}, "/conversation"),
        ({"background": True}, "/background"),
        ({"prompt": {"id": "pmpt_1"}}, "/prompt"),
        ({"input": []}, "/input"),
        ({"input": 5}, "/input"),
        ({"model": ""}, "/model"),
        ({"max_output_tokens": 0}, "/max_output_tokens"),
        ({"max_output_tokens": 10**400}, "/max_output_tokens"),
        ({"temperature": "hot"}, "/temperature"),
        ({"input": [{"role": "king", "content": "Hi"}]}, "/input/0/role"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]},
         "/input/0/content/0/text"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
         "/input/0/content/0/type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://x/y.png"}]}]},
         "/input/0/content/0/image_url"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "/input/0"),
        ({"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}, "/input/0/call_id"),
        ({"tools": [WEATHER, {"type": "function"}]}, "/tools/1/name"),
        ({"tools": [WEATHER, WEATHER]}, "/tools/1/name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "/tool_choice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "/tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "/text/format/schema"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_with_its_place(body: dict[str, Any], pointer: str) -> None:
    assert refused(**body).pointer == pointer


@pytest.mark.parametrize("raw", [b"", b"[1]", b'{"model":', b"\xff", b'{"model":"\xff"}', b'{"input":"x"}'])
def test_what_is_no_request_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidPacketError):
        decode(raw)


@pytest.mark.parametrize(
    "deep",
    [
        b'{"model":"m","input":"x","unknown":%s}',
        b'{"model":"m","input":[%s]}',
        b'{"model":"m","input":"x","tools":[{"type":"function","name":"f","parameters":{"a":%s}}]}',
        b'{"model":"m","input":"x","tools":[{"type":"namespace","name":"f","tools":[%s]}]}',
    ],
)
@pytest.mark.parametrize("levels", [100, 2000, 100_000])
def test_depth_is_bounded(deep: bytes, levels: int) -> None:
    try:
        translate(decode(deep % (b"[" * levels + b"]" * levels)))
    except (InvalidPacketError, MalformedPacketError):
        return
    # What is not looked at may be as deep as the decoder lets it.
    assert b"unknown" in deep


def test_the_events_of_a_text_come_in_openais_order() -> None:
    events = told(ChatDelta(text="Hel"), ChatDelta(text="lo"), END)
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    response = Response.model_validate(events[-1]["response"])
    assert response.output_text == "Hello"
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (
        7,
        3,
        10,
    )
    assert response.usage.input_tokens_details.cached_tokens == 5
    assert response.status == "completed"
    assert response.completed_at is not None


def test_every_field_that_the_published_schema_requires_is_there() -> None:
    required = [
        "id",
        "object",
        "created_at",
        "completed_at",
        "status",
        "incomplete_details",
        "model",
        "previous_response_id",
        "instructions",
        "output",
        "error",
        "tools",
        "tool_choice",
        "truncation",
        "parallel_tool_calls",
        "text",
        "top_p",
        "presence_penalty",
        "frequency_penalty",
        "top_logprobs",
        "temperature",
        "reasoning",
        "usage",
        "max_output_tokens",
        "max_tool_calls",
        "store",
        "background",
        "service_tier",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
    ]
    for event in told(END):
        if "response" in event:
            assert [name for name in required if name not in event["response"]] == []
            assert event["response"]["store"] is False


def test_calls_come_after_the_text_with_their_own_names_and_namespaces() -> None:
    events = told(
        ChatDelta(text="I look."),
        ChatDelta(tool_calls=(ToolCallDelta(index=0, id="c0", name="weather"),)),
        ChatDelta(tool_calls=(ToolCallDelta(index=1, id="c1", name="mcp__files__read", arguments="{}"),)),
        ChatDelta(tool_calls=(ToolCallDelta(index=0, arguments='{"city":'),)),
        ChatDelta(tool_calls=(ToolCallDelta(index=0, arguments='"Paris"}'),)),
        ChatDelta(tool_calls=(ToolCallDelta(index=2, id="c2", name="apply_patch", arguments='{"inp'),)),
        ChatDelta(tool_calls=(ToolCallDelta(index=2, arguments='ut": "a\\nb"}'),)),
        msgspec.structs.replace(END, finish_reason="tool_calls"),
        tools=[WEATHER, NAMESPACE, PATCH],
    )
    text, first, second, third = events[-1]["response"]["output"]
    assert text["type"] == "message"
    assert (first["name"], first["call_id"], first["arguments"]) == ("weather", "c0", '{"city":"Paris"}')
    assert "namespace" not in first
    assert (second["namespace"], second["name"]) == ("mcp__files", "read")
    assert (third["type"], third["input"]) == ("custom_tool_call", "a\nb")
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == [text, first, second, third]
    pieces = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert pieces == ["{}", '{"city":', '"Paris"}']


def test_a_thought_is_an_item_of_its_own_before_the_answer() -> None:
    events = told(ChatDelta(reasoning="Hm, "), ChatDelta(reasoning="42."), ChatDelta(text="42"), END)
    thought, answer = events[-1]["response"]["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm, 42."}]
    assert answer["content"][0]["text"] == "42"
    assert [event["output_index"] for event in events if "output_index" in event] == [0] * 7 + [1] * 6


def test_one_call_at_a_time_where_no_more_are_wanted() -> None:
    calls = tuple(
        ToolCallDelta(index=index, id=f"c{index}", name="weather", arguments="{}") for index in (0, 1)
    )
    events = told(ChatDelta(tool_calls=calls), END, tools=[WEATHER], parallel_tool_calls=False)
    assert [item["call_id"] for item in events[-1]["response"]["output"]] == ["c0"]


@pytest.mark.parametrize(
    ("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_an_answer_that_met_a_limit_is_incomplete(finish: Any, reason: str) -> None:
    last = told(ChatDelta(text="Hel"), msgspec.structs.replace(END, finish_reason=finish))[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": reason}
    assert last["response"]["output"][0]["status"] == "incomplete"
    assert last["response"]["completed_at"] is None


def test_an_answer_that_breaks_off_fails_and_never_completes() -> None:
    draft = decode(b'{"model":"small","input":"Hi"}')
    answer = Answer(draft, translate(draft), model=lambda: "small", new_id=lambda: "x", now=lambda: 0.0)
    events = [*answer.opening(), *answer.take(ChatDelta(text="Hel"))]
    events.append(answer.failing("server_error", "the answer was cut"))
    last = judged([frame(event) for event in events])[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "the answer was cut"}


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "role",
                    "content",
                    "text",
                    "call_id",
                    "name",
                    "arguments",
                    "output",
                    "input",
                    "namespace",
                    "tools",
                    "parameters",
                    "format",
                    "schema",
                    "image_url",
                    "mode",
                ]
            ),
            inner | st.sampled_from(KINDS),
            max_size=6,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=150, derandomize=True)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6), st.booleans())
def test_any_body_is_a_request_or_refused(body: dict[str, Any], has_model: bool) -> None:
    body = {"model": "m", "input": "x", **body} if has_model else body
    try:
        found = translate(decode(json.dumps(body).encode()))
    except InvalidPacketError as exc:
        assert str(exc)
    else:
        assert found.request.messages


@settings(max_examples=100, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_refused(raw: bytes) -> None:
    with contextlib.suppress(InvalidPacketError):
        translate(decode(raw))


@settings(max_examples=60, derandomize=True)
@given(
    st.lists(
        st.builds(
            ChatDelta,
            text=st.text(max_size=4),
            reasoning=st.text(max_size=4),
            tool_calls=st.lists(
                st.builds(
                    ToolCallDelta,
                    index=st.integers(0, 2),
                    id=st.none() | st.text(max_size=3),
                    name=st.none() | st.sampled_from(["weather", "apply_patch", "unknown"]),
                    arguments=st.text(max_size=4),
                ),
                max_size=2,
            ).map(tuple),
        ),
        max_size=8,
    )
)
def test_whatever_an_engine_says_is_told_whole_and_in_order(deltas: list[ChatDelta]) -> None:
    events = told(*deltas, END, tools=[WEATHER, PATCH])
    output = events[-1]["response"]["output"]
    said = "".join(item["content"][0]["text"] for item in output if item["type"] == "message")
    thought = "".join(item["content"][0]["text"] for item in output if item["type"] == "reasoning")
    assert said == "".join(delta.text for delta in deltas)
    assert thought == "".join(delta.reasoning for delta in deltas)
    for item, event in zip(output, [e for e in events if e["type"].endswith("item.added")], strict=True):
        assert event["item"]["id"] == item["id"]
        assert item["status"] == "completed"
