"""The Message Control Protocol, told to a real nats-server by an agent from outside."""

import asyncio
import base64
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import nats
import pytest
from nats.aio.client import Client
from nats.js.errors import NotFoundError

from ai_agent_server.channels.base import DEAD_LETTERS, FEEDBACK, INBOUND, METRICS, Channel, Delivery
from ai_agent_server.channels.memory_channel import MemoryChannel
from ai_agent_server.channels.nats_channel import NatsChannel
from ai_agent_server.core.api_schemas import problem_kind
from ai_agent_server.core.mcp_handler import REASONS, McpHandler, McpHealth
from ai_agent_server.core.task_packet import (
    Completed,
    ErrorDetail,
    Failed,
    FeedbackDraft,
    Hop,
    Recovered,
    Sender,
    Started,
    StepFinished,
    StepStarted,
    TaskDraft,
    TaskPacket,
    Via,
)
from ai_agent_server.core.transitions import fold
from ai_agent_server.errors import (
    ChannelError,
    CorruptTaskError,
    IntakeFullError,
    ShuttingDownError,
    StoreError,
    StoreFullError,
    StoreUnusableError,
)
from tests.servers.nats import NatsServer, a_nats_server
from tests.servers.orchestration_double import OrchestrationDouble
from tests.waiting import until

WAIT_S = 60.0
PACKET: dict[str, Any] = {"profile": "developer", "role": "planner", "payload": {"task": "add two numbers"}}


class Engine(OrchestrationDouble):
    """A double that can be held, and can fail as often as a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()
        self.refusals: list[Exception] = []
        self.submitting = 0
        self.reported = asyncio.Event()
        self.report_gate = asyncio.Event()
        self.report_gate.set()

    async def submit(
        self, draft: TaskDraft, *, via: Via, idempotency_key: str | None = None, sender: Sender | None = None
    ) -> tuple[TaskPacket, bool]:
        self.submitting += 1
        await self.gate.wait()
        if self.refusals:
            raise self.refusals.pop(0)
        return await super().submit(draft, via=via, idempotency_key=idempotency_key, sender=sender)

    async def feedback(
        self, task_id: str, draft: FeedbackDraft, *, via: Via, message_id: str = ""
    ) -> TaskPacket:
        if self.refusals:
            raise self.refusals.pop(0)
        packet = await super().feedback(task_id, draft, via=via, message_id=message_id)
        self.reported.set()
        await self.report_gate.wait()
        return packet

    def only(self) -> TaskPacket:
        (packet,) = self.tasks.values()
        return packet


class Forgetful(MemoryChannel):
    """A channel that does not confirm the first `ack` of a message, and delivers it again."""

    @asynccontextmanager
    async def subscribe(
        self, subject: str, *, group: str, max_in_flight: int = 64
    ) -> AsyncIterator[AsyncIterator[Delivery]]:
        async with super().subscribe(subject, group=group, max_in_flight=max_in_flight) as deliveries:
            yield (_Unconfirmed(delivery) async for delivery in deliveries)


class _Unconfirmed:
    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self.subject, self.body, self.dedupe_id = delivery.subject, delivery.body, delivery.dedupe_id
        self.delivered, self.nak, self.term = delivery.delivered, delivery.nak, delivery.term

    async def ack(self) -> None:
        if self.delivered == 1:
            await self.nak(0)
            raise ChannelError("not confirmed")
        await self._delivery.ack()


class Outside:
    """An agent from outside: a plain NATS client that knows the subjects and nothing of us."""

    def __init__(self, server: NatsServer) -> None:
        self._server = server

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Client]:
        user, _, password = self._server.credentials.partition(":")
        client = await nats.connect(self._server.url, user=user, password=password)
        try:
            yield client
        finally:
            await client.close()

    async def publish(self, subject: str, body: object, *, message_id: str = "") -> None:
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        headers = {"Nats-Msg-Id": message_id} if message_id else None
        async with self._client() as client:
            await client.jetstream().publish(subject, raw, headers=headers)

    async def kept(self, subject: str) -> list[Any]:
        """All that the stream of `subject` holds on it, in order."""
        found = []
        async with self._client() as client:
            jetstream = client.jetstream()
            stream = await jetstream.find_stream_name_by_subject(subject)
            state = (await jetstream.stream_info(stream)).state
            for seq in range(max(1, state.first_seq), state.last_seq + 1):
                try:
                    message = await jetstream.get_msg(stream, seq)
                except NotFoundError:
                    continue
                if message.subject == subject:
                    assert message.data is not None
                    found.append(msgspec.json.decode(message.data))
        return found

    async def events(self) -> list[tuple[str, int]]:
        """The events that came out: (task, seq) each."""
        packets = await self.kept(FEEDBACK)
        return [(p["task_id"], p["event"]["seq"]) for p in packets if p.get("kind") == "event"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with a_nats_server(tmp_path / "nats") as running:
        yield running


@pytest.fixture
def outside(server: NatsServer) -> Outside:
    return Outside(server)


@pytest.fixture
async def channel(server: NatsServer) -> AsyncIterator[NatsChannel]:
    opened = await NatsChannel.connect(server.url, credentials=server.credentials, wait_s=WAIT_S)
    yield opened
    await opened.aclose()


@pytest.fixture
async def engine() -> Engine:
    return Engine()


def a_handler(engine: OrchestrationDouble, channel: Channel, folder: Path, **changes: Any) -> McpHandler:
    settings: dict[str, Any] = {
        "clock": lambda: datetime.now(UTC),
        "metrics": lambda: b'{"tasks": 1}',
        "metrics_interval_s": 3600.0,
        "state_path": folder / "messaging.json",
        "retry_s": 0.05,
    }
    return McpHandler(engine, channel, **(settings | changes))


@pytest.fixture
async def handler(engine: Engine, channel: NatsChannel, tmp_path: Path) -> AsyncIterator[McpHandler]:
    async with a_handler(engine, channel, tmp_path) as running:
        yield running


def steps(count: int) -> list[StepStarted]:
    now = datetime.now(UTC)
    return [
        StepStarted(at=now, step=n + 1, role="planner", attempt=1, hop=Hop(on="entry", why="entry"))
        for n in range(count)
    ]


# --- tasks come in ---


async def test_a_packet_becomes_a_task_and_leaves_the_queue(
    handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    await outside.publish(INBOUND, PACKET)
    await until(lambda: len(engine.tasks) == 1)
    packet = engine.only()
    assert (packet.profile, packet.role, packet.payload) == ("developer", "planner", PACKET["payload"])
    assert msgspec.to_builtins(packet.history[0])["via"] == "nats"

    async def queue_is_empty() -> bool:
        return await outside.kept(INBOUND) == []

    await until(queue_is_empty)
    assert handler.health().accepted == 1


async def test_a_packet_stays_in_the_queue_until_its_task_is_safe(
    handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    engine.gate.clear()
    await outside.publish(INBOUND, PACKET)
    await until(lambda: engine.submitting == 1)
    assert await outside.kept(INBOUND) == [PACKET]
    engine.gate.set()

    async def queue_is_empty() -> bool:
        return await outside.kept(INBOUND) == []

    await until(queue_is_empty)
    assert len(engine.tasks) == 1


@pytest.mark.parametrize(
    ("body", "reason", "pointer"),
    [
        (b"", "malformed", ""),
        (b"not json", "malformed", ""),
        (b'{"payload": {}', "malformed", ""),
        (b"\xff\xfe", "malformed", ""),
        (b"[" * 10_000 + b"]" * 10_000, "malformed", ""),
        (b"[1, 2]", "invalid-packet", ""),
        ({"role": "planner", "payload": {}}, "invalid-packet", "/profile"),
        ({"profile": "developer", "payload": {}}, "invalid-packet", "/role"),
        (PACKET | {"payload": "text"}, "invalid-packet", "/payload"),
        (PACKET | {"payloads": 1}, "invalid-packet", "/payloads"),
        (PACKET | {"limits": {"calls": "many"}}, "invalid-packet", "/limits/calls"),
        (PACKET | {"task_id": "../../etc/passwd"}, "invalid-packet", "/task_id"),
        (PACKET | {"profile": "nobody"}, "unknown-role", "/profile"),
        (PACKET | {"role": "nobody"}, "unknown-role", "/role"),
    ],
)
async def test_what_cannot_be_taken_is_a_dead_letter_that_says_why(
    body: object, reason: str, pointer: str, *, handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    await outside.publish(INBOUND, body)
    await until(lambda: handler.health().dead_letters == 1)
    (letter,) = await outside.kept(DEAD_LETTERS)
    assert (letter["reason"], letter["pointer"]) == (reason, pointer)
    assert letter["problem"]
    assert letter["subject"] == INBOUND
    assert datetime.fromisoformat(letter["received_at"]).tzinfo is not None
    sent = body if isinstance(body, bytes) else msgspec.json.encode(body)
    kept = letter["body"].encode() if letter["encoding"] == "utf-8" else base64.b64decode(letter["body"])
    assert kept == sent
    assert engine.tasks == {}

    async def queue_is_empty() -> bool:
        async with outside._client() as client:
            info = await client.jetstream().stream_info("AI_AGENT_SERVER_INBOUND")
            return info.state.messages == 0

    await until(queue_is_empty)


async def test_of_a_large_message_the_dead_letter_keeps_the_beginning(
    handler: McpHandler, outside: Outside
) -> None:
    await outside.publish(INBOUND, ("ä" * 300_000).encode())
    await until(lambda: handler.health().dead_letters == 1)
    (letter,) = await outside.kept(DEAD_LETTERS)
    assert letter["truncated"] is True
    assert letter["body"] == "ä" * (32 * 1024)


async def test_the_same_id_with_another_body_is_a_dead_letter_and_with_the_same_one_task(
    handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    task_id = str(uuid.uuid4())
    for payload in ({"task": "one"}, {"task": "one"}, {"task": "two"}):
        await outside.publish(INBOUND, PACKET | {"task_id": task_id, "payload": payload})
    await until(lambda: handler.health().dead_letters == 1)
    (letter,) = await outside.kept(DEAD_LETTERS)
    assert letter["reason"] == "idempotency-conflict"
    assert engine.only().payload == {"task": "one"}


async def test_two_equal_packets_without_an_id_are_two_tasks(
    handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    await outside.publish(INBOUND, PACKET)
    await outside.publish(INBOUND, PACKET)
    await until(lambda: len(engine.tasks) == 2)


@pytest.mark.parametrize(
    "refusal",
    [
        IntakeFullError(7, retry_after_s=0.02),
        ShuttingDownError(retry_after_s=0.02),
        StoreFullError("no space"),
        StoreUnusableError("read-only"),
        StoreError("the disk answers nonsense"),
    ],
)
async def test_a_packet_that_cannot_be_kept_now_is_taken_later_however_often_that_was(
    refusal: Exception, handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    engine.refusals = [refusal] * 12
    await outside.publish(INBOUND, PACKET)
    await until(lambda: len(engine.tasks) == 1)
    assert engine.submitting == 13
    assert await outside.kept(DEAD_LETTERS) == []


async def test_a_packet_that_fails_again_and_again_ends_as_a_dead_letter(
    handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    engine.refusals = [CorruptTaskError("no task file")] * 20
    packet = PACKET | {"payload": {"task": "x" * 200_000}}
    await outside.publish(INBOUND, packet)
    await until(lambda: handler.health().dead_letters == 1)
    assert engine.submitting == 6
    (letter,) = await outside.kept(DEAD_LETTERS)
    assert (letter["reason"], letter["problem"]) == ("failed", "no task file")
    assert letter["truncated"] is False
    assert msgspec.json.decode(letter["body"]) == packet


async def test_a_packet_that_failed_and_is_too_large_for_a_dead_letter_stays_until_it_is_taken(
    handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    engine.refusals = [CorruptTaskError("no task file")] * 9
    await outside.publish(INBOUND, PACKET | {"payload": {"task": '"' * 400_000}})
    await until(lambda: len(engine.tasks) == 1)
    assert handler.health().dead_letters == 0


async def test_a_fault_with_one_packet_does_not_end_the_messaging(
    handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    engine.refusals = [RuntimeError("a bug")]
    await outside.publish(INBOUND, PACKET)
    await until(lambda: engine.submitting == 1)
    await outside.publish(INBOUND, PACKET | {"payload": {"task": "the next"}})
    await until(lambda: [t.payload for t in engine.tasks.values()] == [{"task": "the next"}])


async def test_a_packet_under_way_at_the_stop_is_finished(
    engine: Engine, channel: NatsChannel, outside: Outside, tmp_path: Path
) -> None:
    engine.gate.clear()
    handler = a_handler(engine, channel, tmp_path)
    async with handler:
        await outside.publish(INBOUND, PACKET)
        await until(lambda: engine.submitting == 1)
        handler.stop()
        await asyncio.sleep(0.1)
        engine.gate.set()
    assert len(engine.tasks) == 1
    assert await outside.kept(INBOUND) == []
    assert await outside.events() == [(engine.only().task_id, 1)]


async def test_it_stops_while_the_server_is_away(
    engine: Engine, channel: NatsChannel, outside: Outside, server: NatsServer, tmp_path: Path
) -> None:
    engine.gate.clear()
    async with asyncio.timeout(WAIT_S), a_handler(engine, channel, tmp_path, shutdown_s=2.0):
        for _ in range(12):
            await outside.publish(INBOUND, PACKET)
        await until(lambda: engine.submitting == 8)
        await asyncio.to_thread(server.kill)
        engine.gate.set()


# --- events go out ---


async def test_every_event_goes_out_with_the_status_it_led_to(
    handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    now = datetime.now(UTC)
    packet, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
    engine.happen(packet.task_id, Started(at=now, generation=1), *steps(1))
    engine.happen(packet.task_id, Completed(at=now, result={"code": "pass"}))
    await until(lambda: handler.health().unpublished_tasks == 0)
    told = await outside.kept(FEEDBACK)
    assert [p["kind"] for p in told] == ["event"] * 4
    assert {p["task_id"] for p in told} == {packet.task_id}
    assert [(p["event"]["seq"], p["event"]["type"], p["status"]) for p in told] == [
        (1, "task.submitted", "submitted"),
        (2, "task.started", "working"),
        (3, "step.started", "working"),
        (4, "task.completed", "completed"),
    ]
    assert told[3]["event"]["result"] == {"code": "pass"}


async def test_nothing_is_lost_or_doubled_when_the_server_is_killed_and_comes_back(
    handler: McpHandler, engine: Engine, outside: Outside, server: NatsServer
) -> None:
    ids = [
        (await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest"))[0].task_id for _ in range(20)
    ]

    async def work() -> None:
        for step in steps(30):
            for task_id in ids:
                engine.happen(task_id, step)
            await asyncio.sleep(0.02)

    working = asyncio.create_task(work())
    for _ in range(3):
        await asyncio.sleep(0.1)
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(0.05)
        await asyncio.to_thread(server.start)
        await until(lambda: handler.health().channel.state == "connected")
    await working
    await until(lambda: handler.health().unpublished_tasks == 0)
    told = await outside.events()
    for task_id in ids:
        assert [seq for told_id, seq in told if told_id == task_id] == list(range(1, 32))
    assert handler.health().channel.reconnects >= 3


async def test_events_that_another_server_wrote_and_did_not_live_to_publish_go_out(
    engine: Engine, handler: McpHandler, outside: Outside
) -> None:
    now = datetime.now(UTC)
    packet, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
    await until(lambda: handler.health().unpublished_tasks == 0)
    elsewhere = fold(packet, [Started(at=now, generation=1, holder="a"), *steps(1)])
    engine.tasks[packet.task_id] = elsewhere
    engine.happen(packet.task_id, Recovered(at=now, generation=2, holder="b", why="a is gone"))
    await until(lambda: handler.health().unpublished_tasks == 0)
    assert [seq for _, seq in await outside.events()] == [1, 2, 3, 4]


async def test_a_task_that_was_there_at_every_crash_is_a_dead_letter_that_can_be_sent_again(
    handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    packet, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
    error = ErrorDetail(code="poison", message="planner was cut off 20 times in a row")
    engine.happen(packet.task_id, Failed(at=datetime.now(UTC), reason="poison", error=error))
    await until(lambda: handler.health().unpublished_tasks == 0)
    (letter,) = await outside.kept(DEAD_LETTERS)
    assert (letter["reason"], letter["problem"], letter["task_id"]) == (
        "poison",
        error.message,
        packet.task_id,
    )
    await outside.publish(INBOUND, letter["body"].encode())
    await until(lambda: len(engine.tasks) == 2)
    again = engine.tasks[(engine.tasks.keys() - {packet.task_id}).pop()]
    assert (again.payload, again.context_id) == (packet.payload, packet.context_id)


async def test_events_of_before_the_server_was_there_go_out_when_it_is(
    engine: Engine, server: NatsServer, outside: Outside, tmp_path: Path
) -> None:
    await asyncio.to_thread(server.kill)
    channel = await NatsChannel.connect(server.url, credentials=server.credentials, wait_s=0.1)
    async with a_handler(engine, channel, tmp_path) as handler:
        packet, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
        engine.happen(packet.task_id, *steps(5))
        assert handler.health().unpublished_tasks == 1
        await asyncio.to_thread(server.start)
        await until(lambda: handler.health().unpublished_tasks == 0)
        assert await outside.events() == [(packet.task_id, seq) for seq in range(1, 7)]
    await channel.aclose()


async def test_a_server_that_lost_its_files_serves_on(
    handler: McpHandler, engine: Engine, outside: Outside, server: NatsServer
) -> None:
    await outside.publish(INBOUND, PACKET)
    await until(lambda: len(engine.tasks) == 1 and handler.health().unpublished_tasks == 0)
    await asyncio.to_thread(server.kill)
    server.lose_files()
    await asyncio.to_thread(server.start)
    await until(lambda: handler.health().channel.state == "connected")
    await outside.publish(INBOUND, PACKET)
    await until(lambda: len(engine.tasks) == 2 and handler.health().unpublished_tasks == 0)
    assert len(await outside.events()) == 1


async def test_what_happened_while_the_handler_was_away_goes_out_once_it_is_back(
    engine: Engine, channel: NatsChannel, outside: Outside, tmp_path: Path
) -> None:
    packet, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
    async with a_handler(engine, channel, tmp_path):
        engine.happen(packet.task_id, *steps(2))
    away = OrchestrationDouble()  # the next run of the server, with the same files
    away.tasks = engine.tasks
    away.happen(packet.task_id, *steps(3))
    async with a_handler(away, channel, tmp_path) as handler:
        await until(lambda: handler.health().unpublished_tasks == 0)
        away.happen(packet.task_id, *steps(1))
        await until(lambda: handler.health().unpublished_tasks == 0)
    assert await outside.events() == [(packet.task_id, seq) for seq in range(1, 8)]


async def test_what_was_published_long_ago_does_not_go_out_again(
    engine: Engine, channel: NatsChannel, outside: Outside, tmp_path: Path
) -> None:
    packet, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
    later = datetime.now(UTC) + timedelta(hours=1)
    async with a_handler(engine, channel, tmp_path, clock=lambda: later):
        engine.happen(packet.task_id, *steps(2))
    away = OrchestrationDouble()
    away.tasks = engine.tasks
    async with a_handler(away, channel, tmp_path) as handler:
        await until(lambda: handler.health().channel.state == "connected")
        assert handler.health().unpublished_tasks == 0


async def test_an_event_too_large_for_a_message_goes_out_without_its_bulk(
    handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    packet, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
    big = StepFinished(
        at=datetime.now(UTC), step=1, role="planner", outcome="done", output={"text": "x" * 1_100_000}
    )
    engine.happen(packet.task_id, big)
    await until(lambda: handler.health().unpublished_tasks == 0)
    told = (await outside.kept(FEEDBACK))[-1]
    assert (told["truncated"], told["href"]) == (True, f"/api/v1/tasks/{packet.task_id}")
    assert (told["event"]["seq"], told["event"]["outcome"]) == (2, "done")
    assert "output" not in told["event"]


async def test_a_task_deleted_before_its_events_went_out_holds_nothing_up(
    engine: Engine, server: NatsServer, outside: Outside, channel: NatsChannel, tmp_path: Path
) -> None:
    await asyncio.to_thread(server.kill)
    async with a_handler(engine, channel, tmp_path) as handler:
        gone, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
        await engine.cancel(gone.task_id)
        stays, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
        await until(lambda: channel.health().state == "reconnecting")
        await engine.delete(gone.task_id)
        await asyncio.to_thread(server.start)
        await until(lambda: handler.health().unpublished_tasks == 0)
        assert (stays.task_id, 1) in await outside.events()


# --- reports come in ---


@pytest.mark.parametrize("kind", [{}, {"kind": "feedback"}])
@pytest.mark.parametrize("below", [False, True])
async def test_an_outside_report_reaches_the_engine(
    kind: dict[str, str], below: bool, handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    packet, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
    task_id = packet.task_id
    report = {"role": "qa", "outcome": "fail", "sender": "my-qa", "why": "it divides by zero"} | kind
    if below:
        await outside.publish(f"{FEEDBACK}.{task_id}", report)
    else:
        await outside.publish(FEEDBACK, report | {"task_id": task_id})
    await until(lambda: engine.tasks[task_id].revision == 2)
    event = msgspec.to_builtins(engine.tasks[task_id].history[-1])
    assert (event["type"], event["role"], event["outcome"]) == ("feedback.received", "qa", "fail")
    assert (event["via"], event["sender"], event["why"]) == ("nats", "my-qa", "it divides by zero")
    await until(lambda: handler.health().unpublished_tasks == 0)
    assert handler.health().feedback == 1
    assert await outside.events() == [(task_id, 1), (task_id, 2)]
    assert await outside.kept(DEAD_LETTERS) == []


async def test_a_report_of_while_the_handler_was_away_is_taken_when_it_is_back(
    engine: Engine, channel: NatsChannel, outside: Outside, tmp_path: Path
) -> None:
    async with a_handler(engine, channel, tmp_path):
        packet, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
    report = {"task_id": packet.task_id, "role": "qa", "outcome": "pass"}
    await outside.publish(FEEDBACK, report)
    async with a_handler(engine, channel, tmp_path):
        await until(lambda: engine.tasks[packet.task_id].revision == 2)


@pytest.mark.parametrize(
    ("report", "reason", "pointer"),
    [
        (b"nonsense", "malformed", ""),
        ({"role": "qa", "outcome": "pass"}, "invalid-packet", "/task_id"),
        ({"role": "qa", "outcome": "pass", "task_id": "../x"}, "task-not-found", ""),
        ({"role": "qa", "outcome": "pass", "task_id": str(uuid.uuid4())}, "task-not-found", ""),
        ({"role": "qa", "outcome": "pass", "kind": "verdict"}, "invalid-packet", "/kind"),
        ({"role": "qa", "outcome": "pass", "verdict": 1}, "invalid-packet", "/verdict"),
    ],
)
async def test_a_report_that_cannot_be_taken_is_a_dead_letter(
    report: object, reason: str, pointer: str, handler: McpHandler, outside: Outside
) -> None:
    await outside.publish(FEEDBACK, report)
    await until(lambda: handler.health().dead_letters == 1)
    (letter,) = await outside.kept(DEAD_LETTERS)
    assert (letter["reason"], letter["pointer"]) == (reason, pointer)
    assert letter["subject"] == FEEDBACK


async def test_a_report_on_an_ended_task_is_a_dead_letter(
    handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    packet, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
    await engine.cancel(packet.task_id)
    await outside.publish(FEEDBACK, {"task_id": packet.task_id, "role": "qa", "outcome": "pass"})
    await until(lambda: handler.health().dead_letters == 1)
    (letter,) = await outside.kept(DEAD_LETTERS)
    assert letter["reason"] == "invalid-transition"


async def test_a_report_that_spells_a_task_id_in_another_way_is_a_dead_letter(
    handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    packet, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
    spelled = uuid.UUID(packet.task_id).hex
    await outside.publish(FEEDBACK, {"task_id": spelled, "role": "qa", "outcome": "pass"})
    await until(lambda: handler.health().dead_letters == 1)
    (letter,) = await outside.kept(DEAD_LETTERS)
    assert letter["reason"] == "task-not-found"
    assert engine.only().revision == 1


async def test_a_report_whose_packet_and_subject_name_two_tasks_is_a_dead_letter(
    handler: McpHandler, outside: Outside
) -> None:
    one, two = str(uuid.uuid4()), str(uuid.uuid4())
    await outside.publish(f"{FEEDBACK}.{one}", {"task_id": two, "role": "qa", "outcome": "pass"})
    await until(lambda: handler.health().dead_letters == 1)
    (letter,) = await outside.kept(DEAD_LETTERS)
    assert (letter["reason"], letter["pointer"]) == ("invalid-packet", "/task_id")


async def test_what_was_taken_but_not_confirmed_is_not_taken_twice(engine: Engine, tmp_path: Path) -> None:
    channel = Forgetful()
    async with a_handler(engine, channel, tmp_path):
        await channel.publish(INBOUND, msgspec.json.encode(PACKET))
        await until(lambda: engine.submitting == 2)
        task_id = engine.only().task_id
        report = {"task_id": task_id, "role": "qa", "outcome": "pass"}
        await channel.publish(FEEDBACK, msgspec.json.encode(report))
        await channel.publish(FEEDBACK, msgspec.json.encode(report | {"outcome": "fail"}))
        await until(lambda: engine.only().revision == 3)
    told = [msgspec.to_builtins(event) for event in engine.only().history]
    assert [event.get("outcome") for event in told] == [None, "pass", "fail"]
    await channel.aclose()


@pytest.mark.parametrize("refusal", [StoreFullError("no space"), StoreUnusableError("read-only")])
async def test_a_report_that_cannot_be_kept_now_is_taken_later_however_often_that_was(
    refusal: Exception, handler: McpHandler, engine: Engine, outside: Outside
) -> None:
    packet, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
    engine.refusals = [refusal] * 9
    await outside.publish(FEEDBACK, {"task_id": packet.task_id, "role": "qa", "outcome": "pass"})
    await until(lambda: handler.health().feedback == 1)
    assert engine.only().revision == 2
    assert await outside.kept(DEAD_LETTERS) == []


async def test_a_report_that_was_kept_but_not_confirmed_before_the_end_counts_once(
    engine: Engine, channel: NatsChannel, outside: Outside, tmp_path: Path
) -> None:
    packet, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
    engine.report_gate.clear()
    async with a_handler(engine, channel, tmp_path, shutdown_s=0.05):
        await outside.publish(FEEDBACK, {"task_id": packet.task_id, "role": "qa", "outcome": "fail"})
        await engine.reported.wait()
    engine.report_gate.set()
    async with a_handler(engine, channel, tmp_path) as handler:
        await until(lambda: handler.health().feedback == 1)
    assert engine.only().revision == 2


async def test_a_channel_in_memory_never_names_a_message_as_an_earlier_one_did(
    engine: Engine, tmp_path: Path
) -> None:
    packet, _ = await engine.submit(msgspec.convert(PACKET, TaskDraft), via="rest")
    report = msgspec.json.encode({"task_id": packet.task_id, "role": "qa", "outcome": "fail"})

    async def run(folder: Path) -> None:
        channel = MemoryChannel()
        async with a_handler(engine, channel, folder) as handler:
            await channel.publish(FEEDBACK, report)
            await until(lambda: handler.health().feedback == 1)
        await channel.aclose()

    await run(tmp_path / "one")
    await run(tmp_path / "two")
    assert engine.only().revision == 3


# --- health ---


async def test_health_says_that_the_messaging_has_stopped(engine: Engine, tmp_path: Path) -> None:
    channel = MemoryChannel()
    async with a_handler(engine, channel, tmp_path) as handler:
        assert handler.health().ended is False
    assert (handler.health().ended, handler.health().fault) == (True, "")
    await channel.aclose()


async def test_health_says_what_ended_the_messaging_while_the_channel_is_well(
    engine: Engine, tmp_path: Path
) -> None:
    channel = MemoryChannel()
    engine.failing = RuntimeError("a bug")
    seen: McpHealth | None = None
    with pytest.raises(RuntimeError, match="a bug"):
        async with a_handler(engine, channel, tmp_path) as handler:
            await until(lambda: handler.health().ended)
            seen = handler.health()
    assert seen is not None
    assert (seen.channel.state, seen.fault) == ("connected", "RuntimeError: a bug")
    await channel.aclose()


# --- metrics ---


async def test_a_fault_in_a_gauge_costs_a_snapshot_and_no_message(
    engine: Engine, channel: NatsChannel, outside: Outside, tmp_path: Path
) -> None:
    faults = [RuntimeError("a bad gauge"), ZeroDivisionError()]

    def metrics() -> bytes:
        if faults:
            raise faults.pop()
        return b"{}"

    async with a_handler(engine, channel, tmp_path, metrics=metrics, metrics_interval_s=0.05) as handler:

        async def came() -> bool:
            return len(await outside.kept(METRICS)) >= 1

        await until(came)
        await outside.publish(INBOUND, PACKET)
        await until(lambda: handler.health().accepted == 1)


@pytest.mark.parametrize("interval_s", [0.0, -1.0])
async def test_the_metrics_do_not_come_without_a_pause(
    interval_s: float, engine: Engine, tmp_path: Path
) -> None:
    channel = MemoryChannel()
    snapshots = 0

    def metrics() -> bytes:
        nonlocal snapshots
        snapshots += 1
        return b"{}"

    async with a_handler(engine, channel, tmp_path, metrics=metrics, metrics_interval_s=interval_s):
        await until(lambda: snapshots >= 1)
        for _ in range(2000):
            await asyncio.sleep(0)
    assert snapshots < 200
    await channel.aclose()


async def test_the_metrics_come_at_an_interval(
    engine: Engine, channel: NatsChannel, outside: Outside, tmp_path: Path
) -> None:
    told = iter(range(1000))
    async with a_handler(
        engine, channel, tmp_path, metrics=lambda: b'{"n": %d}' % next(told), metrics_interval_s=0.05
    ):

        async def came() -> bool:
            return len(await outside.kept(METRICS)) >= 3

        await until(came)
    numbers = [snapshot["n"] for snapshot in await outside.kept(METRICS)]
    assert numbers == sorted(set(numbers))


def test_a_refusal_has_the_same_word_by_rest_and_by_nats() -> None:
    for error_class, reason in REASONS.items():
        assert problem_kind(error_class).slug == reason
