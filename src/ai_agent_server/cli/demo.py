"""`demo`: a real task on a server of its own, shown step by step."""

import asyncio
import contextlib
import os
import re
import shlex
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from ai_agent_server.cli import ENV_FILE, Exit, view
from ai_agent_server.cli.options import AsJSON, caller, console, print_json
from ai_agent_server.cli.tasks import follow
from ai_agent_server.client import Client, Fetched
from ai_agent_server.config.settings import environment
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.task_packet import Reason, TaskDraft, TaskPacket, TaskStatus
from ai_agent_server.errors import AgentServerError

__all__ = ("PROFILE", "ROLE", "demo")

PROFILE, ROLE = "developer", "planner"
PAYLOAD: JSONObject = {
    "task": "Write a Python function count_vowels(text) that counts the vowels in a text.",
    "entry_point": "count_vowels",
    # As many as QA takes for enough: the demo shows one version that is accepted.
    "examples": [
        "assert count_vowels('hello') == 2",
        "assert count_vowels('xyz') == 0",
        "assert count_vowels('banana') == 3",
    ],
}
OWN_ENDS: frozenset[Reason] = frozenset(
    {
        "max_debug",
        "no_progress",
        "loop_detected",
        "invalid_output",
        "budget_calls",
        "budget_tokens",
        "budget_wall",
    }
)
READY = re.compile(r"ready at (http://\S+)")
READY_S = 60.0
STOP_S = 30.0
LOG_NAME = "server.log"


class _ServerFailedError(AgentServerError):
    """The demo's server did not start."""


def demo(
    *,
    config: Path | None = None,
    state_dir: Annotated[Path, Parameter(help="Where the demo keeps its tasks and its log.")] = Path(
        "state/demo"
    ),
    as_json: AsJSON = False,
) -> int:
    """Solve a real task on a server of its own, and show how.

    The server is a child process with its own state folder and a free port; it is stopped at the
    end. Exit code 0 when the loop ended by itself, solved or not: the model is tiny.

    Parameters
    ----------
    config
        A configuration.json; by default the packaged one with its embedded model.
    """
    out = console()
    if not as_json:
        _introduce(out)
    try:
        fetched = asyncio.run(_play(None if as_json else out, config, state_dir))
    except asyncio.CancelledError:
        return Exit.INTERRUPTED
    if as_json:
        print_json({"file": fetched.file, "packet": fetched.packet})
    else:
        _conclude(out, fetched, state_dir)
    return Exit.OK if _ended_by_itself(fetched.packet) else Exit.FAILED


async def _play(out: Console | None, config: Path | None, state_dir: Path) -> Fetched:
    playing = asyncio.current_task()
    assert playing is not None
    # Whatever ends the demo ends its server too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, playing.cancel)
    async with _server(config, state_dir) as url, Client(url) as client:
        if out is not None:
            out.print(f"server {url}  log {state_dir / LOG_NAME}", soft_wrap=True)
        sent = await client.submit(
            PROFILE, ROLE, TaskDraft(payload=PAYLOAD), idempotency_key=str(uuid.uuid4())
        )
        return await follow(client, sent.packet.task_id, out, until_asked=True)


@contextlib.asynccontextmanager
async def _server(config: Path | None, state_dir: Path) -> AsyncIterator[str]:
    """A server as a child process, its URL; stopped by SIGTERM, by its id, and waited for."""
    await asyncio.to_thread(state_dir.mkdir, parents=True, exist_ok=True)
    log = state_dir / LOG_NAME
    arguments = ["serve", "--host", "127.0.0.1", "--port", "0", "--state-dir", str(state_dir)]
    if config is not None:
        arguments += ["--config", str(config)]
    # The demo is the same whatever a .env or the shell says for the person's own server.
    kept = {name: value for name, value in environment().items() if not name.startswith("AI_AGENT_SERVER_")}
    kept[ENV_FILE] = os.devnull
    with log.open("wb") as errors:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ai_agent_server", *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=errors, env=kept,
            # Ctrl-C is for the demo, which then stops its server in order.
            start_new_session=True,
        )  # fmt: skip
    try:
        yield await _ready(child, log)
    finally:
        await _stop(child)


async def _ready(child: asyncio.subprocess.Process, log: Path) -> str:
    assert child.stdout is not None
    try:
        async with asyncio.timeout(READY_S):
            line = (await child.stdout.readline()).decode(errors="replace")
    except TimeoutError as exc:
        raise _ServerFailedError(f"the server was not ready within {READY_S:.0f} s; see {log}") from exc
    found = READY.search(line)
    if found is None:
        said = (await asyncio.to_thread(log.read_text, "utf-8", "replace")).strip().splitlines()[-3:]
        raise _ServerFailedError(f"the server did not start; {log} ends with:\n" + "\n".join(said))
    return found[1]


async def _stop(child: asyncio.subprocess.Process) -> None:
    if child.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_S):
            await child.communicate()
    except TimeoutError:
        child.kill()
        await child.communicate()


def _ended_by_itself(packet: TaskPacket) -> bool:
    """Whether the loop came to its end, solved or not; what broke on the way is another thing."""
    return packet.status is TaskStatus.COMPLETED or packet.reason in OWN_ENDS


def _introduce(out: Console) -> None:
    pretty = msgspec.json.format(msgspec.json.encode({"payload": PAYLOAD}), indent=2).decode()
    out.print(f"POST /api/v1/{PROFILE}/{ROLE}")
    out.print(view.highlighted(pretty, "json"), soft_wrap=True)


def _conclude(out: Console, fetched: Fetched, state_dir: Path) -> None:
    out.print(view.result(fetched), soft_wrap=True)
    out.print()
    if not _ended_by_itself(fetched.packet):
        out.print("This is not how it should end; ai-agent-server doctor says more.", style="red")
    elif fetched.packet.status is not TaskStatus.COMPLETED:
        out.print(
            "The loop ended by itself without a solution: the embedded model has 135 million parameters. "
            "This is the best it made.",
            style="yellow",
            soft_wrap=True,
        )
    command = caller(None).command()
    steps = [
        (f"{command} serve --state-dir {shlex.quote(str(state_dir))}", "the same server, on port 3160"),
        (f'{command} run "..." -e "assert f(1) == 2"', "your own task, in another terminal"),
        (f"{command} init", "use the models that this machine has"),
    ]
    if fetched.file:
        steps.insert(0, (f"less {shlex.quote(fetched.file)}", "everything that happened, and why"))
    out.print("Try next")
    for step, what in steps:
        out.print(Text(f"  {step}").append(f"   {what}", style="dim"), soft_wrap=True)
