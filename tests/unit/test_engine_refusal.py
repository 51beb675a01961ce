"""What statuses and words of model servers mean."""

from datetime import UTC, datetime

import pytest

from ai_agent_server.errors import (
    ContextOverflowError,
    EngineAuthError,
    EngineBusyError,
    EngineError,
    EngineFailedError,
    EngineProtocolError,
    EngineRequestError,
    ModelNotFoundError,
)
from ai_agent_server.llm_engines._refusal import PROBLEM_CHARS, in_stream, refusal, retry_after_s


@pytest.mark.parametrize(
    ("status", "code", "problem", "expected"),
    [
        (400, "", "bad temperature", EngineRequestError),
        (400, "context_length_exceeded", "maximum context length is 4096 tokens", ContextOverflowError),
        (400, "400 exceed_context_size_error", "request (9 tokens) exceeds it", ContextOverflowError),
        (400, "", "the input length exceeds the context length", ContextOverflowError),
        (413, "", "prompt is too long", ContextOverflowError),
        (413, "", "body too large", EngineRequestError),
        (401, "", "who are you", EngineAuthError),
        (403, "", "not you", EngineAuthError),
        (404, "", 'model "llama3" not found, try pulling it first', ModelNotFoundError),
        (404, "model_not_found", "The model `gpt-9` does not exist", ModelNotFoundError),
        (404, "", "404 page not found", EngineRequestError),
        (408, "", "took too long", EngineFailedError),
        (422, "", "unprocessable", EngineRequestError),
        (429, "rate_limit_exceeded", "slow down", EngineBusyError),
        (429, "insufficient_quota", "check your plan", EngineAuthError),
        (500, "", "oops", EngineFailedError),
        (501, "", "no such feature", EngineRequestError),
        (502, "", "bad gateway", EngineFailedError),
        (503, "unavailable_error", "Loading model", EngineBusyError),
        (307, "", "", EngineRequestError),
        (204, "", "", EngineProtocolError),
    ],
)
def test_a_status_and_its_words_mean_one_error(
    status: int, code: str, problem: str, expected: type[EngineError]
) -> None:
    error = refusal(status, problem, engine="it", code=code)
    assert type(error) is expected
    assert error.status == status
    assert error.engine == "it"


def test_an_overflow_in_the_middle_of_a_stream_is_an_overflow() -> None:
    assert type(in_stream("context size has been exceeded", engine="it")) is ContextOverflowError
    assert type(in_stream("", engine="it")) is EngineFailedError


def test_what_a_server_says_is_kept_short_on_one_line_and_without_the_key() -> None:
    error = refusal(401, "bad key\nsk-1 " + "x" * 5000, engine="it", secret="sk-1")
    assert "sk-1" not in error.problem
    assert "\n" not in error.problem
    assert len(error.problem) == PROBLEM_CHARS


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:30 GMT"}, 30.0),
        ({"retry-after": "Wed, 31 Dec 2025 00:00:00 GMT"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_each_of_its_forms(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers, now=datetime(2026, 1, 1, tzinfo=UTC)) == expected
