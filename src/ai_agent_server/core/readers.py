"""Those who follow tasks: each has a bounded backlog, and is cut when it falls too far behind."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

from ai_agent_server.core.task_packet import (
    FINAL_EVENTS,
    AnyTaskEvent,
    Progress,
    TaskPacket,
    TaskStatus,
)
from ai_agent_server.errors import TaskNotFoundError

BACKLOG = 1024
"""How many events a reader may be behind before it is cut; it comes back with its last seq."""
PAGE, PAGES = 8, 16
"""A reader holds so many events of the past, or one in so many of all of them, and then reads on."""

_Read = Callable[[str], Awaitable[TaskPacket]]


class _Reader:
    def __init__(self, *, cut: bool) -> None:
        self.queue: asyncio.Queue[AnyTaskEvent | Progress | None] = asyncio.Queue(BACKLOG + 1)
        self.cut = False
        if cut:
            self.end()

    def tell(self, item: AnyTaskEvent | Progress) -> None:
        if self.cut or (isinstance(item, Progress) and self.queue.qsize() > BACKLOG // 2):
            return
        if self.queue.qsize() >= BACKLOG:
            self.end()
        else:
            self.queue.put_nowait(item)

    def end(self) -> None:
        """Nothing follows what is queued."""
        if not self.cut:
            self.cut = True
            self.queue.put_nowait(None)


class Readers:
    """Who follows which task. `read` answers a task's packet as it is."""

    def __init__(self, read: _Read) -> None:
        self._read = read
        self._of: dict[str, set[_Reader]] = {}
        self._waiting: dict[str, set[asyncio.Future[TaskPacket | None]]] = {}
        self._closed = False

    def written(self, packet: TaskPacket, news: Iterable[AnyTaskEvent]) -> None:
        """Pass on what was written last of `packet`, and `packet` itself to who waits for its end."""
        if _needs_no_more(packet):
            self._answer(packet.task_id, packet)
        self.tell(packet.task_id, news)

    def tell(self, task_id: str, items: Iterable[AnyTaskEvent | Progress]) -> None:
        """Pass `items` on to everyone who follows the task."""
        readers = self._of.get(task_id)
        if readers:
            for item in items:
                for reader in tuple(readers):
                    reader.tell(item)

    async def follow(self, task_id: str, since: int) -> AsyncIterator[AnyTaskEvent | Progress]:
        """Every event after `since`, then what happens, until the task's end or the reader's."""
        reader = self._enter(task_id)
        try:
            ended, seen, is_more = False, since, True
            while is_more:
                try:
                    packet = await self._read(task_id)
                except TaskNotFoundError:
                    if seen > since:
                        return  # deleted, or archived, while it was read
                    raise
                page = deque(packet.history[seen : seen + max(PAGE, packet.revision // PAGES)])
                is_more, ended = seen + len(page) < packet.revision, packet.status.is_final
                # A slow reader may keep this for long, and the packet may be large.
                del packet
                while page:
                    seen = page[0].seq
                    yield page.popleft()
            while not ended:
                item = await reader.queue.get()
                if item is None:
                    return
                if isinstance(item, Progress):
                    yield item
                else:
                    if item.seq > seen:
                        seen = item.seq
                        yield item
                    ended = isinstance(item, FINAL_EVENTS)
        finally:
            self._leave(task_id, reader)

    async def wait(self, task_id: str, timeout_s: float) -> TaskPacket:
        """The packet once the task has ended or needs input, or as it is after `timeout_s`."""
        settled: asyncio.Future[TaskPacket | None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(task_id, set())
        waiting.add(settled)
        try:
            packet = await self._read(task_id)
            if _needs_no_more(packet) or self._closed:
                return packet
            await asyncio.wait((settled,), timeout=timeout_s)
        finally:
            waiting.discard(settled)
            if not waiting and self._waiting.get(task_id) is waiting:
                del self._waiting[task_id]
        return (settled.result() if settled.done() else None) or await self._read(task_id)

    def close(self) -> None:
        """Let everybody go, now and from now on, with what they have."""
        self._closed = True
        for readers in self._of.values():
            for reader in readers:
                reader.end()
        for task_id in tuple(self._waiting):
            self._answer(task_id, None)

    def _answer(self, task_id: str, packet: TaskPacket | None) -> None:
        for settled in self._waiting.pop(task_id, ()):
            if not settled.done():
                settled.set_result(packet)

    def _enter(self, task_id: str) -> _Reader:
        reader = _Reader(cut=self._closed)
        self._of.setdefault(task_id, set()).add(reader)
        return reader

    def _leave(self, task_id: str, reader: _Reader) -> None:
        readers = self._of.get(task_id)
        if readers is not None:
            readers.discard(reader)
            if not readers:
                del self._of[task_id]


def _needs_no_more(packet: TaskPacket) -> bool:
    """Whether nothing happens before somebody does something."""
    return packet.status.is_final or packet.status is TaskStatus.INPUT_REQUIRED
