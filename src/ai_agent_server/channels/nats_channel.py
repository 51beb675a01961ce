"""A channel over NATS JetStream that starts without its server and outlives it."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Self

import structlog
from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import NoStreamResponseError

from ai_agent_server.channels._nats_streams import STREAMS, stream_of
from ai_agent_server.channels.base import ChannelHealth, ChannelState, Delivery
from ai_agent_server.errors import ChannelClosedError, ChannelError, MessageTooLargeError
from ai_agent_server.nats_link import OPEN_TIMEOUT_S, REQUEST_TIMEOUT_S, Link, Session, translated

__all__ = ("NatsChannel",)

READY_TIMEOUT_S = 5.0
ACK_WAIT_S = 30.0
PULL_EXPIRES_S = 30.0
HEARTBEAT_S = 5.0
REBUILD_PAUSE_S = 0.2
MAX_ACK_PENDING = 1024
HEADER_BYTES = 64
"""What NATS adds around a `Nats-Msg-Id`; the server counts it in `max_payload`, nats-py does not."""

log = structlog.get_logger(__name__)


class NatsChannel:
    """`Channel` on a nats-server with JetStream.

    Every subject is kept by a stream (`_nats_streams.STREAMS`); a group is a durable pull consumer. A
    subject outside the layout is a `ChannelError`. `messaging.url` may name several servers of one
    cluster, with commas.
    """

    def __init__(self, link: Link, *, embedded: bool, ack_wait_s: float = ACK_WAIT_S) -> None:
        self._link = link
        self._ack_wait_s = ack_wait_s
        self._embedded = embedded
        self._subscriptions: set[_Subscription] = set()

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        credentials: str | None = None,
        name: str = "ai-agent-server",
        embedded: bool = False,
        wait_s: float = 2.0,
        ack_wait_s: float = ACK_WAIT_S,
        replicas: int = 1,
    ) -> Self:
        """A channel to `url`; `credentials` is `user:password` or a token.

        A member of a group that vanished with a delivery open loses it to another after `ack_wait_s`.

        Waits up to `wait_s` for the server. When it is not there the channel is returned all the
        same, in state `reconnecting`, and goes on trying in the background until `aclose`.
        """
        link = Link(url, credentials=credentials, name=name, streams=STREAMS, replicas=replicas)
        link.open()
        try:
            with suppress(ChannelError):
                await link.session(wait_s)
        except asyncio.CancelledError:
            await link.aclose()
            raise
        return cls(link, embedded=embedded, ack_wait_s=ack_wait_s)

    async def publish(self, subject: str, body: bytes, *, dedupe_id: str = "") -> None:
        """Publish and wait until the stream has it. Raises `ChannelError`."""
        stream_of(subject)
        session = await self._link.session(READY_TIMEOUT_S)
        size = len(body) + len(dedupe_id.encode()) + HEADER_BYTES
        if size > session.client.max_payload:
            raise MessageTooLargeError(subject, size_bytes=size, limit_bytes=session.client.max_payload)
        async with translated(f"publish to {subject}"):
            try:
                await self._publish(session, subject, body, dedupe_id)
            except NoStreamResponseError:
                await session.or_lost(session.ensure_streams(), OPEN_TIMEOUT_S)
                await self._publish(session, subject, body, dedupe_id)

    async def _publish(self, session: Session, subject: str, body: bytes, dedupe_id: str) -> None:
        headers = {"Nats-Msg-Id": dedupe_id} if dedupe_id else None
        work = session.jetstream.publish(subject, body, headers=headers)
        await session.or_lost(work, REQUEST_TIMEOUT_S)

    @asynccontextmanager
    async def subscribe(
        self, subject: str, *, group: str, max_in_flight: int = 64
    ) -> AsyncIterator[AsyncIterator[Delivery]]:
        """Receive what comes on `subject`, through the durable consumer of `group`."""
        if self._link.is_closed:
            raise ChannelClosedError("the channel was closed")
        subscription = _Subscription(
            self._link, subject, group=group, max_in_flight=max_in_flight, ack_wait_s=self._ack_wait_s
        )
        self._subscriptions.add(subscription)
        tasks = (
            asyncio.create_task(subscription.pull(), name=f"nats-pull {subject}"),
            asyncio.create_task(subscription.beat(), name=f"nats-beat {subject}"),
        )
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await subscription.give_back()

    def health(self) -> ChannelHealth:
        """The state of the connection, without asking the server."""
        state: ChannelState = "connected" if self._link.is_connected else "reconnecting"
        return ChannelHealth(
            state="closed" if self._link.is_closed else state,
            url=self._link.url,
            embedded=self._embedded,
            reconnects=max(0, self._link.connections - 1),
            version=self._link.version,
        )

    async def aclose(self) -> None:
        """End the subscriptions and close the connection."""
        for subscription in tuple(self._subscriptions):
            subscription.end()
        await self._link.aclose()


class _Subscription:
    """A durable consumer that is pulled from, over as many sessions as it takes."""

    def __init__(
        self, link: Link, subject: str, *, group: str, max_in_flight: int, ack_wait_s: float
    ) -> None:
        self._link = link
        self._ack_wait_s = ack_wait_s
        self._subject = subject
        self._stream = stream_of(subject)
        self._consumer = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{group}--{subject.replace('>', 'all')}")
        self._max_in_flight = max_in_flight
        self._open: dict[tuple[str, int], _Delivery] = {}
        self._freed = asyncio.Event()
        # Holds at most max_in_flight: no more are asked for than there are places in _open.
        self._ready: asyncio.Queue[_Delivery | None] = asyncio.Queue()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivery:
        delivery = await self._ready.get()
        if delivery is None:
            self._ready.put_nowait(None)
            raise StopAsyncIteration
        return delivery

    def end(self) -> None:
        """Let the iterator end."""
        self._ready.put_nowait(None)

    def ended(self, delivery: "_Delivery") -> None:
        """Its place is free again."""
        if self._open.get(delivery.key) is delivery:  # it may have come again already
            del self._open[delivery.key]
            self._freed.set()

    async def pull(self) -> None:
        """Ask for messages, for ever; a pull that fails or falls silent is built anew."""
        while True:
            session = await self._link.session()
            try:
                await self._pull(session)
            except (Error, OSError, TimeoutError, ChannelError) as exc:
                if not session.is_lost:
                    log.info("channel.pull_rebuilt", subject=self._subject, problem=str(exc))
            await asyncio.sleep(REBUILD_PAUSE_S)

    async def _pull(self, session: Session) -> None:
        await session.or_lost(session.ensure_streams(), OPEN_TIMEOUT_S)
        wanted = session.jetstream.add_consumer(self._stream, self._wanted_consumer())
        await session.or_lost(wanted, REQUEST_TIMEOUT_S)
        request = _PullRequest()

        async def on_message(message: Msg) -> None:
            if message.reply.startswith("$JS.ACK."):
                self._take(message, session)
                request.missing -= 1
            else:
                request.note(message)
            request.stirred.set()

        inbox = session.client.new_inbox()
        subscription = await session.client.subscribe(inbox, cb=on_message)
        drain: Callable[[], Awaitable[None]] = subscription.drain
        try:
            while True:
                await self._ask(session, inbox, request)
                while request.is_pending:
                    request.stirred.clear()
                    # Two heartbeats missed: the server forgot the request, or the consumer is gone.
                    await session.or_lost(request.stirred.wait(), 2.5 * HEARTBEAT_S)
                request.check()
        finally:
            if not session.is_lost:
                # Drained, not dropped: what is on its way would otherwise wait for ack_wait_s.
                with suppress(Error, OSError, TimeoutError):
                    async with asyncio.timeout(REQUEST_TIMEOUT_S):
                        await drain()

    async def _ask(self, session: Session, inbox: str, request: "_PullRequest") -> None:
        while len(self._open) >= self._max_in_flight:
            self._freed.clear()
            await session.or_lost(self._freed.wait(), None)
        request.start(self._max_in_flight - len(self._open))
        wish = {
            "batch": request.missing,
            "expires": int(PULL_EXPIRES_S * 1e9),
            "idle_heartbeat": int(HEARTBEAT_S * 1e9),
        }
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}"
        await session.client.publish(subject, json.dumps(wish).encode(), reply=inbox)

    def _wanted_consumer(self) -> ConsumerConfig:
        return ConsumerConfig(
            durable_name=self._consumer,
            filter_subject=self._subject,
            deliver_policy=DeliverPolicy.ALL,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=self._ack_wait_s,
            max_deliver=-1,
            max_ack_pending=MAX_ACK_PENDING,
        )

    def _take(self, message: Msg, session: Session) -> None:
        delivery = _Delivery(self, message, session.incarnations[self._stream])
        earlier = self._open.get(delivery.key)
        if earlier is not None and not earlier.is_returned:
            return  # redelivered while it is still being worked on; the one acknowledgement covers both
        self._open[delivery.key] = delivery
        self._ready.put_nowait(delivery)

    async def beat(self) -> None:
        """Tell the server of every open delivery that it is being worked on."""
        while True:
            await asyncio.sleep(self._ack_wait_s / 3)
            session = await self._link.session()
            with suppress(Error, OSError):
                for delivery in tuple(self._open.values()):
                    if self._open.get(delivery.key) is delivery and not delivery.is_returned:
                        await session.client.publish(delivery.reply, b"+WPI")

    async def give_back(self) -> None:
        """Return what is open, so that another member gets it now."""
        for delivery in tuple(self._open.values()):
            if not self._link.is_connected:
                return  # the server will miss the heartbeats, and deliver them again
            with suppress(ChannelError):
                await delivery.nak(0.0)

    async def reply(self, delivery: "_Delivery", word: bytes) -> None:
        """Send `word` about `delivery` and wait until the server took it. Raises `ChannelError`."""
        session = await self._link.session(0.0 if self._link.is_closed else READY_TIMEOUT_S)
        if session.incarnations.get(self._stream) != delivery.incarnation:
            # The numbers of a stream made anew begin at 1: this would end somebody else's message.
            raise ChannelError(f"the server lost the stream that delivered this message on {self._subject}")
        async with translated(f"{word[:4].decode()} on {self._subject}"):
            work = session.client.request(delivery.reply, word, timeout=REQUEST_TIMEOUT_S)
            await session.or_lost(work, REQUEST_TIMEOUT_S)


class _PullRequest:
    """What was asked of the server, and what it said about it."""

    def __init__(self) -> None:
        self.missing = 0
        self.stirred = asyncio.Event()
        self._status = ""
        self._description = ""

    def start(self, batch: int) -> None:
        self.missing, self._status, self._description = batch, "", ""

    def note(self, message: Msg) -> None:
        headers = message.headers or {}
        status = headers.get("Status", "")
        if status != "100":  # a heartbeat stirs, and says no more
            self._status, self._description = status, headers.get("Description", "")

    @property
    def is_pending(self) -> bool:
        return self.missing > 0 and not self._status

    def check(self) -> None:
        """404 and 408 are a request that ran out; anything else is a consumer that will not serve."""
        if self._status not in {"", "404", "408"}:
            raise ChannelError(f"{self._status} {self._description}".strip())


class _Delivery:
    """A message that JetStream delivered."""

    def __init__(self, subscription: _Subscription, message: Msg, incarnation: str) -> None:
        meta = message.metadata
        self.subject = message.subject
        self.body = message.data
        self.delivered = meta.num_delivered
        self.reply = message.reply
        self.incarnation = incarnation
        self.key = (incarnation, meta.sequence.stream)
        published_as = (message.headers or {}).get("Nats-Msg-Id")
        # The time keeps the numbers of a stream that was lost and made anew apart from the old ones.
        self.dedupe_id = published_as or f"{meta.stream}:{meta.sequence.stream}:{meta.timestamp.isoformat()}"
        self._subscription = subscription
        self._is_ended = False
        self.is_returned = False
        """It may come again from now on."""

    async def ack(self) -> None:
        await self._end(b"+ACK")

    async def nak(self, delay_s: float) -> None:
        if not self._is_ended:
            self.is_returned = True
        await self._end(b"-NAK " + json.dumps({"delay": int(delay_s * 1e9)}).encode())

    async def term(self) -> None:
        await self._end(b"+TERM")

    async def _end(self, word: bytes) -> None:
        if self._is_ended:
            raise ChannelError(f"the delivery on {self.subject} was ended before")
        self._is_ended = True
        try:
            await self._subscription.reply(self, word)
        finally:
            # Also when it failed: no more heartbeats, so that the server delivers it again.
            self._subscription.ended(self)
