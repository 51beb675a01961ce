"""What other programs take: up at once, down only for good, and noise is nothing."""

from hypothesis import given
from hypothesis import strategies as st

from ai_agent_server.load_balancer.outside import CALM, LEAST_NOISE_MB, NOISE, Outside, looked

MEMORY_MB = 16_384.0
NOISE_MB = max(LEAST_NOISE_MB, NOISE * MEMORY_MB)


def told(*taken_mb: float, held_mb: float = 4000, before: Outside | None = None) -> list[float]:
    found, said = before or Outside(), []
    for each in taken_mb:
        free_mb = MEMORY_MB - held_mb - each
        found = looked(found, memory_mb=MEMORY_MB, held_mb=held_mb, free_mb=free_mb)
        said.append(found.mb)
    return said


def test_what_another_program_takes_counts_at_once() -> None:
    assert told(0, 3000) == [0, 3000]


def test_noise_moves_nothing() -> None:
    assert told(2000, 2100, 1900, 2050) == [2000] * 4


def test_what_goes_counts_once_it_stayed_away() -> None:
    assert told(3000, 500, 600, 400) == [3000, 3000, 3000, 600]


def test_a_program_that_takes_and_gives_in_turn_has_what_it_takes_at_most() -> None:
    assert told(3000, 500, 3000, 500, 500, 3000) == [3000] * 6


def test_after_a_model_came_or_went_the_next_look_counts() -> None:
    # Another of our models was in memory before it was booked: it looked like somebody else's.
    before = looked(Outside(), memory_mb=MEMORY_MB, held_mb=0, free_mb=MEMORY_MB - 9000)
    assert before.mb == 9000
    assert told(0, held_mb=9000, before=before) == [0]


def test_what_lies_beyond_the_accelerator_s_share_is_nobody_s_business() -> None:
    # 64 GB of RAM, of which models may have 16: others take 40, and there is enough.
    assert looked(Outside(), memory_mb=MEMORY_MB, held_mb=0, free_mb=24_000).mb == 0
    assert looked(Outside(), memory_mb=MEMORY_MB, held_mb=0, free_mb=10_384).mb == 6000


@given(st.lists(st.floats(0, MEMORY_MB), min_size=1, max_size=40))
def test_never_is_less_told_than_what_was_seen_last_less_the_noise(taken_mb: list[float]) -> None:
    for number, said in enumerate(told(*taken_mb, held_mb=0), start=1):
        assert said >= taken_mb[number - 1] - NOISE_MB
        assert said <= max(taken_mb[:number][-CALM:], default=0) + NOISE_MB or said in taken_mb[:number]
