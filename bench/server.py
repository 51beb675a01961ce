"""The server as a user runs it: a process with a state folder of its own, stopped by a signal."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

from ai_agent_server.config.settings import packaged_configuration

READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A server that answers at `url`. `started` is on the clock of `time.perf_counter`."""

    url: str
    pid: int
    started: float
    ready_s: float
    """From the start of the process to its first healthy answer."""

    def children(self) -> dict[int, str]:
        """The process ids of the server's children, with their names."""
        return {child.pid: child.name() for child in psutil.Process(self.pid).children(recursive=True)}


@contextmanager
def serving(state: Path, config: Path | None = None) -> Iterator[Running]:
    """`ai-agent-server serve` on a free port."""
    command = [sys.executable, "-m", "ai_agent_server", "serve", "--port", "0", "--state-dir", str(state)]
    if config is not None:
        command += ["--config", str(config)]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "AI_AGENT_SERVER_LOG_LEVEL": "warning"},
        ) as process,
    ):
        started = time.perf_counter()
        assert process.stdout is not None
        try:
            words = process.stdout.readline().split()
            urls = [word for word in words if word.startswith("http://")]
            if not urls:
                log.seek(0)
                raise RuntimeError(f"the server did not start: {log.read()[-2000:].decode(errors='replace')}")
            answer = httpx.get(f"{urls[0]}/api/v1/health", timeout=READY_TIMEOUT_S)
            answer.raise_for_status()
            yield Running(
                url=urls[0], pid=process.pid, started=started, ready_s=time.perf_counter() - started
            )
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def without_model(folder: Path) -> Path:
    """The packaged configuration with a scripted LLM in the place of the embedded one."""
    document: dict[str, Any] = json.loads(packaged_configuration())
    document["llms"] = {"scripted": {"engine": "local.scripted", "model": "scripted", "source": "local"}}
    path = folder / "configuration.json"
    path.write_text(json.dumps(document))
    return path
