"""The transport port: messages on named subjects, acknowledged by the one who made them safe."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

import msgspec

INBOUND = "ai-agent-server.tasks.inbound"
"""Task packets from outside, one a message."""
FEEDBACK = "ai-agent-server.tasks.feedback"
"""Every event of every task, and the reports of outside agents (here or on `.<task_id>` below it)."""
DEAD_LETTERS = "ai-agent-server.tasks.dlq"
"""What came in and could not be taken, with the reason."""
METRICS = "ai-agent-server.metrics"
"""The metrics snapshot, at an interval. Only the last few are kept."""

ChannelState = Literal["connected", "reconnecting", "closed"]


class Delivery(Protocol):
    """One message that was received. Exactly one of `ack`, `nak`, `term` ends it."""

    @property
    def subject(self) -> str:
        """The subject it was published to."""
        ...

    @property
    def body(self) -> bytes:
        """The payload as it came."""
        ...

    @property
    def delivered(self) -> int:
        """1 on the first delivery, more on a redelivery."""
        ...

    @property
    def dedupe_id(self) -> str:
        """The same on every redelivery of one message, unique among messages."""
        ...

    async def ack(self) -> None:
        """It is safe; never deliver it again. Returns when the transport confirmed.

        Raises `ChannelError` when it did not: then the message comes again. A transport that is
        killed right after may forget that it confirmed; `dedupe_id` tells.
        """
        ...

    async def nak(self, delay_s: float) -> None:
        """Not now; deliver it again after `delay_s`."""
        ...

    async def term(self) -> None:
        """Never deliver it again, it was not handled."""
        ...


class ChannelHealth(msgspec.Struct, frozen=True, kw_only=True):
    """What `/health` and `doctor` show of the transport. `url` carries no credentials."""

    state: ChannelState
    url: str = ""
    embedded: bool = False
    reconnects: int = 0
    version: str = ""


class Channel(Protocol):
    """Publish and subscribe with at-least-once delivery, in order per subject.

    Promises, tested on every implementation by tests/conformance/test_channel.py: what `publish`
    returned from is kept by the transport; a message that was neither acked nor termed comes again;
    two publications with the same `dedupe_id` close together are delivered once; a subscription
    lives through a restart of the server; `aclose` may be called twice.
    """

    async def publish(self, subject: str, body: bytes, *, dedupe_id: str = "") -> None:
        """Publish and wait until the transport has it.

        Raises `ChannelError`, at the latest after a few seconds while the transport is away, and
        `MessageTooLargeError` when a repeat could not help.
        """
        ...

    def subscribe(
        self, subject: str, *, group: str, max_in_flight: int = 64
    ) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Receive what comes on `subject` (`*` and `>` as in NATS); members of `group` share it.

        A group gets what was kept from before it first came, and what came while it was away. At
        most `max_in_flight` deliveries are open; leaving the context gives the open ones back. It
        is entered also while the transport is away. The iterator ends when the channel is closed.
        """
        ...

    def health(self) -> ChannelHealth:
        """The state of the connection, without asking the server."""
        ...

    async def aclose(self) -> None:
        """Drain and close."""
        ...
