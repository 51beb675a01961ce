"""What an engine's HTTP status and words mean in our error tree. The one table for every engine."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import isfinite

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

PROBLEM_CHARS = 500

_OVERFLOW = re.compile(
    r"context_length_exceeded|exceed_context_size|maximum context length|context (size|length|window)"
    r"|prompt is too long|too many tokens|too large to process",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(r"model_not_found|model\b.*\b(not found|not exist)|no such model", re.IGNORECASE)
_NO_CREDIT = re.compile(
    r"insufficient_quota|credit_balance_exhausted|(spend|usage)_limit_exceeded", re.IGNORECASE
)


def refusal(
    status: int,
    problem: str,
    *,
    engine: str,
    code: str = "",
    retry_after_s: float | None = None,
    secret: str | None = None,
) -> EngineError:
    """The error for an answer with `status`; `code` is the engine's own word for it, where it has one."""
    said = f"{code} {problem}"
    text = short(problem, secret) or f"HTTP {status}"
    if status in {401, 403} or (status == 429 and _NO_CREDIT.search(said)):
        # An account without credit answers 429 as well, but no wait will help it.
        return EngineAuthError(text, engine=engine, status=status)
    if status in {429, 503}:
        return EngineBusyError(text, engine=engine, status=status, retry_after_s=retry_after_s)
    if status in {400, 413, 422, 500} and _OVERFLOW.search(said):
        return ContextOverflowError(text, engine=engine, status=status)
    if status in {400, 404} and _NO_MODEL.search(said):
        return ModelNotFoundError(text, engine=engine, status=status)
    if 300 <= status < 400:
        return EngineRequestError(
            "answers with a redirect, which is not followed", engine=engine, status=status
        )
    if status == 501 or (400 <= status < 500 and status != 408):
        return EngineRequestError(text, engine=engine, status=status)
    if status >= 500 or status == 408:
        return EngineFailedError(text, engine=engine, status=status)
    return EngineProtocolError(f"unexpected HTTP status {status}", engine=engine, status=status)


def in_stream(
    problem: str, *, engine: str, code: str = "", status: int | None = None, secret: str | None = None
) -> EngineError:
    """The error for an error object inside a stream that began well."""
    if _OVERFLOW.search(f"{code} {problem}"):
        return ContextOverflowError(short(problem, secret), engine=engine, status=status)
    return EngineFailedError(short(problem, secret) or "an error without words", engine=engine, status=status)


def short(problem: str, secret: str | None) -> str:
    """`problem` on one line, bounded, and without the key that some servers echo."""
    if secret:
        problem = problem.replace(secret, "***")
    problem = " ".join(problem.split())
    return problem if len(problem) <= PROBLEM_CHARS else problem[: PROBLEM_CHARS - 3] + "..."


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """What `Retry-After-Ms` or `Retry-After` (seconds or a date, RFC 9110) asks for."""
    for name, per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            asked_s = float(headers.get(name, "")) / per_second
        except ValueError:
            continue
        if isfinite(asked_s):
            return max(0.0, asked_s)
    try:
        until = parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - (now or datetime.now(UTC))).total_seconds())
