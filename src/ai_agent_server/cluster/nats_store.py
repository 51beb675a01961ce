"""A task store that several servers share: every packet under its subject in one NATS stream."""

import asyncio
import hashlib
import zlib
from collections.abc import Sequence
from contextlib import suppress

import msgspec
import structlog
from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    Header,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import APIError

from ai_agent_server.cluster._stream import WRONG_LAST_SEQUENCE, last_message
from ai_agent_server.core.task_packet import TaskEvent, TaskPacket, TaskStatus, is_task_id, summary
from ai_agent_server.errors import (
    AgentServerError,
    ChannelError,
    CorruptTaskError,
    IdempotencyConflictError,
    InvalidPacketError,
    MessageTooLargeError,
    StoreError,
    StoreFullError,
    StoreUnusableError,
    TaskConflictError,
    TaskLiveError,
    TaskNotFoundError,
)
from ai_agent_server.nats_link import OPEN_TIMEOUT_S, REQUEST_TIMEOUT_S, Link, Session, told
from ai_agent_server.tasks_state._index import TaskIndex, first_state, next_state
from ai_agent_server.tasks_state.base import (
    ForeignListener,
    StoreHealth,
    TaskFilter,
    TaskPage,
    TaskStore,
)

__all__ = ("NatsTaskStore",)

SUBJECT = "ai-agent-server.state"
TASKS = f"{SUBJECT}.task"
KEYS = f"{SUBJECT}.key"
SHELVES = f"{SUBJECT}.shelf"
"""Beside the tasks, in the same stream: what a server leaves to the others (`NatsShelf`)."""
STREAM = "AI_AGENT_SERVER_STATE"
STREAM_FULL = frozenset({10077, 10047, 10023})
NO_TTL = 10166
"""JetStream's error codes: no more bytes for the stream, or the account; no message of the stream may
expire."""

WRITE_S = 10.0
"""How long a write is tried again while nobody said whether it took place."""
RETRY_PAUSE_S = 0.2
CATCH_UP_S = 60.0
HEARTBEAT_S = 2.0
COPY_AGAIN_S = 1.0
WATCH_AGAIN_S = 1.0
DELETED_S = 30 * 86_400
"""For so long the stream says that a task was deleted, to servers that are away: one that is away for
longer brings it back."""
TTL = "Nats-TTL"
HEADER_BYTES = 128
"""At most what the condition of a write adds to it."""
COMPRESS_BYTES = 64 * 1024
MAX_PACKET_BYTES = 256 * 1024 * 1024
PAGE = 200

log = structlog.get_logger(__name__)


def stream(size_bytes: int) -> StreamConfig:
    """The stream that keeps the tasks, for the link to have in place."""
    return StreamConfig(
        name=STREAM,
        subjects=[f"{SUBJECT}.>"],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        max_msgs_per_subject=1,
        # A full stream refuses a change; it never drops a task.
        discard=DiscardPolicy.NEW,
        max_bytes=size_bytes,
        # Of what was deleted; a nats-server before 2.11 keeps it for ever.
        allow_msg_ttl=True,
    )


class _Held(msgspec.Struct, frozen=True):
    """A packet, and its place in the stream, which the next write of it has to name."""

    packet: TaskPacket
    sequence: int


class _Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What stands under an idempotency key: which task has it, and for what request."""

    task_id: str
    request_sha256: str


class _CameFirstError(Exception):
    """Somebody else wrote this subject since it was read."""


class NatsTaskStore:
    """Keeps each task's packet as the last message of its subject, written by compare-and-set.

    Every server follows the stream: summaries of all tasks and the packets of live ones are in memory,
    and what others write is told to the engine. What this server writes or has written goes to
    `copies` too, its own store of files, before it is answered; a copy is brought up to date when
    another server goes on with the task. At the start, tasks that only `copies` has are put into the
    stream: so a server brings its tasks along when it joins, and a NATS that lost its disk gets them
    back.
    """

    def __init__(self, link: Link, copies: TaskStore, *, deleted_s: int = DELETED_S) -> None:
        self._link = link
        self._copies = copies
        self._deleted_s = deleted_s
        self._copied: set[str] = set()
        self._behind: set[str] = set()
        self._stirred = asyncio.Event()
        self._index = TaskIndex()
        self._live: dict[str, _Held] = {}
        self._sequences: dict[str, int] = {}
        self._last_sequence = 0
        self._incarnation = ""
        self._must_bring = False
        self._problem = ""
        """Why other servers' tasks are not followed at the moment."""
        self._is_open = False
        self._writing: dict[str, asyncio.Task[None]] = {}
        self._deferred: dict[str, tuple[int, bytes]] = {}
        self._listeners: list[ForeignListener] = []
        self._caught_up = asyncio.Event()
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    def observe(self, listener: ForeignListener) -> None:
        """See the port."""
        self._listeners.append(listener)

    async def open(self) -> None:
        """Open the copies, and follow the stream from its beginning. Raises `StoreUnusableError`."""
        try:
            await self._copies.open()
            await self._link.session(OPEN_TIMEOUT_S)
            self._is_open = True
            self._tasks = (asyncio.create_task(self._watch(), name="state-watch"),)
            async with asyncio.timeout(CATCH_UP_S):
                await self._caught_up.wait()
            await self._bring_along()
        except (ChannelError, TimeoutError) as exc:
            await self.aclose()
            problem = str(exc) or f"the state of the tasks did not come within {CATCH_UP_S:g} s"
            raise StoreUnusableError(f"the cluster's NATS cannot be used: {problem}") from exc
        except BaseException:
            await self.aclose()
            raise
        self._tasks = (*self._tasks, asyncio.create_task(self._keep_copies(), name="state-copies"))
        log.info("store.joined", url=self._link.url, tasks=len(self._index), live=len(self._live))

    async def aclose(self) -> None:
        """End every write under way, stop following, close the copies."""
        self._is_open = False
        while self._writing:
            await asyncio.wait(tuple(self._writing.values()))
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = ()
        await self._copies.aclose()

    # --- what everybody asks ---

    async def create(self, packet: TaskPacket, events: Sequence[TaskEvent]) -> tuple[TaskPacket, bool]:
        """Keep a new task, or answer the earlier one, whichever server took it. See the port."""
        earlier = self._index.earlier(packet)
        if earlier is not None:
            return await self.read(earlier), False
        first = first_state(packet, events)
        if packet.idempotency_key is not None:
            claim = await self._claim(packet.idempotency_key, packet)
            if claim.request_sha256 != packet.request_sha256:
                raise IdempotencyConflictError(packet.idempotency_key, claim.task_id)
            # The claim's task may still be on its way here, or its server died before it wrote it:
            # under the claim's id there is one task, whoever of us writes it.
            first = msgspec.structs.replace(first, task_id=claim.task_id)
        try:
            there = await self._first_of(first)
        except MessageTooLargeError as exc:
            raise InvalidPacketError(
                "too large for the NATS that the servers share",
                pointer="/payload",
                expected=f"a packet of less than {exc.limit_bytes} bytes when compressed",
            ) from exc
        if there.request_sha256 != packet.request_sha256:
            raise IdempotencyConflictError(first.task_id, there.task_id)
        return there, there is first

    async def _first_of(self, first: TaskPacket) -> TaskPacket:
        """`first`, written; or the task that has its id already."""
        while True:
            # The message of a task that was deleted is empty, and may be written over.
            deleted = 0 if first.task_id in self._index else self._sequences.get(first.task_id, 0)
            try:
                await self._write(first, deleted)
            except TaskConflictError:
                there = await self._newest(first.task_id)
                if there is not None:
                    return there.packet
            else:
                return first

    async def read(self, task_id: str) -> TaskPacket:
        """The task as it is: from memory while it lives, else from its copy or the stream."""
        held = self._live.get(task_id)
        if held is not None:
            return held.packet
        if task_id in self._copied:
            with suppress(TaskNotFoundError, StoreError):
                copy = await self._copies.read(task_id)
                if copy.revision == self._index.get(task_id).revision:
                    return copy
        try:
            return (await self._fetch(task_id)).packet
        except TaskNotFoundError:
            raise await self.not_found(task_id) from None

    async def append(
        self, task_id: str, events: Sequence[TaskEvent], *, expected_revision: int
    ) -> TaskPacket:
        """Fold `events` into the task, if no server wrote it meanwhile. See the port."""
        while (rival := self._writing.get(task_id)) is not None:
            await asyncio.wait((rival,))
        held = self._live.get(task_id) or await self._fetch(task_id)
        changed = next_state(held.packet, events, expected_revision)
        if changed.revision != held.packet.revision:
            await self._write(changed, held.sequence)
        return changed

    async def list(self, where: TaskFilter, *, limit: int, cursor: str | None = None) -> TaskPage:
        """A page of summaries of every server's tasks, newest first."""
        return self._index.page(where, limit=limit, cursor=cursor)

    def counts(self) -> dict[TaskStatus, int]:
        """How many tasks of all servers have each status."""
        return self._index.counts()

    async def live(self) -> tuple[str, ...]:
        """The ids of the tasks of all servers that have not ended, oldest first."""
        return self._index.live()

    async def delete(self, task_id: str) -> None:
        """Remove an ended task from the stream and, in time, from every server's copies."""
        ended = self._index.ended(task_id)
        held = await self._fetch(task_id)
        try:
            sequence = await self._put(f"{TASKS}.{task_id}", b"", held.sequence, ttl_s=self._deleted_s)
        except _CameFirstError:
            raise TaskNotFoundError(task_id) from None  # an ended task changes in no other way
        self._sequences[task_id] = sequence
        self._drop(task_id)
        if ended.idempotency_key is not None:
            await self._put(_key_subject(ended.idempotency_key), b"", None, ttl_s=self._deleted_s)

    async def not_found(self, task_id: str) -> TaskNotFoundError:
        """What to raise for a task that is not here: the copies know what was archived on this machine."""
        return await self._copies.not_found(task_id)

    def location(self, task_id: str) -> str:
        """The copy's file, "" for a task that this server has none of."""
        return self._copies.location(task_id) if task_id in self._copied else ""

    async def health(self) -> StoreHealth:
        """Whether a write would work now: NATS has to be there, and the disk should be."""
        copies = await self._copies.health()
        connected = self._link.is_connected
        return msgspec.structs.replace(
            copies,
            kind="nats_store",
            ok=copies.ok and connected and not self._problem,
            tasks=len(self._index),
            detail=(self._problem or copies.detail) if connected else f"not connected to {self._link.url}",
        )

    # --- writing ---

    async def _write(self, packet: TaskPacket, sequence: int) -> None:
        """Put `packet` in the place of the message `sequence`. Raises `TaskConflictError`.

        The write belongs to the store: it ends, and is taken note of, also when nobody waits any more.
        """
        task_id = packet.task_id
        while (rival := self._writing.get(task_id)) is not None:
            await asyncio.wait((rival,))
        if not self._is_open:
            raise StoreUnusableError("the store of the cluster is not open")
        writing = asyncio.create_task(self._write_now(packet, sequence), name=f"state-write-{task_id}")
        self._writing[task_id] = writing
        writing.add_done_callback(_retrieved)
        await asyncio.shield(writing)

    async def _write_now(self, packet: TaskPacket, sequence: int) -> None:
        task_id = packet.task_id
        try:
            self._publish(packet, await self._put(f"{TASKS}.{task_id}", _encoded(packet), sequence))
            if not await self._copy(packet):
                self._note_behind(task_id)
        except _CameFirstError:
            newest = await self._newest(task_id)
            actual = newest.packet.revision if newest is not None else 0
            raise TaskConflictError(task_id, expected=packet.revision, actual=actual) from None
        finally:
            del self._writing[task_id]
            deferred = self._deferred.pop(task_id, None)
            if deferred is not None:
                self._take(task_id, *deferred)

    async def _put(
        self, subject: str, content: bytes, sequence: int | None, *, ttl_s: int | None = None
    ) -> int:
        """Put `content` at `subject`, for `ttl_s`, if its last message is `sequence` (None: in any case).

        An attempt of which nobody said how it ended is made again, with the same condition: one that
        took place after all is recognised by its content.
        """
        headers = {} if sequence is None else {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(sequence)}
        if ttl_s is not None:
            headers[TTL] = f"{ttl_s}s"
        problem = ""
        with suppress(TimeoutError):
            async with asyncio.timeout(WRITE_S):
                while True:
                    try:
                        session = await self._link.session()
                        _check_size(subject, content, session.client.max_payload)
                        work = session.jetstream.publish(subject, content, headers=headers)
                        return (await session.or_lost(work, REQUEST_TIMEOUT_S)).seq
                    except MessageTooLargeError:
                        raise
                    except APIError as exc:
                        if exc.err_code in WRONG_LAST_SEQUENCE:
                            there = await self._message(subject) if problem else None
                            if there is not None and there[1] == content:
                                return there[0]
                            raise _CameFirstError from None
                        if exc.err_code == NO_TTL and headers.pop(TTL, None) is not None:
                            continue  # a stream that somebody made otherwise: it is kept for ever there
                        if exc.err_code in STREAM_FULL:
                            raise StoreFullError(f"NATS has no space: {exc.description}") from exc
                        problem = str(exc.description)
                    except (Error, OSError, TimeoutError, ChannelError) as exc:
                        problem = told(exc)
                    await asyncio.sleep(RETRY_PAUSE_S)
        raise StoreError(
            f"NATS did not take a change of {subject} within {WRITE_S:g} s: {problem or 'no answer'}"
        )

    async def _claim(self, key: str, packet: TaskPacket) -> _Claim:
        subject = _key_subject(key)
        ours = _Claim(task_id=packet.task_id, request_sha256=packet.request_sha256)
        sequence = 0
        while True:
            try:
                await self._put(subject, msgspec.json.encode(ours), sequence)
            except _CameFirstError:
                there = await self._message(subject)
                if there is not None and there[1]:
                    return msgspec.json.decode(there[1], type=_Claim)
                sequence = 0 if there is None else there[0]  # its task was deleted: the key is free
            else:
                return ours

    # --- reading the stream ---

    async def _message(self, subject: str) -> tuple[int, bytes] | None:
        message = await last_message(self._link, STREAM, subject)
        return None if message is None else (message.seq or 0, message.data or b"")

    async def _newest(self, task_id: str) -> _Held | None:
        """The task as the stream has it, taken note of; None when it has none."""
        message = await self._message(f"{TASKS}.{task_id}")
        if message is None:
            self._sequences.pop(task_id, None)  # also what said that it was deleted has expired
            return None
        if not message[1]:
            self._sequences[task_id] = max(message[0], self._sequences.get(task_id, 0))
            return None
        self._take(task_id, *message)
        return _Held(_decoded(task_id, message[1]), message[0])

    async def _fetch(self, task_id: str) -> _Held:
        if not is_task_id(task_id):
            raise TaskNotFoundError(task_id)
        held = await self._newest(task_id)
        if held is None:
            raise TaskNotFoundError(task_id)
        return held

    async def _watch(self) -> None:
        """Follow the stream for ever; a consumer that fails or falls silent is built anew."""
        while True:
            session = await self._link.session()
            try:
                await self._follow(session)
            except (Error, OSError, TimeoutError, ChannelError) as exc:
                if not session.is_lost:
                    log.info("store.watch_rebuilt", problem=told(exc))
            except Exception as exc:
                # Without this loop the server would know of nothing that others write, and not say so.
                self._problem = f"other servers' tasks are not followed: {type(exc).__name__}"
                log.exception("store.watch_failed", again_s=WATCH_AGAIN_S)
                await asyncio.sleep(WATCH_AGAIN_S)
            await asyncio.sleep(RETRY_PAUSE_S)

    async def _follow(self, session: Session) -> None:
        await session.or_lost(session.ensure_streams(), OPEN_TIMEOUT_S)
        incarnation = session.incarnations[STREAM]
        was_lost = self._incarnation not in {"", incarnation}
        if was_lost:
            # It was made anew: its numbers begin at 1, and what it had is in everybody's copies.
            log.error("store.stream_lost", stream=STREAM)
            self._index, self._last_sequence = TaskIndex(), 0
            self._live.clear()
            self._sequences.clear()
            self._must_bring = True
        self._incarnation = incarnation
        inbox = session.client.new_inbox()
        news = _News(self)
        subscription = await session.client.subscribe(inbox, cb=news.hear)
        wanted = ConsumerConfig(
            deliver_subject=inbox,
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE
            if self._last_sequence
            else DeliverPolicy.LAST_PER_SUBJECT,
            opt_start_seq=self._last_sequence + 1 if self._last_sequence else None,
            filter_subject=f"{TASKS}.>",
            ack_policy=AckPolicy.NONE,
            idle_heartbeat=HEARTBEAT_S,
            inactive_threshold=30.0,
            mem_storage=True,
            num_replicas=1,
        )
        try:
            info = await session.or_lost(session.jetstream.add_consumer(STREAM, wanted), REQUEST_TIMEOUT_S)
            if not info.num_pending:
                self._caught_up.set()
            if self._must_bring:
                await self._bring_along()
                self._must_bring = False
            self._problem = ""
            while True:
                news.stirred.clear()
                await session.or_lost(news.stirred.wait(), 2.5 * HEARTBEAT_S)
                news.check()
        finally:
            if not session.is_lost:
                with suppress(Error, OSError, TimeoutError):
                    await subscription.unsubscribe()

    def told(self, subject: str, sequence: int, content: bytes, *, pending: int) -> None:
        """A message of the stream: what somebody wrote, perhaps we."""
        task_id = subject.removeprefix(f"{TASKS}.")
        self._last_sequence = sequence
        if task_id in self._writing:
            self._deferred[task_id] = (sequence, content)
        else:
            self._take(task_id, sequence, content)
        if not pending:
            self._caught_up.set()

    def _take(self, task_id: str, sequence: int, content: bytes) -> None:
        """Take note of what another server wrote, unless it is known."""
        if sequence <= self._sequences.get(task_id, 0):
            return
        if not content:
            self._sequences[task_id] = sequence
            self._drop(task_id)
            return
        try:
            packet = _decoded(task_id, content)
        except CorruptTaskError as exc:
            log.warning("store.unreadable", task_id=task_id, problem=str(exc))
            self._sequences[task_id] = sequence
            return
        since = self._index.get(task_id).revision if task_id in self._index else 0
        self._publish(packet, sequence)
        if task_id in self._copied:
            self._note_behind(task_id)
        for listener in self._listeners:
            listener(packet, since)

    def _publish(self, packet: TaskPacket, sequence: int) -> None:
        self._sequences[packet.task_id] = sequence
        self._index.put(summary(packet))
        if packet.status.is_final:
            self._live.pop(packet.task_id, None)
        else:
            self._live[packet.task_id] = _Held(packet, sequence)

    def _drop(self, task_id: str) -> None:
        self._live.pop(task_id, None)
        if task_id in self._index:
            self._index.remove(task_id)
        if task_id in self._copied:
            self._note_behind(task_id)

    def _note_behind(self, task_id: str) -> None:
        self._behind.add(task_id)
        self._stirred.set()

    # --- copies ---

    async def _bring_along(self) -> None:
        """Put into the stream what only the copies have, and note which copies are behind."""
        cursor: str | None = None
        brought = 0
        while True:
            page = await self._copies.list(TaskFilter(), limit=PAGE, cursor=cursor)
            for task in page.items:
                self._copied.add(task.task_id)
                if task.task_id in self._index:
                    if self._index.get(task.task_id).revision > task.revision:
                        self._behind.add(task.task_id)
                elif task.task_id in self._sequences:
                    self._behind.add(task.task_id)  # deleted while this server was away
                else:
                    brought += await self._bring(task.task_id)
            cursor = page.next_cursor
            if cursor is None:
                break
        if brought:
            log.info("store.brought_along", tasks=brought)
        self._stirred.set()

    async def _bring(self, task_id: str) -> bool:
        try:
            packet = await self._copies.read(task_id)
            if packet.idempotency_key is not None:
                await self._claim(packet.idempotency_key, packet)
            return await self._brought(packet)
        except TaskNotFoundError:
            return False
        except (StoreError, MessageTooLargeError) as exc:
            log.warning("store.left_behind", task_id=task_id, problem=str(exc))
            return False

    async def _brought(self, packet: TaskPacket) -> bool:
        """Whether the stream has `packet` from us, rather than one that is as far, or none any more."""
        sequence = 0
        while True:
            try:
                await self._write(packet, sequence)
            except TaskConflictError:
                there = await self._newest(packet.task_id)
                if there is None or there.packet.revision >= packet.revision:
                    return False
                sequence = there.sequence
            else:
                return True

    async def _keep_copies(self) -> None:
        """Bring copies up to date after other servers went on with their tasks, or the disk failed."""
        while True:
            await self._stirred.wait()
            self._stirred.clear()
            failed: set[str] = set()
            while self._behind:
                task_id = self._behind.pop()
                if not await self._catch_up(task_id):
                    failed.add(task_id)
            if failed:
                await asyncio.sleep(COPY_AGAIN_S)
                self._behind |= failed
                self._stirred.set()

    async def _catch_up(self, task_id: str) -> bool:
        try:
            if task_id in self._index:
                held = self._live.get(task_id) or await self._fetch(task_id)
                return await self._copy(held.packet)
            await self._copies.delete(task_id)
        except (TaskNotFoundError, TaskLiveError):
            # Gone already; or the copy was left behind before the end, and no task's history is made up.
            log.info("store.copy_left", task_id=task_id)
        except StoreError as exc:
            log.info("store.copy_behind", task_id=task_id, problem=str(exc))
            return False
        self._copied.discard(task_id)
        return True

    async def _copy(self, packet: TaskPacket) -> bool:
        """Keep the copy of `packet`. The stream has it: a disk that fails here loses nothing."""
        task_id = packet.task_id
        try:
            if task_id not in self._copied:
                await self._copies.create(packet, [])
                self._copied.add(task_id)
            while (copy := await self._copies.read(task_id)).revision < packet.revision:
                news = packet.history[copy.revision :]
                with suppress(TaskConflictError):  # a later state was copied meanwhile
                    await self._copies.append(task_id, news, expected_revision=copy.revision)
        except StoreError as exc:
            log.warning("store.copy_failed", task_id=task_id, problem=str(exc))
            return False
        except AgentServerError as exc:
            # The copy is of another life of the task: what the stream has is the truth.
            log.warning("store.copy_differs", task_id=task_id, problem=str(exc))
        return True


class _News:
    """The messages of one consumer, in order: a gap ends it, and the next one goes on from there."""

    def __init__(self, store: NatsTaskStore) -> None:
        self._store = store
        self._last = 0
        self._gap = False
        self.stirred = asyncio.Event()

    async def hear(self, message: Msg) -> None:
        """A message, or the heartbeat of a consumer that has none."""
        self.stirred.set()
        if not message.reply.startswith("$JS.ACK."):
            return
        meta = message.metadata
        if meta.sequence.consumer != self._last + 1:
            self._gap = True
        if not self._gap:
            self._last += 1
            try:
                self._store.told(
                    message.subject, meta.sequence.stream, message.data, pending=meta.num_pending
                )
            except Exception:
                # The client library would swallow it.
                log.exception("store.news_failed", subject=message.subject)

    def check(self) -> None:
        """Raises `ChannelError` after a gap."""
        if self._gap:
            raise ChannelError("the consumer left out a message")


def _retrieved(writing: asyncio.Task[None]) -> None:
    """Who asked for the write may be gone; what became of it is then nobody's to hear."""
    if not writing.cancelled():
        writing.exception()


def _check_size(subject: str, content: bytes, limit_bytes: int) -> None:
    if len(content) + len(subject) + HEADER_BYTES > limit_bytes:
        raise MessageTooLargeError(subject, size_bytes=len(content), limit_bytes=limit_bytes)


def _key_subject(key: str) -> str:
    return f"{KEYS}.{hashlib.sha256(key.encode()).hexdigest()}"


def _encoded(packet: TaskPacket) -> bytes:
    content = msgspec.json.encode(packet)
    return content if len(content) < COMPRESS_BYTES else zlib.compress(content, 1)


def _decoded(task_id: str, content: bytes) -> TaskPacket:
    try:
        if not content.startswith(b"{"):
            content = zlib.decompressobj().decompress(content, MAX_PACKET_BYTES)
        return msgspec.json.decode(content, type=TaskPacket)
    except (zlib.error, msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise CorruptTaskError(f"the packet of {task_id} on NATS does not decode: {exc}") from exc
