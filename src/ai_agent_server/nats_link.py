"""The link to a nats-server: one connection after the other, each with the streams in place."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import structlog
from nats.aio.client import Client
from nats.errors import ConnectionClosedError, Error
from nats.js.api import StreamConfig
from nats.js.errors import APIError, BadRequestError

from ai_agent_server.errors import ChannelClosedError, ChannelError

T = TypeVar("T")

REQUEST_TIMEOUT_S = 3.0
CONNECT_TIMEOUT_S = 5
OPEN_TIMEOUT_S = 20.0
PING_INTERVAL_S = 10  # a peer that vanished without a word is noticed after two of these
RETRY_FIRST_S, RETRY_LAST_S = 0.05, 2.0

NAME_IN_USE = 10058
"""JetStream's error code for a stream that exists with another configuration."""

log = structlog.get_logger(__name__)


@asynccontextmanager
async def translated(doing: str) -> AsyncIterator[None]:
    """nats-py's errors as `ChannelError`."""
    try:
        yield
    except (Error, OSError, TimeoutError) as exc:
        raise ChannelError(f"{doing}: {told(exc)}") from exc


async def apart(work: Coroutine[Any, Any, T], lost: "asyncio.Future[None]", timeout_s: float | None) -> T:
    """The result of `work`, in a task of its own. Raises `ConnectionClosedError` and `TimeoutError`.

    nats-py leaves the requests of a dead connection waiting: this ends them when it is `lost`. And
    it waits in `asyncio.wait_for`, which in Python 3.11 forgets a cancellation that comes together
    with the answer: this does not.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, lost), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if lost.done():
            raise ConnectionClosedError
        raise TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


def told(exc: BaseException) -> str:
    """What went wrong: its kind, where it has no words."""
    return str(exc) or type(exc).__name__


class Session:
    """One connection, from CONNECT until it is lost. Nothing of it is used after that.

    nats-py's own reconnect is off: it replays a buffer of half-finished requests and keeps pull
    subscriptions that no longer deliver. A new connection that carries nothing over does neither.
    """

    def __init__(self, client: Client, lost: "asyncio.Future[None]", streams: Sequence[StreamConfig]) -> None:
        self.client = client
        self._streams = streams
        self.jetstream = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        self.incarnations: dict[str, str] = {}
        """Stream -> when it was created. A stream that was lost and made anew counts from 1 again."""
        self._lost = lost
        self._ensuring = asyncio.Lock()

    @property
    def is_lost(self) -> bool:
        """Whether the connection is gone."""
        return self._lost.done()

    async def lost(self) -> None:
        """Return when the connection is gone."""
        await asyncio.shield(self._lost)

    async def or_lost(self, work: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        """The result of `work`, if the connection lives as long; see `apart`."""
        return await apart(work, self._lost, timeout_s)

    async def ensure_streams(self) -> None:
        """Create the streams that are missing, and bring the others up to the layout."""
        async with self._ensuring:
            for wanted in self._streams:
                try:
                    info = await self.jetstream.add_stream(wanted)
                except BadRequestError as exc:
                    if exc.err_code != NAME_IN_USE:
                        raise
                    info = await self._update(wanted)
                self.incarnations[str(wanted.name)] = str(info.created)

    async def _update(self, wanted: StreamConfig) -> Any:
        try:
            return await self.jetstream.update_stream(wanted)
        except APIError as exc:
            # Somebody made it by hand with another retention, say. It may still serve.
            log.warning("channel.stream_kept", stream=wanted.name, problem=exc.description)
            return await self.jetstream.stream_info(str(wanted.name))


class Link:
    """Keeps a session open as long as there is a server, and makes a new one when it is lost.

    `url` may name several servers of one NATS cluster, with commas. `streams` are in place in every
    session, each on `replicas` of these servers.
    """

    def __init__(
        self,
        url: str,
        *,
        credentials: str | None,
        name: str,
        streams: Sequence[StreamConfig],
        replicas: int = 1,
    ) -> None:
        self._streams = tuple(stream.evolve(num_replicas=replicas) for stream in streams)
        self._servers = [server.strip() for server in url.split(",")]
        self._login = _login(credentials)
        self._name = name
        self._session: Session | None = None
        self._connected = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self.url = ",".join(_without_credentials(server) for server in self._servers)
        self.connections = 0
        self.version = ""

    def open(self) -> None:
        """Start connecting, in the background."""
        self._task = asyncio.create_task(self._keep(), name="nats-link")

    @property
    def is_connected(self) -> bool:
        """Whether there is a session now."""
        return self._session is not None and not self._session.is_lost

    @property
    def is_closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._closing

    async def session(self, timeout_s: float | None = None) -> Session:
        """The session, as soon as there is one. Raises `ChannelError` after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._session is None or self._session.is_lost:
                    if self._closing:
                        raise ChannelClosedError("the channel was closed")
                    self._connected.clear()
                    await self._connected.wait()
        except TimeoutError as exc:
            raise ChannelError(f"not connected to {self.url}") from exc
        return self._session

    async def aclose(self) -> None:
        """Send what is waiting, close, and stop connecting. May be called twice."""
        self._closing = True
        self._connected.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _keep(self) -> None:
        while True:
            session = await self._open()
            try:
                self._session = session
                self.connections += 1
                self._connected.set()
                await session.lost()
                log.warning("channel.lost", url=self.url)
            finally:
                self._session = None
                await _close(session.client)

    async def _open(self) -> Session:
        wait_s, told = RETRY_FIRST_S, ""
        while True:
            session, problem = await self._try()
            if session is not None:
                log.info("channel.connected", url=self.url, version=self.version)
                return session
            if problem != told:
                log.warning("channel.unreachable", url=self.url, problem=problem)
            told = problem
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, RETRY_LAST_S)

    async def _try(self) -> tuple[Session | None, str]:
        """One attempt: (session, ""), or (None, why not)."""
        client = Client()
        lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def on_lost() -> None:
            if not lost.done():
                lost.set_result(None)

        async def on_error(exc: Exception) -> None:
            log.debug("channel.nats_error", problem=told(exc))

        connecting = client.connect(
            self._servers,
            name=self._name,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=CONNECT_TIMEOUT_S,
            ping_interval=PING_INTERVAL_S,
            max_outstanding_pings=1,
            error_cb=on_error,
            disconnected_cb=on_lost,
            closed_cb=on_lost,
            **self._login,
        )
        session: Session | None = None
        problem = ""
        try:
            await apart(connecting, lost, OPEN_TIMEOUT_S)
            opened = Session(client, lost, self._streams)
            await opened.or_lost(opened.ensure_streams(), OPEN_TIMEOUT_S)
            version = client.connected_server_version
            self.version = f"{version.major}.{version.minor}.{version.patch}"
            session = opened
        except (Error, OSError, TimeoutError) as exc:
            problem = told(exc)
        finally:
            if session is None:
                await _close(client)
        return session, problem


async def _close(client: Client) -> None:
    with suppress(Error, OSError, TimeoutError):
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            if client.is_connected:
                await client.flush()
    with suppress(Error, OSError, TimeoutError):
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await client.close()


def _login(credentials: str | None) -> dict[str, Any]:
    if not credentials:
        return {}
    user, colon, password = credentials.partition(":")
    return {"user": user, "password": password} if colon else {"token": credentials}


def _without_credentials(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
