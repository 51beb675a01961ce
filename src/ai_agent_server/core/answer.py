"""What an LLM wrote, read as the JSON object that was asked for, or refused by name."""

import json
from collections.abc import Iterator
from typing import NoReturn

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from referencing import Registry

from ai_agent_server.core.chat import ChatReply, JSONObject
from ai_agent_server.errors import InvalidOutputError

MAX_CHARS = 1_000_000
MAX_OBJECTS = 32
"""How many openings of an object are tried in an answer that is prose with JSON in it."""


def read_object(reply: ChatReply, schema: JSONObject) -> JSONObject:
    """The JSON object in `reply` that obeys `schema`, bare, fenced or within prose.

    Raises `InvalidOutputError` saying what the first object that was found does not obey.
    """
    if len(reply.text) > MAX_CHARS:
        raise InvalidOutputError(f"the answer is longer than {MAX_CHARS} characters")
    # A registry of its own: a schema that refers elsewhere is never fetched.
    validator = Draft202012Validator(schema, registry=Registry())
    problem = ""
    for found in _objects(reply.text):
        mistake = best_match(validator.iter_errors(found))
        if mistake is None:
            return found
        where = "/".join(str(part) for part in mistake.absolute_path)
        problem = problem or f"{mistake.message[:200]}{f' at {where}' if where else ''}"
    if problem:
        raise InvalidOutputError(problem)
    if reply.finish_reason == "length":
        raise InvalidOutputError("the answer was cut off before its JSON object ended")
    raise InvalidOutputError("the answer holds no JSON object")


def read_text(reply: ChatReply) -> str:
    """The answer as text. Raises `InvalidOutputError` when there is none."""
    text = reply.text.strip()
    if not text:
        raise InvalidOutputError("the answer is empty")
    if len(text) > MAX_CHARS:
        raise InvalidOutputError(f"the answer is longer than {MAX_CHARS} characters")
    return text


def _objects(text: str) -> Iterator[JSONObject]:
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    at = -1
    for _ in range(MAX_OBJECTS):
        at = text.find("{", at + 1)
        if at < 0:
            return
        try:
            found, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        yield found
        at = end - 1


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
