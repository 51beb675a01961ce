"""Lines and server-sent events out of bytes, for the servers that stream answers."""

from typing import Final

from ai_agent_server.errors import EngineProtocolError

__all__ = ("MAX_LINE_BYTES", "Events", "Lines")

MAX_LINE_BYTES: Final = 8 * 1024 * 1024
_NO_PAYLOAD: Final = frozenset({b"", b"event", b"id", b"retry"})


class Lines:
    """Lines that end at LF or CRLF alone.

    A text-mode line splitter also breaks at U+2028 or U+0085, which a model may write inside a JSON string.
    """

    def __init__(self, *, engine: str) -> None:
        self._engine = engine
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines that `piece` completes. Raises `EngineProtocolError` for one without an end."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise EngineProtocolError("a line of the answer is larger than 8 MiB", engine=self._engine)
        return [line.removesuffix(b"\r") for line in lines]


class Events:
    """The payload of each `data:` line (these servers never split one). Events' names stand in it too."""

    def __init__(self, *, engine: str) -> None:
        self._engine = engine
        self._lines = Lines(engine=engine)

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that `piece` completes. Raises `EngineProtocolError`."""
        found = []
        for stripped in self._lines.feed(piece):
            if not stripped:
                continue
            if stripped.startswith(b"data:"):
                found.append(stripped[5:].strip())
            elif stripped.startswith(b"error:"):
                # llama.cpp has sent an error's object under this field name.
                found.append(b'{"error":' + (stripped[6:].strip() or b"true") + b"}")
            elif stripped.partition(b":")[0] not in _NO_PAYLOAD:
                # To pass over an unknown field, as browsers do, is to lose a part of the answer in silence
                # where the field was `data` and a byte of it went wrong.
                raise EngineProtocolError("a line of the answer is no event's", engine=self._engine)
        return found
