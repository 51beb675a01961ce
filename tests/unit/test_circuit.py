"""The circuit by table: what opens it, what probes it, what closes it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_agent_server.config.settings import CircuitSettings
from ai_agent_server.errors import (
    ContextOverflowError,
    EngineAuthError,
    EngineBusyError,
    EngineError,
    EngineFailedError,
    EngineProtocolError,
    EngineRequestError,
    EngineTimeoutError,
    EngineUnreachableError,
    ModelNotFoundError,
)
from ai_agent_server.load_balancer import circuit
from ai_agent_server.load_balancer.circuit import Blame, Circuit

SETTINGS = CircuitSettings(failures=3, cooldown_s=30.0)


def failing(times: int, *, now_s: float = 0.0) -> Circuit:
    standing = Circuit()
    for _ in range(times):
        standing = circuit.failed(standing, now_s, probe=False, settings=SETTINGS)
    return standing


def test_failures_in_a_row_open_it() -> None:
    assert circuit.state(failing(2), 0.0) == "closed"
    assert circuit.state(failing(3), 0.0) == "open"
    assert not circuit.admits(failing(3), 29.9)


def test_a_whole_answer_clears_the_count() -> None:
    standing = circuit.succeeded(failing(2))
    standing = circuit.failed(standing, 0.0, probe=False, settings=SETTINGS)
    assert circuit.state(standing, 0.0) == "closed"


def test_after_the_cooldown_exactly_one_request_is_the_probe() -> None:
    standing = failing(3)
    assert circuit.state(standing, 30.0) == "half_open"
    assert circuit.admits(standing, 30.0)
    standing, probe = circuit.begun(standing, 30.0)
    assert probe
    assert not circuit.admits(standing, 30.0)


def test_a_request_on_a_closed_circuit_is_no_probe() -> None:
    assert circuit.begun(Circuit(), 0.0) == (Circuit(), False)


def test_a_probe_that_fails_opens_it_for_another_cooldown() -> None:
    standing, _ = circuit.begun(failing(3), 30.0)
    standing = circuit.failed(standing, 31.0, probe=True, settings=SETTINGS)
    assert circuit.state(standing, 60.9) == "open"
    assert circuit.admits(standing, 61.0)


def test_a_probe_whose_client_left_lets_the_next_one_probe() -> None:
    standing, _ = circuit.begun(failing(3), 30.0)
    assert circuit.admits(circuit.abandoned(standing, probe=True), 30.0)


def test_a_client_that_left_frees_no_other_request_s_probe() -> None:
    standing, _ = circuit.begun(failing(3), 30.0)
    assert not circuit.admits(circuit.abandoned(standing, probe=False), 30.0)


def test_the_probe_s_first_token_closes_it_on_trial() -> None:
    standing, _ = circuit.begun(failing(3), 30.0)
    standing = circuit.answered(standing, probe=True, settings=SETTINGS)
    assert circuit.state(standing, 30.0) == "closed"
    again = circuit.failed(standing, 31.0, probe=False, settings=SETTINGS)
    assert circuit.state(again, 31.0) == "open"
    assert circuit.succeeded(standing) == Circuit()


def test_an_answer_to_an_older_request_does_not_close_it() -> None:
    standing = failing(3)
    assert circuit.succeeded(standing) == standing


def test_a_failure_of_an_older_request_does_not_push_the_probe_away() -> None:
    standing = circuit.failed(failing(3), 20.0, probe=False, settings=SETTINGS)
    assert circuit.admits(standing, 30.0)


def test_a_retry_after_opens_it_at_once_for_as_long_as_it_says() -> None:
    standing = circuit.failed(
        Circuit(), 100.0, probe=False, settings=SETTINGS, blame="nobody", retry_after_s=7.0
    )
    assert circuit.cooldown_s(standing, 100.0) == 7.0
    assert not circuit.admits(standing, 106.9)
    assert circuit.admits(standing, 107.0)


def test_a_shorter_retry_after_does_not_shorten_a_cooldown() -> None:
    standing = circuit.failed(failing(3), 0.0, probe=False, settings=SETTINGS, retry_after_s=1.0)
    assert circuit.cooldown_s(standing, 0.0) == 30.0


def test_a_probe_that_meets_a_full_engine_shows_nothing() -> None:
    standing, _ = circuit.begun(failing(3), 30.0)
    standing = circuit.failed(standing, 31.0, probe=True, settings=SETTINGS, blame="nobody")
    assert circuit.state(standing, 31.0) == "half_open"
    assert circuit.admits(standing, 31.0)


def test_a_threshold_of_zero_counts_as_one() -> None:
    standing = circuit.failed(Circuit(), 0.0, probe=False, settings=CircuitSettings(failures=0))
    assert circuit.state(standing, 0.0) == "open"


@pytest.mark.parametrize(
    ("error", "cold", "blamed"),
    [
        (EngineUnreachableError("refused"), False, "llm"),
        (EngineFailedError("500"), False, "llm"),
        (EngineProtocolError("cut"), False, "llm"),
        (EngineAuthError("401"), False, "llm"),
        (ModelNotFoundError("404"), False, "llm"),
        (EngineRequestError("400"), False, "nobody"),
        (ContextOverflowError("too long"), False, "nobody"),
        (EngineBusyError("503"), False, "nobody"),
        (EngineTimeoutError("connect", 5.0), True, "llm"),
        (EngineTimeoutError("idle", 5.0), True, "llm"),
        (EngineTimeoutError("first_token", 5.0), False, "llm"),
        (EngineTimeoutError("first_token", 5.0), True, "nobody"),
    ],
)
def test_only_a_failure_of_the_llm_speaks_against_it(error: EngineError, cold: bool, blamed: Blame) -> None:
    assert circuit.blame_for(error, cold=cold) == blamed


@given(st.lists(st.sampled_from(["send", "fail", "succeed", "leave", "first", "pass"]), max_size=60))
def test_there_is_never_more_than_one_probe(steps: list[str]) -> None:
    standing, now_s = Circuit(), 0.0
    running: list[bool] = []
    for step in steps:
        now_s += 1.0
        if step == "pass":
            now_s += SETTINGS.cooldown_s
        elif step == "send":
            if circuit.admits(standing, now_s):
                standing, probe = circuit.begun(standing, now_s)
                running.append(probe)
        elif running and step == "first":
            standing = circuit.answered(standing, probe=running[0], settings=SETTINGS)
            running[0] = False
        elif running:
            probe = running.pop(0)
            match step:
                case "fail":
                    standing = circuit.failed(standing, now_s, probe=probe, settings=SETTINGS)
                case "succeed":
                    if probe:
                        standing = circuit.answered(standing, probe=True, settings=SETTINGS)
                    standing = circuit.succeeded(standing)
                case _:
                    standing = circuit.abandoned(standing, probe=probe)
        assert sum(running) <= 1
        assert standing.probing == any(running)
