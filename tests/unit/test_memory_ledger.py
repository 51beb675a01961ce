"""The ledger of an accelerator's memory: what is believed, what is taken, what is left."""

import pytest

from ai_agent_server.load_balancer.memory_ledger import Basis, Footprint, MemoryLedger, estimate_mb


def ledger(*footprints: Footprint, external_mb: float = 0.0) -> MemoryLedger:
    return MemoryLedger(
        memory_mb=16384,
        headroom_mb=384,
        external_mb=external_mb,
        footprints={footprint.llm: footprint for footprint in footprints},
    )


A = Footprint(llm="a", declared_mb=9000)
B = Footprint(llm="b", declared_mb=8000)


@pytest.mark.parametrize(
    ("footprint", "mb", "basis"),
    [
        (Footprint(llm="a", declared_mb=2, estimated_mb=3, measured_mb=1), 1, "measured"),
        (Footprint(llm="a", declared_mb=2, estimated_mb=3), 2, "declared"),
        (Footprint(llm="a", estimated_mb=3), 3, "estimated"),
        (Footprint(llm="a"), None, "unknown"),
    ],
)
def test_what_was_measured_is_believed_before_what_was_said(
    footprint: Footprint, mb: float | None, basis: Basis
) -> None:
    assert (footprint.mb, footprint.basis) == (mb, basis)


def test_the_budget_is_the_memory_less_headroom_and_what_others_take() -> None:
    books = ledger(A, external_mb=1000)
    assert books.budget_mb == 15_000
    assert books.hold("a").free_mb == 6000


def test_memory_is_taken_from_the_order_to_load_until_the_unload_is_confirmed() -> None:
    books = ledger(A, B).hold("a")
    assert not books.fits("b")
    assert books.fits("b", freed=["a"])
    assert books.release("a").fits("b")


def test_taking_it_twice_takes_it_once() -> None:
    assert ledger(A).hold("a").hold("a").used_mb == 9000


def test_a_first_measurement_replaces_the_guess_and_later_ones_only_raise_it() -> None:
    books = ledger(A).hold("a").measured("a", 7000)
    assert books.used_mb == 7000
    assert books.measured("a", 7500).measured("a", 7100).used_mb == 7500


def test_what_was_measured_is_what_the_next_load_is_taken_for() -> None:
    books = ledger(A).hold("a").measured("a", 7500).release("a").hold("a")
    assert books.held["a"].predicted_mb == 7500
    assert books.measured("a", 6000).used_mb == 6000


def test_a_measurement_of_what_is_not_held_changes_nothing() -> None:
    assert ledger(A).measured("a", 1) == ledger(A)


def test_a_model_of_which_nothing_is_known_runs_alone_until_it_was_measured() -> None:
    unknown = Footprint(llm="u")
    books = ledger(unknown, B)
    assert books.fits("u")
    assert not books.hold("b").fits("u")
    assert not books.hold("u").fits("b")
    assert books.hold("u").measured("u", 2000).fits("b")


def test_what_can_never_fit_is_told_apart_from_what_does_not_fit_now() -> None:
    big = Footprint(llm="big", declared_mb=16_001)
    assert not ledger(big).can_fit("big")
    assert ledger(A, external_mb=12_000).can_fit("a")
    assert not ledger(A, external_mb=12_000).fits("a")


def test_a_model_measured_a_little_beyond_the_budget_is_all_of_it_and_comes_again() -> None:
    books = ledger(A, B).hold("a").measured("a", 16_100)
    assert books.free_mb == 0
    assert books.can_fit("a")
    assert books.release("a").fits("a")
    assert not books.fits("b")
    # Another program is another matter: there is less than it takes.
    assert not books.release("a").external(500).fits("a")


def test_a_model_measured_beyond_the_memory_itself_can_never_fit() -> None:
    assert not ledger(A).hold("a").measured("a", 16_500).can_fit("a")


def test_another_program_can_outrun_the_books() -> None:
    assert ledger(A).hold("a").external(10_000).free_mb == -3000


def test_an_estimate_grows_with_the_file_and_with_the_context() -> None:
    small = estimate_mb(2**30, context_tokens=4096, slots=1)
    assert 1024 < small < estimate_mb(2**30, context_tokens=4096, slots=4)
    assert small < estimate_mb(2**31, context_tokens=4096, slots=1)
