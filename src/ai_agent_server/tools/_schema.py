"""A JSON Schema from outside, made safe to hold an answer to: bounded, and without references. Pure."""

from typing import Any
from urllib.parse import unquote

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.packet_json import json_pointer
from ai_agent_server.errors import InvalidPacketError

MAX_NODES = 4000
MAX_DEPTH = 24
REFUSED = {
    "pattern": "a regular expression can take for ever; say it with `enum`, or in a `description`",
    "patternProperties": "a regular expression can take for ever; name the properties",
    "$dynamicRef": "only `$ref` within the schema is followed",
    "$dynamicAnchor": "only `$ref` within the schema is followed",
    "$anchor": "only `$ref` by JSON pointer is followed",
    "$id": "only `$ref` within the schema is followed",
    "$recursiveRef": "only `$ref` within the schema is followed",
}
COUNTS = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})
MAX_COUNT = 2000
"""A grammar repeats its rule so often; llama.cpp refuses more."""
NAMES = frozenset({"properties", "dependentSchemas"})
"""Keywords whose keys are names, not keywords."""
PLAIN = frozenset({"enum", "const", "default", "examples", "required", "dependentRequired"})
"""Keywords that hold values, not schemas."""
ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated"})


def admitted(schema: JSONObject, *, pointer: str) -> JSONObject:
    """`schema` with each `$ref` replaced by what it refers to, for whatever grammar will hold it.

    A chain of references can make a small schema endless, or double it with every link: what comes of it is
    counted. Raises `InvalidPacketError` at `pointer` and below.
    """
    inlined: JSONObject = _Inliner(schema, pointer).schema(schema, (), ())
    mistake = best_match(Draft202012Validator(Draft202012Validator.META_SCHEMA).iter_errors(inlined))
    if mistake is not None:
        raise InvalidPacketError(
            f"not a JSON Schema: {mistake.message[:200]}",
            pointer=pointer + json_pointer(str(part) for part in mistake.absolute_path),
        )
    if inlined.get("type") != "object":
        raise InvalidPacketError(
            "the schema must be that of an object", pointer=f"{pointer}/type", expected="object"
        )
    return inlined


class _Inliner:
    """One walk over one schema."""

    def __init__(self, root: JSONObject, pointer: str) -> None:
        self._root, self._pointer = root, pointer
        self._nodes = 0

    def schema(self, node: Any, at: tuple[str, ...], inside: tuple[str, ...]) -> Any:
        """`node`, a schema, without references; `inside` are those that led here."""
        self._count(at)
        if isinstance(node, list):
            return [self.schema(part, (*at, str(index)), inside) for index, part in enumerate(node)]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return self._inlined(node, at, inside)
        made: JSONObject = {}
        for key, value in node.items():
            if key in REFUSED:
                raise self._refused(f"`{key}` is not taken: {REFUSED[key]}", (*at, key))
            if key in COUNTS and isinstance(value, int | float) and value > MAX_COUNT:
                raise self._refused(f"`{key}` is at most {MAX_COUNT}", (*at, key))
            if key in {"$defs", "definitions", "$schema", "$comment"}:
                continue
            if key in NAMES and isinstance(value, dict):
                made[key] = {
                    name: self.schema(part, (*at, key, name), inside) for name, part in value.items()
                }
            elif key in PLAIN:
                self._count(at, _size(value))
                made[key] = value
            else:
                made[key] = self.schema(value, (*at, key), inside)
        return made

    def _inlined(self, node: JSONObject, at: tuple[str, ...], inside: tuple[str, ...]) -> Any:
        reference = node["$ref"]
        found = self._followed(reference, (*at, "$ref"), inside)
        target = self.schema(found, at, (*inside, reference))
        beside = {key: value for key, value in node.items() if key != "$ref"}
        if not beside:
            return target
        if isinstance(target, dict) and beside.keys() <= ANNOTATIONS:
            return {**target, **beside}
        return {**self.schema(beside, at, inside), "allOf": [target]}

    def _followed(self, reference: Any, here: tuple[str, ...], inside: tuple[str, ...]) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise self._refused("only `$ref` within the schema is followed", here)
        if reference in inside or reference == "#":
            raise self._refused("the schema contains itself; no answer could be bounded", here)
        if len(inside) >= MAX_DEPTH:
            raise self._refused(f"more than {MAX_DEPTH} `$ref` lead to each other", here)
        node: Any = self._root
        for part in reference[2:].split("/"):
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if not isinstance(node, dict) or name not in node:
                raise self._refused(f"`$ref` {reference[:80]!r} leads nowhere", here)
            node = node[name]
        return node

    def _count(self, at: tuple[str, ...], nodes: int = 1) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES or len(at) > MAX_DEPTH * 2:
            raise InvalidPacketError(
                "the schema is too large", pointer=self._pointer, expected=f"at most {MAX_NODES} parts"
            )

    def _refused(self, problem: str, at: tuple[str, ...]) -> InvalidPacketError:
        return InvalidPacketError(problem, pointer=self._pointer + json_pointer(at))


def _size(value: Any) -> int:
    """How many values `value` is made of; what came in is no deeper than the decoder allows."""
    if isinstance(value, dict):
        return 1 + sum(_size(part) for part in value.values())
    if isinstance(value, list):
        return 1 + sum(_size(part) for part in value)
    return 1
