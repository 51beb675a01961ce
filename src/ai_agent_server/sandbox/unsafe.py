"""No sandbox: rlimits and a killed process tree, nothing more. Only where the configuration says `unsafe`."""

import asyncio
from collections.abc import Mapping

from ai_agent_server.sandbox._folder import run_in_folder
from ai_agent_server.sandbox._interpreter import Interpreter, find_interpreter
from ai_agent_server.sandbox._probe import probe_by_running
from ai_agent_server.sandbox.base import SandboxLimits, SandboxProbe, SandboxReport

__all__ = ("Unsafe",)


class Unsafe:
    """Runs what it is given as the server's own user, with the user's files and network."""

    def __init__(self) -> None:
        self._interpreter: Interpreter | None = None
        self._finding = asyncio.Lock()

    async def probe(self) -> SandboxProbe:
        """Whether programs run at all; nothing is contained."""
        return await probe_by_running(
            self, tier="unsafe", advice="set sandbox.tier to auto", must_contain=False
        )

    async def run(
        self, files: Mapping[str, str], argv: tuple[str, ...], *, stdin: str = "", limits: SandboxLimits
    ) -> SandboxReport:
        """One run in a fresh folder below the system's temporary one, removed afterwards."""
        async with self._finding:
            if self._interpreter is None:
                self._interpreter = await find_interpreter()
        return await run_in_folder(
            self._interpreter,
            files,
            argv,
            stdin=stdin,
            limits=limits,
            drop_user=False,
            layers={},
            tier="unsafe",
        )
