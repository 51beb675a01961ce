"""The productivity roles: payloads held to their schemas, answers to what the payload asks for."""

import base64

import pytest
from jsonschema import Draft202012Validator

from ai_agent_server.core.chat import ImagePart, JSONObject
from ai_agent_server.errors import ConfigurationError, InvalidOutputError, InvalidPacketError
from tests.agent_context import Chat, Task, packaged

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 8
WEBP = b"RIFF\0\0\0\0WEBPVP8 "
INVOICE: JSONObject = {
    "text": "Invoice 7 of ACME: 2 bolts at 0.10, 1 nut at 0.05. Unpaid.",
    "fields": {
        "number": {"type": "integer", "required": True},
        "date": {"type": "string", "description": "As it is written."},
        "state": {"type": "string", "enum": ["paid", "unpaid"], "required": True},
        "lines": {
            "type": "object",
            "many": True,
            "fields": {"item": {"type": "string", "required": True}, "price": {"type": "number"}},
        },
    },
}


def accepts(role: str, payload: JSONObject) -> bool:
    schema = packaged().profiles["productivity"].roles[role].payload_schema
    assert schema is not None
    return Draft202012Validator(schema).is_valid(payload)


@pytest.mark.parametrize(
    ("role", "payload"),
    [
        ("classify", {"text": "x", "labels": ["a", "b"]}),
        ("extract", INVOICE),
        ("summarize", {"text": "x", "words": 20}),
        ("rewrite", {"text": "x", "instructions": "shorter"}),
        ("vision", {"task": "x", "image": "photos/cat.png"}),
    ],
)
def test_a_payload_as_described_is_accepted_and_another_key_is_not(role: str, payload: JSONObject) -> None:
    assert accepts(role, payload)
    assert not accepts(role, payload | {"txt": "x"})
    for required in ("text", "image"):
        assert required not in payload or not accepts(
            role, {k: v for k, v in payload.items() if k != required}
        )


@pytest.mark.parametrize(
    "field",
    [
        {"type": "date"},
        {"type": "object"},
        {"type": "string", "pattern": "(a+)+$"},
        {"$ref": "http://127.0.0.1:9/schema"},
        {"type": "object", "fields": {"deep": {"type": "object", "fields": {"x": {"type": "string"}}}}},
        {},
    ],
)
def test_a_field_can_be_no_more_than_is_described(field: JSONObject) -> None:
    assert not accepts("extract", {"text": "x", "fields": {"a": field}})


# --- classify ---


async def test_one_label_is_chosen_of_those_given() -> None:
    chat = Chat('{"label": "billing"}')
    task = Task("productivity", "classify", {"text": "Charged twice!", "labels": ["billing", "bug"]})
    assert (await task.run("classify", chat)).output == {"label": "billing"}
    assert chat.sent[0].response_schema is not None
    assert chat.sent[0].response_schema["properties"]["label"] == {"enum": ["billing", "bug"]}
    assert "- billing\n- bug" in chat.prompt
    assert "Charged twice!" in chat.prompt


async def test_a_label_that_was_not_given_is_refused() -> None:
    task = Task("productivity", "classify", {"text": "x", "labels": ["billing", "bug"]})
    with pytest.raises(InvalidOutputError):
        await task.run("classify", Chat('{"label": "Billing department"}'))


async def test_all_labels_that_fit() -> None:
    task = Task("productivity", "classify", {"text": "x", "labels": ["a", "b", "c"], "multiple": True})
    assert (await task.run("classify", Chat('{"labels": ["a", "c"]}'))).output == {"labels": ["a", "c"]}
    # No grammar can say that each comes once.
    assert (await task.run("classify", Chat('{"labels": ["a", "a"]}'))).output == {"labels": ["a"]}
    with pytest.raises(InvalidOutputError):
        await task.run("classify", Chat('{"labels": ["d"]}'))


# --- extract ---


async def test_fields_are_taken_out_and_what_is_not_there_is_null() -> None:
    answer = (
        '{"number": 7, "date": null, "state": "unpaid", '
        '"lines": [{"item": "bolt", "price": 0.1}, {"item": "nut", "price": null}]}'
    )
    outcome = await Task("productivity", "extract", INVOICE).run("extract", Chat(answer))
    assert outcome.output is not None
    assert outcome.output["number"] == 7
    assert outcome.output["date"] is None
    assert [line["item"] for line in outcome.output["lines"]] == ["bolt", "nut"]


@pytest.mark.parametrize(
    "answer",
    [
        '{"number": null, "date": null, "state": "paid", "lines": []}',
        '{"number": 7, "date": null, "state": "late", "lines": []}',
        '{"number": 7, "state": "paid", "lines": []}',
        '{"number": 7, "date": null, "state": "paid", "lines": [{"item": null, "price": 1}]}',
        '{"number": 7, "date": null, "state": "paid", "lines": [], "total": 0.25}',
    ],
)
async def test_an_answer_that_is_not_as_the_fields_say_is_refused(answer: str) -> None:
    with pytest.raises(InvalidOutputError):
        await Task("productivity", "extract", INVOICE).run("extract", Chat(answer))


# --- summarize ---


async def test_a_short_text_takes_one_call() -> None:
    task = Task("productivity", "summarize", {"text": "It rained.", "words": 5})
    chat = Chat("Rain.")
    outcome = await task.run("summarize", chat)
    assert (outcome.verdict, outcome.output) == (
        "done",
        {"summary": "Rain.", "pieces": 1, "complete": True},
    )
    assert "At most 5 words" in chat.prompt
    assert "parts" not in chat.prompt


async def test_a_long_text_is_read_to_its_end_and_merged_one_exchange_a_step() -> None:
    words = [f"word{number}" for number in range(400)]
    task = Task("productivity", "summarize", {"text": " ".join(words)})
    seen: list[str] = []
    for number in range(20):
        chat = Chat(f"Summary number {number}.")
        outcome = await task.run("summarize", chat, options={"piece_tokens": 150})
        assert len(chat.sent) == 1
        assert len(chat.prompt) < 1000
        seen.append(chat.prompt)
        if outcome.verdict == "done":
            break
    assert all(word in "".join(seen) for word in words)
    # Six pieces were read, then all that was written of them.
    assert outcome.output == {"summary": "Summary number 6.", "pieces": 7, "complete": True}
    assert all(f"Summary number {number}." in seen[-1] for number in range(6))


async def test_a_step_that_was_unusable_is_asked_again_and_leaves_no_gap() -> None:
    task = Task("productivity", "summarize", {"text": "One. " * 300})
    await task.run("summarize", Chat("First."), options={"piece_tokens": 250})
    with pytest.raises(InvalidOutputError):
        await task.run("summarize", Chat("  "), options={"piece_tokens": 250})
    await task.run("summarize", Chat("Second."), attempt=2, options={"piece_tokens": 250})
    chat = Chat("Both.")
    outcome = await task.run("summarize", chat, options={"piece_tokens": 250})
    assert outcome.output == {"summary": "Both.", "pieces": 3, "complete": True}
    assert "First.\n\nSecond." in chat.prompt


async def test_a_piece_of_no_size_is_a_mistake_in_the_configuration() -> None:
    task = Task("productivity", "summarize", {"text": "It rained."})
    with pytest.raises(ConfigurationError, match="piece_tokens"):
        await task.run("summarize", Chat("Rain."), options={"piece_tokens": 0})


def test_the_packaged_routes_bring_a_long_text_back() -> None:
    routes = packaged().profiles["productivity"].workflow.routes
    assert [edge.to for edge in routes["summarize.more"]] == ["summarize"]
    assert [edge.to for edge in routes["rewrite.more"]] == ["rewrite"]


# --- rewrite ---


async def test_a_long_text_is_rewritten_part_by_part() -> None:
    text = "\n\n".join(f"Paragraph {number} says little." for number in range(40))
    task = Task("productivity", "rewrite", {"text": text, "instructions": "Shorter."})
    first = Chat("A.")
    assert (await task.run("rewrite", first, options={"piece_tokens": 200})).verdict == "more"
    outcome = await task.run("rewrite", Chat("B."), options={"piece_tokens": 200})
    assert (outcome.verdict, outcome.output) == ("done", {"text": "A.\n\nB."})
    assert first.prompt.rstrip().endswith("Rewrite it: Shorter.")


async def test_a_rewriting_that_was_cut_off_is_none() -> None:
    task = Task("productivity", "rewrite", {"text": "x", "instructions": "Longer."})
    with pytest.raises(InvalidOutputError, match="cut off"):
        await task.run("rewrite", Chat("And so on and", finish_reason="length"))


# --- vision ---


def data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


async def test_an_image_goes_along_as_a_part() -> None:
    chat = Chat("A cat.")
    task = Task("productivity", "vision", {"task": "What is it?", "image": data_url(PNG)})
    assert (await task.run("vision", chat)).output == {"text": "A cat."}
    (message,) = chat.sent[0].messages
    image = ImagePart(media_type="image/png", content=base64.b64encode(PNG).decode())
    assert message.text == "What is it?"
    assert image in message.parts


async def test_the_first_bytes_say_what_kind_of_image_it_is() -> None:
    chat = Chat("A cat.")
    task = Task("productivity", "vision", {"task": "?", "image": data_url(WEBP, "image/png")})
    await task.run("vision", chat)
    assert any(
        isinstance(p, ImagePart) and p.media_type == "image/webp" for p in chat.sent[0].messages[0].parts
    )


async def test_a_file_is_read_where_it_is_allowed() -> None:
    chat = Chat("A cat.")
    task = Task("productivity", "vision", {"task": "?", "image": "/photos/cat.png"})
    await task.run("vision", chat, files={"/photos/cat.png": PNG})
    assert len(chat.sent) == 1


@pytest.mark.parametrize(
    "image",
    [
        "/etc/passwd",
        "data:image/png,rawbytes",
        "data:image/png;base64,é",
        data_url(PNG) + "***",
        data_url(b"GIF? no"),
    ],
)
async def test_what_is_no_image_is_refused_before_anybody_is_asked(image: str) -> None:
    chat = Chat("A cat.")
    with pytest.raises(InvalidPacketError) as refused:
        await Task("productivity", "vision", {"task": "?", "image": image}).run("vision", chat)
    assert refused.value.pointer == "/payload/image"
    assert chat.sent == []


async def test_an_address_as_image_is_refused_with_a_sentence_of_its_own() -> None:
    task = Task("productivity", "vision", {"task": "?", "image": "https://example.org/cat.png"})
    with pytest.raises(InvalidPacketError, match="not fetched from an address") as refused:
        await task.run("vision", Chat("A cat."))
    assert refused.value.pointer == "/payload/image"
