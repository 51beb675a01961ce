"""Options and habits that the commands share: the server's address, JSON, the console."""

import sys
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from rich.console import Console

from ai_agent_server.cli.serve import DEFAULT_HOST, DEFAULT_PORT
from ai_agent_server.client import Client
from ai_agent_server.config.settings import API_KEY, environment

__all__ = ("AsJSON", "ServerURL", "connect", "console", "print_json")

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


def connect(server: str | None) -> Client:
    """A client of the server that is meant. Use it as `async with`."""
    environ = environment()
    host = environ.get("AI_AGENT_SERVER_HOST") or DEFAULT_HOST
    # Where a server listens on every interface, this machine reaches it on loopback.
    host = {"0.0.0.0": DEFAULT_HOST, "::": "[::1]"}.get(host, host)  # noqa: S104 - not bound here
    port = environ.get("AI_AGENT_SERVER_PORT") or DEFAULT_PORT
    return Client(server or f"http://{host}:{port}", api_key=environ.get(API_KEY) or None)


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
