"""The Message Control Protocol: tasks, events, feedback and metrics as messages. No decisions.

In: a task packet on `tasks.inbound` is acknowledged when its file is safe. An outside agent's report on
`tasks.feedback` (or `tasks.feedback.<task_id>`) is a `FeedbackDraft` without `kind`, or with
`"kind": "feedback"`. What cannot be taken goes to `tasks.dlq` as a `DeadLetter`.

Out: every event of every task on `tasks.feedback` as an `EventPacket` (`"kind": "event"`), in order per
task, at least once, with `task_id:seq` as its id. The metrics snapshot, at an interval.
"""

import asyncio
import base64
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, Self

import msgspec
import structlog

from ai_agent_server.channels.base import (
    DEAD_LETTERS,
    FEEDBACK,
    INBOUND,
    METRICS,
    Channel,
    ChannelHealth,
    Delivery,
)
from ai_agent_server.core import packet_json
from ai_agent_server.core.event_packet import EventPacket, cut, is_copy, statuses
from ai_agent_server.core.ports import Orchestration
from ai_agent_server.core.task_packet import (
    AnyTaskEvent,
    Failed,
    FeedbackDraft,
    Recovered,
    TaskDraft,
    TaskPacket,
    TaskStatus,
    is_task_id,
)
from ai_agent_server.durable import write_whole
from ai_agent_server.errors import (
    AgentServerError,
    ChannelError,
    CorruptTaskError,
    IdempotencyConflictError,
    IntakeError,
    IntakeFullError,
    InvalidPacketError,
    InvalidTransitionError,
    MalformedPacketError,
    MessageTooLargeError,
    ShuttingDownError,
    StoreError,
    TaskNotFoundError,
    TaskStateError,
    UnknownRoleError,
)
from ai_agent_server.tasks_state.base import TaskFilter

GROUP = "ai-agent-server"
INTAKES = 8
PUBLISHERS = 8
MAX_FAILURES = 5
"""How often a message may fail for a reason that is not its own before it is a dead letter."""
MAX_REMEMBERED = 4096
MAX_HELD_PACKETS = 64
DEAD_BODY_BYTES = 64 * 1024
"""Of a message that was wrong itself, as much is kept as shows how; one that we failed is kept whole."""
METRICS_FLOOR_S = 0.1
PAGE = 100
MARK_EVERY_S = 5.0
MARK_SLACK = timedelta(seconds=30)
"""An event is stamped, then written, then told; the mark stays this far behind all three."""

REASONS: dict[type[AgentServerError], str] = {
    UnknownRoleError: "unknown-role",
    MalformedPacketError: "malformed",
    InvalidPacketError: "invalid-packet",
    IdempotencyConflictError: "idempotency-conflict",
    TaskNotFoundError: "task-not-found",
    InvalidTransitionError: "invalid-transition",
}
"""The word for each refusal: the same that REST puts at the end of a problem's `type`."""

log = structlog.get_logger(__name__)


class FeedbackPacket(FeedbackDraft, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A report from an outside agent, as it comes in. `task_id` may be in the subject instead."""

    kind: Literal["feedback"] = "feedback"


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message that could not be taken, and why; or a task that was there at every crash (`poison`).

    Of a `body` that was wrong the first 64 KiB are kept; with `failed` as the reason it is whole.
    """

    reason: str
    problem: str
    pointer: str
    subject: str
    received_at: datetime
    body: str
    encoding: Literal["utf-8", "base64"]
    truncated: bool
    task_id: str = ""
    """The task that was poison; `ai-agent-server tasks requeue` puts it back."""


class McpHealth(msgspec.Struct, frozen=True, kw_only=True):
    """The channel, and what went through it since the start.

    `ended`: messages are not carried any more, whatever the channel says; `fault` is what ended it,
    "" for a regular stop.
    """

    channel: ChannelHealth
    ended: bool
    fault: str
    unpublished_tasks: int
    accepted: int
    feedback: int
    dead_letters: int


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """The file at `state_path`: every event stamped up to then was published."""

    published_until: datetime


class _Kind(msgspec.Struct):
    kind: str = ""


class _Failures:
    """How often each of the last so many messages failed."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._counts: OrderedDict[str, int] = OrderedDict()

    def count(self, dedupe_id: str) -> int:
        """One failure more; answers how many there are now."""
        failures = self._counts.pop(dedupe_id, 0) + 1
        self._counts[dedupe_id] = failures
        if len(self._counts) > self._size:
            self._counts.popitem(last=False)
        return failures


class _Position:
    """How far a task's events are published."""

    def __init__(self, next_seq: int, revision: int, since: datetime) -> None:
        self.next_seq, self.revision, self.since = next_seq, revision, since
        self.after: datetime | None = None
        """Events up to then were published by an earlier run."""


class McpHandler:
    """Carries messages between a channel and the orchestration engine, as long as it is entered.

    While the transport is away it remembers which tasks have unpublished events, never the events:
    those are read again from the engine. `state_path` is a small file that tells the next run where
    to go on. `metrics` is the snapshot to publish. A store or a transport that failed is asked again
    after `retry_s`.
    """

    def __init__(
        self,
        engine: Orchestration,
        channel: Channel,
        *,
        clock: Callable[[], datetime],
        metrics: Callable[[], bytes],
        metrics_interval_s: float,
        state_path: Path,
        retry_s: float = 1.0,
        shutdown_s: float = 10.0,
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._clock = clock
        self._metrics = metrics
        self._metrics_interval_s = max(METRICS_FLOOR_S, metrics_interval_s)
        self._retry_s = retry_s
        self._shutdown_s = shutdown_s
        self._outbox = _Outbox(engine, channel, clock=clock, state_path=state_path, retry_s=retry_s)
        self._stopping = asyncio.Event()
        self._readers: set[asyncio.Timeout] = set()
        self._task: asyncio.Task[None] | None = None
        self._failures = _Failures(MAX_REMEMBERED)
        self._ended = False
        self._fault = ""
        self._accepted = self._feedbacks = self._dead = 0
        engine.observe(self._outbox.tell)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run_or_tell(), name="message-control-protocol")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()
        if self._task is not None:
            await self._task

    async def _run_or_tell(self) -> None:
        try:
            await self.run()
        except Exception as exc:
            log.exception("mcp.ended")  # at once, and not only when somebody leaves the handler
            self._fault = f"{type(exc).__name__}: {exc}"
            raise
        finally:
            self._ended = True

    def stop(self) -> None:
        """Let `run` return: take nothing new, finish what is open within `shutdown_s`."""
        self._stopping.set()
        while self._readers:
            self._readers.pop().reschedule(0)

    async def run(self) -> None:
        """Carry messages until `stop`."""
        await self._outbox.load()
        takers = (
            asyncio.create_task(self._take(INBOUND, self._intake, at_once=INTAKES)),
            asyncio.create_task(self._take(FEEDBACK, self._report, at_once=1)),
            asyncio.create_task(self._take(f"{FEEDBACK}.>", self._report, at_once=1)),
        )
        senders = (
            *(asyncio.create_task(self._outbox.send()) for _ in range(PUBLISHERS)),
            asyncio.create_task(self._outbox.keep_mark()),
            asyncio.create_task(self._tell_metrics()),
        )
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait((stopped, *takers, *senders), return_when=asyncio.FIRST_COMPLETED)
            self.stop()
            await asyncio.wait(takers, timeout=self._shutdown_s)
            await self._outbox.flush(timeout_s=self._shutdown_s)
        finally:
            owned = (stopped, *takers, *senders)
            for task in owned:
                task.cancel()
            ended = await asyncio.gather(*owned, return_exceptions=True)
        for outcome in ended:
            if isinstance(outcome, Exception):
                raise outcome

    def health(self) -> McpHealth:
        """What `/health` shows of messaging."""
        return McpHealth(
            channel=self._channel.health(),
            ended=self._ended,
            fault=self._fault,
            unpublished_tasks=self._outbox.behind,
            accepted=self._accepted,
            feedback=self._feedbacks,
            dead_letters=self._dead,
        )

    # --- in ---

    async def _take(
        self, subject: str, handle: Callable[[Delivery], Awaitable[None]], *, at_once: int
    ) -> None:
        places = asyncio.Semaphore(at_once)

        async def handled(delivery: Delivery) -> None:
            try:
                await handle(delivery)
            except ChannelError as exc:
                # Not confirmed, so it comes again; intake and feedback know it when it does.
                log.info("mcp.unconfirmed", subject=subject, problem=str(exc))
            except Exception:
                # A fault of ours: it must not end the messaging. Left open, the message comes again.
                log.exception("mcp.fault", subject=subject)
            finally:
                places.release()

        async with (
            self._channel.subscribe(subject, group=GROUP, max_in_flight=4 * at_once) as deliveries,
            asyncio.TaskGroup() as group,
        ):
            async for delivery in self._until_stopped(deliveries, places):
                group.create_task(handled(delivery))

    async def _until_stopped(
        self, deliveries: AsyncIterator[Delivery], places: asyncio.Semaphore
    ) -> AsyncIterator[Delivery]:
        """Each delivery, when there is a place for it."""
        while not self._stopping.is_set():
            try:
                async with asyncio.timeout(None) as reader:
                    self._readers.add(reader)
                    try:
                        await places.acquire()
                        delivery = await anext(deliveries, None)
                    finally:
                        self._readers.discard(reader)
            except TimeoutError:
                if not reader.expired():
                    raise
                return
            if delivery is None:
                return
            yield delivery

    async def _intake(self, delivery: Delivery) -> None:
        """Ends the delivery; acknowledged only when the task's file is safe."""
        try:
            draft = packet_json.decode(delivery.body, TaskDraft)
            for name in ("profile", "role"):
                if getattr(draft, name) is None:
                    raise InvalidPacketError(f"{name!r} is missing", pointer=f"/{name}", expected="string")
            key = None if draft.task_id else f"nats:{delivery.dedupe_id}"
            packet, is_new = await self._engine.submit(draft, via="nats", idempotency_key=key)
        except (IntakeFullError, ShuttingDownError) as exc:
            await self._later(delivery, exc.retry_after_s, str(exc))
        except IntakeError as exc:
            await self._dead_letter(delivery, exc)
        except CorruptTaskError as exc:
            await self._failed(delivery, exc)
        except StoreError as exc:
            # The disk's state, not the message's: it is as good tomorrow as it is now.
            await self._later(delivery, self._retry_s, str(exc))
        except AgentServerError as exc:
            await self._failed(delivery, exc)
        else:
            self._accepted += is_new
            await delivery.ack()
            log.info("mcp.accepted", task_id=packet.task_id, is_new=is_new)

    async def _report(self, delivery: Delivery) -> None:
        """Ends the delivery. Our own events come by here too, and are let go."""
        if _is_event(delivery.body):
            await delivery.ack()
            return
        try:
            packet = packet_json.decode(delivery.body, FeedbackPacket)
            task_id = _task_named(packet, delivery.subject)
            told = {name: getattr(packet, name) for name in FeedbackDraft.__struct_fields__}
            draft = FeedbackDraft(**told)
            await self._engine.feedback(task_id, draft, via="nats", message_id=delivery.dedupe_id)
        except (IntakeError, TaskNotFoundError, InvalidTransitionError) as exc:
            await self._dead_letter(delivery, exc)
        except CorruptTaskError as exc:
            await self._failed(delivery, exc)
        except StoreError as exc:
            await self._later(delivery, self._retry_s, str(exc))
        except AgentServerError as exc:
            await self._failed(delivery, exc)
        else:
            self._feedbacks += 1
            await delivery.ack()

    async def _later(self, delivery: Delivery, delay_s: float, why: str) -> None:
        """Give it back, and keep its place for as long: a full server is not asked again at once."""
        log.info("mcp.postponed", subject=delivery.subject, why=why, delay_s=delay_s)
        await delivery.nak(delay_s)
        await self._pause(delay_s)

    async def _failed(self, delivery: Delivery, exc: AgentServerError) -> None:
        failures = self._failures.count(delivery.dedupe_id)
        if failures > MAX_FAILURES:
            await self._dead_letter(delivery, exc, keep_bytes=len(delivery.body))
            return
        log.warning("mcp.failed", subject=delivery.subject, failures=failures, problem=str(exc))
        await delivery.nak(self._retry_s)

    async def _dead_letter(
        self, delivery: Delivery, exc: AgentServerError, *, keep_bytes: int = DEAD_BODY_BYTES
    ) -> None:
        letter = dead_letter(
            delivery.subject, delivery.body, exc, received_at=self._clock(), keep_bytes=keep_bytes
        )
        try:
            await self._channel.publish(
                DEAD_LETTERS, msgspec.json.encode(letter), dedupe_id=f"dlq:{delivery.dedupe_id}"
            )
        except ChannelError as unsent:
            # Also for a letter too large to send: its message stays where it is, whole.
            await self._later(delivery, self._retry_s, f"no dead letter: {unsent}")
            return
        self._dead += 1
        log.warning("mcp.dead_letter", subject=delivery.subject, reason=letter.reason, pointer=letter.pointer)
        await delivery.term()

    async def _pause(self, delay_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._stopping.wait()

    # --- out ---

    async def _tell_metrics(self) -> None:
        while True:
            try:
                await self._channel.publish(METRICS, self._metrics())
            except ChannelError as exc:
                # The next snapshot says all that this one did.
                log.debug("mcp.metrics_unpublished", problem=str(exc))
            except Exception:
                # The gauges are anybody's code; a bad one costs a snapshot, never the messages.
                log.exception("mcp.metrics_fault")
            await asyncio.sleep(self._metrics_interval_s)


class _Outbox:
    """The events that are not published yet: per task, the next one to go."""

    def __init__(
        self,
        engine: Orchestration,
        channel: Channel,
        *,
        clock: Callable[[], datetime],
        state_path: Path,
        retry_s: float,
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._clock = clock
        self._path = state_path
        self._retry_s = retry_s
        self._positions: dict[str, _Position] = {}
        self._packets: dict[str, TaskPacket] = {}
        """The newest packet of some tasks in `_positions`: it spares a read while we keep up."""
        self._busy: set[str] = set()
        self._stirred = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._mark: datetime | None = None
        self._last_event_at: datetime | None = None

    @property
    def behind(self) -> int:
        """How many tasks have unpublished events."""
        return len(self._positions)

    def tell(self, packet: TaskPacket, events: tuple[AnyTaskEvent, ...]) -> None:
        """An `EventListener`: there is something to publish."""
        if not events:
            return
        task_id = packet.task_id
        position = self._positions.get(task_id)
        if position is None:
            # The server that we have the task from may have died before it published what it wrote.
            is_taken_over = any(isinstance(event, Recovered) and event.holder for event in events)
            first = packet.history[0] if is_taken_over else events[0]
            self._positions[task_id] = _Position(first.seq, packet.revision, first.at)
        else:
            position.revision = packet.revision
        if task_id in self._packets or len(self._packets) < MAX_HELD_PACKETS:
            self._packets[task_id] = packet
        self._last_event_at = events[-1].at
        self._stir()

    async def load(self) -> None:
        """Find the tasks that changed since an earlier run had published all there was.

        The first run of all begins where its own mark will: what is older is nobody's to publish.
        """
        mark = await asyncio.to_thread(_read_mark, self._path) or self._clock() - MARK_SLACK
        self._last_event_at = mark
        cursor: str | None = None
        found = 0
        while True:
            try:
                page = await self._engine.list(TaskFilter(), limit=PAGE, cursor=cursor)
            except StoreError as exc:
                log.warning("mcp.unreadable", problem=str(exc))
                await asyncio.sleep(self._retry_s)
                continue
            # All pages: they are in the order of creation, and an old task may have changed lately.
            for task in page.items:
                if task.updated_at is not None and task.updated_at > mark:
                    told = self._positions.get(task.task_id)
                    position = _Position(1, max(task.revision, told.revision if told else 0), mark)
                    position.after = mark
                    self._positions[task.task_id] = position
                    found += 1
            cursor = page.next_cursor
            if cursor is None:
                break
        if found:
            log.info("mcp.publishing_again", tasks=found, since=mark.isoformat())
            self._stir()

    async def send(self) -> None:
        """Publish for ever, one task at a time; several of these share the tasks."""
        while True:
            task_id = await self._take()
            try:
                await self._send_task(task_id, self._positions[task_id])
            except ChannelError as exc:
                log.debug("mcp.unpublished", task_id=task_id, problem=str(exc))
                await asyncio.sleep(self._retry_s)
            except (TaskStateError, CorruptTaskError) as exc:
                log.info("mcp.events_dropped", task_id=task_id, problem=str(exc))
                self._done(task_id)
            except StoreError as exc:
                log.warning("mcp.unreadable", task_id=task_id, problem=str(exc))
                await asyncio.sleep(self._retry_s)
            except Exception:
                # A fault of ours with this task's events: the other tasks' must still go out.
                log.exception("mcp.fault", task_id=task_id)
                self._done(task_id)
            finally:
                self._busy.discard(task_id)

    async def flush(self, *, timeout_s: float) -> None:
        """Wait until all is published, if the transport is there, and write the mark."""
        if self._channel.health().state == "connected":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
        await self._write_mark()

    async def keep_mark(self) -> None:
        """Write the mark every few seconds, until it is past the last event there was."""
        while True:
            await asyncio.sleep(MARK_EVERY_S)
            if self._last_event_at is not None and (self._mark is None or self._mark <= self._last_event_at):
                await self._write_mark()

    def _stir(self) -> None:
        self._idle.clear()
        self._stirred.set()

    async def _take(self) -> str:
        while True:
            for task_id in self._positions:
                if task_id not in self._busy:
                    self._busy.add(task_id)
                    return task_id
            self._stirred.clear()
            await self._stirred.wait()

    def _done(self, task_id: str) -> None:
        self._positions.pop(task_id, None)
        self._packets.pop(task_id, None)
        if not self._positions:
            self._idle.set()

    async def _send_task(self, task_id: str, position: _Position) -> None:
        while position.next_seq <= position.revision:
            packet = self._packets.pop(task_id, None)
            if packet is None or packet.revision < position.revision:
                packet = await self._engine.read(task_id)
            if packet.revision < position.next_seq:
                break  # deleted, and made anew under the same id
            for event, status in statuses(packet, since=position.next_seq - 1):
                is_news = position.after is None or event.at > position.after
                if is_news and not is_copy(packet, event):
                    await self._send_event(task_id, status, event)
                    if isinstance(event, Failed) and event.reason == "poison":
                        await self._send_letter(packet, event)
                position.next_seq = event.seq + 1
        self._done(task_id)

    async def _send_letter(self, packet: TaskPacket, end: Failed) -> None:
        """A task that was there at every crash, as it could be submitted again."""
        draft = TaskDraft(
            payload=packet.payload,
            profile=packet.profile,
            role=packet.role,
            context_id=packet.context_id,
            scope=packet.scope,
            privacy=packet.privacy,
        )
        body = msgspec.json.encode(draft)
        letter = DeadLetter(
            reason="poison",
            problem=end.error.message,
            pointer="",
            subject=INBOUND,
            received_at=packet.created_at,
            body=body[:DEAD_BODY_BYTES].decode(errors="ignore"),
            encoding="utf-8",
            truncated=len(body) > DEAD_BODY_BYTES,
            task_id=packet.task_id,
        )
        await self._channel.publish(
            DEAD_LETTERS, msgspec.json.encode(letter), dedupe_id=f"dlq:{packet.task_id}"
        )
        log.warning("mcp.dead_letter", task_id=packet.task_id, reason="poison")

    async def _send_event(self, task_id: str, status: TaskStatus, event: AnyTaskEvent) -> None:
        dedupe_id = f"{task_id}:{event.seq}"
        whole = EventPacket(kind="event", task_id=task_id, status=status, event=event)
        try:
            await self._channel.publish(FEEDBACK, msgspec.json.encode(whole), dedupe_id=dedupe_id)
        except MessageTooLargeError as exc:
            log.info("mcp.event_truncated", task_id=task_id, seq=event.seq, size_bytes=exc.size_bytes)
            try:
                await self._channel.publish(
                    FEEDBACK, msgspec.json.encode(cut(whole, event)), dedupe_id=dedupe_id
                )
            except MessageTooLargeError as still:
                log.warning("mcp.event_unpublished", task_id=task_id, seq=event.seq, problem=str(still))

    async def _write_mark(self) -> None:
        oldest = min((position.since for position in self._positions.values()), default=self._clock())
        mark = oldest - MARK_SLACK
        if self._mark is not None and mark <= self._mark:
            return
        try:
            await asyncio.to_thread(write_whole, self._path, msgspec.json.encode(Mark(published_until=mark)))
        except OSError as exc:
            # Repeats after a restart are the price; their ids make them harmless.
            log.warning("mcp.mark_unwritten", problem=exc.strerror)
            return
        self._mark = mark


def dead_letter(
    subject: str, body: bytes, exc: AgentServerError, *, received_at: datetime, keep_bytes: int
) -> DeadLetter:
    """What is kept of a message that could not be taken because of `exc`."""
    reason = next((REASONS[cls] for cls in type(exc).__mro__ if cls in REASONS), "failed")
    pointer = ""
    if isinstance(exc, InvalidPacketError):
        pointer = exc.pointer
    elif isinstance(exc, UnknownRoleError):
        pointer = f"/{exc.what}"
    kept = body[:keep_bytes]
    encoding: Literal["utf-8", "base64"] = "utf-8"
    try:
        body.decode()
        text = kept.decode(errors="ignore")  # the cut may go through a character
    except UnicodeDecodeError:
        encoding, text = "base64", base64.b64encode(kept).decode()
    return DeadLetter(
        reason=reason,
        problem=str(exc)[:2000],
        pointer=pointer,
        subject=subject,
        received_at=received_at,
        body=text,
        encoding=encoding,
        truncated=len(body) > keep_bytes,
    )


def _is_event(body: bytes) -> bool:
    try:
        return msgspec.json.decode(body, type=_Kind).kind == "event"
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False  # what is wrong with it is for the strict decoder to say


def _task_named(packet: FeedbackPacket, subject: str) -> str:
    """The task that a report is about: named in the packet, in the subject, or alike in both."""
    in_subject = subject.removeprefix(FEEDBACK).removeprefix(".")
    named = packet.task_id or in_subject
    if not named:
        raise InvalidPacketError("'task_id' is missing", pointer="/task_id", expected="string")
    if in_subject not in {"", named}:
        raise InvalidPacketError(
            f"the packet says {named[:80]!r}, the subject {in_subject[:80]!r}", pointer="/task_id"
        )
    if not is_task_id(named):
        raise TaskNotFoundError(named[:64])
    return named


def _read_mark(path: Path) -> datetime | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Mark).published_until
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as exc:
        log.warning("mcp.mark_unreadable", path=str(path), problem=str(exc))
        return None
