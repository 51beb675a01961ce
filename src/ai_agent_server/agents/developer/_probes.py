"""Probes: calls like the examples' own, with other values, to see whether two versions do the same. Pure.

A version that passes the one example of a task is often wrong; two versions that were drawn apart,
pass it and do the same on other inputs seldom are. The idea is AlphaCode's (Li et al. 2022, section
4.6) and CodeT's (Chen et al. 2022): wrong programs differ, right ones agree.
"""

import ast
from collections.abc import Iterator
from itertools import zip_longest
from math import isfinite

MAX_PROBES = 24
MATRIX_DEPTH = 1
"""How deep in lists of lists a value is changed."""
MIN_SHARED = 3
"""Probes on which both versions have a value, for agreement to mean something."""


def probes(anchors: tuple[str, ...], entry_point: str) -> tuple[str, ...]:
    """At most `MAX_PROBES` calls of `entry_point`, near those of the anchors and unlike each.

    None where no anchor calls it with literals alone.
    """
    calls = [call for anchor in anchors for call in _calls(anchor, entry_point)]
    known = {_spelled(entry_point, arguments) for arguments in calls}
    found: dict[str, None] = {}
    for round_ in zip_longest(*(tuple(_near_call(arguments)) for arguments in calls)):
        for arguments in round_:
            if arguments is not None and (text := _spelled(entry_point, arguments)) not in known:
                found.setdefault(text)
    return tuple(found)[:MAX_PROBES]


def agree(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether two versions had equal values wherever both had one, in `MIN_SHARED` places at least.

    Where one of them raised nothing is held against either: the input may not be allowed. Values that
    are all the same are no sign: `return True` agrees with every other way to be wrong.
    """
    shared = [(a, b) for a, b in zip(one, other, strict=False) if a and b]
    return len(shared) >= MIN_SHARED and len(set(shared)) > 1 and all(a == b for a, b in shared)


def _calls(anchor: str, entry_point: str) -> Iterator[tuple[object, ...]]:
    try:
        tree = ast.parse(anchor)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == entry_point
            and not node.keywords
        ):
            try:
                yield tuple(ast.literal_eval(argument) for argument in node.args)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue


def _near_call(arguments: tuple[object, ...]) -> Iterator[tuple[object, ...]]:
    """One argument changed at a time, then all at once."""
    near = [tuple(_near(argument)) for argument in arguments]
    for round_ in range(max(map(len, near), default=0)):
        if len(arguments) > 1:
            yield tuple(
                values[round_ % len(values)] if values else argument
                for argument, values in zip(arguments, near, strict=True)
            )
        for place, values in enumerate(near):
            if round_ < len(values):
                yield (*arguments[:place], values[round_], *arguments[place + 1 :])


def _near(value: object, depth: int = 0) -> Iterator[object]:
    """Values of the same kind, close by: an allowed input has allowed neighbours more often than not."""
    match value:
        case bool():
            yield not value
        case int():
            yield from (value + 1, value - 1 if value else 3, value * 2 + 1, value + 7, value * 3, value + 2)
            yield from (value * 10 + 4, 0 if value else 1)
        case float():
            yield from (near for near in (value + 1, value / 2, value * 2) if isfinite(near))
        case str():
            yield from (value[::-1], value[1:], value + value, value.swapcase(), f"{value}a", value[:-1])
        case list() | tuple():
            kind, items = type(value), list(value)
            yield from (kind(items[::-1]), kind(items[1:]), kind(items[:-1]), kind(items + items[:1]))
            if items and depth <= MATRIX_DEPTH:
                near = [tuple(_near(item, depth + 1)) for item in items]
                # All items together: what a smallest or a longest item decides seldom changes with one.
                for which in range(3):
                    yield kind(
                        [
                            way[which % len(way)] if way else item
                            for item, way in zip(items, near, strict=True)
                        ]
                    )
                yield from (kind(items[:1]), kind(items[len(items) // 2 :]))
                for place in {0: None, len(items) - 1: None}:
                    for changed in near[place][:3]:
                        yield kind([*items[:place], changed, *items[place + 1 :]])
        case set() if value:
            yield set(sorted(value, key=repr)[1:])
        case dict() if value:
            pairs = list(value.items())
            yield from (dict(pairs[1:]), dict(pairs[::-1]))
            for changed in tuple(_near(pairs[0][1], depth + 1))[:2]:
                yield {**value, pairs[0][0]: changed}
        case _:
            return


def _spelled(entry_point: str, arguments: tuple[object, ...]) -> str:
    return f"{entry_point}({', '.join(map(repr, arguments))})"
