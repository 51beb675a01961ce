"""Limits: no stretch of a window's length ever holds more than was allowed, and nothing is lost."""

import math
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_agent_server.config.settings import Allowance
from ai_agent_server.gateway.limits import (
    MAX_SUBJECTS,
    Amounts,
    Bound,
    Limiter,
    Refusal,
    Share,
    Standing,
    Taken,
    bounds,
    duration,
    standing_headers,
)

MINUTE = (Share("key:laptop", (Bound("requests", 60.0, 3),)),)
TOTAL = (Share("key:laptop", (Bound("usd", None, 1.0),)),)


def taken(found: Taken | Refusal) -> Taken:
    assert isinstance(found, Taken), found
    return found


def refused(found: Taken | Refusal) -> Refusal:
    assert isinstance(found, Refusal)
    return found


def one(limiter: Limiter, now_s: float, shares: tuple[Share, ...] = MINUTE) -> Taken | Refusal:
    return limiter.take(shares, Amounts(requests=1), now_s)


def test_what_is_allowed_is_given_and_the_next_is_told_when_to_come_again() -> None:
    limiter = Limiter()
    for now_s in (0.0, 10.0, 20.0):
        taken(one(limiter, now_s))

    refusal = refused(one(limiter, 30.0))

    assert (refusal.subject, refusal.unit, refusal.allowed, refusal.per_s) == (
        "key:laptop", "requests", 3, 60.0,
    )  # fmt: skip
    assert refusal.retry_after_s == 30.0
    assert (refusal.is_quota, refusal.should_retry) == (False, True)
    assert isinstance(one(limiter, 59.9), Refusal)
    taken(one(limiter, 60.0))
    assert refused(one(limiter, 60.0)).retry_after_s == 10.0


def test_what_is_used_at_once_is_free_again_at_once() -> None:
    limiter = Limiter()
    for now_s in (0.0, 0.3, 0.6):
        taken(one(limiter, now_s))

    assert refused(one(limiter, 1.0)).retry_after_s == pytest.approx(59.6)
    assert isinstance(one(limiter, 60.5), Refusal)
    for _ in range(3):
        taken(one(limiter, 60.6))


def test_a_budget_in_total_is_never_free_again() -> None:
    limiter = Limiter()
    taken(limiter.take(TOTAL, Amounts(usd=0.75), 0.0))

    refusal = refused(limiter.take(TOTAL, Amounts(usd=0.5), 1e9))

    assert (refusal.retry_after_s, refusal.is_quota, refusal.should_retry) == (None, True, False)
    taken(limiter.take(TOTAL, Amounts(usd=0.25), 1e9))


def test_of_what_is_not_known_before_something_must_be_left() -> None:
    shares = (Share("key:laptop", (Bound("gpu_s", 60.0, 5.0),)),)
    limiter = Limiter()
    first = taken(limiter.take(shares, Amounts(requests=1), 0.0))
    limiter.settle(first, Amounts(gpu_s=7.0), 3.0)

    assert refused(limiter.take(shares, Amounts(requests=1), 4.0)).retry_after_s == pytest.approx(59.0)
    taken(limiter.take(shares, Amounts(requests=1), 63.0))


def test_what_is_spent_to_the_last_crumb_is_spent() -> None:
    shares = (Share("key:laptop", (Bound("gpu_s", 60.0, 5.0),)),)
    limiter = Limiter()
    limiter.count(shares, Amounts(gpu_s=2.0), 0.0)
    limiter.count(shares, Amounts(gpu_s=5.0), 30.0)

    assert refused(limiter.take(shares, Amounts(), 40.0)).retry_after_s == 50.0
    # Two of seven are free again, and the five that are allowed are still used.
    assert isinstance(limiter.take(shares, Amounts(), 60.0), Refusal)
    taken(limiter.take(shares, Amounts(), 90.0))


def test_what_a_hold_did_not_need_is_given_back_and_what_it_needed_more_is_counted() -> None:
    shares = (Share("key:laptop", (Bound("tokens", 60.0, 100),)),)
    limiter = Limiter()
    hold = taken(limiter.take(shares, Amounts(tokens=90), 0.0))
    assert isinstance(limiter.take(shares, Amounts(tokens=20), 0.0), Refusal)

    limiter.settle(hold, Amounts(tokens=30), 1.0)
    again = taken(limiter.take(shares, Amounts(tokens=60), 2.0))
    limiter.settle(again, Amounts(tokens=75), 3.0)

    assert limiter.standing(shares, "tokens", 3.0) == Standing(limit=100, remaining=0, reset_s=60.0)
    limiter.settle(again, Amounts(), 3.0)
    assert refused(limiter.take(shares, Amounts(tokens=1), 3.0)).used == 105


def test_a_refusal_in_one_share_takes_nothing_in_any() -> None:
    other = Share("project:shop", (Bound("requests", 60.0, 1),))
    limiter = Limiter()
    taken(one(limiter, 0.0, (*MINUTE, other)))

    refusal = refused(one(limiter, 1.0, (*MINUTE, other)))

    assert refusal.subject == "project:shop"
    assert limiter.standing(MINUTE, "requests", 1.0) == Standing(limit=3, remaining=2, reset_s=59.0)


def test_of_two_limits_without_room_the_longer_wait_is_told() -> None:
    shares = (Share("key:laptop", (Bound("requests", 60.0, 1), Bound("requests", 3600.0, 1))),)
    limiter = Limiter()
    taken(one(limiter, 0.0, shares))

    refusal = refused(one(limiter, 1.0, shares))

    assert (refusal.per_s, refusal.retry_after_s) == (3600.0, 3599.0)
    assert (refusal.is_quota, refusal.should_retry) == (False, False)


def test_what_can_never_fit_is_told_at_once() -> None:
    refusal = refused(Limiter().take(MINUTE, Amounts(requests=4), 0.0))
    assert (refusal.retry_after_s, refusal.is_quota) == (None, True)


def test_another_caller_has_limits_of_his_own() -> None:
    limiter = Limiter()
    for _ in range(3):
        taken(one(limiter, 0.0))
    assert isinstance(one(limiter, 0.0), Refusal)
    taken(one(limiter, 0.0, (Share("key:phone", MINUTE[0].bounds),)))


def test_counters_come_back_as_they_were_kept() -> None:
    limiter = Limiter()
    shares = (*MINUTE, Share("project:shop", (Bound("usd", None, 1.0),)))
    for now_s in (1000.0, 1010.0, 1020.0):
        taken(limiter.take(shares, Amounts(requests=1, usd=0.1), now_s))

    again = Limiter()
    again.restore(limiter.kept(), 1030.0)

    assert again.kept() == limiter.kept()
    assert refused(one(again, 1030.0)).retry_after_s == 30.0
    assert refused(again.take(shares[1:], Amounts(usd=0.8), 1090.0)).used == pytest.approx(0.3)


def test_a_clock_that_was_set_back_locks_nobody_out_for_longer_than_the_window() -> None:
    limiter = Limiter()
    for _ in range(3):
        taken(one(limiter, 1e9))
    again = Limiter()
    again.restore(limiter.kept(), 1000.0)

    assert refused(one(again, 1000.0)).retry_after_s == 60.0
    taken(one(again, 1060.0))


def test_who_uses_nothing_any_more_is_forgotten() -> None:
    limiter = Limiter()
    taken(one(limiter, 0.0))
    limiter.prune(59.0)
    assert len(limiter.kept()) == 1
    limiter.prune(60.0)
    assert limiter.kept() == ()


def test_a_hold_outlives_that_its_meter_is_forgotten() -> None:
    shares = (Share("key:laptop", (Bound("gpu_s", 60.0, 5.0),)),)
    limiter = Limiter()
    hold = taken(limiter.take(shares, Amounts(), 0.0))
    limiter.prune(1.0)
    limiter.settle(hold, Amounts(gpu_s=6.0), 2.0)
    assert isinstance(limiter.take(shares, Amounts(), 3.0), Refusal)


def test_strangers_beyond_the_table_are_counted_together() -> None:
    limiter = Limiter()
    for number in range(MAX_SUBJECTS):
        shares = (Share(limiter.subject("address", str(number)), MINUTE[0].bounds),)
        taken(one(limiter, 0.0, shares))

    assert limiter.subject("address", "7") == "address:7"
    for _ in range(3):
        stranger = (Share(limiter.subject("address", "stranger"), MINUTE[0].bounds),)
        taken(one(limiter, 0.0, stranger))
    late = (Share(limiter.subject("address", "another"), MINUTE[0].bounds),)
    assert refused(one(limiter, 0.0, late)).subject == "address:others"


def test_of_two_limits_for_the_same_window_the_smaller_counts() -> None:
    found = bounds(
        (Allowance(per_s=60, tokens=9, requests=2), Allowance(per_s=60, tokens=5), Allowance(usd=1))
    )
    assert set(found) == {Bound("tokens", 60, 5), Bound("requests", 60, 2), Bound("usd", None, 1)}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.0004, "1ms"), (0.12, "120ms"), (0.9999, "1s"), (1, "1s"), (1.2, "2s"), (59.01, "1m0s"),
        (60, "1m0s"), (360, "6m0s"), (3599.5, "1h0m0s"), (3630, "1h0m30s"), (86400, "24h0m0s"),
    ],
)  # fmt: skip
def test_a_duration_is_written_as_clients_read_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_headers_tell_the_limit_that_is_nearest_to_its_end() -> None:
    shares = (Share("key:laptop", (Bound("requests", 60.0, 3), Bound("requests", 86400.0, 2))),)
    limiter = Limiter()
    taken(one(limiter, 0.0, shares))

    standing = limiter.standing(shares, "requests", 6.5)

    assert standing_headers({"requests": standing, "tokens": limiter.standing(shares, "tokens", 6.5)}) == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "23h59m54s",
    }


def ticks(up_to_s: int) -> st.SearchStrategy[float]:
    """Seconds that a float holds exactly: at a window's edge the sums must not differ by a crumb."""
    return st.integers(0, 64 * up_to_s).map(lambda tick: tick / 64)


asks = st.lists(
    st.tuples(
        ticks(40),
        st.integers(0, 60),
        ticks(90),
        st.floats(0, 1),
    ),
    max_size=60,
)
"""Seconds since the last, tokens wanted, seconds until it is settled, which part of them was used."""


@settings(max_examples=300)
@given(asks=asks, window_s=st.sampled_from([1.0, 30.0, 60.0, 3600.0]), allowed=st.integers(1, 100))
def test_no_stretch_of_a_window_ever_holds_more_than_is_allowed(
    asks: list[tuple[float, int, float, float]], window_s: float, allowed: int
) -> None:
    shares = (Share("key:a", (Bound("tokens", window_s, allowed), Bound("requests", window_s, allowed))),)
    limiter, now_s = Limiter(), 0.0
    used: list[tuple[float, int]] = []
    open_holds: list[tuple[float, Taken, int, int]] = []
    for pause_s, wanted, lasts_s, share in asks:
        now_s += pause_s
        for hold in [hold for hold in open_holds if hold[0] <= now_s]:
            open_holds.remove(hold)
            _, held, index, need = hold
            limiter.settle(held, Amounts(tokens=need), now_s)
            used[index] = (used[index][0], need)
        found = limiter.take(shares, Amounts(requests=1, tokens=wanted), now_s)
        if isinstance(found, Refusal):
            assert found.retry_after_s is None or found.retry_after_s >= 0
            assert_a_retry_is_soon_enough(found, wanted, allowed)
        else:
            used.append((now_s, wanted))
            open_holds.append((now_s + lasts_s, found, len(used) - 1, math.floor(wanted * share)))
        for standing in (
            limiter.standing(shares, "tokens", now_s),
            limiter.standing(shares, "requests", now_s),
        ):
            assert standing is not None
            assert 0 <= standing.remaining <= allowed
            assert 0 <= standing.reset_s <= window_s
        assert most_in_a_window(used, window_s) <= allowed
        assert most_in_a_window([(at_s, 1) for at_s, _ in used], window_s) <= allowed


def assert_a_retry_is_soon_enough(refusal: Refusal, wanted: int, allowed: int) -> None:
    never = refusal.unit == "tokens" and wanted > allowed
    assert (refusal.retry_after_s is None) == never


def most_in_a_window(used: Iterable[tuple[float, int]], window_s: float) -> int:
    events = list(used)
    return max(
        (sum(amount for at_s, amount in events if end_s - window_s < at_s <= end_s) for end_s, _ in events),
        default=0,
    )


@settings(max_examples=200)
@given(times=st.lists(ticks(5), max_size=80), allowed=st.integers(1, 20))
def test_who_comes_again_when_he_was_told_to_is_let_in(times: list[float], allowed: int) -> None:
    shares = (Share("key:a", (Bound("requests", 60.0, allowed),)),)
    limiter, now_s = Limiter(), 0.0
    for pause_s in times:
        now_s += pause_s
        found = one(limiter, now_s, shares)
        if isinstance(found, Refusal):
            assert found.retry_after_s is not None
            assert found.retry_after_s <= 60.0
            now_s += found.retry_after_s + 1e-6
            taken(one(limiter, now_s, shares))


@settings(max_examples=100)
@given(
    amounts=st.lists(st.tuples(st.floats(0, 3, allow_nan=False), st.floats(0, 1)), max_size=50),
)
def test_a_kept_counter_is_the_same_counter(amounts: list[tuple[float, float]]) -> None:
    shares = (Share("key:a", (Bound("usd", 30.0, 5.0), Bound("usd", None, 9.0))),)
    limiter, now_s = Limiter(), 0.0
    for pause_s, usd in amounts:
        now_s += pause_s
        limiter.count(shares, Amounts(usd=usd), now_s)
    again = Limiter()
    again.restore(limiter.kept(), now_s)
    for later_s in (0.0, 10.0, 29.0, 31.0):
        first, second = (it.standing(shares, "usd", now_s + later_s) for it in (limiter, again))
        assert first is not None
        assert second is not None
        assert first.remaining == pytest.approx(second.remaining, abs=1e-9)
        assert first.reset_s == second.reset_s
