"""The escape suite: small hostile programs, contained on both tiers, and each seen to succeed without.

A probe (escape_probes/*.py) does harm or raises: one that ends with 0 has got what it wanted. Beyond
that the arena looks for evidence: what it planted must be as it was, its sockets silent, its
bystander well, and no process left that carries the arena's token.
"""

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

import ai_agent_server
from ai_agent_server.sandbox import _seccomp
from ai_agent_server.sandbox._inside import remove_tree
from ai_agent_server.sandbox.base import Sandbox, SandboxLimits
from ai_agent_server.sandbox.bubblewrap import Bubblewrap
from ai_agent_server.sandbox.landlock import Landlock

PROBES = Path(__file__).parent / "escape_probes"
NAMES = tuple(sorted(path.stem for path in PROBES.glob("*.py")))
LIMITS = SandboxLimits(cpu_s=2, wall_s=40.0, memory_mb=100, processes=16, file_mb=4, output_kb=16)
SPECIAL_LIMITS = {
    "ignore_termination": msgspec.structs.replace(LIMITS, wall_s=0.5),
    "stop_itself": msgspec.structs.replace(LIMITS, wall_s=0.5),
    "burn_cpu": msgspec.structs.replace(LIMITS, cpu_s=1),
    "burn_cpu_by_many": msgspec.structs.replace(LIMITS, cpu_s=1),
    # processes that share most of their memory are counted in full
    "fork_storm": msgspec.structs.replace(LIMITS, memory_mb=400),
}
VERDICTS = {
    "memory_flood": ("memory",),
    "memory_flood_by_many": ("memory",),
    "output_flood": ("output_limit",),
    "error_flood": ("output_limit",),
    # a mount's size refuses the write, or the watch on the folder ends the program: both are right
    "disk_flood_by_many": ("fail", "output_limit"),
    "disk_flood_deleted": ("fail", "output_limit"),
    "disk_flood_in_depth": ("fail", "output_limit"),
    "inode_flood": ("output_limit",),
    "burn_cpu": ("timeout",),
    "burn_cpu_by_many": ("timeout",),
    "ignore_termination": ("timeout",),
    "stop_itself": ("timeout",),
    # starting a child is nobody's harm; that it stays would be
    "double_fork": ("ok",),
    "daemon_holds_output": ("ok",),
    "chain_of_forks": ("ok",),
    "fork_storm": ("ok", "fail"),
}
HARMLESS_END = {"double_fork", "daemon_holds_output", "chain_of_forks", "fork_storm"}
"""These end with 0 when they are contained, too: what they leave is the evidence."""
NEVER_ENDS = {"ignore_termination", "stop_itself"}
ENDS_S = 60.0
MACHINE_MAY_REFUSE = {
    "read_raw_disk", "write_interpreter", "change_attribute_outside", "make_device", "read_server_memory",
    "trace_bystander", "read_bystander_memory", "mount_file_system", "change_root", "new_user_namespace",
    "clone_user_namespace", "load_bpf", "open_io_uring", "open_userfaultfd", "regain_root", "keep_key",
    "read_through_process_root", "read_through_hard_link",
}  # fmt: skip
"""What needs root or a kernel setting even without a sandbox: the control is skipped where it fails."""


class Arena:
    """What the probes attack: secrets, files, sockets and a bystander, and how they were."""

    def __init__(self, folder: Path, token: str) -> None:
        self.token = token
        self.home, self.outside = folder / "home", folder / "outside"
        for part in (folder, self.home, self.outside):
            part.mkdir(exist_ok=True)
            part.chmod(0o777)
        self.secret = self.home / "secret"
        self.secret.write_text(token)
        self.victim = self.outside / "victim"
        self.victim.write_text("as it was")
        self.victim.chmod(0o666)
        self.other_run = Path(tempfile.mkdtemp(prefix="ai-agent-server-run-"))
        self.other_run.chmod(0o755)
        (self.other_run / "other").write_text("x")
        # inherited by every child that is not told otherwise
        self.descriptor = os.open(self.secret, os.O_RDONLY)
        os.set_inheritable(self.descriptor, True)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix, self.abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.unix_path = f"/tmp/escape-{token}"
        self.unix.bind(self.unix_path)
        self.abstract.bind("\0" + token)
        self.datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.datagram.bind(self.unix_path + "-datagram")
        for path in (self.unix_path, self.unix_path + "-datagram"):
            Path(path).chmod(0o777)
        for listener in (self.unix, self.abstract):
            listener.listen()
        self.sockets = (self.tcp, self.udp, self.unix, self.abstract, self.datagram)
        for endpoint in self.sockets:
            endpoint.setblocking(False)
        self.bystander = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"], start_new_session=True
        )
        self.before = self.state()

    def close(self) -> None:
        for endpoint in self.sockets:
            endpoint.close()
        os.close(self.descriptor)
        with contextlib.suppress(ProcessLookupError):
            self.bystander.kill()
        self.bystander.wait()
        for pid in self.survivors():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        remove_tree(str(self.other_run))
        for path in (self.unix_path, self.unix_path + "-datagram"):
            Path(path).unlink()

    def argument(self, *, bare: bool) -> str:
        column = 0 if os.uname().machine == "x86_64" else 1
        return json.dumps(
            {
                "token": self.token,
                "bare": bare,
                "secret": str(self.secret),
                "beside_secret": str(self.home / "beside"),
                "outside": str(self.outside),
                "victim": str(self.victim),
                "temporary": tempfile.gettempdir(),
                "server_pid": os.getpid(),
                "server_code": str(ai_agent_server.__file__),
                "bystander_pid": self.bystander.pid,
                "tcp": self.tcp.getsockname()[1],
                "udp": self.udp.getsockname()[1],
                "unix": self.unix_path,
                "unix_datagram": self.unix_path + "-datagram",
                "abstract": self.token,
                "calls": {name: numbers[column] for name, numbers in _seccomp.REFUSALS.items()},
            }
        )

    def state(self) -> list[tuple[object, ...]]:
        """Everything planted, as it is now."""
        found: list[tuple[object, ...]] = []
        for path in sorted((*self.home.rglob("*"), *self.outside.rglob("*"))):
            about = path.lstat()
            attributes = tuple(os.listxattr(path, follow_symlinks=False))
            found.append(
                (str(path), about.st_mode, about.st_mtime_ns, about.st_nlink, attributes, path.read_bytes())
            )
        return found

    def survivors(self) -> tuple[int, ...]:
        """Processes that carry the token in their arguments and are not dead."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if self.token.encode() in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return tuple(found)

    def evidence(self) -> list[str]:
        """What harm was done."""
        found = []
        if self.state() != self.before:
            found.append("the planted files changed")
        for endpoint in self.sockets:
            with contextlib.suppress(BlockingIOError):
                if endpoint.type == socket.SOCK_DGRAM:
                    endpoint.recv(100)
                else:
                    endpoint.accept()[0].close()
                found.append(f"somebody spoke to {endpoint.family.name}")
        if self.bystander.poll() is not None:
            found.append("the bystander was killed")
        elif os.getpriority(os.PRIO_PROCESS, self.bystander.pid) != os.getpriority(os.PRIO_PROCESS, 0):
            found.append("the bystander was slowed down")
        elif resource.prlimit(self.bystander.pid, resource.RLIMIT_NOFILE)[0] == 3:
            found.append("the bystander was limited")
        if self.survivors():
            found.append(f"{len(self.survivors())} processes live on")
        return found


@pytest.fixture
def arena(monkeypatch: pytest.MonkeyPatch) -> Iterator[Arena]:
    """A fresh one, open to every user, so that it is the sandbox that keeps a probe out of it."""
    token = uuid.uuid4().hex
    monkeypatch.setenv("ESCAPE_SECRET", token)
    folder = Path(tempfile.mkdtemp(prefix="escape-"))
    made = Arena(folder, token)
    try:
        yield made
    finally:
        made.close()
        remove_tree(str(folder))


@pytest.fixture(params=(Bubblewrap, Landlock), ids=("bubblewrap", "landlock"))
async def sandbox(request: pytest.FixtureRequest) -> AsyncIterator[Sandbox]:
    """Each tier that has to contain."""
    made: Sandbox = request.param()
    probe = await made.probe()
    if not probe.works:
        pytest.skip(f"this machine has no {probe.tier}: {probe.detail}")
    yield made


@pytest.mark.parametrize("name", NAMES)
async def test_a_probe_is_contained(sandbox: Sandbox, arena: Arena, name: str) -> None:
    program = (PROBES / f"{name}.py").read_text()
    report = await sandbox.run(
        {"probe.py": program},
        ("python", "probe.py", arena.argument(bare=False)),
        limits=SPECIAL_LIMITS.get(name, LIMITS),
    )
    assert report.verdict in VERDICTS.get(name, ("fail",)), report
    assert arena.evidence() == []
    assert len(report.stdout) + len(report.stderr) < 3 * LIMITS.output_kb * 1024
    assert report.exit_code != 0 or name in HARMLESS_END


@pytest.mark.parametrize("name", NAMES)
async def test_the_same_probe_does_its_harm_without_a_sandbox(
    arena: Arena, name: str, tmp_path: Path
) -> None:
    """A suite that cannot fail proves nothing. What the probes use is bounded by themselves."""
    (tmp_path / "probe.py").write_text((PROBES / f"{name}.py").read_text())
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "probe.py", arena.argument(bare=True),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        cwd=tmp_path, pass_fds=(arena.descriptor,), start_new_session=True,
    )  # fmt: skip
    if name in NEVER_ENDS:
        await _until_deaf(process.pid)
        process.terminate()  # what stays after a polite word is the evidence
        await asyncio.sleep(0.2)
    else:
        async with asyncio.timeout(ENDS_S):
            await process.wait()
    harm = arena.evidence()
    if process.returncode == 0 and name not in HARMLESS_END:
        harm.append("ended with 0")
    if process.returncode is None:
        process.kill()
        await process.wait()
    if not harm and name in MACHINE_MAY_REFUSE:
        pytest.skip("this machine refuses it by itself")
    assert harm, f"{name} did no harm where nothing stops it (exit code {process.returncode})"


async def _until_deaf(pid: int) -> None:
    """Until the process has stopped itself, or ignores what it can."""
    terminate = 1 << (signal.SIGTERM - 1)
    async with asyncio.timeout(ENDS_S):
        while True:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            about = dict(line.split(":", 1) for line in lines)
            if int(about["SigIgn"], 16) & terminate or about["State"].split()[0] == "T":
                return
            await asyncio.sleep(0.02)
