"""What came from outside, read as JSON: one decoder for bodies, messages and queries.

Every mistake is an `InvalidPacketError` that says where (a JSON pointer) and what would have been taken.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from ai_agent_server.errors import InvalidPacketError, MalformedPacketError

MAX_DEPTH = 64
"""Levels of objects and arrays. Far below what any recursive reader behind this one can take."""

T = TypeVar("T")

_MISTAKE = re.compile(r"(?s)(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>.*)`)?")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[(\.\.\.)\]")


def decode(raw: bytes, kind: type[T]) -> T:
    """`raw` as a `kind`. Raises `MalformedPacketError` (no JSON) or `InvalidPacketError` (another shape)."""
    return _convert(_read(raw), kind, strict=True)


def decode_query(pairs: Iterable[tuple[str, str]], kind: type[T]) -> T:
    """Query parameters as a `kind`; numbers and booleans may be written as text."""
    given: dict[str, str] = {}
    for name, value in pairs:
        if name in given:
            raise InvalidPacketError(f"{name!r} stands twice", pointer=json_pointer((name,)))
        given[name] = value
    return _convert(given, kind, strict=False)


def _read(raw: bytes) -> Any:
    try:
        value = msgspec.json.decode(raw)
    except UnicodeDecodeError as exc:
        raise MalformedPacketError("not UTF-8", expected="JSON in UTF-8") from exc
    except RecursionError as exc:
        raise _too_deep() from exc
    except msgspec.ValidationError as exc:
        what, path = _taken_apart(exc)
        raise MalformedPacketError(what.lower(), pointer=json_pointer(path)) from exc
    except msgspec.DecodeError as exc:
        raise MalformedPacketError(f"not JSON: {exc}", expected="one JSON object in UTF-8") from exc
    # Both walks cost a pass over the values; nearly no packet needs one.
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and is_deeper(value, MAX_DEPTH):
        raise _too_deep()
    if (path_of_twice := _find_twice(raw)) is not None:
        raise InvalidPacketError(
            f"the key {path_of_twice[-1][:80]!r} stands twice in one object",
            pointer=json_pointer(path_of_twice),
            expected="each key once",
        )
    if b"\\u0000" in raw and (path_of_nul := _find_nul(value)) is not None:
        raise InvalidPacketError(
            "text holds the character NUL", pointer=json_pointer(path_of_nul), expected="text without U+0000"
        )
    return value


def _too_deep() -> MalformedPacketError:
    return MalformedPacketError("nested too deep", expected=f"at most {MAX_DEPTH} levels")


def is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and arrays are nested deeper than `levels`."""
    level = [value]
    for _ in range(levels):
        level = [child for node in level for child in _children(node) if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _children(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


class _KeyTwice(dict[str, Any]):
    """An object in which `twice` stands twice."""

    def __init__(self, pairs: list[tuple[str, Any]], twice: str) -> None:
        super().__init__(pairs)
        self.twice = twice


def _find_twice(raw: bytes) -> tuple[str, ...] | None:
    """Where a key stands twice in one object. msgspec takes the last one without a word."""
    found = False

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        made = dict(pairs)
        if len(made) == len(pairs):
            return made
        found = True
        names = [name for name, _ in pairs]
        return _KeyTwice(pairs, next(name for at, name in enumerate(names) if name in names[:at]))

    # The numbers are of no interest, and Python refuses to convert very long ones.
    value = json.loads(raw.decode(), object_pairs_hook=once, parse_int=str, parse_float=str)
    waiting: list[tuple[tuple[str, ...], Any]] = [((), value)] if found else []
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, _KeyTwice):
            return (*path, node.twice)
        if isinstance(node, dict):
            waiting.extend(((*path, key), child) for key, child in node.items())
        elif isinstance(node, list):
            waiting.extend(((*path, str(index)), child) for index, child in enumerate(node))
    return None


def _find_nul(value: Any) -> tuple[str, ...] | None:
    waiting: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, str) and "\0" in node:
            return path
        if isinstance(node, dict):
            if any("\0" in key for key in node):
                return path
            waiting.extend(((*path, key), child) for key, child in node.items())
        elif isinstance(node, list):
            waiting.extend(((*path, str(index)), child) for index, child in enumerate(node))
    return None


def _convert(value: Any, kind: type[T], *, strict: bool) -> T:
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as exc:
        raise explained(exc, kind) from exc


def explained(exc: msgspec.ValidationError, kind: type[Any]) -> InvalidPacketError:
    """What msgspec says of a value that is no `kind`: where, and what would have been taken."""
    what, path = _taken_apart(exc)
    here = inspect.type_info(kind)
    for step in path:
        here = _below(here, step)
    if unknown := re.fullmatch(r"(?s)Object contains unknown field `(.*)`", what):
        return InvalidPacketError(
            f"unknown key {unknown[1][:80]!r}",
            pointer=json_pointer((*path, unknown[1][:80])),
            choices=_choices(here),
        )
    if missing := re.fullmatch(r"Object missing required field `(.*)`", what):
        path = (*path, missing[1])
        return InvalidPacketError(
            f"{missing[1]!r} is missing",
            pointer=json_pointer(path),
            expected=_named(_below(here, missing[1])),
        )
    if wrong := re.fullmatch(r"(?s)Expected (.+), got (.+)", what):
        return InvalidPacketError(
            f"got {_plain(wrong[2])}",
            pointer=json_pointer(path),
            expected=_plain(wrong[1]),
            choices=_choices(here),
        )
    if wrong := re.fullmatch(r"(?s)Expected (.+)", what):
        return InvalidPacketError("out of bounds", pointer=json_pointer(path), expected=_plain(wrong[1]))
    return InvalidPacketError(what[:300].lower(), pointer=json_pointer(path), choices=_choices(here))


def _plain(words: str) -> str:
    return words.replace("`", "").replace(" | null", " or null")


def _taken_apart(exc: msgspec.ValidationError) -> tuple[str, tuple[str, ...]]:
    """msgspec's message as what and where. It names no key of a free dictionary: the path ends before."""
    match = _MISTAKE.fullmatch(str(exc))
    if match is None:
        return str(exc), ()
    path: list[str] = []
    for name, index, anywhere in _STEP.findall(match["path"] or ""):
        if anywhere:
            break
        path.append(name or index)
    return match["what"], tuple(path)


def json_pointer(path: Iterable[str | int]) -> str:
    """RFC 6901."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def _below(here: inspect.Type, step: str) -> inspect.Type:
    """The type of the member `step` of `here`; `AnyType` where that says nothing."""
    for kind in _members(here):
        match kind:
            case inspect.StructType(fields=fields):
                for field in fields:
                    if field.encode_name == step:
                        return field.type
            case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
                return item
            case inspect.FrozenSetType(item_type=item) | inspect.DictType(value_type=item):
                return item
            case _:
                continue
    return inspect.AnyType()


def _members(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    if isinstance(kind, inspect.UnionType):
        return tuple(member for branch in kind.types for member in _members(branch))
    if isinstance(kind, inspect.Metadata):
        return _members(kind.type)
    return (kind,)


def _choices(here: inspect.Type) -> tuple[str, ...]:
    found: list[str] = []
    for kind in _members(here):
        match kind:
            case inspect.StructType(fields=fields):
                found.extend(field.encode_name for field in fields)
            case inspect.LiteralType(values=values):
                found.extend(str(value) for value in values)
            case inspect.EnumType(cls=cls):
                found.extend(str(member.value) for member in cls)
            case _:
                continue
    return tuple(found)


_NAMES: Mapping[type[inspect.Type], str] = {
    inspect.DictType: "object",
    inspect.StructType: "object",
    inspect.ListType: "array",
    inspect.VarTupleType: "array",
    inspect.StrType: "string",
    inspect.BoolType: "boolean",
    inspect.IntType: "integer",
    inspect.FloatType: "number",
}


def _named(here: inspect.Type) -> str:
    return " or ".join(_NAMES.get(type(kind), "value") for kind in _members(here))
