"""Webhooks: a task's events sent to the URL that its packet names, signed, in order, at least once.

Only targets that the configuration names are called. What was delivered is in a small document, so that
a restart goes on where it was, and another server where this one is gone; the events themselves are read
from the task again. A message that comes twice has the same `webhook-id`.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, Self, TypeAlias

import httpx
import msgspec
import structlog

from ai_agent_server.cluster.base import Left, Shelf, server_of
from ai_agent_server.config.settings import CallbackSettings, secret
from ai_agent_server.core.callbacks import signature, target_of
from ai_agent_server.core.chat import Privacy
from ai_agent_server.core.event_packet import EventPacket, cut, is_copy, statuses
from ai_agent_server.core.ports import Orchestration, WebhookStatus
from ai_agent_server.core.task_packet import AnyTaskEvent, Recovered, Started, TaskPacket, TaskStatus
from ai_agent_server.errors import (
    CorruptTaskError,
    InvalidPacketError,
    StoreError,
    TaskStateError,
)
from ai_agent_server.loopback import is_loopback_url
from ai_agent_server.tasks_state.base import TaskFilter

SENDERS: Final = 4
MAX_BODY_BYTES: Final = 256 * 1024
"""An event that is longer goes without its bulky fields."""
MAX_PENDING: Final = 10_000
"""As many tasks may have messages that are not delivered; past it those of others are given up."""
SAVE_S: Final = 0.25
"""A kill repeats what was delivered in so long at most."""
SLACK: Final = timedelta(seconds=30)
"""An event is stamped, then written, then told, then delivered; what is known goes back so far at least."""
READ_AGAIN_S: Final = 1.0
LOOK_S: Final = 2.0
"""How often it is looked for what servers left that are gone."""
_PAGE = 200
_ALL = _GIVEN_UP = 2**53
Sent: TypeAlias = Literal["done", "again", "never"]
_LONG_AGO = datetime.min.replace(tzinfo=UTC)

log = structlog.get_logger(__name__)


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a webhook, in the form of standardwebhooks.com."""

    type: str
    timestamp: datetime
    data: EventPacket


class Cursor(msgspec.Struct, kw_only=True):
    """How far a task's messages are delivered."""

    next_seq: int
    last_seq: int = _ALL
    """No further than this: what follows was written, and is told, by another server."""
    at: datetime
    """When it last moved."""
    attempts: int = 0
    """How often the next message failed."""


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A server's document: everything that was stamped before `until` less `SLACK` is in it."""

    until: datetime
    tasks: dict[str, Cursor]


class Targets:
    """Where the configuration in force lets webhooks go, and what signs them."""

    def __init__(self, settings: Callable[[], CallbackSettings], environ: Mapping[str, str]) -> None:
        self.settings, self._environ = settings, environ

    def find(self, url: str) -> str | None:
        """The name of the target that `url` belongs to."""
        return target_of(url, {name: target.url for name, target in self.settings().targets.items()})

    def key(self, name: str) -> str | None:
        """The target's secret, None where it is not set."""
        return secret(self.settings().targets[name].secret, self._environ)

    def check(self, url: str, privacy: Privacy) -> None:
        """Whether a task may be taken whose events are to go to `url`.

        Raises `InvalidPacketError`.
        """
        targets = self.settings().targets
        name = self.find(url)
        if name is None:
            raise InvalidPacketError(
                "events may not be sent there" if targets else "no callback target is configured",
                pointer="/callback/url",
                expected="a URL at or below that of one of callbacks.targets in configuration.json",
                # Their names: the path of a URL may be a secret, as Slack's is.
                choices=tuple(targets),
            )
        if privacy == "local" and not is_loopback_url(url):
            raise InvalidPacketError(
                "nothing of a private task leaves this machine",
                pointer="/callback/url",
                expected="a loopback address, or privacy 'any'",
            )
        key = self.key(name)
        try:
            signature(key or "", message_id="", timestamp_s=0, body=b"")
        except ValueError:
            key = None
        if not key:
            raise InvalidPacketError(
                f"the target {name!r} cannot be used: its secret is not set",
                pointer="/callback/url",
                expected=f"{targets[name].secret.env} in the environment: a text, or whsec_ and base64",
            )


class Webhooks:
    """Delivers, as long as it is entered.

    It is entered before the engine starts, so that no event is told that it would not know of.
    """

    def __init__(
        self,
        engine: Orchestration,
        *,
        targets: Targets,
        clock: Callable[[], datetime],
        rng: random.Random,
        shelf: Shelf,
    ) -> None:
        self._engine, self._targets = engine, targets
        self._clock, self._rng, self._shelf = clock, rng, shelf
        self._cursors: dict[str, Cursor] = {}
        self._due: dict[str, datetime] = {}
        """Tasks with something to deliver, and when to try (again)."""
        self._busy: set[str] = set()
        self._disabled: set[str] = set()
        self._stirred = asyncio.Event()
        self._dirty = False
        self._saving = asyncio.Lock()
        self._delivered = self._failed = self._given_up = 0
        self._http: httpx.AsyncClient | None = None
        self._tasks: list[asyncio.Task[None]] = []
        engine.observe(self._observe)

    async def __aenter__(self) -> Self:
        content = await self._shelf.read()
        await self._find(_decoded(content) if content else None, self._shelf.is_own)
        # Under this process's name, before anything is owed.
        self._dirty = True
        self._http = httpx.AsyncClient(follow_redirects=False, trust_env=False)
        self._tasks = [
            asyncio.create_task(self._keep(), name="webhooks-keep"),
            asyncio.create_task(self._take_over(), name="webhooks-take-over"),
            *(asyncio.create_task(self._send(), name=f"webhooks-{number}") for number in range(SENDERS)),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        async with self._saving:  # one that is cut off would be taken for done
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()
        await self._save()

    def status(self) -> WebhookStatus:
        """For the metrics."""
        return WebhookStatus(
            pending=len(self._due),
            delivered=self._delivered,
            failed=self._failed,
            given_up=self._given_up,
            disabled_targets=tuple(sorted(self._disabled)),
        )

    def _observe(self, packet: TaskPacket, events: tuple[AnyTaskEvent, ...]) -> None:
        if packet.callback is None or not events:
            return
        now, task_id = self._clock(), packet.task_id
        cursor = self._cursors.get(task_id)
        if cursor is None or (task_id not in self._due and cursor.next_seq != _GIVEN_UP):
            cursor = self._cursors[task_id] = Cursor(next_seq=events[0].seq, last_seq=0, at=now)
        cursor.last_seq, cursor.at = max(cursor.last_seq, events[-1].seq), now
        self._dirty = True
        if len(self._due) >= MAX_PENDING and task_id not in self._due:
            log.error("webhooks.too_many", pending=len(self._due), task_id=task_id)
            self._forget(task_id)
        elif any(event.__struct_config__.tag in packet.callback.events for event in events):
            # What a server that is gone did not deliver comes first: it is about to be found.
            wait_s = 2 * LOOK_S if self._is_taken_over(packet, events) else 0.0
            self._due.setdefault(task_id, now + timedelta(seconds=wait_s))
            self._stirred.set()

    def _is_taken_over(self, packet: TaskPacket, events: tuple[AnyTaskEvent, ...]) -> bool:
        if not any(isinstance(event, Recovered) for event in events):
            return False
        holders = [event.holder for event in packet.history if isinstance(event, Started | Recovered)]
        return not self._shelf.is_own(holders[-2] if len(holders) > 1 else holders[-1])

    async def _find(self, kept: Kept | None, is_its: Callable[[str], bool]) -> None:
        """Take up what was not delivered of tasks whose holder `is_its`, or that nobody had.

        Raises `StoreError` children.
        """
        mark = kept.until - SLACK if kept is not None else _LONG_AGO
        known = kept.tasks if kept is not None else {}
        cursor: str | None = None
        while True:
            page = await self._engine.list(TaskFilter(), limit=_PAGE, cursor=cursor)
            for task in page.items:
                # What is not known and did not change since was delivered long ago.
                is_new = (task.updated_at or task.created_at) > mark
                may_be_its = is_its(task.holder) or (kept is not None and not task.holder)
                if task.callback is not None and ((is_new and may_be_its) or task.task_id in known):
                    self._take_up(task.task_id, known.get(task.task_id))
            cursor = page.next_cursor
            if cursor is None:
                return

    def _take_up(self, task_id: str, known: Cursor | None) -> None:
        next_seq = known.next_seq if known else 1
        if (ours := self._cursors.get(task_id)) is not None:
            next_seq = min(next_seq, ours.next_seq)
        # A new one: who is delivering now moves the old one on.
        self._cursors[task_id] = Cursor(next_seq=next_seq, at=self._clock())
        self._due[task_id] = self._clock()
        self._stirred.set()

    async def _take_over(self) -> None:
        """Go on where servers stopped that are gone."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                for left in await self._shelf.left():
                    await self._inherit(left)
            except StoreError as exc:
                log.warning("webhooks.not_taken_over", problem=str(exc))

    async def _inherit(self, left: Left) -> None:
        server = server_of(left.holder)
        await self._find(_decoded(left.content), lambda holder: server_of(holder) == server)
        # Kept as ours before it is taken: a death between the two repeats messages, and loses none.
        self._dirty = True
        if not await self._save():
            return
        nothing_left = Kept(until=self._clock() + SLACK, tasks={})
        is_ours = await self._shelf.replace(left, msgspec.json.encode(nothing_left))
        log.info("webhooks.taken_over", holder=left.holder, is_ours=is_ours, pending=len(self._due))

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            if self._dirty:
                await self._save()

    async def _save(self) -> bool:
        """Whether what is known is kept."""
        async with self._saving:
            if not self._dirty:
                return True
            self._dirty = False
            now = self._clock()
            for task_id, cursor in list(self._cursors.items()):
                if task_id not in self._due and cursor.at < now - 2 * SLACK:
                    del self._cursors[task_id]
            content = msgspec.json.encode(Kept(until=now, tasks=self._cursors))
            try:
                await self._shelf.put(content)
            except StoreError as exc:
                self._dirty = True
                log.warning("webhooks.not_kept", problem=str(exc))
                return False
            return True

    async def _send(self) -> None:
        while True:
            task_id = await self._next()
            try:
                await self._deliver(task_id)
            except (TaskStateError, CorruptTaskError) as exc:
                log.info("webhooks.dropped", task_id=task_id, problem=str(exc))
                self._forget(task_id)
            except StoreError as exc:
                log.warning("webhooks.unreadable", problem=str(exc))
                self._due[task_id] = self._clock() + timedelta(seconds=READ_AGAIN_S)
            except Exception:
                # A fault of ours with this task's messages: the others' must still go out.
                log.exception("webhooks.fault", task_id=task_id)
                self._forget(task_id)
            finally:
                self._busy.discard(task_id)
                self._dirty = True

    async def _next(self) -> str:
        """A task whose turn it is."""
        while True:
            self._stirred.clear()
            free = [(due, task_id) for task_id, due in self._due.items() if task_id not in self._busy]
            due, task_id = min(free, default=(None, ""))
            wait_s = None if due is None else (due - self._clock()).total_seconds()
            if wait_s is not None and wait_s <= 0:
                self._busy.add(task_id)
                return task_id
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._stirred.wait()

    async def _deliver(self, task_id: str) -> None:
        cursor = self._cursors[task_id]
        while True:
            packet = await self._engine.read(task_id)
            for event, status in statuses(packet, since=cursor.next_seq - 1):
                if event.seq > cursor.last_seq:
                    break
                match await self._tell(packet, event, status):
                    case "again":
                        self._postpone(task_id, cursor)
                        return
                    case "never":
                        self._forget(task_id)
                        return
                cursor.next_seq, cursor.at, cursor.attempts = event.seq + 1, self._clock(), 0
                self._dirty = True
            written = (await self._engine.read(task_id)).revision
            if min(written, cursor.last_seq) < cursor.next_seq:
                if self._cursors.get(task_id) is cursor:
                    del self._due[task_id]
                return

    def _postpone(self, task_id: str, cursor: Cursor) -> None:
        settings = self._targets.settings()
        cursor.at, cursor.attempts = self._clock(), cursor.attempts + 1
        self._failed += 1
        if cursor.attempts >= settings.attempts:
            log.warning("webhooks.given_up", task_id=task_id, attempts=cursor.attempts)
            self._forget(task_id)
            return
        wait_s = min(settings.backoff_max_s, settings.backoff_s * 2.0 ** (cursor.attempts - 1))
        self._due[task_id] = cursor.at + timedelta(seconds=wait_s * self._rng.uniform(0.8, 1.2))

    def _forget(self, task_id: str) -> None:
        """Nothing more of this task goes out."""
        self._given_up += 1
        self._due.pop(task_id, None)
        self._cursors[task_id] = Cursor(next_seq=_GIVEN_UP, at=self._clock())

    async def _tell(self, packet: TaskPacket, event: AnyTaskEvent, status: TaskStatus) -> Sent:
        """Send one event, where it is wanted."""
        callback = packet.callback
        is_wanted = callback is not None and event.__struct_config__.tag in callback.events
        if callback is None or not is_wanted or is_copy(packet, event):
            return "done"
        target = self._targets.find(callback.url)
        if target is None or target in self._disabled:
            log.info("webhooks.no_target", task_id=packet.task_id, target=target)
            return "never"
        key = self._targets.key(target)
        if not key:
            log.warning("webhooks.no_secret", target=target)
            return "again"
        status_code = await self._post(
            callback.url, key, _body(packet.task_id, event, status), f"{packet.task_id}:{event.seq}"
        )
        if status_code == httpx.codes.GONE:
            self._disabled.add(target)
            log.warning("webhooks.target_disabled", target=target)
            return "never"
        is_taken = 200 <= status_code < 300
        self._delivered += is_taken
        log.info(
            "webhooks.sent" if is_taken else "webhooks.failed",
            task_id=packet.task_id,
            seq=event.seq,
            target=target,
            status=status_code,
        )
        return "done" if is_taken else "again"

    async def _post(self, url: str, key: str, body: bytes, message_id: str) -> int:
        """The status of the answer, 0 where there was none."""
        assert self._http is not None
        timestamp_s = int(self._clock().timestamp())
        headers = {
            "Content-Type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp_s),
            "webhook-signature": signature(key, message_id=message_id, timestamp_s=timestamp_s, body=body),
        }
        timeout_s = self._targets.settings().timeout_s
        try:
            async with (
                asyncio.timeout(timeout_s),
                # What is answered is not read: it may have no end.
                self._http.stream("POST", url, content=body, headers=headers, timeout=timeout_s) as answer,
            ):
                return answer.status_code
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError):
            return 0


def _body(task_id: str, event: AnyTaskEvent, status: TaskStatus) -> bytes:
    data = EventPacket(kind="event", task_id=task_id, status=status, event=event)
    name = str(event.__struct_config__.tag)
    body = msgspec.json.encode(Message(type=name, timestamp=event.at, data=data))
    if len(body) > MAX_BODY_BYTES:
        body = msgspec.json.encode(Message(type=name, timestamp=event.at, data=cut(data, event)))
    return body


def _decoded(content: bytes) -> Kept | None:
    try:
        return msgspec.json.decode(content, type=Kept)
    except msgspec.MsgspecError as exc:
        # Everything is found anew: messages come twice, none is missing.
        log.warning("webhooks.state_unreadable", problem=str(exc))
        return None
