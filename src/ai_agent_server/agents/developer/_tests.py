"""Tests that QA's LLM wrote, seen as claims: which can be run at all, and what each one says. Pure."""

import ast

import msgspec

from ai_agent_server.core.code_text import IMPORTS, undefined_names


class Claim(msgspec.Struct, frozen=True):
    """What a test says: this expression has this value, both as normalised source."""

    call: str
    value: str


def claim(test: str) -> Claim:
    """`assert f(1) == 2` -> f(1) is 2; `assert f(1)` -> f(1) is True; `assert not f(1)` -> it is False."""
    found = _asserted(test)
    match found:
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[right]):
            return Claim(ast.unparse(left), _value(right))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return Claim(ast.unparse(operand), "False")
        case None:
            return Claim("", test.strip())
        case _:
            return Claim(ast.unparse(found), "True")


def runnable(tests: tuple[str, ...], entry_point: str, anchors: tuple[str, ...]) -> tuple[str, ...]:
    """The tests that say something about `entry_point` and can be run at all.

    Dropped are those that use names nobody defines, pass another number of arguments than every
    anchor does, compare the function with itself, or repeat or contradict an anchor or an earlier test.
    """
    counts = {count for anchor in anchors for count in _argument_counts(anchor, entry_point)}
    known = {claim(anchor).call for anchor in anchors}
    kept: list[str] = []
    for test in tests:
        said = claim(test)
        if said.call in known or not _says_something(test, entry_point):
            continue
        if counts and not _argument_counts(test, entry_point) <= counts:
            continue
        known.add(said.call)
        kept.append(test)
    return tuple(kept)


def _says_something(test: str, entry_point: str) -> bool:
    root = entry_point.partition(".")[0]
    unknown = undefined_names(test, own=root) - (IMPORTS.keys() - {root})
    return unknown == {root} and root not in undefined_names(claim(test).value, own=root)


def _argument_counts(test: str, entry_point: str) -> set[int]:
    found = _asserted(test)
    if found is None:
        return set()
    return {
        len(node.args) + len(node.keywords)
        for node in ast.walk(found)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == entry_point
    }


def _asserted(test: str) -> ast.expr | None:
    try:
        body = ast.parse(test.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    asserts = [statement for statement in body if isinstance(statement, ast.Assert)]
    return asserts[0].test if len(asserts) == 1 else None


def _value(node: ast.expr) -> str:
    """The value's own spelling: `'a'` and `"a"`, `(1)` and `1` are the same."""
    try:
        return repr(ast.literal_eval(node))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return ast.unparse(node)
