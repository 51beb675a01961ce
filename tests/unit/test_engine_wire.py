"""OpenAI's wire: events out of bytes, deltas out of chunks, requests into bodies."""

import json
from typing import Any

import pytest

from ai_agent_server.core.chat import (
    ChatRequest,
    ChatUsage,
    ImagePart,
    Message,
    TextPart,
    Tool,
    ToolCall,
    ToolCallDelta,
    message,
)
from ai_agent_server.errors import EngineFailedError, EngineProtocolError
from ai_agent_server.llm_engines import _openai_wire as wire
from ai_agent_server.llm_engines._sse import MAX_LINE_BYTES, Events


def fold(*events: Any) -> tuple[list[Any], Any]:
    """The deltas of some chunks, and the last one."""
    answer = wire.Answer(engine="it")
    chunks = [wire.decode_chunk(json.dumps(event).encode(), engine="it") for event in events]
    return [delta for chunk in chunks if (delta := answer.take(chunk)) is not None], answer.end()


def choice(delta: Any = None, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}]}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_the_bytes_are_cut(size: int) -> None:
    text = ': ping\n\ndata: {"a":"\u2028\u0085é"}\r\n\r\nevent: x\ndata:{"b":1}\n\ndata: [DONE]\n\n'.encode()
    events = Events(engine="it")
    found = [event for at in range(0, len(text), size) for event in events.feed(text[at : at + size])]
    assert found == ['{"a":"\u2028\u0085é"}'.encode(), b'{"b":1}', b"[DONE]"]


def test_an_event_without_an_end_is_not_kept_for_ever() -> None:
    events = Events(engine="it")
    with pytest.raises(EngineProtocolError, match="larger"):
        for _ in range(MAX_LINE_BYTES // 2**20 + 1):
            events.feed(b"x" * 2**20)


def test_usage_after_the_finish_is_in_the_last_delta() -> None:
    deltas, last = fold(
        choice({"role": "assistant", "content": ""}),
        choice({"content": "hi"}),
        choice(finish="stop"),
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}, "model": "m"},
    )
    assert [delta.text for delta in deltas] == ["hi"]
    assert (last.finish_reason, last.usage, last.model) == (
        "stop",
        ChatUsage(input_tokens=3, output_tokens=1),
        "m",
    )


@pytest.mark.parametrize(
    ("details", "cached_tokens"),
    [({"cached_tokens": 2}, 2), ({"cached_tokens": None}, 0), (None, 0), ({"audio_tokens": 0}, 0),
     ({"cached_tokens": 9}, 3), ({"cached_tokens": -1}, 0)],
)  # fmt: skip
def test_what_was_not_read_again_is_a_part_of_the_prompt(details: Any, cached_tokens: int) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": details}
    _, last = fold(choice({"content": "hi"}, "stop"), {"choices": [], "usage": usage})
    assert last.usage == ChatUsage(input_tokens=3, output_tokens=1, cached_tokens=cached_tokens)


def test_fewer_tokens_than_none_are_none() -> None:
    usage = {"prompt_tokens": -3, "completion_tokens": -1, "prompt_tokens_details": {"cached_tokens": 2}}
    _, last = fold(choice({"content": "hi"}, "stop"), {"choices": [], "usage": usage})
    assert last.usage == ChatUsage()


def test_a_chunk_without_choices_carries_no_answer() -> None:
    deltas, last = fold({"choices": None}, {"choices": []}, choice({"content": "hi"}, "length"))
    assert [delta.text for delta in deltas] == ["hi"]
    assert last.finish_reason == "length"


def test_a_tool_call_that_ends_with_stop_ends_with_tool_calls() -> None:
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}
    deltas, last = fold(choice({"tool_calls": [call]}), choice(finish="stop"))
    assert deltas[0].tool_calls == (ToolCallDelta(index=0, id="a", name="f", arguments="{}"),)
    assert last.finish_reason == "tool_calls"


def test_thinking_is_progress_but_no_text() -> None:
    answer = wire.Answer(engine="it")
    for key in ("reasoning_content", "reasoning"):
        event = json.dumps(choice({key: "hmm"})).encode()
        delta = answer.take(wire.decode_chunk(event, engine="it"))
        assert delta is not None
        assert (delta.reasoning, delta.text) == ("hmm", "")
        assert answer.progressed
    assert answer.take(wire.decode_chunk(json.dumps(choice({"content": ""})).encode(), engine="it")) is None
    assert not answer.progressed


@pytest.mark.parametrize(
    "error", ["broke", {"message": "broke", "code": 500}, {"message": "broke", "code": "x"}, True]
)
def test_an_error_object_in_the_stream_is_a_failure(error: Any) -> None:
    with pytest.raises(EngineFailedError):
        fold({"error": error})


def test_a_stream_without_a_finish_reason_was_cut() -> None:
    with pytest.raises(EngineProtocolError, match="finish_reason"):
        fold(choice({"content": "hi"}))


def test_a_finish_reason_that_nobody_knows_is_named() -> None:
    with pytest.raises(EngineProtocolError, match="'tired'"):
        fold(choice(finish="tired"))


def test_a_request_becomes_the_body_that_the_reference_asks_for() -> None:
    request = ChatRequest(
        messages=(
            message("system", "Be brief."),
            Message(
                role="user",
                parts=(TextPart(text="What?"), ImagePart(media_type="image/png", content="aGk=")),
            ),
            Message(role="assistant", parts=(), tool_calls=(ToolCall(id="a", name="f", arguments="{}"),)),
            Message(role="tool", parts=(TextPart(text="42"),), tool_call_id="a"),
        ),
        max_tokens=9,
        temperature=0.0,
        seed=1,
        stop=("END",),
        tools=(Tool(name="f", description="d", parameters={"type": "object"}),),
        response_schema={"type": "object"},
    )
    assert wire.payload(request, "m", max_tokens_field="max_completion_tokens") == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 9,
        "temperature": 0.0,
        "seed": 1,
        "stop": ["END"],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
                ],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "42", "tool_call_id": "a"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
            }
        ],
        "tool_choice": "auto",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "object"}},
        },
    }
