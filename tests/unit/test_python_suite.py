"""Parts of the test runner that decide: what is sent as a literal, what is evaluated where."""

import ast
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_agent_server.core.code_text import builtin_under_test
from ai_agent_server.sandbox._suite_judge import is_plain, plain_value
from ai_agent_server.sandbox._suite_worker import literal
from ai_agent_server.sandbox.python_suite import suite_sha256

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.sets(st.integers() | st.text())
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=20,
)


@given(plain)
def test_plain_values_go_over_as_literals_and_come_back_the_same(value: object) -> None:
    back = plain_value(literal(value))
    assert back == value
    assert type(back) is type(value)


class AlwaysEqual(int):
    """A subclass that lies."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    "value", [AlwaysEqual(1), [AlwaysEqual(1)], {AlwaysEqual(1): 2}, object(), math.nan, iter(()), range(3)]
)
def test_what_has_no_literal_form_is_never_passed_off_as_one(value: object) -> None:
    with pytest.raises(TypeError):
        literal(value)


@pytest.mark.parametrize(
    ("expression", "here"),
    [
        ("[1, 2, 3]", True),
        ("sorted([3, 1])", True),
        ("math.sqrt(2) / 2", True),
        ("-1", True),
        ("f(1)", False),
        ("x", False),
        ("'a'.upper()", False),
        ("[n for n in range(3)]", False),
        ("open('x')", False),
        ("(lambda: 1)()", False),
        ("__import__('os')", False),
    ],
)
def test_the_judge_evaluates_only_what_cannot_come_from_the_code(expression: str, here: bool) -> None:
    assert is_plain(ast.parse(expression, mode="eval").body) is here


@pytest.mark.parametrize(
    ("tests", "entry_point", "subject"),
    [
        (("assert sum(1, 2) == 3", "assert abs(sum(1, 2) - 3) < 1"), "", "sum"),
        (("assert gcd(4, 6) == 2",), "", "gcd"),
        (("assert sum(f(1)) == 3",), "", None),
        (("assert sum(1, 2) == 3", "assert f(1) == 3"), "", None),
        (("assert sum(1, 2) == 3", "assert max(1, 2) == 2"), "", None),
        (("assert round(sum(1, 2)) == 3",), "", None),
        (("assert round(sum(1, 2)) == 3",), "sum", "sum"),
        (("assert sum(Point(1, 2)) == 3",), "sum", "sum"),
        (("assert sum(f(1)) == 3",), "f", None),
        (("assert 'a'.upper() == 'A'",), "", None),
        ((), "", None),
        (("assert f(",), "f", None),
    ],
)
def test_the_suite_alone_says_which_builtins_name_is_the_codes(
    tests: tuple[str, ...], entry_point: str, subject: str | None
) -> None:
    assert builtin_under_test(tests, entry_point) == subject


def test_a_suite_has_one_name_whatever_runs_it() -> None:
    assert suite_sha256(("a",), ("b",)) == suite_sha256(("a",), ("b",))
    assert suite_sha256(("a",), ("b",)) != suite_sha256(("a", "b"), ())
