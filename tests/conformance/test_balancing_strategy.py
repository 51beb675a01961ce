"""What every strategy promises; parametrised by the files that are there."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_agent_server import discovery
from ai_agent_server.load_balancer import strategies
from ai_agent_server.load_balancer.base import BalancingStrategy, LLMView, Requirements

pytestmark = pytest.mark.parametrize("kind", sorted(discovery.kinds(strategies)))

views_of_all_kinds = st.lists(
    st.builds(
        LLMView,
        name=st.from_regex(r"[a-z]{1,8}", fullmatch=True),
        source=st.sampled_from(["local", "api"]),
        tier=st.sampled_from(["small", "main"]),
        slots=st.integers(1, 8),
        in_flight=st.integers(0, 20),
        waiting=st.integers(0, 20),
        resident=st.sampled_from([True, False, None]),
        cost_per_million_input_usd=st.floats(0, 1000),
        cost_per_million_output_usd=st.floats(0, 1000),
        time_to_first_token_ms=st.none() | st.floats(0, 1e6),
        tokens_per_s=st.none() | st.floats(0, 1e6),
        load_s=st.none() | st.floats(0, 1000),
    ),
    max_size=6,
    unique_by=lambda view: view.name,
).map(tuple)
requirements_of_all_kinds = st.builds(
    Requirements,
    tier=st.sampled_from([None, "small", "main"]),
    prefer=st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), max_size=3).map(tuple),
    input_tokens=st.integers(0, 1_000_000),
    output_tokens=st.integers(0, 100_000),
)


def strategy_of(kind: str) -> BalancingStrategy:
    strategy: BalancingStrategy = discovery.implementation(strategies, kind)()
    return strategy


@given(wanted=requirements_of_all_kinds, views=views_of_all_kinds)
def test_ranks_everyone_once_best_first(kind: str, wanted: Requirements, views: tuple[LLMView, ...]) -> None:
    ranked = strategy_of(kind).rank(wanted, views)
    assert sorted(each.llm for each in ranked) == sorted(view.name for view in views)
    scores = [each.score for each in ranked]
    assert scores == sorted(scores)


@given(wanted=requirements_of_all_kinds, views=views_of_all_kinds)
def test_the_score_is_the_sum_of_its_parts(
    kind: str, wanted: Requirements, views: tuple[LLMView, ...]
) -> None:
    for each in strategy_of(kind).rank(wanted, views):
        assert each.parts
        assert each.score == pytest.approx(sum(each.parts.values()))
        assert all(part >= 0 for part in each.parts.values())


@given(wanted=requirements_of_all_kinds, views=views_of_all_kinds)
def test_the_same_question_has_the_same_answer(
    kind: str, wanted: Requirements, views: tuple[LLMView, ...]
) -> None:
    strategy = strategy_of(kind)
    assert (
        strategy.rank(wanted, views) == strategy.rank(wanted, views) == strategy_of(kind).rank(wanted, views)
    )


def test_equals_keep_the_order_given(kind: str) -> None:
    first = LLMView(name="first", source="local", tier="small")
    views = tuple(msgspec.structs.replace(first, name=name) for name in ("m", "z", "a", "k"))
    assert [each.llm for each in strategy_of(kind).rank(Requirements(), views)] == ["m", "z", "a", "k"]


def test_of_two_that_are_alike_the_free_one_goes_first(kind: str) -> None:
    free = LLMView(name="free", source="local", tier="small")
    busy = msgspec.structs.replace(free, name="busy", in_flight=3)
    assert strategy_of(kind).rank(Requirements(), (busy, free))[0].llm == "free"
