"""Prompt files filled in, and answers read: by table."""

import pytest

from ai_agent_server.core.answer import read_object
from ai_agent_server.core.chat import ChatReply, JSONObject
from ai_agent_server.core.prompt import render, section_of
from ai_agent_server.errors import ConfigurationError, InvalidOutputError
from tests.agent_context import Chat, Task

AGE: JSONObject = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}


def texts(template: str, **fields: str) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in render(template, fields)]


def test_what_stands_above_the_line_is_the_system_message() -> None:
    assert texts("Be brief.\n---\nSay $word.", word="hi") == [("system", "Be brief."), ("user", "Say hi.")]
    assert texts("Say $word.", word="hi") == [("user", "Say hi.")]


def test_a_paragraph_with_nothing_to_say_is_left_out() -> None:
    template = "Do $task.\n\nExample:\n$example\n\nBe quick."
    assert texts(template, task="it", example="") == [("user", "Do it.\n\nBe quick.")]
    assert texts(template, task="it") == [("user", "Do it.\n\nBe quick.")]


def test_a_paragraph_stays_when_one_of_its_names_is_known() -> None:
    assert texts("$a and $b", a="x") == [("user", "x and")]


def test_what_a_field_holds_is_never_read_as_a_template() -> None:
    assert texts("$task", task="costs $5, $code and $$", code="SECRET") == [
        ("user", "costs $5, $code and $$")
    ]


def test_two_dollars_are_one() -> None:
    assert texts("It costs $$5.") == [("user", "It costs $5.")]


def test_a_section_ends_where_the_next_begins() -> None:
    prompt = "## write\nWrite.\n\n## look again\nLook."
    assert section_of(prompt, "write") == "Write."
    assert section_of(prompt, "look again") == "Look."
    with pytest.raises(ConfigurationError, match="review"):
        section_of(prompt, "review")


@pytest.mark.parametrize(
    "text",
    [
        '{"age": 36}',
        '```json\n{"age": 36}\n```',
        'Sure! {"age": 36} I hope that helps {you}.',
        'First {"years": 36}, or rather {"age": 36}',
        '{"wrong": {"age": 36}} {"age": 36}',
    ],
)
def test_an_object_is_found_bare_fenced_or_in_prose(text: str) -> None:
    assert read_object(ChatReply(text=text, finish_reason="stop"), AGE) == {"age": 36}


@pytest.mark.parametrize(
    ("text", "finish_reason", "problem"),
    [
        ("", "stop", "no JSON object"),
        ("thirty-six", "stop", "no JSON object"),
        ('{"age": 3', "length", "cut off"),
        ('{"age": "36"}', "stop", "not of type 'integer' at age"),
        ('{"age": 36, "name": "Ada"}', "stop", "Additional properties"),
        ('{"age": NaN}', "stop", "no JSON object"),
        ("{" * 50_000, "stop", "no JSON object"),
        ("[36]", "stop", "no JSON object"),
    ],
)
def test_anything_else_is_refused_by_name(text: str, finish_reason: str, problem: str) -> None:
    reply = ChatReply(text=text, finish_reason="length" if finish_reason == "length" else "stop")
    with pytest.raises(InvalidOutputError, match=problem):
        read_object(reply, AGE)


async def test_a_role_needs_only_a_prompt_file() -> None:
    chat = Chat("BONJOUR")
    task = Task("productivity", "title", {"text": "hello", "instructions": "shout in French"})
    outcome = await task.run("title", chat, prompt="$text -> $instructions ($payload)", result_schema=None)
    assert outcome.output == {"text": "BONJOUR"}
    assert chat.prompt.startswith("hello -> shout in French (")
    assert '"text": "hello"' in chat.prompt


async def test_a_role_without_a_prompt_file_is_given_its_payload() -> None:
    chat = Chat("4")
    task = Task("productivity", "title", {"task": "2 + 2?"})
    await task.run("title", chat, prompt="")
    assert chat.prompt == "2 + 2?"


async def test_a_role_sees_what_ran_before_it() -> None:
    task = Task("productivity", "title", {"text": "hello", "instructions": "shout"})
    await task.run("title", Chat("HELLO"))
    chat = Chat("HELLO!")
    await task.run("title", chat, prompt="Make $work louder: $title")
    assert chat.prompt == "Make HELLO louder: HELLO"


async def test_a_role_with_a_schema_asks_for_it_and_holds_the_answer_to_it() -> None:
    task = Task("productivity", "title", {"text": "Ada is 36", "instructions": "count"})
    chat = Chat('{"age": 36}', '{"age": "?"}')
    outcome = await task.run("title", chat, result_schema=AGE)
    assert outcome.output == {"age": 36}
    assert chat.sent[0].response_schema == AGE
    with pytest.raises(InvalidOutputError):
        await task.run("title", chat, result_schema=AGE)


async def test_a_repeat_says_what_was_wrong_and_has_another_seed() -> None:
    task = Task("productivity", "title", {"text": "Ada", "instructions": "count"})
    first, second = Chat("none"), Chat('{"age": 36}')
    with pytest.raises(InvalidOutputError):
        await task.run("title", first, result_schema=AGE)
    await task.run("title", second, attempt=2, result_schema=AGE)
    assert "the answer holds no JSON object" not in first.prompt
    assert "the answer holds no JSON object" in second.prompt
    assert first.sent[0].seed != second.sent[0].seed
