"""The tracing port: who asked whom, and how long it took, as spans that the traces of others go on in."""

import re
from collections.abc import Mapping
from typing import Literal, Protocol, TypeAlias

__all__ = ("Attribute", "Span", "SpanKind", "Tracer", "is_traceparent")

SpanKind = Literal["server", "client"]
"""`server`: somebody asked us; `client`: we asked somebody."""
Attribute: TypeAlias = str | int | float | bool | tuple[str, ...]

_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class Span(Protocol):
    """Something that takes time."""

    @property
    def traceparent(self) -> str:
        """What is sent along (W3C Trace Context), so that whoever is asked goes on in this trace."""
        ...

    def add(self, attributes: Mapping[str, Attribute]) -> None:
        """Say more of it."""
        ...

    def end(self, error: str = "") -> None:
        """It is over; `error` says how it failed, empty where it did not. To be called once."""
        ...


class Tracer(Protocol):
    """Where spans are told. Never in the way: nothing here waits or raises."""

    def begin(self, name: str, *, kind: SpanKind, parent: str, attributes: Mapping[str, Attribute]) -> Span:
        """A span that begins now. `parent` is a `traceparent`; an empty one begins a trace."""
        ...


def is_traceparent(text: str) -> bool:
    """Whether `text` is a W3C `traceparent` of the version that there is."""
    return _TRACEPARENT.fullmatch(text) is not None
