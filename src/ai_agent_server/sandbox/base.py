"""The sandbox port: runs a program that nobody trusts and says what became of it."""

from collections.abc import Mapping
from typing import Annotated, Literal, Protocol

import msgspec

Verdict = Literal["ok", "fail", "timeout", "memory", "signal", "output_limit", "sandbox_error"]
Tier = Literal["bubblewrap", "landlock", "unsafe", "none"]


class SandboxLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one run may use."""

    cpu_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = 10
    wall_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 20.0
    memory_mb: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] = 1024
    processes: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 64
    file_mb: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 16
    output_kb: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 64


class SandboxReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one run. `stdout` and `stderr` are cut in the middle past the limit."""

    verdict: Verdict
    tier: Tier
    exit_code: int | None = None
    signal: int | None = None
    stdout: str = ""
    stderr: str = ""
    cpu_ms: float = 0.0
    wall_ms: float = 0.0
    memory_peak_kb: int = 0
    detail: str = ""


class SandboxProbe(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the sandbox works here, found by running it."""

    tier: Tier
    works: bool
    detail: str = ""
    advice: str = ""


class Sandbox(Protocol):
    """Runs programs for QA.

    Promises, tested on every implementation by tests/conformance/test_sandbox.py: what runs inside
    sees no file outside its work folder but a read-only interpreter, no network, no environment of
    the server; the whole process tree is dead when `run` returns or is cancelled; a verdict is
    always given.
    """

    async def probe(self) -> SandboxProbe:
        """Run a trivial program inside and say whether it was contained."""
        ...

    async def run(
        self, files: Mapping[str, str], argv: tuple[str, ...], *, stdin: str = "", limits: SandboxLimits
    ) -> SandboxReport:
        """Put `files` (relative path -> text) in a fresh work folder and run `argv` there.

        `argv[0]` is `python` for the interpreter inside. Raises `SandboxError` only when the sandbox
        itself cannot be started.
        """
        ...
