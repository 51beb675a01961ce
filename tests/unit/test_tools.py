"""The text tools' decisions: what is asked, how long texts are cut and merged, which schemas are held."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ai_agent_server.config.settings import load
from ai_agent_server.core.chat import ChatReply, JSONObject
from ai_agent_server.errors import InvalidOutputError, InvalidPacketError
from ai_agent_server.tools._pieces import pieces, tokens, whole_sentences
from ai_agent_server.tools._schema import admitted
from ai_agent_server.tools.base import Ask, Room, TextTool, read
from ai_agent_server.tools.classify import Classify
from ai_agent_server.tools.extract import Extract
from ai_agent_server.tools.rewrite import Rewrite
from ai_agent_server.tools.summarize import Summarize

TOOLS: tuple[TextTool, ...] = (Classify(), Extract(), Summarize(), Rewrite())
TEXT = st.text(max_size=3000) | st.lists(st.sampled_from(["Word ", "End. ", "\n\n", "漢字。", "🙂"])).map(
    "".join
)


def run(tool: TextTool, arguments: JSONObject, room: Room, say: str) -> tuple[JSONObject, int]:
    """Every exchange had, each answered with `say`."""
    answers: list[JSONObject] = []
    for _ in range(2000):
        asks = tool.asks(arguments, answers, room)
        if not asks:
            return tool.result(answers), len(answers)
        answers += [read(ChatReply(text=say, finish_reason="stop"), ask) for ask in asks]
    raise AssertionError("it never ends")


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.card.name)
def test_a_role_of_the_same_name_takes_the_same_payload(tool: TextTool) -> None:
    role = load(None).profiles["productivity"].roles[tool.card.name]
    assert role.payload_schema == tool.card.parameters
    Draft202012Validator.check_schema(tool.card.parameters)
    Draft202012Validator.check_schema(tool.card.result)


# --- pieces ---


@given(TEXT, st.integers(min_value=1, max_value=400))
def test_pieces_are_the_whole_text_and_none_is_too_long(text: str, piece_tokens: int) -> None:
    found = pieces(text, piece_tokens)
    assert "".join(found) == text
    assert all(found) or not text
    # One character of four bytes is more than a token by estimate; it cannot be halved.
    assert all(tokens(piece) <= max(piece_tokens, 2) for piece in found)


def test_a_piece_ends_with_its_paragraph_or_else_its_sentence() -> None:
    paragraphs = "A first one. It has two sentences.\n\n" * 30
    assert all(piece.endswith("\n\n") for piece in pieces(paragraphs, 80))
    sentences = "A sentence that is short. " * 60
    assert all(piece.rstrip().endswith(".") for piece in pieces(sentences, 80))
    assert all(piece.endswith("。") for piece in pieces("これは文です。" * 60, 80))


def test_pieces_are_of_about_one_size_and_no_crumb_is_left() -> None:
    sizes = [tokens(piece) for piece in pieces("word " * 1051, 500)]
    assert min(sizes) > max(sizes) / 4


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One. Two. Thr", "One. Two."),
        ('He said "No." And th', 'He said "No."'),
        ("version 3.11 is", "version 3.11 is"),
        ("no end at all", "no end at all"),
        ("終わり。まだ", "終わり。"),
    ],
)
def test_a_cut_text_is_kept_to_its_last_whole_sentence(text: str, kept: str) -> None:
    assert whole_sentences(text) == kept


# --- summarize and rewrite ---


@given(TEXT.filter(bool), st.integers(min_value=20, max_value=300), st.text(min_size=1, max_size=2000))
@example("word " * 500, 50, "An answer that is longer than a piece. " * 20)
def test_a_summary_ends_whatever_is_answered(text: str, piece_tokens: int, say: str) -> None:
    room = Room(piece_tokens=piece_tokens, answer_tokens=piece_tokens // 3)
    if not say.strip():
        with pytest.raises(InvalidOutputError):
            run(Summarize(), {"text": text}, room, say)
        return
    result, exchanges = run(Summarize(), {"text": text}, room, say)
    assert result["summary"] == say.strip()
    assert exchanges <= 2 * len(pieces(text, piece_tokens))
    assert Draft202012Validator(Summarize.card.result).is_valid(result)


def test_every_word_of_a_long_text_is_read_before_anything_is_merged() -> None:
    words = [f"w{number}" for number in range(2000)]
    asks = Summarize().asks({"text": " ".join(words)}, [], Room(piece_tokens=300))
    assert [w for ask in asks for w in ask.fields["text"].split()] == words
    assert all(ask.fields["several"] == "" for ask in asks)


def test_a_summary_that_reached_its_bound_ends_with_a_sentence_and_says_so() -> None:
    ask = Ask(fields={}, may_be_cut=True)
    answer = read(ChatReply(text="It rained. Then it sto", finish_reason="length"), ask)
    assert Summarize().result([answer]) == {"summary": "It rained.", "pieces": 1, "complete": False}


def test_parts_to_rewrite_leave_room_for_their_answer() -> None:
    asks = Rewrite().asks(
        {"text": "word " * 4000, "instructions": "x"}, [], Room(piece_tokens=1500, answer_tokens=300)
    )
    assert all(tokens(ask.fields["text"]) <= 200 for ask in asks)
    assert sum(len(ask.fields["text"].split()) for ask in asks) == 4000


def test_what_a_content_filter_held_back_is_no_answer() -> None:
    with pytest.raises(InvalidOutputError, match="content filter"):
        read(ChatReply(text="I can", finish_reason="content_filter"), Ask(fields={}, may_be_cut=True))


# --- extract: the caller's schema ---

PYDANTIC: JSONObject = {
    "$defs": {
        "Line": {
            "type": "object",
            "title": "Line",
            "properties": {"item": {"type": "string"}, "price": {"type": "number"}},
            "required": ["item", "price"],
        }
    },
    "type": "object",
    "title": "Invoice",
    "properties": {
        "lines": {"type": "array", "items": {"$ref": "#/$defs/Line"}},
        "first": {"$ref": "#/$defs/Line", "description": "The first line."},
        "pattern": {"type": "string", "description": "A property may have any name."},
    },
    "required": ["lines"],
}


def test_references_within_a_schema_are_followed() -> None:
    held = admitted(PYDANTIC, pointer="/schema")
    assert "$ref" not in str(held)
    assert held["properties"]["lines"]["items"]["required"] == ["item", "price"]
    assert held["properties"]["first"]["description"] == "The first line."
    assert Draft202012Validator(held).is_valid({"lines": [{"item": "a", "price": 1}]})
    assert not Draft202012Validator(held).is_valid({"lines": [{"item": "a"}]})


def test_what_stands_beside_a_reference_holds_too() -> None:
    schema = {
        "$defs": {"name": {"type": "string", "minLength": 2}},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/name", "maxLength": 3}},
    }
    held = Draft202012Validator(admitted(schema, pointer="/schema"))
    assert held.is_valid({"a": "abc"})
    assert not held.is_valid({"a": "a"})
    assert not held.is_valid({"a": "abcd"})


DOUBLING = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(20)} | {
    "d20": {"type": "string"}
}
CHAIN = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(3000)} | {"d3000": {"type": "string"}}


@pytest.mark.parametrize(
    ("schema", "pointer", "says"),
    [
        ({"type": "array"}, "/schema/type", "object"),
        (
            {"type": "object", "properties": {"a": {"type": "date"}}},
            "/schema/properties/a/type",
            "not a JSON",
        ),
        (
            {"type": "object", "properties": {"a": {"pattern": "(a+)+$"}}},
            "/schema/properties/a/pattern",
            "ever",
        ),
        ({"type": "object", "patternProperties": {"a": {}}}, "/schema/patternProperties", "ever"),
        (
            {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:9/x"}}},
            "/schema/properties/a/$ref",
            "within",
        ),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, "/schema/properties/a/$ref", "itself"),
        (
            {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}},
            "/schema/properties/a/$ref",
            "nowhere",
        ),
        (
            {"$defs": {"a": {"$ref": "#/$defs/a"}}, "type": "object", "allOf": [{"$ref": "#/$defs/a"}]},
            "/schema/allOf/0/$ref",
            "itself",
        ),
        (
            {"$defs": DOUBLING, "type": "object", "properties": {"a": {"$ref": "#/$defs/d0"}}},
            "/schema",
            "large",
        ),
        (
            {"$defs": CHAIN, "type": "object", "properties": {"a": {"$ref": "#/$defs/d0"}}},
            "/schema/properties/a/$ref",
            "lead to each other",
        ),
        (
            {"type": "object", "properties": {"a": {"type": "array", "minItems": 10**6}}},
            "/schema/properties/a/minItems",
            "at most",
        ),
        ({"type": "object", "properties": {str(n): {} for n in range(5000)}}, "/schema", "large"),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused_where_it_is_wrong(
    schema: Any, pointer: str, says: str
) -> None:
    with pytest.raises(InvalidPacketError, match=says) as refused:
        Extract().asks({"text": "x", "schema": schema}, [], Room())
    assert refused.value.pointer == pointer


def test_the_form_is_told_once() -> None:
    fields = {"a": {"type": "string"}}
    for arguments in ({"text": "x"}, {"text": "x", "fields": fields, "schema": {"type": "object"}}):
        with pytest.raises(InvalidPacketError) as refused:
            Extract().asks(arguments, [], Room())
        assert refused.value.choices == ("fields", "schema")


def test_the_prompt_names_what_the_schema_describes() -> None:
    (ask,) = Extract().asks({"text": "x", "schema": PYDANTIC}, [], Room())
    assert "- first: The first line." in ask.fields["fields"]
