"""Anthropic's messages in our own values, and our deltas in Anthropic's events."""

import itertools
import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_agent_server.core.chat import (
    ChatDelta,
    ChatRequest,
    ChatUsage,
    FinishReason,
    ImagePart,
    Message,
    ToolCall,
    ToolCallDelta,
)
from ai_agent_server.errors import EngineProtocolError, InvalidPacketError, MalformedPacketError
from ai_agent_server.gateway import _anthropic_wire as wire

PNG = "iVBORw0KGgo="


def body(*turns: Any, **rest: Any) -> dict[str, Any]:
    """A request's body; a plain text is the user's turn."""
    messages = [{"role": "user", "content": turn} if isinstance(turn, str) else turn for turn in turns]
    return {
        "model": "m",
        "max_tokens": 10,
        "messages": messages or [{"role": "user", "content": "Hi."}],
    } | rest


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def use(call_id: str, **given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "read", "input": given}


def result(call_id: str, content: Any, **rest: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **rest}


def image(source: Any = None) -> dict[str, Any]:
    return {"type": "image", "source": source or {"type": "base64", "media_type": "image/png", "data": PNG}}


def tool(name: str, **rest: Any) -> dict[str, Any]:
    return {"name": name, "description": "", "input_schema": {"type": "object"}, **rest}


def read(document: Any) -> ChatRequest:
    return wire.chat_request(wire.decode_messages(json.dumps(document).encode()))


def said(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in messages]


def refusal(document: Any) -> InvalidPacketError:
    with pytest.raises(InvalidPacketError) as caught:
        read(document)
    return caught.value


# What comes in


def test_a_conversation_is_read_turn_by_turn() -> None:
    request = read(
        body("Hi.", assistant(text("Hello.")), user(text("Bye.")), system="Be brief.", temperature=0.5)
    )
    assert said(request.messages) == [
        ("system", "Be brief."),
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", "Bye."),
    ]
    assert (request.max_tokens, request.temperature, request.stop) == (10, 0.5, ())


def test_turns_of_one_side_are_one_turn() -> None:
    request = read(body("One.", "Two.", assistant(text("a"), text("b")), assistant(use("c"))))
    assert said(request.messages) == [("user", "One.\n\nTwo."), ("assistant", "ab")]
    assert [call.id for call in request.messages[1].tool_calls] == ["c"]


def test_a_system_prompt_in_blocks_is_one_and_what_differs_each_time_is_left_out() -> None:
    attribution = text("x-anthropic-billing-header: cc_version=2.1.329; cch=00000;")
    blocks = [attribution, text("You are an agent."), {**text("Be brief."), "cache_control": {}}]
    request = read(body(system=blocks))
    assert said(request.messages)[0] == ("system", "You are an agent.\n\nBe brief.")


def test_a_system_message_in_mid_conversation_becomes_a_reminder_to_the_side_that_asks() -> None:
    first = {"role": "system", "content": "Be kind."}
    later = {"role": "system", "content": [text("The date is Monday.")]}
    request = read(body(first, "Hi.", later, assistant(text("Hello.")), later, system="Be brief."))
    reminder = "<system-reminder>\nThe date is Monday.\n</system-reminder>"
    assert said(request.messages) == [
        ("system", "Be brief.\n\nBe kind."),
        ("user", f"Hi.\n\n{reminder}"),
        ("assistant", "Hello."),
        ("user", reminder),
    ]


def test_calls_and_their_results_are_told_in_the_order_that_engines_need() -> None:
    request = read(
        body(
            "Read both.",
            assistant(text("I will."), use("a", path="x y"), use("b")),
            user(text("Here:"), result("a", "one"), result("b", [text("two"), text("!")], is_error=True)),
        )
    )
    assert said(request.messages) == [
        ("user", "Read both."),
        ("assistant", "I will."),
        ("tool", "one"),
        ("tool", "Error: two!"),
        ("user", "Here:"),
    ]
    assert request.messages[1].tool_calls == (
        ToolCall(id="a", name="read", arguments='{"path": "x y"}'),
        ToolCall(id="b", name="read", arguments="{}"),
    )
    assert [message.tool_call_id for message in request.messages[2:4]] == ["a", "b"]


def test_an_empty_result_is_still_a_result() -> None:
    request = read(body("Go.", assistant(use("a")), user({"type": "tool_result", "tool_use_id": "a"})))
    assert request.messages[-1] == Message(role="tool", parts=(), tool_call_id="a")


def test_an_image_is_passed_on_whole_and_a_tools_image_comes_after_its_result() -> None:
    shown = ImagePart(media_type="image/png", content=PNG)
    request = read(body(user(text("What is it?"), image())))
    assert request.messages[0].parts[1] == shown
    request = read(body("Look.", assistant(use("a")), user(result("a", [text("a picture"), image()]))))
    assert said(request.messages[2:]) == [("tool", "a picture"), ("user", "")]
    assert request.messages[3].parts == (shown,)


def test_documents_and_search_results_are_told_in_words() -> None:
    plain = {"type": "text", "media_type": "text/plain", "data": "It rains."}
    inner = {"type": "content", "content": [text("one"), text("two")]}
    found = {"type": "search_result", "source": "s", "title": "Found", "content": [text("three")]}
    request = read(
        body(
            user(
                {"type": "document", "source": plain, "title": "Weather"},
                {"type": "document", "source": inner},
                found,
            )
        )
    )
    assert request.messages[0].text == "Weather:\nIt rains.\nDocument:\none\ntwo\nFound\nthree\n"


UNREADABLE: dict[str, Any] = {
    "a picture elsewhere": image({"type": "url", "url": "https://example.org/a.png"}),
    "a PDF": {
        "type": "document",
        "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"},
    },
    "something new": {"type": "hologram", "content": {"points": [1, 2]}},
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_a_person_attached_and_nobody_can_read_is_refused(what: str) -> None:
    assert refusal(body(user(text("Look."), UNREADABLE[what]))).pointer == "/messages/0/content/1"


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_a_tool_brought_and_nobody_can_read_is_told_in_words(what: str) -> None:
    request = read(body("Go.", assistant(use("a")), user(result("a", [UNREADABLE[what]]))))
    (answer,) = [message for message in request.messages if message.role == "tool"]
    assert answer.text.startswith("[")


def test_what_was_thought_or_done_on_anthropics_side_is_left_out() -> None:
    request = read(
        body(
            "Go.",
            assistant(
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "x"}},
                {
                    "type": "web_search_tool_result",
                    "tool_use_id": "s",
                    "content": [{"type": "r", "url": "u"}],
                },
                text("Done."),
            ),
        )
    )
    assert said(request.messages) == [("user", "Go."), ("assistant", "Done.")]


def test_the_tools_are_those_that_can_be_called_here_and_now() -> None:
    tools = [
        tool("read", type="custom", description="Reads."),
        tool("late", defer_loading=True),
        tool("later", defer_loading=True),
        {"type": "web_search_20260318", "name": "web_search", "max_uses": 5},
    ]
    assert [found.name for found in read(body(tools=tools)).tools] == ["read"]
    named = user(result("a", [{"type": "tool_reference", "tool_name": "late"}]))
    request = read(body("Go.", assistant(use("a")), named, tools=tools))
    assert [(found.name, found.description) for found in request.tools] == [("read", "Reads."), ("late", "")]
    assert "late" in request.messages[2].text


def test_tools_come_and_go_in_mid_conversation() -> None:
    def change(kind: str, **named: Any) -> dict[str, Any]:
        block = {"type": f"tool_{kind}", "tool": {"type": "tool_reference", **named}}
        return {"role": "system", "content": [block]}

    tools = [tool("read"), tool("late", defer_loading=True)]
    turns = ["Go.", change("addition", name="late"), change("addition", definition=tool("new"))]
    assert [found.name for found in read(body(*turns, tools=tools)).tools] == ["read", "late", "new"]
    turns += [assistant(text("Ok.")), change("removal", name="read"), change("removal", name="never")]
    request = read(body(*turns, tools=tools))
    assert [found.name for found in request.tools] == ["late", "new"]
    assert said(request.messages) == [("user", "Go."), ("assistant", "Ok.")]
    wrong = body("Go.", change("addition", definition={"name": "x", "input_schema": 5}))
    assert refusal(wrong).pointer == "/messages/1/content/0/tool/definition/input_schema"


@pytest.mark.parametrize(
    ("choice", "called", "names"),
    [
        (None, "auto", ["a", "b"]),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", ["a", "b"]),
        ({"type": "none"}, "none", ["a", "b"]),
        ({"type": "any"}, "required", ["a", "b"]),
        ({"type": "tool", "name": "b"}, "required", ["b"]),
    ],
)
def test_a_choice_of_tools_is_understood(choice: Any, called: str, names: list[str]) -> None:
    rest = {"tool_choice": choice} if choice else {}
    request = read(body(tools=[tool("a"), tool("b")], **rest))
    assert request.tool_choice == called
    assert [found.name for found in request.tools] == names


def test_a_schema_for_the_answer_is_taken_in_both_of_its_places() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    wanted = {"type": "json_schema", "schema": schema}
    assert read(body(output_config={"effort": "low", "format": wanted})).response_schema == schema
    assert read(body(output_format=wanted)).response_schema == schema
    assert read(body(output_config={"effort": "low"})).response_schema is None


def test_whatever_else_a_client_says_is_tolerated() -> None:
    read(
        body(
            metadata={"user_id": "{}"},
            thinking={"type": "adaptive", "display": "summarized"},
            context_management={"edits": [{"type": "clear_thinking"}]},
            cache_control={"type": "ephemeral"},
            service_tier="auto",
            top_k=5,
            something_new=[1],
        )
    )


@pytest.mark.parametrize(
    ("thinking", "shown"),
    [
        (None, False),
        ({"type": "disabled"}, False),
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "adaptive"}, True),
        ({"type": "adaptive", "display": "omitted"}, False),
    ],
)
def test_thinking_is_shown_to_who_asks_for_it(thinking: Any, shown: bool) -> None:
    document = body(**({"thinking": thinking} if thinking else {}))
    assert wire.decode_messages(json.dumps(document).encode()).shows_thinking is shown


@pytest.mark.parametrize(
    ("document", "pointer"),
    [
        ({"max_tokens": 1, "messages": [{"role": "user", "content": "Hi."}]}, "/model"),
        ({"model": "m", "messages": [{"role": "user", "content": "Hi."}]}, "/max_tokens"),
        (body(max_tokens=0), "/max_tokens"),
        (body(messages=[]), "/messages"),
        (body({"role": "robot", "content": "Hi."}), "/messages/0/role"),
        (body({"role": "user"}), "/messages/0/content"),
        (body(user({"text": "Hi."})), "/messages/0/content/0/type"),
        (body(user({"type": "text"})), "/messages/0/content/0/text"),
        (body(user({"type": "text", "text": 5})), "/messages/0/content/0/text"),
        (
            body(user(image({"type": "base64", "media_type": "x/y"}))),
            "/messages/0/content/0/source/media_type",
        ),
        (body(user(image({"media_type": "image/png"}))), "/messages/0/content/0/source/type"),
        (body(user(result("a", [{"type": "text", "text": 5}]))), "/messages/0/content/0/content/0/text"),
        (body(user({"type": "tool_result", "content": ""})), "/messages/0/content/0/tool_use_id"),
        (body("Go.", assistant(use("a") | {"input": [1]})), "/messages/1/content/0/input"),
        (body(tools=[{"input_schema": {}}]), "/tools/0/name"),
        (body(tools=[tool("a", input_schema="x")]), "/tools/0/input_schema"),
        (body(tool_choice={"type": "any"}), "/tool_choice/type"),
        (body(tools=[tool("a")], tool_choice={"type": "tool", "name": "b"}), "/tool_choice/name"),
        (body(tool_choice={"type": "perhaps"}), "/tool_choice/type"),
        (body(output_config={"format": {"type": "yaml"}}), "/output_config/format/type"),
        (body(temperature=3), "/temperature"),
        (body(stop_sequences="END"), "/stop_sequences"),
        (body(stream="yes"), "/stream"),
    ],
)
def test_a_mistake_is_told_with_its_place(document: Any, pointer: str) -> None:
    assert refusal(document).pointer == pointer


def test_what_is_free_in_shape_is_bounded_in_depth() -> None:
    deep: Any = {}
    for _ in range(100):
        deep = {"type": "object", "properties": {"a": deep}}
    assert refusal(body(tools=[tool("a", input_schema=deep)])).pointer == "/tools/0/input_schema"
    assert refusal(body("Go.", assistant(use("a", **deep)))).pointer == "/messages/1/content/0/input"


@pytest.mark.parametrize("raw", [b"", b"{", b'{"model": "\xff"}', b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_no_json_is_told_as_that(raw: bytes) -> None:
    with pytest.raises((MalformedPacketError, InvalidPacketError)):
        wire.decode_messages(raw)


# What goes out


def events(raw: bytes) -> list[dict[str, Any]]:
    """The events of a stream; each one's name has to be its type."""
    found = []
    for frame in raw.decode().split("\n\n")[:-1]:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def answer(
    *deltas: ChatDelta, stops: tuple[str, ...] = (), shows_thinking: bool = False
) -> tuple[list[dict[str, Any]], wire.MessageReply]:
    """The events of an answer, and the same answer whole."""
    folded = wire.Answer(
        message_id="msg_1",
        model="m",
        input_tokens=3,
        stops=stops,
        shows_thinking=shows_thinking,
        keep=True,
    )
    raw = folded.start()
    for delta in deltas:
        raw += folded.take(delta)
        if folded.stopped:
            break
    raw += folded.end()
    return events(raw), folded.message()


def end(reason: FinishReason = "stop") -> ChatDelta:
    usage = ChatUsage(input_tokens=7, output_tokens=5, cached_tokens=4)
    return ChatDelta(finish_reason=reason, usage=usage)


def call(index: int, arguments: str = "", **head: str) -> ChatDelta:
    return ChatDelta(tool_calls=(ToolCallDelta(index=index, arguments=arguments, **head),))


def test_text_is_one_block_between_the_messages_start_and_its_end() -> None:
    streamed, message = answer(ChatDelta(text="Hel"), ChatDelta(text="lo \u2028"), end())
    assert streamed == [
        {
            "type": "message_start",
            "message": {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": "m",
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {
                    "input_tokens": 3,
                    "cache_creation_input_tokens": 0,
                    "cache_read_input_tokens": 0,
                    "output_tokens": 0,
                },
            },
        },
        {"type": "ping"},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo \u2028"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {
                "input_tokens": 3,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 4,
                "output_tokens": 5,
            },
        },
        {"type": "message_stop"},
    ]
    assert message.content == (wire.TextBlock(text="Hello \u2028"),)
    assert message.stop_reason == "end_turn"


def test_text_and_calls_are_blocks_one_after_the_other() -> None:
    streamed, message = answer(
        ChatDelta(text="Let me look."),
        call(0, id="a", name="read"),
        call(0, '{"path"'),
        call(0, ': "x"}'),
        call(1, "", id="b", name="list"),
        end("tool_calls"),
    )
    assert [event["type"].removeprefix("content_block_") for event in streamed[2:-2]] == [
        *("start", "delta", "stop"),
        *("start", "delta", "delta", "stop"),
        *("start", "stop"),
    ]
    assert [event["index"] for event in streamed[2:-2]] == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert message.content[1:] == (
        wire.ToolUseBlock(id="a", name="read", input={"path": "x"}),
        wire.ToolUseBlock(id="b", name="list", input={}),
    )
    assert message.stop_reason == "tool_use"


@pytest.mark.parametrize(
    ("said_by_us", "said_by_them"),
    [
        ("stop", "end_turn"),
        ("length", "max_tokens"),
        ("tool_calls", "tool_use"),
        ("content_filter", "refusal"),
    ],
)
def test_every_reason_to_end_has_a_word_of_theirs(said_by_us: FinishReason, said_by_them: str) -> None:
    streamed, message = answer(ChatDelta(text="x"), end(said_by_us))
    assert streamed[-2]["delta"]["stop_reason"] == message.stop_reason == said_by_them


def test_thinking_is_a_block_with_a_signature_for_who_asked_and_a_ping_for_who_did_not() -> None:
    deltas = (ChatDelta(reasoning="Hm."), ChatDelta(reasoning=" So."), ChatDelta(text="Yes."), end())
    streamed, message = answer(*deltas, shows_thinking=True)
    kinds = [event.get("delta", {}).get("type") for event in streamed[2:8]]
    assert kinds == [None, "thinking_delta", "thinking_delta", "signature_delta", None, None]
    assert message.content == (
        wire.ThinkingBlock(thinking="Hm. So.", signature="msg_1"),
        wire.TextBlock(text="Yes."),
    )
    streamed, message = answer(*deltas)
    assert [event["type"] for event in streamed[:4]] == [
        "message_start",
        "ping",
        "ping",
        "content_block_start",
    ]
    assert message.content == (wire.TextBlock(text="Yes."),)


def test_an_answer_without_a_reason_to_end_is_cut() -> None:
    with pytest.raises(EngineProtocolError):
        answer(ChatDelta(text="Hel"))


@pytest.mark.parametrize("arguments", ['{"path": "x"', "[1]", "x", '{"a": 1} {}'])
def test_a_call_that_nobody_could_make_is_no_good_end(arguments: str) -> None:
    with pytest.raises(EngineProtocolError, match="arguments"):
        answer(call(0, arguments, id="a", name="read"), end("tool_calls"))


def test_a_call_that_goes_on_after_the_next_began_is_no_good_end() -> None:
    with pytest.raises(EngineProtocolError):
        answer(call(0, id="a", name="x"), call(1, id="b", name="y"), call(0, "{}"), end("tool_calls"))


def test_a_stop_sequence_ends_the_answer_before_itself_and_is_named() -> None:
    pieces = (ChatDelta(text="one E"), ChatDelta(text="N"), ChatDelta(text="D two"), end())
    streamed, message = answer(*pieces, stops=("STOP", "END"))
    assert message.content == (wire.TextBlock(text="one "),)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")
    assert streamed[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "END"}
    assert streamed[-2]["usage"]["output_tokens"] == 3


def test_what_only_looked_like_a_stop_sequence_is_told() -> None:
    _, message = answer(ChatDelta(text="the EN"), end(), stops=("END",))
    assert message.content == (wire.TextBlock(text="the EN"),)
    assert message.stop_reason == "end_turn"


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.randoms(),
)
def test_wherever_a_text_is_cut_a_stop_sequence_is_found_in_the_same_place(
    whole: str, stops: list[str], rng: random.Random
) -> None:
    cuts = sorted(rng.randint(0, len(whole)) for _ in range(rng.randint(0, 8)))
    scan, shown = wire.StopScan(stops), ""
    for start, stop in itertools.pairwise([0, *cuts, len(whole)]):
        shown += scan.feed(whole[start:stop])
        if scan.found:
            break
    shown += scan.rest()
    ends = [at + len(stop) for stop in stops if (at := whole.find(stop)) >= 0]
    if not ends:
        assert (shown, scan.found) == (whole, None)
    else:
        assert scan.found is not None
        assert whole.startswith(shown + scan.found)
        assert len(shown) + len(scan.found) <= max(ends)
        assert not any(stop in shown for stop in stops)


def test_an_error_in_a_stream_is_an_event() -> None:
    (event,) = events(wire.error_event("overloaded_error", "busy", "req_1"))
    assert event == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "busy"},
        "request_id": "req_1",
    }


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_as_a_mistake(raw: bytes) -> None:
    with pytest.raises(InvalidPacketError):
        wire.decode_messages(raw)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
blocks = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            ["text", "image", "document", "tool_use", "tool_result", "tool_reference", "?"]
        )
    },
    optional={
        name: anything | st.text(max_size=3) | st.lists(st.fixed_dictionaries({"type": st.just("text")}))
        for name in ("text", "id", "name", "input", "content", "source", "tool_use_id", "tool_name", "title")
    },
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.lists(blocks, max_size=3)}
)


@given(
    st.lists(turns, min_size=1, max_size=3),
    st.dictionaries(st.sampled_from(["system", "tools", "tool_choice", "output_config"]), anything),
)
def test_a_body_of_any_shape_is_read_or_refused_as_a_mistake(messages: Any, rest: Any) -> None:
    raw = msgspec.json.encode(body(messages=messages, **rest))
    try:
        request = wire.chat_request(wire.decode_messages(raw))
    except InvalidPacketError:
        return
    msgspec.json.encode(request)
