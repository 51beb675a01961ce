"""A run in a folder of the machine's own file system, for the tiers without a mount namespace."""

import asyncio
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ai_agent_server.errors import SandboxError
from ai_agent_server.sandbox._helper import (
    Need,
    Request,
    helper_argv,
    inner_argv,
    inner_environment,
    run_helper,
)
from ai_agent_server.sandbox._inside import remove_tree
from ai_agent_server.sandbox._interpreter import Interpreter
from ai_agent_server.sandbox.base import SandboxLimits, SandboxReport, Tier


async def run_in_folder(
    interpreter: Interpreter,
    files: Mapping[str, str],
    argv: tuple[str, ...],
    *,
    stdin: str,
    limits: SandboxLimits,
    drop_user: bool,
    layers: Mapping[str, Need],
    tier: Tier,
) -> SandboxReport:
    """Make a folder, run the helper there, remove the folder. Raises `SandboxError`."""
    program = inner_argv(interpreter, argv)
    try:
        work = tempfile.mkdtemp(prefix="ai-agent-server-run-")
    except OSError as exc:
        raise SandboxError(f"no work folder: {exc.strerror}") from exc
    request = Request(
        argv=program,
        files=files,
        stdin=stdin,
        limits=limits,
        work=work,
        remove_work=True,
        drop_user=drop_user,
        layers=layers,
        readable=interpreter.readable,
        environment=inner_environment(interpreter),
    )
    try:
        return await run_helper(helper_argv(interpreter), interpreter, request, tier=tier)
    finally:
        # the helper removes it; this is for the helper that did not get so far
        if await asyncio.to_thread(Path(work).exists):
            await asyncio.to_thread(remove_tree, work)
