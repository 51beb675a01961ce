"""Logging: structlog, configured once by the process's edge. One event per fact; JSON lines or pretty."""

import logging
import sys
from typing import TextIO

import structlog

LEVELS = ("debug", "info", "warning", "error")


def configure(level: str = "info", *, stream: TextIO | None = None) -> None:
    """Send events to `stream` (stderr): pretty on a terminal, JSON lines elsewhere."""
    out = stream or sys.stderr
    pretty = out.isatty()
    number = getattr(logging, level.upper())
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if pretty:
        # The renderer's own tracebacks show every frame's variables: prompts and keys among them.
        processors.append(structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback))
    else:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=True,
    )
    # Libraries speak through logging; what they say below a warning is theirs to know.
    logging.basicConfig(level=max(number, logging.WARNING), stream=out, format="%(name)s: %(message)s")
