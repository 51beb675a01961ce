"""Which sandbox this machine has: found out by running each tier, best first."""

from collections.abc import Mapping

from ai_agent_server.errors import SandboxError
from ai_agent_server.sandbox.base import Sandbox, SandboxLimits, SandboxProbe, SandboxReport
from ai_agent_server.sandbox.bubblewrap import Bubblewrap
from ai_agent_server.sandbox.landlock import Landlock
from ai_agent_server.sandbox.unsafe import Unsafe

__all__ = ("NoSandbox", "choose_sandbox")


class NoSandbox:
    """What stands in where no tier works: it runs nothing, so that nothing is accepted unchecked."""

    def __init__(self, why: str, advice: str) -> None:
        self._why, self._advice = why, advice

    async def probe(self) -> SandboxProbe:
        """Why nothing works, and what to do about it."""
        return SandboxProbe(tier="none", works=False, detail=self._why, advice=self._advice)

    async def run(
        self,
        files: Mapping[str, str],  # noqa: ARG002 - the port's signature
        argv: tuple[str, ...],
        *,
        stdin: str = "",  # noqa: ARG002 - the port's signature
        limits: SandboxLimits,  # noqa: ARG002 - the port's signature
    ) -> SandboxReport:
        """Always a `SandboxError`."""
        raise SandboxError(f"{argv[:1]} is not run, for no sandbox works here: {self._why}")


async def choose_sandbox(tier: str) -> tuple[Sandbox, SandboxProbe]:
    """The sandbox of `tier`, or with `auto` the first that contains; and what its probe said.

    `unsafe` is only ever taken when it is asked for by name. None works: a `NoSandbox`.
    """
    candidates: dict[str, tuple[Sandbox, ...]] = {
        "auto": (Bubblewrap(), Landlock()),
        "bubblewrap": (Bubblewrap(),),
        "landlock": (Landlock(),),
        "unsafe": (Unsafe(),),
    }
    refused: list[SandboxProbe] = []
    for sandbox in candidates.get(tier, ()):
        probe = await sandbox.probe()
        if probe.works:
            return sandbox, probe
        refused.append(probe)
    none = NoSandbox(
        "; ".join(f"{probe.tier}: {probe.detail}" for probe in refused) or f"there is no tier {tier!r}",
        "; or ".join(probe.advice for probe in refused),
    )
    return none, await none.probe()
