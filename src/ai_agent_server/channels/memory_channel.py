"""A channel inside the process: the same promises without a server, and nothing survives a restart."""

import asyncio
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Self

from ai_agent_server.channels.base import ChannelHealth, Delivery
from ai_agent_server.errors import ChannelClosedError, ChannelError, MessageTooLargeError

__all__ = ("MemoryChannel",)

MAX_KEPT = 10_000
MAX_KEPT_BYTES = 4 * 1024 * 1024
MAX_BODY_BYTES = 1024 * 1024


class MemoryChannel:
    """`Channel` in memory, for `messaging.enabled = false` and for tests.

    Of the messages the last `MAX_KEPT`, or `MAX_KEPT_BYTES` of them, are kept for groups that come
    later; a group that is `MAX_KEPT` behind makes `publish` fail.
    """

    def __init__(self) -> None:
        self._kept: deque[_Message] = deque()
        self._kept_bytes = 0
        self._dedupe: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._groups: dict[tuple[str, str], _Group] = {}
        # Who keeps a message's id keeps it for longer than this channel lives: no run repeats another's.
        self._run = uuid.uuid4().hex
        self._published = 0
        self._is_closed = False

    async def publish(self, subject: str, body: bytes, *, dedupe_id: str = "") -> None:
        """Keep the message and hand it to every group. Raises `ChannelError`."""
        if self._is_closed:
            raise ChannelClosedError("the channel was closed")
        if len(body) > MAX_BODY_BYTES:
            raise MessageTooLargeError(subject, size_bytes=len(body), limit_bytes=MAX_BODY_BYTES)
        if dedupe_id and (subject, dedupe_id) in self._dedupe:
            return
        takers = [group for group in self._groups.values() if matches(group.subject, subject)]
        if any(group.is_full for group in takers):
            raise ChannelError(f"{subject}: {MAX_KEPT} messages wait, which is the bound")
        if dedupe_id:
            self._dedupe[subject, dedupe_id] = None
            if len(self._dedupe) > MAX_KEPT:
                self._dedupe.popitem(last=False)
        self._published += 1
        message = _Message(subject, body, dedupe_id or f"memory:{self._run}:{self._published}")
        self._keep(message)
        for group in takers:
            group.put(message)

    def _keep(self, message: "_Message") -> None:
        self._kept.append(message)
        self._kept_bytes += len(message.body)
        while len(self._kept) > MAX_KEPT or self._kept_bytes > MAX_KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft().body)

    @asynccontextmanager
    async def subscribe(
        self, subject: str, *, group: str, max_in_flight: int = 64
    ) -> AsyncIterator[AsyncIterator[Delivery]]:
        """Receive what comes on `subject`, sharing it with the others of `group`."""
        if self._is_closed:
            raise ChannelClosedError("the channel was closed")
        shared = self._groups.get((subject, group))
        if shared is None:
            shared = self._groups[subject, group] = _Group(subject)
            for message in self._kept:
                if matches(subject, message.subject):
                    shared.put(message)
        subscription = _Subscription(shared, max_in_flight)
        try:
            yield subscription
        finally:
            await subscription.give_back()

    def health(self) -> ChannelHealth:
        """Connected until it is closed."""
        return ChannelHealth(state="closed" if self._is_closed else "connected", url="memory:")

    async def aclose(self) -> None:
        """End the subscriptions."""
        self._is_closed = True
        for group in self._groups.values():
            group.close()


def matches(pattern: str, subject: str) -> bool:
    """Whether `subject` is one of `pattern`, in which `*` is one word and `>` all the rest."""
    words, asked = subject.split("."), pattern.split(".")
    for at, word in enumerate(asked):
        if word == ">":
            return len(words) > at
        if at >= len(words) or word not in {"*", words[at]}:
            return False
    return len(words) == len(asked)


class _Message:
    def __init__(self, subject: str, body: bytes, dedupe_id: str) -> None:
        self.subject, self.body, self.dedupe_id = subject, body, dedupe_id


class _Group:
    """What one group has still to receive, each with how often it was delivered before."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.is_closed = False
        self._waiting: deque[tuple[_Message, int]] = deque()
        self._delayed: set[asyncio.TimerHandle] = set()
        self._wakers: set[asyncio.Future[None]] = set()

    @property
    def is_full(self) -> bool:
        return len(self._waiting) + len(self._delayed) >= MAX_KEPT

    def put(self, message: _Message) -> None:
        self._waiting.append((message, 0))
        self._wake()

    def put_back(self, message: _Message, delivered: int, delay_s: float) -> None:
        """To the front: what comes again is older than what waits."""
        if delay_s <= 0:
            self._waiting.appendleft((message, delivered))
            self._wake()
            return

        def due() -> None:
            self._delayed.discard(timer)
            self.put_back(message, delivered, 0)

        timer = asyncio.get_running_loop().call_later(delay_s, due)
        self._delayed.add(timer)

    async def take(self) -> tuple[_Message, int] | None:
        """The next message and how often it was delivered before; None when the channel was closed."""
        while not self._waiting:
            if self.is_closed:
                return None
            await self.changed()
        return None if self.is_closed else self._waiting.popleft()

    async def changed(self) -> None:
        """Return when something was put, ended or closed."""
        waker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wakers.add(waker)
        try:
            await waker
        finally:
            self._wakers.discard(waker)

    def _wake(self) -> None:
        for waker in self._wakers:
            if not waker.done():
                waker.set_result(None)

    def ended(self) -> None:
        self._wake()

    def close(self) -> None:
        self.is_closed = True
        for timer in self._delayed:
            timer.cancel()
        self._delayed.clear()
        self._wake()


class _Subscription:
    def __init__(self, group: _Group, max_in_flight: int) -> None:
        self.group = group
        self.open: dict[_Delivery, None] = {}
        self._max_in_flight = max_in_flight

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivery:
        while len(self.open) >= self._max_in_flight and not self.group.is_closed:
            await self.group.changed()
        taken = await self.group.take()
        if taken is None:
            raise StopAsyncIteration
        delivery = _Delivery(self, *taken)
        self.open[delivery] = None
        return delivery

    async def give_back(self) -> None:
        for delivery in reversed(tuple(self.open)):
            with suppress(ChannelError):
                await delivery.nak(0.0)


class _Delivery:
    def __init__(self, subscription: _Subscription, message: _Message, delivered_before: int) -> None:
        self.subject, self.body, self.dedupe_id = message.subject, message.body, message.dedupe_id
        self.delivered = delivered_before + 1
        self._message = message
        self._subscription = subscription

    async def ack(self) -> None:
        self._end()

    async def nak(self, delay_s: float) -> None:
        self._end()
        self._subscription.group.put_back(self._message, self.delivered, delay_s)

    async def term(self) -> None:
        self._end()

    def _end(self) -> None:
        if self not in self._subscription.open:
            raise ChannelError(f"the delivery on {self.subject} was ended before")
        del self._subscription.open[self]
        self._subscription.group.ended()
