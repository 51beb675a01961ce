"""Leases by heartbeats on NATS: a server that is silent for too long has lost what it held."""

import asyncio
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec
import structlog
from nats.aio.msg import Msg
from nats.errors import Error

from ai_agent_server.cluster.base import Peers, server_of
from ai_agent_server.durable import write_whole
from ai_agent_server.errors import ChannelError
from ai_agent_server.nats_link import REQUEST_TIMEOUT_S, Link, Session, told

__all__ = ("NatsLeases",)

SUBJECT = "ai-agent-server.cluster.heartbeats"
BEATS_PER_LEASE = 4
GONE_S = float("-inf")

log = structlog.get_logger(__name__)


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """One server says that it is there, or that it leaves."""

    holder: str
    leaving: bool = False


class NatsLeases:
    """`Leases` of a server that hears the others over NATS.

    A holder is `<server>.<process>`: the server's id is kept in its state folder, which one process at
    a time has open, so that another process of the same server is known to be gone at once. The
    heartbeat is sent by the event loop that runs the tasks, on purpose: a loop that stands still is
    not alive. It is never kept by a stream; what was missed is made good by the next one.

    Nobody is taken to be gone for something that we did not listen to: not before a whole lease was
    heard from the start or from a lost connection, nor after this process itself stood still.
    """

    def __init__(self, link: Link, server: str, *, lease_s: float, clock: Callable[[], float]) -> None:
        """`clock` is monotonic, in seconds."""
        self._link = link
        self._server = server
        self._lease_s = lease_s
        self._clock = clock
        self._heard: dict[str, float] = {}
        self._listening_since: float | None = None
        self._ticked = clock()
        self._task: asyncio.Task[None] | None = None
        self.holder = f"{server}.{uuid.uuid4().hex[:8]}"

    def open(self) -> Self:
        """Begin to listen and to be heard."""
        self._task = asyncio.create_task(self._keep(), name="leases")
        return self

    def may_take(self, holder: str) -> bool:
        """See `Leases.may_take`."""
        if holder in {"", self.holder}:
            return True
        now = self._clock()
        if self._listening_since is None or now - self._ticked > self._lease_s / 2:
            return False
        heard = self._heard.get(holder)
        if heard is None:
            own_past = server_of(holder) == self._server
            return own_past or now - self._listening_since > self._lease_s
        return now - heard > self._lease_s

    def peers(self) -> Peers:
        """See `Leases.peers`."""
        now = self._clock()
        others = {holder: now - heard for holder, heard in self._heard.items() if heard != GONE_S}
        return Peers(holder=self.holder, others=others, connected=self._listening_since is not None)

    async def aclose(self) -> None:
        """See `Leases.aclose`."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait((self._task,))
        self._task = None
        with suppress(ChannelError, Error, OSError, TimeoutError):
            session = await self._link.session(0.0)
            await self._beat(session, leaving=True)
            await session.or_lost(session.client.flush(), REQUEST_TIMEOUT_S)

    async def _keep(self) -> None:
        while True:
            session = await self._link.session()
            try:
                await self._listen(session)
            except (Error, OSError, TimeoutError, ChannelError) as exc:
                log.info("cluster.not_listening", problem=told(exc))
            finally:
                self._listening_since = None
            await asyncio.sleep(self._lease_s / BEATS_PER_LEASE)

    async def _listen(self, session: Session) -> None:
        await session.client.subscribe(SUBJECT, cb=self._hear)
        self._begin()
        while not session.is_lost:
            if self._clock() - self._ticked > self._lease_s / 2:
                log.warning("cluster.stood_still", stood_s=round(self._clock() - self._ticked, 1))
                self._begin()
            self._ticked = self._clock()
            await self._beat(session, leaving=False)
            self._forget_silent()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._lease_s / BEATS_PER_LEASE):
                    await session.lost()

    def _begin(self) -> None:
        """Everybody has a whole lease from now to be heard."""
        self._ticked = self._listening_since = self._clock()
        self._heard.clear()

    async def _beat(self, session: Session, *, leaving: bool) -> None:
        beat = Heartbeat(holder=self.holder, leaving=leaving)
        await session.client.publish(SUBJECT, msgspec.json.encode(beat))

    async def _hear(self, message: Msg) -> None:
        try:
            beat = msgspec.json.decode(message.data, type=Heartbeat)
        except msgspec.MsgspecError:
            return
        if beat.holder == self.holder:
            return
        if beat.leaving:
            log.info("cluster.left", holder=beat.holder)
            self._heard[beat.holder] = GONE_S
            return
        if self._heard.get(beat.holder, GONE_S) == GONE_S:
            log.info("cluster.joined", holder=beat.holder)
        self._heard[beat.holder] = self._clock()

    def _forget_silent(self) -> None:
        """Whoever is silent for long is as good as never heard."""
        now = self._clock()
        if self._listening_since is None or now - self._listening_since <= 2 * self._lease_s:
            return
        for holder, heard in tuple(self._heard.items()):
            if now - heard > 2 * self._lease_s:
                log.warning("cluster.silent", holder=holder)
                del self._heard[holder]


def server_id(state_dir: Path, name: str | None) -> str:
    """The id of the server whose state folder this is, made once; it begins with `name`."""
    path = state_dir / "server_id"
    try:
        kept = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        kept = uuid.uuid4().hex[:8]
        write_whole(path, kept.encode())
    return f"{name}-{kept}" if name else kept
