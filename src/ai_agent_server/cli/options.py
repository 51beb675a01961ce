"""Options and habits that the commands share: the server's address, JSON, the console."""

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from rich.console import Console

from ai_agent_server.cli.caller import Caller
from ai_agent_server.cli.serve import DEFAULT_HOST, DEFAULT_PORT, default_state_dir
from ai_agent_server.client import Client
from ai_agent_server.config.settings import API_KEY, environment

__all__ = (
    "AsJSON",
    "ServerURL",
    "StateDir",
    "address",
    "caller",
    "connect",
    "console",
    "print_json",
    "state_folder",
)

PIPE_WIDTH = 240
"""A table in a pipe is cut by nobody."""

ServerURL = Annotated[
    str | None,
    Parameter(
        name="--server",
        env_var="AI_AGENT_SERVER_URL",
        help=f"The server's URL; by default http://{DEFAULT_HOST}:{DEFAULT_PORT}, or where "
        "AI_AGENT_SERVER_HOST and _PORT point.",
    ),
]
AsJSON = Annotated[bool, Parameter(name="--json", negative=(), help="Print JSON for a program.")]

StateDir = Annotated[
    Path | None,
    Parameter(env_var="AI_AGENT_SERVER_STATE_DIR", help="The server's state folder."),
]


def state_folder(given: Path | None) -> Path:
    """The state folder that is meant."""
    return (given or default_state_dir(environment())).absolute()


def connect(server: str | None) -> Client:
    """A client of the server that is meant. Use it as `async with`."""
    return Client(address(server), api_key=environment().get(API_KEY) or None)


def address(server: str | None) -> str:
    """The URL of the server that is meant."""
    if server:
        return server
    environ = environment()
    host = environ.get("AI_AGENT_SERVER_HOST") or DEFAULT_HOST
    # Where a server listens on every interface, this machine reaches it on loopback.
    host = {"0.0.0.0": DEFAULT_HOST, "::": "[::1]"}.get(host, host)  # noqa: S104 - not bound here
    port = environ.get("AI_AGENT_SERVER_PORT") or DEFAULT_PORT
    return f"http://{host}:{port}"


def caller(server: str | None) -> Caller:
    """How this command was called, so that what is told to do next can be copied."""
    # What a variable says holds for the next command too.
    given = server if server != environment().get("AI_AGENT_SERVER_URL") else None
    return Caller(program=_program(Path(sys.argv[0])), server=given)


def _program(called: Path) -> tuple[str, ...]:
    if called.name == "__main__.py":
        return (sys.executable, "-m", "ai_agent_server")
    if called.suffix == ".py":
        return (sys.executable, str(called))
    on_path = shutil.which(called.name)
    if on_path is not None and Path(on_path).resolve() == called.resolve():
        return (called.name,)
    here = Path.cwd()
    return (str(called.relative_to(here) if called.is_relative_to(here) else called),)


def console() -> Console:
    """Standard output: with colour where it is a terminal, with long lines where it is not."""
    out = Console(highlight=False, markup=False)
    if not out.is_terminal:
        out.width = PIPE_WIDTH
    return out


def print_json(found: Any, *, pretty: bool = True) -> None:
    """Print `found` as JSON: indented, or one line for a stream."""
    encoded = msgspec.json.encode(found)
    sys.stdout.write((msgspec.json.format(encoded, indent=2) if pretty else encoded).decode() + "\n")
    sys.stdout.flush()
