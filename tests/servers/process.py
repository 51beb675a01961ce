"""The server as a user runs it: a process of its own, started, stopped and killed by its id."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Self

import httpx

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 60.0

PROGRAM = (sys.executable, "-m", "ai_agent_server")

SCRIPT: dict[str, Any] = {
    "engine": "local.scripted",
    "model": "scripted",
    "source": "local",
    "capabilities": ["chat", "json_schema", "tools"],
    "slots": 64,
}
"""An LLM for configurations of tests; give it `options`."""


class ServerProcess:
    """`ai-agent-server serve` with its own state folder; `url` and `http` after `start`.

    `program` is what is run; another one than `PROGRAM` ends by becoming it.
    """

    def __init__(
        self,
        state_dir: Path,
        config: Path | None = None,
        *,
        program: tuple[str, ...] = PROGRAM,
        start_timeout_s: float = START_TIMEOUT_S,
        **environ: str,
    ) -> None:
        self.state_dir, self.config = state_dir, config
        self.program = program
        self.start_timeout_s = start_timeout_s
        self.environ = environ
        self.log = state_dir.parent / f"{state_dir.name}.log"
        self.url = ""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self, port: int = 0) -> Self:
        arguments = ["serve", "--port", str(port), "--state-dir", str(self.state_dir)]
        if self.config is not None:
            arguments += ["--config", str(self.config)]
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.program,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self.environ},
            )
        assert self._process.stdout is not None
        line = (await asyncio.wait_for(self._process.stdout.readline(), self.start_timeout_s)).decode()
        words = [word for word in line.split() if word.startswith("http://")]
        assert words, f"the server did not start: {self.log.read_text()[-3000:]}"
        self.url = words[0]
        return self

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=90.0)

    async def kill(self) -> None:
        """SIGKILL: no goodbye."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def stop(self) -> int:
        """SIGTERM, as a user's Ctrl-C or a service manager does; answers the exit status."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            await self.kill()
            raise

    async def __aenter__(self) -> Self:
        try:
            return await self.start()
        except BaseException:
            await self.kill()  # nobody else will
            raise

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.stop()
        finally:
            await self.kill()


async def outputs(child: asyncio.subprocess.Process, within_s: float) -> tuple[bytes, bytes]:
    """What a program printed to its end, to both its streams; it is killed where it does not end in time."""
    try:
        async with asyncio.timeout(within_s):
            return await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


def packaged(**changes: Any) -> dict[str, Any]:
    """The packaged configuration as a document, its top-level keys replaced by `changes`.

    With other LLMs the developer's loop is the one that `init` writes for them.
    """
    from ai_agent_server.cli.init import with_loop
    from ai_agent_server.config.settings import packaged_configuration, packaged_debug_loop

    document: dict[str, Any] = json.loads(packaged_configuration())
    if "llms" in changes:
        document["profiles"] = with_loop(document["profiles"], packaged_debug_loop())
    return document | changes


def write_config(folder: Path, **changes: Any) -> Path:
    """The packaged configuration with `changes`, as a file."""
    path = folder / "configuration.json"
    path.write_text(json.dumps(packaged(**changes)))
    return path


def scripted(*replies: Any, delay_s: float = 0.0) -> dict[str, Any]:
    """`llms` of a configuration: one scripted LLM."""
    return {"scripted": {**SCRIPT, "options": {"replies": list(replies), "delay_s": delay_s}}}
