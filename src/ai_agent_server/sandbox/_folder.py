"""A run in a folder of the machine's own file system, for the tiers without a mount namespace."""

import asyncio
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

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
    """Run the helper in a folder that it makes and removes. Raises `SandboxError`."""
    program = inner_argv(interpreter, argv)
    temporary = await asyncio.to_thread(tempfile.gettempdir)
    work = str(Path(temporary, f"ai-agent-server-run-{secrets.token_hex(8)}"))
    request = Request(
        argv=program,
        files=files,
        stdin=stdin,
        limits=limits,
        work=work,
        own_folder=True,
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
