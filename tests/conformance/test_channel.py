"""What every channel promises, on every file below channels."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from ai_agent_server import channels
from ai_agent_server.channels.base import DEAD_LETTERS, FEEDBACK, INBOUND, METRICS, Channel, Delivery
from ai_agent_server.channels.memory_channel import MemoryChannel
from ai_agent_server.channels.nats_channel import NatsChannel
from ai_agent_server.discovery import implementation, kinds
from ai_agent_server.errors import ChannelClosedError, ChannelError, MessageTooLargeError
from tests.servers.nats import a_nats_server

Opener = Callable[[Path], AbstractAsyncContextManager[Channel]]
WAIT_S = 60.0


@asynccontextmanager
async def _memory(_: Path) -> AsyncIterator[Channel]:
    channel = MemoryChannel()
    try:
        yield channel
    finally:
        await channel.aclose()


@asynccontextmanager
async def _nats(folder: Path) -> AsyncIterator[Channel]:
    with a_nats_server(folder / "nats") as server:
        channel = await NatsChannel.connect(server.url, credentials=server.credentials, wait_s=WAIT_S)
        try:
            yield channel
        finally:
            await channel.aclose()


OPENERS: dict[str, Opener] = {"memory_channel": _memory, "nats_channel": _nats}


@pytest.fixture(params=sorted(kinds(channels)))
def opener(request: pytest.FixtureRequest) -> Opener:
    kind: str = request.param
    assert kind in OPENERS, f"say in OPENERS how a {kind} is opened, and it is under test"
    return OPENERS[kind]


@pytest.fixture
async def channel(opener: Opener, tmp_path: Path) -> AsyncIterator[Channel]:
    async with opener(tmp_path) as opened:
        yield opened


async def the_next(deliveries: AsyncIterator[Delivery]) -> Delivery:
    async with asyncio.timeout(WAIT_S):
        return await anext(deliveries)


async def acked(deliveries: AsyncIterator[Delivery], count: int) -> list[bytes]:
    bodies = []
    for _ in range(count):
        delivery = await the_next(deliveries)
        bodies.append(delivery.body)
        await delivery.ack()
    return bodies


def test_each_channel_is_the_single_class_its_file_names() -> None:
    assert implementation(channels, "nats_channel") is NatsChannel
    assert implementation(channels, "memory_channel") is MemoryChannel


async def test_messages_come_in_the_order_they_were_published(channel: Channel) -> None:
    async with channel.subscribe(FEEDBACK, group="a") as deliveries:
        for number in range(100):
            await channel.publish(FEEDBACK, b"%d" % number)
        assert await acked(deliveries, 100) == [b"%d" % number for number in range(100)]


async def test_a_message_published_before_anyone_came_is_received(channel: Channel) -> None:
    await channel.publish(INBOUND, b"early")
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        assert await acked(deliveries, 1) == [b"early"]


async def test_a_group_gets_what_came_while_it_was_away(channel: Channel) -> None:
    async with channel.subscribe(FEEDBACK, group="a") as deliveries:
        await channel.publish(FEEDBACK, b"one")
        assert await acked(deliveries, 1) == [b"one"]
    await channel.publish(FEEDBACK, b"two")
    async with channel.subscribe(FEEDBACK, group="a") as deliveries:
        assert await acked(deliveries, 1) == [b"two"]


async def test_two_groups_get_each_message_and_members_of_one_share_it(channel: Channel) -> None:
    async with (
        channel.subscribe(FEEDBACK, group="a") as first,
        channel.subscribe(FEEDBACK, group="b", max_in_flight=1) as second,
        channel.subscribe(FEEDBACK, group="b", max_in_flight=1) as third,
    ):
        await channel.publish(FEEDBACK, b"one")
        await channel.publish(FEEDBACK, b"two")
        assert await acked(first, 2) == [b"one", b"two"]
        shared = [await the_next(second), await the_next(third)]
        assert {delivery.body for delivery in shared} == {b"one", b"two"}
        for delivery in shared:
            await delivery.ack()


async def test_a_message_given_back_comes_again_as_the_same_one(channel: Channel) -> None:
    await channel.publish(INBOUND, b"again")
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        first = await the_next(deliveries)
        await first.nak(0.05)
        second = await the_next(deliveries)
        assert (second.body, second.dedupe_id) == (first.body, first.dedupe_id)
        assert (first.delivered, second.delivered) == (1, 2)
        await second.ack()


async def test_what_is_open_when_a_subscription_is_left_comes_again(channel: Channel) -> None:
    await channel.publish(INBOUND, b"open")
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        await the_next(deliveries)
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        delivery = await the_next(deliveries)
        assert (delivery.body, delivery.delivered) == (b"open", 2)
        await delivery.ack()


async def test_an_acked_and_a_termed_message_never_come_again(channel: Channel) -> None:
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        for body in (b"acked", b"termed"):
            await channel.publish(INBOUND, body)
        await (await the_next(deliveries)).ack()
        await (await the_next(deliveries)).term()
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        await channel.publish(INBOUND, b"last")
        assert await acked(deliveries, 1) == [b"last"]


async def test_a_delivery_is_ended_once(channel: Channel) -> None:
    await channel.publish(INBOUND, b"once")
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        delivery = await the_next(deliveries)
        await delivery.ack()
        with pytest.raises(ChannelError, match="ended before"):
            await delivery.nak(0)


async def test_two_publications_with_one_dedupe_id_are_delivered_once(channel: Channel) -> None:
    for body in (b"first", b"repeat"):
        await channel.publish(FEEDBACK, body, dedupe_id="task:1")
    await channel.publish(FEEDBACK, b"other", dedupe_id="task:2")
    async with channel.subscribe(FEEDBACK, group="a") as deliveries:
        assert await acked(deliveries, 2) == [b"first", b"other"]


async def test_different_messages_have_different_dedupe_ids(channel: Channel) -> None:
    await channel.publish(INBOUND, b"same")
    await channel.publish(INBOUND, b"same")
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        first, second = await the_next(deliveries), await the_next(deliveries)
        assert first.dedupe_id != second.dedupe_id


async def test_a_wildcard_takes_the_subjects_below_and_not_the_one_itself(channel: Channel) -> None:
    async with channel.subscribe(f"{FEEDBACK}.>", group="a") as deliveries:
        await channel.publish(FEEDBACK, b"itself")
        await channel.publish(f"{FEEDBACK}.task-7", b"below")
        delivery = await the_next(deliveries)
        assert (delivery.subject, delivery.body) == (f"{FEEDBACK}.task-7", b"below")
        await delivery.ack()


async def test_no_more_than_max_in_flight_are_open_at_once(channel: Channel) -> None:
    async with channel.subscribe(INBOUND, group="a", max_in_flight=2) as deliveries:
        for number in range(3):
            await channel.publish(INBOUND, b"%d" % number)
        first, second = await the_next(deliveries), await the_next(deliveries)
        third = asyncio.ensure_future(anext(deliveries))
        await asyncio.wait((third,), timeout=0.5)
        assert not third.done()
        await first.ack()
        async with asyncio.timeout(WAIT_S):
            await (await third).ack()
        await second.ack()


@pytest.mark.parametrize("subject", [INBOUND, FEEDBACK, DEAD_LETTERS, METRICS])
async def test_every_subject_of_the_protocol_carries_any_bytes(channel: Channel, subject: str) -> None:
    body = bytes(range(256))
    await channel.publish(subject, body)
    async with channel.subscribe(subject, group="a") as deliveries:
        delivery = await the_next(deliveries)
        assert (delivery.subject, delivery.body) == (subject, body)
        await delivery.ack()


async def test_a_message_over_the_limit_is_refused_and_the_next_one_is_not(channel: Channel) -> None:
    with pytest.raises(MessageTooLargeError) as caught:
        await channel.publish(FEEDBACK, b"x" * 1024 * 1024 + b"y", dedupe_id="big")
    assert caught.value.limit_bytes <= 1024 * 1024
    await channel.publish(FEEDBACK, b"small")
    async with channel.subscribe(FEEDBACK, group="a") as deliveries:
        assert await acked(deliveries, 1) == [b"small"]


async def test_a_closed_channel_ends_its_iterators_and_refuses_the_rest(channel: Channel) -> None:
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        waiting = asyncio.ensure_future(anext(deliveries, None))
        await asyncio.sleep(0)
        await channel.aclose()
        async with asyncio.timeout(WAIT_S):
            assert await waiting is None
    assert channel.health().state == "closed"
    with pytest.raises(ChannelClosedError):
        await channel.publish(INBOUND, b"late")
    with pytest.raises(ChannelClosedError):
        async with channel.subscribe(INBOUND, group="a"):
            pass
    await channel.aclose()


async def test_a_channel_in_memory_keeps_some_megabytes_for_who_comes_later() -> None:
    async with _memory(Path()) as channel:
        body = bytes(900_000)
        for number in range(20):
            await channel.publish(FEEDBACK, body, dedupe_id=str(number))
        async with channel.subscribe(FEEDBACK, group="late") as deliveries:
            assert (await the_next(deliveries)).dedupe_id == "16"
