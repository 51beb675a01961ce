"""A program: takes user namespaces and mounts away from itself, as containers do, then uses the sandbox.

Prints one JSON object: what the probes said, and what became of some runs. With arguments it becomes
the server's command instead, `--no-landlock` first for a machine on which no tier works.
"""

import asyncio
import ctypes
import errno
import json
import os
import struct
import sys

from ai_agent_server.sandbox._choose import choose_sandbox
from ai_agent_server.sandbox.base import SandboxLimits
from ai_agent_server.sandbox.python_suite import run_suite

LIMITS = SandboxLimits(cpu_s=2, wall_s=40.0, memory_mb=150, processes=16, file_mb=4, output_kb=16)
NO_NEW_PRIVS, SET_SECCOMP, FILTER_MODE = 38, 22, 2
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
PERMITTED, REFUSED = 0x7FFF0000, 0x00050000
NEW_NAMESPACES = 0x7E020000
LANDLOCK_CREATE_RULESET = 444
NUMBERS = {
    "x86_64": {"unshare": 272, "mount": 165, "setns": 308, "clone": 56, "clone3": 435},
    "aarch64": {"unshare": 97, "mount": 40, "setns": 268, "clone": 220, "clone3": 435},
}


def refuse_namespaces(*, landlock: bool = False) -> None:
    """What Docker's default profile refuses: new namespaces, mounts, and clone3 altogether.

    `landlock`: that too, as by a kernel which does not have it.
    """
    numbers = NUMBERS[os.uname().machine]

    def step(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", operation, if_true, if_false, value)

    code = [step(LOAD, 0)]
    for name in ("unshare", "mount", "setns"):
        code += [step(EQUAL, numbers[name], 0, 1), step(RETURN, REFUSED | errno.EPERM)]
    unknown = [numbers["clone3"], *([LANDLOCK_CREATE_RULESET] if landlock else [])]
    for number in unknown:
        code += [step(EQUAL, number, 0, 1), step(RETURN, REFUSED | errno.ENOSYS)]
    code += [step(EQUAL, numbers["clone"], 0, 3), step(LOAD, 16), step(ANY_BIT, NEW_NAMESPACES, 0, 1)]
    code += [step(RETURN, REFUSED | errno.EPERM), step(RETURN, PERMITTED)]
    text = ctypes.create_string_buffer(b"".join(code))
    header = struct.pack("HL", len(code), ctypes.addressof(text))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(SET_SECCOMP, FILTER_MODE, header, 0, 0):
        raise OSError(ctypes.get_errno(), "the filter was refused")


async def main() -> None:
    """Probe and run."""
    _, tier_1 = await choose_sandbox("bubblewrap")
    chosen, probe = await choose_sandbox("auto")
    secret = await chosen.run({"a.py": f"open({__file__!r})"}, ("python", "a.py"), limits=LIMITS)
    network = await chosen.run({"a.py": "import socket; socket.socket()"}, ("python", "a.py"), limits=LIMITS)
    suite = await run_suite(
        chosen,
        code="def f(x): return x + 1",
        anchors=("assert f(1) == 2",),
        tests=("assert f(2) == 4",),
        limits=LIMITS,
    )
    said = {
        "bubblewrap": [tier_1.works, tier_1.detail, tier_1.advice],
        "auto": [probe.tier, probe.works],
        "runs": [secret.verdict, network.verdict],
        "suite": [suite.tier, suite.verdict, suite.anchors_passed],
    }
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    refuse_namespaces(landlock=arguments[:1] == ["--no-landlock"])
    if arguments:
        command = arguments[arguments[0] == "--no-landlock" :]
        os.execv(sys.executable, [sys.executable, "-m", "ai_agent_server", *command])
    asyncio.run(main())
