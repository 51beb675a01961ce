"""Probes: calls near the examples', and when two versions that pass them do the same."""

import ast

from hypothesis import given
from hypothesis import strategies as st

from ai_agent_server.agents.developer._probes import MAX_PROBES, agree, probes

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.lists(VALUES, max_size=4))
def test_probes_are_calls_of_the_function_with_other_values_than_the_examples(
    arguments: list[object],
) -> None:
    anchor = f"assert f({', '.join(map(repr, arguments))}) == 1"
    found = probes((anchor,), "f")
    assert len(set(found)) == len(found) <= MAX_PROBES
    for text in found:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "f"
        assert len(call.args) == len(arguments)
        assert repr([ast.literal_eval(argument) for argument in call.args]) != repr(arguments)


def test_every_argument_is_varied_and_all_examples_are_used() -> None:
    found = probes(("assert f(1, 'ab') == 1", "assert not f(5, 'z')"), "f")
    assert {"f(2, 'ab')", "f(1, 'ba')", "f(6, 'z')"} <= set(found)


def test_a_list_is_moved_as_a_whole_so_that_its_smallest_changes() -> None:
    assert "low([11, 2, 46])" in probes(("assert low([10, 1, 45]) == 1",), "low")


def test_nothing_is_varied_where_the_arguments_are_no_literals() -> None:
    assert probes(("assert f(x) == 1", "assert g(1) == 2", "assert f(n=1) == 2", "not python ("), "f") == ()


def test_the_same_values_wherever_both_have_one_are_agreement() -> None:
    assert agree(("a", "b", "", "c"), ("a", "b", "d", "c"))
    assert not agree(("a", "b", "c"), ("a", "b", "x"))


def test_values_that_never_change_are_no_agreement() -> None:
    assert not agree(("a", "a", "a", "a"), ("a", "a", "a", "a"))


def test_two_values_in_common_are_too_few() -> None:
    assert not agree(("a", "b", "", ""), ("a", "b", "c", "d"))
