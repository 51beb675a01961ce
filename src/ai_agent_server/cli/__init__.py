"""The command line. Each command is a function of a module of this package, imported when it is called."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TextIO

from cyclopts import App
from cyclopts.exceptions import CycloptsError

from ai_agent_server import __version__
from ai_agent_server.errors import (
    AgentServerError,
    ConfigurationError,
    InvalidPacketError,
    ServerRefusedError,
    ServerUnreachableError,
    StoreUnusableError,
)

__all__ = ("ENV_FILE", "Exit", "app", "main", "run")

API_KEY_VARIABLE = "AI_AGENT_SERVER_API_KEY"
ENV_FILE = "AI_AGENT_SERVER_ENV_FILE"
"""The variable that names another file than `.env`."""


class Exit(IntEnum):
    """What the exit code says."""

    OK = 0
    FAILED = 1
    """The task did not complete, or the server broke."""
    USAGE = 2
    """The command, the configuration or the request is wrong; nothing was done."""
    UNREACHABLE = 3
    """No server answers."""
    INPUT_REQUIRED = 4
    """The task waits for an answer."""
    INTERRUPTED = 130


app = App(
    name="ai-agent-server",
    help="Task packets in, agents on local models, every state a JSON file.",
    version=__version__,
    suppress_keyboard_interrupt=False,
    help_epilogue=(
        "Exit codes: 0 done, 1 the task failed, 2 wrong usage or configuration, 3 no server answers, "
        "4 the task waits for an answer. Variables of the same name in ./.env are read too."
    ),
    help_format="plaintext",
)
for _name, _path, _help in (
    ("serve", "serve:serve", "Run the server until Ctrl-C."),
    ("demo", "demo:demo", "Solve a real task on a server of its own, and show how."),
    ("init", "init:init", "Write a configuration.json from what this machine has."),
    ("doctor", "doctor:doctor", "Check engines, NATS, GPU, sandbox and state folder; say what to do."),
    ("run", "tasks:run", "Submit a task, follow it to its end, show the result."),
    ("submit", "tasks:submit", "Submit a task and print its id."),
    ("watch", "tasks:watch", "Follow a task to its end."),
    ("tasks", "tasks:tasks", "List tasks; show, cancel, delete one, or send feedback."),
    ("mcp", "mcp:mcp", "Speak the Model Context Protocol on standard input and output."),
    ("keys", "keys:keys", "List the keys that clients show; make one, revoke one."),
    ("llms", "llms:llms", "List LLMs; switch one on or off; explain a choice."),
):
    app.command(f"ai_agent_server.cli.{_path}", name=_name, help=_help)


def run(arguments: Sequence[str], *, environ: Mapping[str, str], errors: TextIO) -> int:
    """Run one command line and answer its exit code. Anything that went wrong is one sentence on `errors`.

    With --json it is a problem document (RFC 9457) on the standard output too.
    """
    as_json = "--json" in arguments
    try:
        code = app(arguments, exit_on_error=False, result_action="return_value")
    except CycloptsError as exc:
        if as_json:
            sys.stdout.write(_problem(exc) + "\n")
        return Exit.USAGE  # cyclopts has printed it
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except AgentServerError as exc:
        print(f"error: {exc}", file=errors)
        if as_json:
            sys.stdout.write(_problem(exc) + "\n")
        match exc:
            case ServerUnreachableError():
                if "AI_AGENT_SERVER_URL" not in environ:
                    hint = "start one with `ai-agent-server serve`, or name one with --server URL"
                    print(hint, file=errors)
                return Exit.UNREACHABLE
            case ServerRefusedError(status=401):
                print(f"set {API_KEY_VARIABLE} to the server's key, here or in .env", file=errors)
                return Exit.USAGE
            case ServerRefusedError() if exc.status < 500:
                return Exit.USAGE
            case ConfigurationError() | InvalidPacketError() | StoreUnusableError():
                return Exit.USAGE
            case _:
                return Exit.FAILED
    return code if isinstance(code, int) else Exit.OK


def _problem(exc: Exception) -> str:
    told: dict[str, object] = {"type": "about:blank", "title": "The command failed", "detail": str(exc)}
    match exc:
        case ServerRefusedError():
            told |= {"title": exc.title, "status": exc.status, "detail": exc.detail or exc.title}
        case ServerUnreachableError():
            told |= {"title": "No server answers"}
        case ConfigurationError():
            told |= {"title": "The configuration is wrong"}
        case CycloptsError() | InvalidPacketError():
            told |= {"title": "Wrong usage"}
    for name in ("pointer", "choices"):
        if found := getattr(exc, name, None):
            told[name] = found
    return json.dumps(told, ensure_ascii=False)


def main() -> None:
    """The installed command `ai-agent-server`."""
    env_file = Path(os.environ.get(ENV_FILE) or ".env")
    if env_file.is_file():
        from dotenv import load_dotenv  # noqa: PLC0415 - costs 20 ms, and few have a .env

        load_dotenv(env_file, override=False)
    try:
        code = run(sys.argv[1:], environ=os.environ, errors=sys.stderr)
        sys.stdout.flush()
    except BrokenPipeError:
        # `tasks | head` closed its end. Nothing may be flushed to it when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.OK
    sys.exit(code)
