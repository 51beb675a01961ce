"""A shelf on NATS: each server's document is the last message of a subject of its own."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import msgspec
from nats.errors import Error
from nats.js.api import Header
from nats.js.errors import APIError

from ai_agent_server.cluster._stream import WRONG_LAST_SEQUENCE, last_message
from ai_agent_server.cluster.base import Leases, Left, Shelf, server_of
from ai_agent_server.errors import ChannelError, StoreError
from ai_agent_server.nats_link import REQUEST_TIMEOUT_S, Link, told

__all__ = ("NatsShelf",)

HOLDER = "Ai-Agent-Server-Holder"
"""The header that says whose process put it; without one it was replaced by another server."""


class _Message(msgspec.Struct, frozen=True):
    """A document as it is in the stream."""

    content: bytes
    holder: str
    sequence: int


class NatsShelf:
    """`Shelf` of a server of a cluster, kept in its own shelf too.

    `own` is for a NATS that lost its disk, and for a server that was alone before. Whether a server is
    gone is asked of `leases`, by the holder that its document names.
    """

    def __init__(self, link: Link, leases: Leases, own: Shelf, *, stream: str, subject: str) -> None:
        self._link, self._leases, self._own = link, leases, own
        self._stream, self._subject = stream, subject
        self._server = server_of(leases.holder)

    async def read(self) -> bytes | None:
        """See `Shelf.read`."""
        message = await self._message(f"{self._subject}.{self._server}")
        return await self._own.read() if message is None else message.content

    async def put(self, content: bytes) -> None:
        """See `Shelf.put`."""
        await self._own.put(content)
        await self._publish(self._server, content, {HOLDER: self._leases.holder})

    def is_own(self, holder: str) -> bool:
        """See `Shelf.is_own`."""
        return server_of(holder) == self._server

    async def left(self) -> Sequence[Left]:
        """See `Shelf.left`."""
        async with _translated():
            session = await self._link.session(REQUEST_TIMEOUT_S)
            asking = session.jetstream.stream_info(self._stream, subjects_filter=f"{self._subject}.>")
            info = await session.or_lost(asking, REQUEST_TIMEOUT_S)
        found = [await self._message(subject) for subject in info.state.subjects or {}]
        return [
            Left(holder=message.holder, content=message.content, place=message.sequence)
            for message in found
            if message is not None
            and message.holder
            and not self.is_own(message.holder)
            and self._leases.may_take(message.holder)
        ]

    async def replace(self, left: Left, content: bytes) -> bool:
        """See `Shelf.replace`."""
        expected = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(left.place)}
        try:
            await self._publish(server_of(left.holder), content, expected)
        except _CameFirstError:
            return False
        return True

    async def _publish(self, server: str, content: bytes, headers: Mapping[str, str]) -> None:
        async with _translated():
            session = await self._link.session(REQUEST_TIMEOUT_S)
            work = session.jetstream.publish(f"{self._subject}.{server}", content, headers=dict(headers))
            await session.or_lost(work, REQUEST_TIMEOUT_S)

    async def _message(self, subject: str) -> _Message | None:
        message = await last_message(self._link, self._stream, subject)
        if message is None:
            return None
        holder = (message.headers or {}).get(HOLDER, "")
        return _Message(message.data or b"", holder, message.seq or 0)


class _CameFirstError(StoreError):
    """Somebody else wrote the document since it was read."""


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except APIError as exc:
        if exc.err_code in WRONG_LAST_SEQUENCE:
            raise _CameFirstError("another server was first") from exc
        raise StoreError(f"NATS refused: {exc.description}") from exc
    except (Error, OSError, TimeoutError, ChannelError) as exc:
        raise StoreError(f"NATS did not answer: {told(exc)}") from exc
