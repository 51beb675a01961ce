"""`serve`: the server in the foreground, one line on standard output when it is ready."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import UInt16

from ai_agent_server.config.settings import API_KEY, environment, load
from ai_agent_server.errors import ConfigurationError
from ai_agent_server.loopback import is_loopback

__all__ = ("DEFAULT_HOST", "DEFAULT_PORT", "check_binding", "default_state_dir", "serve")

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 3160


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Where tasks are kept by default, as the XDG Base Directory Specification says."""
    base = environ.get("XDG_STATE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state"
    return root / "ai-agent-server"


def check_binding(host: str, *, has_key: bool) -> None:
    """Refuse to listen beyond this machine without a key. Raises `ConfigurationError`."""
    if has_key or is_loopback(host):
        return
    raise ConfigurationError(
        f"{host} can be reached from other machines, so a key is needed: make one (ai-agent-server keys new "
        f"NAME), or set {API_KEY} (in the environment or in .env), or listen on {DEFAULT_HOST}",
        source="--host",
    )


def _has_key(config: Path | None, state_dir: Path, environ: Mapping[str, str]) -> bool:
    """Whether there is any key that a client could show."""
    if environ.get(API_KEY):
        return True
    from ai_agent_server.gateway.keys import key_ring, keys_path, read_kept  # noqa: PLC0415 - seldom needed

    settings = load(config)
    return len(key_ring(settings, environ, read_kept(keys_path(settings, state_dir)))) > 0


def serve(
    *,
    config: Annotated[Path | None, Parameter(env_var="AI_AGENT_SERVER_CONFIG")] = None,
    host: Annotated[str, Parameter(env_var="AI_AGENT_SERVER_HOST")] = DEFAULT_HOST,
    port: Annotated[UInt16, Parameter(env_var="AI_AGENT_SERVER_PORT")] = DEFAULT_PORT,
    state_dir: Annotated[Path | None, Parameter(env_var="AI_AGENT_SERVER_STATE_DIR")] = None,
) -> int:
    """Run the server until Ctrl-C.

    Prints one line when it is ready; what happens is logged on standard error.

    Parameters
    ----------
    config
        A configuration.json; by default the packaged one, which needs no key and no network.
    host
        The address to listen on. Beyond this machine only where clients have to show a key.
    port
        The port to listen on; 0 takes a free one.
    state_dir
        Where tasks are kept; by default $XDG_STATE_HOME/ai-agent-server or
        ~/.local/state/ai-agent-server.
    """
    environ = environment()
    folder = (state_dir or default_state_dir(environ)).absolute()
    check_binding(host, has_key=is_loopback(host) or _has_key(config, folder, environ))

    def ready(url: str) -> None:
        sys.stdout.write(f"AI-Agent-Server is ready at {url} (state in {folder}; Ctrl-C stops it)\n")
        sys.stdout.flush()

    from ai_agent_server import process  # noqa: PLC0415 - what is refused above is refused at once

    return process.serve(
        config=config.absolute() if config else None, host=host, port=port, state_dir=folder, ready=ready
    )
