"""What the NATS channel does when its server comes, goes, forgets, freezes or refuses."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import pytest
from nats.js import JetStreamContext

from ai_agent_server.channels.base import FEEDBACK, INBOUND, Delivery
from ai_agent_server.channels.nats_channel import NatsChannel
from ai_agent_server.errors import ChannelError
from tests.servers.nats import NatsServer, a_nats_server
from tests.waiting import until

WAIT_S = 60.0


async def the_next(deliveries: AsyncIterator[Delivery]) -> Delivery:
    async with asyncio.timeout(WAIT_S):
        return await anext(deliveries)


async def published(channel: NatsChannel, body: bytes, dedupe_id: str) -> None:
    """Publish it, once the server is able to take it."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await channel.publish(FEEDBACK, body, dedupe_id=dedupe_id)
            except ChannelError:
                await asyncio.sleep(0.05)


@asynccontextmanager
async def by_hand(server: NatsServer) -> AsyncIterator[JetStreamContext]:
    user, _, password = server.credentials.partition(":")
    client = await nats.connect(server.url, user=user, password=password)
    try:
        yield client.jetstream()
    finally:
        await client.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with a_nats_server(tmp_path / "nats") as running:
        yield running


@pytest.fixture
async def channel(server: NatsServer) -> AsyncIterator[NatsChannel]:
    opened = await NatsChannel.connect(server.url, credentials=server.credentials, wait_s=WAIT_S)
    yield opened
    await opened.aclose()


async def test_it_starts_without_its_server_and_finds_it_when_it_comes(server: NatsServer) -> None:
    server.kill()
    channel = await NatsChannel.connect(server.url, credentials=server.credentials, wait_s=0.1)
    assert channel.health().state == "reconnecting"
    async with channel.subscribe(FEEDBACK, group="a") as deliveries:
        await asyncio.to_thread(server.start)
        await until(lambda: channel.health().state == "connected")
        await channel.publish(FEEDBACK, b"hello")
        delivery = await the_next(deliveries)
        assert delivery.body == b"hello"
        await delivery.ack()
    assert channel.health().reconnects == 0
    await channel.aclose()


async def test_a_publication_while_the_server_is_away_fails_and_says_so(
    channel: NatsChannel, server: NatsServer
) -> None:
    server.kill()
    await until(lambda: channel.health().state == "reconnecting")
    with pytest.raises(ChannelError, match="not connected"):
        await channel.publish(FEEDBACK, b"lost?")


async def test_what_comes_again_before_its_return_is_confirmed_is_not_dropped(channel: NatsChannel) -> None:
    async with channel.subscribe(FEEDBACK, group="a") as deliveries:
        await channel.publish(FEEDBACK, b"x")
        for turns in range(20):
            async with asyncio.timeout(15):  # the server would wait for 30 s for a word
                delivery = await anext(deliveries)
            returning = asyncio.create_task(delivery.nak(0.01))
            for _ in range(turns):
                await asyncio.sleep(0)
            # The loop is busy: where the word was sent, its confirmation and the message come together.
            time.sleep(0.05)  # noqa: ASYNC251
            await returning
        last = await the_next(deliveries)
        assert last.delivered == 21
        await last.ack()


async def test_a_subscription_lives_through_a_kill_and_a_restart(
    channel: NatsChannel, server: NatsServer
) -> None:
    seen: list[bytes] = []
    async with channel.subscribe(FEEDBACK, group="a") as deliveries:
        for number in range(3):
            await channel.publish(FEEDBACK, b"%d" % number)
            while b"%d" % number not in seen:
                # A server that is killed may forget the last acknowledgement, and deliver again.
                delivery = await the_next(deliveries)
                seen.append(delivery.body)
                await delivery.ack()
            await asyncio.to_thread(server.restart)
            while channel.health().reconnects <= number:
                await asyncio.sleep(0.02)
    assert sorted(set(seen)) == [b"0", b"1", b"2"]


async def test_what_was_published_before_a_kill_is_there_after_it(
    channel: NatsChannel, server: NatsServer
) -> None:
    await channel.publish(INBOUND, b"safe")
    await asyncio.to_thread(server.restart)
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        delivery = await the_next(deliveries)
        assert delivery.body == b"safe"
        await delivery.ack()


async def test_a_delivery_from_before_a_kill_is_acked_after_it_or_comes_again(server: NatsServer) -> None:
    channel = await NatsChannel.connect(
        server.url, credentials=server.credentials, wait_s=WAIT_S, ack_wait_s=2.0
    )
    await channel.publish(INBOUND, b"first")
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        before = await the_next(deliveries)
        await asyncio.to_thread(server.restart)
        await until(lambda: channel.health().reconnects == 1)
        try:
            await before.ack()
        except ChannelError:
            again = await the_next(deliveries)
            assert again.dedupe_id == before.dedupe_id
            await again.ack()
    async with by_hand(server) as jetstream, asyncio.timeout(WAIT_S):
        while (await jetstream.stream_info("AI_AGENT_SERVER_INBOUND")).state.messages:
            await asyncio.sleep(0.02)
    await channel.aclose()


async def test_a_delivery_that_is_worked_on_for_long_is_not_delivered_again(server: NatsServer) -> None:
    channel = await NatsChannel.connect(
        server.url, credentials=server.credentials, wait_s=WAIT_S, ack_wait_s=3.0
    )
    await channel.publish(INBOUND, b"long")
    async with channel.subscribe(INBOUND, group="a", max_in_flight=1) as busy:
        delivery = await the_next(busy)
        async with channel.subscribe(INBOUND, group="a") as idle:
            await asyncio.sleep(4.5)
            await channel.publish(INBOUND, b"next")
            assert (await the_next(idle)).body == b"next"
        await delivery.ack()
    await channel.aclose()


async def test_a_delivery_of_a_lost_stream_never_ends_a_message_of_the_new_one(
    channel: NatsChannel, server: NatsServer
) -> None:
    await channel.publish(INBOUND, b"old")
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        old = await the_next(deliveries)
        await asyncio.to_thread(server.kill)
        server.lose_files()
        await asyncio.to_thread(server.start)
        await until(lambda: channel.health().reconnects == 1)
        await channel.publish(INBOUND, b"new")
        new = await the_next(deliveries)
        assert new.body == b"new"
        assert new.dedupe_id != old.dedupe_id
        with pytest.raises(ChannelError, match="lost the stream"):
            await old.ack()
        async with by_hand(server) as jetstream:
            assert (await jetstream.stream_info("AI_AGENT_SERVER_INBOUND")).state.messages == 1
        await new.ack()


async def test_a_stream_that_somebody_deletes_is_made_again(channel: NatsChannel, server: NatsServer) -> None:
    async with channel.subscribe(FEEDBACK, group="a") as deliveries:
        await channel.publish(FEEDBACK, b"before")
        await (await the_next(deliveries)).ack()
        async with by_hand(server) as jetstream:
            await jetstream.delete_stream("AI_AGENT_SERVER_FEEDBACK")
        await channel.publish(FEEDBACK, b"after")
        delivery = await the_next(deliveries)
        assert delivery.body == b"after"
        await delivery.ack()


async def test_a_consumer_that_somebody_deletes_is_made_again(
    channel: NatsChannel, server: NatsServer
) -> None:
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        await channel.publish(INBOUND, b"before")
        await (await the_next(deliveries)).ack()
        async with by_hand(server) as jetstream:
            (consumer,) = await jetstream.consumers_info("AI_AGENT_SERVER_INBOUND")
            await jetstream.delete_consumer("AI_AGENT_SERVER_INBOUND", consumer.name)
        await channel.publish(INBOUND, b"after")
        delivery = await the_next(deliveries)
        assert delivery.body == b"after"
        await delivery.ack()


async def test_a_server_that_freezes_fails_a_publication_and_serves_when_it_thaws(
    channel: NatsChannel, server: NatsServer
) -> None:
    async with channel.subscribe(FEEDBACK, group="a") as deliveries:
        server.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(ChannelError):
                await channel.publish(FEEDBACK, b"frozen", dedupe_id="one")
        finally:
            server.send_signal(signal.SIGCONT)
        for body, dedupe_id in ((b"frozen", "one"), (b"thawed", "two")):
            await published(channel, body, dedupe_id)
        for body in (b"frozen", b"thawed"):
            delivery = await the_next(deliveries)
            assert delivery.body == body
            await delivery.ack()


async def test_a_refused_password_is_told_and_never_shown(
    server: NatsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    url = server.url.replace("nats://", "nats://tester:wrong-secret@")
    channel = await NatsChannel.connect(url, wait_s=0.5)
    health = channel.health()
    assert health.state == "reconnecting"
    assert health.url == server.url
    said = ""
    async with asyncio.timeout(WAIT_S):
        while "Authorization Violation" not in said:
            await asyncio.sleep(0.02)
            said += "".join(capsys.readouterr())
    await channel.aclose()
    said += "".join(capsys.readouterr())
    assert "wrong-secret" not in said


async def test_credentials_may_be_a_token(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "nats")
    server.start(authorization={"token": "s3cret"})
    try:
        channel = await NatsChannel.connect(server.url, credentials="s3cret", wait_s=WAIT_S)
        await channel.publish(FEEDBACK, b"x")
        await channel.aclose()
    finally:
        server.kill()


async def test_a_subject_that_no_stream_keeps_is_refused(channel: NatsChannel) -> None:
    with pytest.raises(ChannelError, match="no stream keeps"):
        await channel.publish("somebody.else", b"x")
    with pytest.raises(ChannelError, match="no stream keeps"):
        async with channel.subscribe("somebody.else", group="a"):
            pass


async def test_a_header_that_looks_like_a_status_is_delivered_as_any_other(
    channel: NatsChannel, server: NatsServer
) -> None:
    async with by_hand(server) as jetstream:
        await jetstream.publish(INBOUND, b"x", headers={"Status": "404"})
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        delivery = await the_next(deliveries)
        assert delivery.body == b"x"
        await delivery.ack()


async def test_the_publishers_message_id_is_the_dedupe_id(channel: NatsChannel, server: NatsServer) -> None:
    async with by_hand(server) as jetstream:
        await jetstream.publish(INBOUND, b"x", headers={"Nats-Msg-Id": "order-66"})
    async with channel.subscribe(INBOUND, group="a") as deliveries:
        delivery = await the_next(deliveries)
        assert delivery.dedupe_id == "order-66"
        await delivery.ack()


async def test_nothing_is_left_running_when_it_is_closed(server: NatsServer) -> None:
    before = asyncio.all_tasks()
    channel = await NatsChannel.connect(server.url, credentials=server.credentials, wait_s=WAIT_S)
    async with channel.subscribe(FEEDBACK, group="a") as deliveries:
        await channel.publish(FEEDBACK, b"x")
        await (await the_next(deliveries)).ack()
    await channel.aclose()
    await until(lambda: asyncio.all_tasks() == before)
