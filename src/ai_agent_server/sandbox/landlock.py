"""The second tier, where user namespaces are refused: Landlock, seccomp and rlimits alone."""

import asyncio
import os
from collections.abc import Mapping

from ai_agent_server.errors import SandboxError
from ai_agent_server.sandbox._folder import run_in_folder
from ai_agent_server.sandbox._helper import can_change_user
from ai_agent_server.sandbox._interpreter import Interpreter, find_interpreter
from ai_agent_server.sandbox._probe import probe_by_running
from ai_agent_server.sandbox.base import SandboxLimits, SandboxProbe, SandboxReport

__all__ = ("Landlock",)

_ADVICE = (
    "Landlock needs Linux 5.13 or newer with `landlock` in its LSMs (see /sys/kernel/security/lsm), seccomp "
    "needs x86_64 or aarch64; as root, a system-wide Python that other users can read"
)


class Landlock:
    """No namespaces: the program sees the machine's process numbers and file names, and can open nothing.

    As root the program runs as a user that nobody else is. Otherwise it is the server's user, kept
    apart by Landlock (files, TCP, signals) and seccomp (sockets, other processes, a file's mode).
    """

    def __init__(self) -> None:
        self._interpreter: Interpreter | None = None
        self._finding = asyncio.Lock()

    async def probe(self) -> SandboxProbe:
        """Run a program that tries to look around; it must find nothing."""
        return await probe_by_running(self, tier="landlock", advice=_ADVICE)

    async def run(
        self, files: Mapping[str, str], argv: tuple[str, ...], *, stdin: str = "", limits: SandboxLimits
    ) -> SandboxReport:
        """One run in a fresh folder below the system's temporary one, removed afterwards."""
        as_root = os.geteuid() == 0
        if as_root and not await asyncio.to_thread(can_change_user):
            raise SandboxError("root that cannot become another user has no second tier")
        async with self._finding:
            if self._interpreter is None:
                self._interpreter = await find_interpreter()
        return await run_in_folder(
            self._interpreter,
            files,
            argv,
            stdin=stdin,
            limits=limits,
            drop_user=as_root,
            layers={"landlock": "required", "seccomp": "required"},
            tier="landlock",
        )
