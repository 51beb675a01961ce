"""The probe: a program that looks for what it must not find, run inside before anything is trusted."""

import os
import socket
from collections.abc import Mapping
from typing import Protocol

import msgspec

from ai_agent_server.errors import SandboxError
from ai_agent_server.sandbox.base import SandboxLimits, SandboxProbe, SandboxReport, Tier

LIMITS = SandboxLimits(cpu_s=5, wall_s=15.0, memory_mb=512, processes=16, file_mb=4, output_kb=16)

_LOOK_AROUND = """
import json, os, socket, sys
found = []
for path in ('/etc/passwd', '/root', '/home', '/proc/1/environ', '/proc/%s/status'):
    try:
        with open(path) as file:
            file.read(1)
        found.append(path)
    except IsADirectoryError:
        try:
            os.listdir(path)
            found.append(path)
        except OSError:
            pass
    except OSError:
        pass
try:
    socket.create_connection(('127.0.0.1', %d), 2).close()
    found.append('network')
except OSError:
    pass
for path in ('/tmp/../escaped', '/escaped', '/usr/escaped'):
    try:
        open(path, 'w').close()
        os.unlink(path)
        found.append('writes ' + path)
    except OSError:
        pass
with open('made', 'w') as file:
    file.write('x')
print(json.dumps([os.environ.get('SANDBOX_LAYERS', ''), found]))
"""


class _Runner(Protocol):
    async def run(
        self, files: Mapping[str, str], argv: tuple[str, ...], *, stdin: str = "", limits: SandboxLimits
    ) -> SandboxReport: ...


async def probe_by_running(
    sandbox: _Runner, *, tier: Tier, advice: str, must_contain: bool = True
) -> SandboxProbe:
    """Run a program that tries the network and files outside; what it says decides."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        try:
            report = await sandbox.run(
                {"probe.py": _LOOK_AROUND % (os.getpid(), port)}, ("python", "probe.py"), limits=LIMITS
            )
        except SandboxError as exc:
            return SandboxProbe(tier=tier, works=False, detail=str(exc), advice=advice)
    if report.verdict != "ok":
        detail = f"{report.verdict}: {report.detail} {report.stderr[-300:]}".strip()
        return SandboxProbe(tier=tier, works=False, detail=detail, advice=advice)
    layers, found = msgspec.json.decode(report.stdout, type=tuple[str, list[str]])
    if must_contain and found:
        return SandboxProbe(
            tier=tier, works=False, detail=f"not contained: {', '.join(found)}", advice=advice
        )
    return SandboxProbe(tier=tier, works=True, detail=layers)
