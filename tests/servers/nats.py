"""A real nats-server on a free port of loopback, to be killed, started again and robbed of its files."""

import json
import shutil
import socket
import subprocess
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ai_agent_server.channels._embedded_nats import find_nats_server
from tests.servers.ports import holder


class NatsServer:
    """One port and one store; the process between them comes and goes."""

    def __init__(self, folder: Path = Path()) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        held = holder()
        # For as long as this object is there, so that a server that is away has its port when it is back.
        weakref.finalize(self, held.close)
        self.port: int = held.getsockname()[1]
        self.credentials = "tester:a-secret"

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self, **changes: object) -> None:
        """Start it; `changes` are in its configuration beside what every test needs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration = self.folder / "nats.conf"
        user, _, password = self.credentials.partition(":")
        wanted = {
            "host": "127.0.0.1",
            "port": self.port,
            "authorization": {"user": user, "password": password},
            "jetstream": {"store_dir": str(self.folder / "store"), "sync_interval": "always"},
            "log_file": str(self.folder / "nats.log"),
        }
        configuration.write_text(json.dumps(wanted | changes))
        self.start_again()

    def start_again(self) -> None:
        """Start it with the configuration that it had."""
        configuration = self.folder / "nats.conf"
        self._process = subprocess.Popen([find_nats_server(), "-c", configuration])
        _await_port(self.port)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def send_signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def restart(self) -> None:
        self.kill()
        self.start()

    def lose_files(self) -> None:
        """Remove every stream; only while it is not running."""
        shutil.rmtree(self.folder / "store", ignore_errors=True)


@contextmanager
def a_nats_server(folder: Path) -> Iterator[NatsServer]:
    """One that runs, and is killed at the end."""
    server = NatsServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _await_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                assert connection.recv(4) == b"INFO"
                return
        except OSError:
            assert time.monotonic() < deadline, "nats-server did not start"
            time.sleep(0.02)
