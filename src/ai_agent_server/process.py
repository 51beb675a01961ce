"""The serving process: one listener, uvicorn, signals. Everything else is built by `app`."""

import asyncio
import ctypes
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import structlog
import uvicorn
import uvloop

from ai_agent_server import log
from ai_agent_server.app import Server, running, try_reload
from ai_agent_server.config import settings as configuration
from ai_agent_server.errors import ConfigurationError

__all__ = ("serve",)

events = structlog.get_logger(__name__)

LOG_LEVEL = "AI_AGENT_SERVER_LOG_LEVEL"
UNREAD_S = 60.0
"""A client that takes nothing of what was written to it for so long is dropped by the kernel.

Who was cut for reading too slowly would otherwise be kept, with what is written, until it goes."""
GC_ALLOCATIONS = 20_000
"""So many objects more than were freed, and the cycles among the youngest are looked for."""
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3
"""From glibc's `malloc.h`."""
ARENAS = 2
LARGE_BYTES = 256 * 1024


class _HttpServer(uvicorn.Server):
    """uvicorn that says when it listens, and leaves the signals to us."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(*, config: Path | None, host: str, port: int, state_dir: Path, ready: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT; answers the exit status.

    `ready` is called once with the URL. SIGHUP reloads the configuration; a second SIGTERM or SIGINT
    stops at once. Raises `ConfigurationError` or `StoreUnusableError` before anything listens.
    """
    environ = configuration.environment()
    level = environ.get(LOG_LEVEL, "info").lower()
    if level not in log.LEVELS:
        raise ConfigurationError(f"{level!r} is no log level", source=LOG_LEVEL, choices=log.LEVELS)
    log.configure(level)
    bound_arenas()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        parts = running(config=config, state_dir=state_dir, environ=environ)
        return runner.run(_serve(_listen(host, port), host, ready, parts))


def bound_arenas() -> None:
    """Have glibc keep less of what was freed. Before any thread begins; elsewhere it does nothing.

    By itself it gives each of up to eight threads a core a heap of its own, which grows to the most that
    the thread ever held, and puts ever larger blocks into them. After twenty minutes under load that was
    214 MB instead of 185 (`python -m bench.under_load --minutes 20`).
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, ARENAS)
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)


def collect_rarely() -> None:
    """Tune the garbage collector for a process that has loaded all it needs and serves from now on.

    What was loaded stays, so the collector need not go through it again and again; what requests leave
    behind is nearly all freed without it, and a rarer look saves some 6 % of CPU.
    """
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS)


async def _serve(
    listener: socket.socket,
    host: str,
    ready: Callable[[str], None],
    parts: AbstractAsyncContextManager[tuple[Server, Any]],
) -> int:
    bound = listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    with listener:
        async with parts as (server, application):
            collect_rarely()
            http = _HttpServer(
                uvicorn.Config(
                    application,
                    log_config=None,
                    access_log=False,
                    lifespan="off",
                    server_header=False,
                    # Whoever asks could say in them that he is another address.
                    proxy_headers=False,
                    ws="wsproto",
                    # Nothing is read from a WebSocket.
                    ws_max_size=4096,
                    timeout_graceful_shutdown=max(1, round(server.settings.server.shutdown_s)),
                ),
                on_ready=lambda: ready(f"http://{shown}:{bound}"),
            )
            async with _signals(server, http):
                await http.serve(sockets=[listener])
    events.info("server.stopped")
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Linux's alone; every connection has it from its listener.
    if (user_timeout := getattr(socket, "TCP_USER_TIMEOUT", None)) is not None:
        listener.setsockopt(socket.IPPROTO_TCP, user_timeout, round(1000 * UNREAD_S))
    try:
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {exc.strerror}", source="--host/--port"
        ) from exc
    return listener


@asynccontextmanager
async def _signals(server: Server, http: _HttpServer) -> AsyncIterator[None]:
    """First signal: drain and stop. Second: stop at once. SIGHUP: reload."""
    loop = asyncio.get_running_loop()
    owned: set[asyncio.Task[None]] = set()

    def own(work: Coroutine[Any, Any, None]) -> None:
        task = loop.create_task(work)
        owned.add(task)
        task.add_done_callback(owned.discard)

    async def stop() -> None:
        # First of all: open event streams and sessions would hold HTTP up.
        await server.drain()
        http.should_exit = True

    def on_stop() -> None:
        if server.engine.status().accepting:
            bound_s = server.settings.server.shutdown_s
            events.info(
                "server.stopping",
                running=server.engine.status().running,
                bound_s=bound_s,
                again="stops at once",
            )
            own(stop())
        else:
            events.warning("server.stopped_at_once")
            os._exit(130)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_stop)
    loop.add_signal_handler(signal.SIGHUP, lambda: own(try_reload(server)))
    try:
        yield
    finally:
        for task in tuple(owned):
            await task
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)
