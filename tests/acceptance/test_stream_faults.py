"""A short run of the faults of `bench.stream_faults`: an answer that broke never ends like a whole one."""

from bench.stream_faults.__main__ import played

TRIALS = 120


async def test_no_broken_answer_ends_like_a_whole_one() -> None:
    outcomes = await played(seed=7, count=TRIALS)
    assert [outcome for outcome in outcomes if outcome.seen.verdict in {"truncated", "torn"}] == []
    assert [outcome for outcome in outcomes if outcome.is_unserved] == []
    # On a machine that is busy enough an engine is given up as silent before its fault comes.
    assert sum(outcome.before_first_token is not None for outcome in outcomes) > 0.8 * TRIALS
