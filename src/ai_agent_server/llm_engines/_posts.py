"""The seam below an engine's streamed answers: POSTs to one URL, whose bodies are read as they come."""

from collections.abc import Mapping
from typing import Protocol

from ai_agent_server.llm_engines._pace import Pace

__all__ = ("Answer", "Posts")


class Answer(Protocol):
    """An answer whose head came. Raises `EngineProtocolError` where it is cut."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """By their names in lower case."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether the body was read to its end."""
        ...

    def read_nowait(self) -> bytes:
        """What of the body is here, perhaps nothing."""
        ...

    async def read(self, pace: Pace) -> bytes:
        """The next piece of the body, nothing at its end. Raises `EngineTimeoutError` by `pace`."""
        ...

    def close(self) -> None:
        """Done with it: its connection may serve again where the body was read to its end. Once."""
        ...


class Posts(Protocol):
    """POSTs over kept connections. Repeats nothing, follows no redirect."""

    async def post(self, body: bytes, pace: Pace, headers: Mapping[str, str]) -> Answer:
        """The answer to `body`; `headers` are beside those of every request.

        Raises `EngineUnreachableError`, `EngineRequestError` and, by `pace`, `EngineTimeoutError`.
        """
        ...

    async def aclose(self) -> None:
        """Close every socket. May be called twice."""
        ...
