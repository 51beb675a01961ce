"""What every sandbox promises, on every implementation that is found, and on none where none works."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from ai_agent_server import sandbox as package
from ai_agent_server.discovery import implementation, kinds
from ai_agent_server.errors import SandboxError
from ai_agent_server.sandbox._choose import choose_sandbox
from ai_agent_server.sandbox.base import Sandbox, SandboxLimits
from tests.waiting import until

TIERS = tuple(kind for kind in kinds(package) if kind != "python_suite")
LIMITS = SandboxLimits(cpu_s=5, wall_s=20.0, memory_mb=200, processes=16, file_mb=4, output_kb=16)


@pytest.fixture(params=TIERS)
async def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """Each tier that works on this machine."""
    make: Callable[[], Sandbox] = implementation(package, request.param)
    made = make()
    probe = await made.probe()
    if not probe.works:
        pytest.skip(f"this machine has no {probe.tier}: {probe.detail}")
    return made


def processes_with(token: str) -> tuple[int, ...]:
    """Processes that carry the token in their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if token.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return tuple(found)


def work_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("ai-agent-server-run-*"))


async def until_gone(left: set[Path]) -> None:
    """Wait until none of `left` is there. What other tests run at the same time comes and goes by itself."""
    await until(lambda: not any(path.exists() for path in left))


async def test_a_program_runs_and_is_accounted_for(sandbox: Sandbox) -> None:
    report = await sandbox.run(
        {"main.py": "import sys; print('out'); print('err', file=sys.stderr)"},
        ("python", "main.py"),
        limits=LIMITS,
    )
    assert (report.verdict, report.exit_code, report.signal) == ("ok", 0, None)
    assert (report.stdout, report.stderr) == ("out\n", "err\n")
    assert report.cpu_ms > 0
    assert report.wall_ms > 0
    assert report.memory_peak_kb > 1000
    assert report.tier == (await sandbox.probe()).tier


async def test_input_files_and_arguments_arrive(sandbox: Sandbox) -> None:
    text = "é\n" * 100_000
    report = await sandbox.run(
        {"main.py": "import sys; print(len(sys.stdin.read()), open('deep/er/a.txt').read(), sys.argv[1:])",
         "deep/er/a.txt": "naïve"},
        ("python", "main.py", "one", "two words"), stdin=text, limits=LIMITS,
    )  # fmt: skip
    assert report.stdout == f"{len(text)} naïve ['one', 'two words']\n"


async def test_a_program_that_reads_no_input_is_not_waited_for(sandbox: Sandbox) -> None:
    report = await sandbox.run({"a.py": "pass"}, ("python", "a.py"), stdin="x" * 1_000_000, limits=LIMITS)
    assert report.verdict == "ok"


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("raise SystemExit(3)", "fail"),
        ("1 / 0", "fail"),
        ("import time; time.sleep(60)", "timeout"),
        ("while True: pass", "timeout"),
        ("x = bytearray(500_000_000)", "memory"),
        ("import os; os.abort()", "signal"),
        ("import os\nwhile True: os.write(1, b'x' * 10000)", "output_limit"),
        ("import os\nwhile True: os.write(2, b'x' * 10000)", "output_limit"),
    ],
)
async def test_every_end_has_its_verdict(sandbox: Sandbox, program: str, verdict: str) -> None:
    limits = msgspec.structs.replace(LIMITS, wall_s=2.0, cpu_s=1) if verdict == "timeout" else LIMITS
    report = await sandbox.run({"main.py": program}, ("python", "main.py"), limits=limits)
    assert report.verdict == verdict, report


async def test_long_output_keeps_its_head_and_its_tail(sandbox: Sandbox) -> None:
    program = "print('first'); print('x' * 60_000); print('last')"
    report = await sandbox.run({"main.py": program}, ("python", "main.py"), limits=LIMITS)
    assert report.verdict == "ok"
    assert report.stdout.startswith("first\n")
    assert report.stdout.endswith("last\n")
    assert "bytes cut" in report.stdout
    assert len(report.stdout) < 17 * 1024


async def test_the_environment_is_not_the_servers(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    program = "import json, os; print(json.dumps(sorted(os.environ)))"
    report = await sandbox.run({"main.py": program}, ("python", "main.py"), limits=LIMITS)
    assert set(json.loads(report.stdout)) <= {
        "HOME", "LANG", "LC_CTYPE", "LD_LIBRARY_PATH", "PATH", "SANDBOX_LAYERS", "TMPDIR",
    }  # fmt: skip


async def test_modules_beside_the_program_do_not_replace_standard_ones(sandbox: Sandbox) -> None:
    files = {"main.py": "import json; print(json.dumps(1))", "json.py": "raise SystemExit('hijacked')"}
    report = await sandbox.run(files, ("python", "main.py"), limits=LIMITS)
    assert report.stdout == "1\n"


async def test_asyncio_and_threads_work_inside(sandbox: Sandbox) -> None:
    program = (
        "import asyncio, concurrent.futures, tempfile\n"
        "async def main():\n"
        "    loop = asyncio.get_running_loop()\n"
        "    with concurrent.futures.ThreadPoolExecutor(2) as pool:\n"
        "        return await loop.run_in_executor(pool, sum, [1, 2])\n"
        "with tempfile.TemporaryFile() as file:\n"
        "    file.write(b'x')\n"
        "print(asyncio.run(main()))\n"
    )
    report = await sandbox.run({"main.py": program}, ("python", "main.py"), limits=LIMITS)
    assert (report.stdout, report.verdict) == ("3\n", "ok"), report


async def test_a_cancel_kills_the_whole_tree(sandbox: Sandbox) -> None:
    token = uuid.uuid4().hex
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\ntime.sleep(60)\n"
    running = asyncio.ensure_future(
        sandbox.run({"main.py": program}, ("python", "main.py", token), limits=LIMITS)
    )
    await until(lambda: len(processes_with(token)) >= 3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert processes_with(token) == ()


async def test_a_second_cancel_does_not_leave_anything_behind(sandbox: Sandbox) -> None:
    token = uuid.uuid4().hex
    running = asyncio.ensure_future(
        sandbox.run({"a.py": "import time; time.sleep(60)"}, ("python", "a.py", token), limits=LIMITS)
    )
    await until(lambda: bool(processes_with(token)))
    running.cancel()
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert processes_with(token) == ()


async def test_runs_at_the_same_time_are_apart(sandbox: Sandbox) -> None:
    program = (
        "import os, sys\n"
        "open('mine', 'x').write(sys.argv[1])\n"
        "print(open('mine').read(), len(os.listdir('.')))\n"
    )
    reports = await asyncio.gather(
        *(sandbox.run({"main.py": program}, ("python", "main.py", str(n)), limits=LIMITS) for n in range(4))
    )
    assert [report.stdout for report in reports] == [f"{n} 2\n" for n in range(4)]


async def test_nothing_of_the_work_folder_stays(sandbox: Sandbox) -> None:
    before = work_folders()
    program = (
        "import os\n"
        "os.mkdir('closed', 0)\n"
        "os.symlink('/', 'link')\n"
        "for _ in range(1200):\n"
        "    os.mkdir('d')\n"
        "    os.chdir('d')\n"
    )
    report = await sandbox.run({"main.py": program}, ("python", "main.py"), limits=LIMITS)
    assert report.verdict == "ok", report
    await until_gone(work_folders() - before)


@pytest.mark.parametrize("name", ["/etc/evil", "../evil", "a/../../evil", ""])
async def test_a_file_name_that_leaves_the_folder_is_refused(sandbox: Sandbox, name: str) -> None:
    with pytest.raises(SandboxError):
        await sandbox.run({name: "x"}, ("python", "-c", "pass"), limits=LIMITS)


async def test_only_the_interpreter_is_run(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxError):
        await sandbox.run({}, ("/bin/sh", "-c", "true"), limits=LIMITS)


SERVER = """
import asyncio, sys
from ai_agent_server import sandbox
from ai_agent_server.discovery import implementation
from ai_agent_server.sandbox.base import SandboxLimits
program = "import os, time\\nif os.fork() == 0: os.setsid()\\ntime.sleep(60)"
made = implementation(sandbox, sys.argv[1])()
asyncio.run(made.run({"main.py": program}, ("python", "main.py", input()), limits=SandboxLimits(wall_s=60)))
"""


@pytest.mark.parametrize("tier", TIERS)
async def test_a_killed_server_leaves_nothing_running(tier: str) -> None:
    made: Sandbox = implementation(package, tier)()
    if not (await made.probe()).works:
        pytest.skip(f"this machine has no {tier}")
    token = uuid.uuid4().hex
    before = work_folders()
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, tier, stdin=asyncio.subprocess.PIPE
    )
    assert server.stdin is not None
    server.stdin.write(f"{token}\n".encode())
    await until(lambda: len(processes_with(token)) >= 2)
    server.send_signal(signal.SIGKILL)
    await server.wait()
    await until(lambda: not processes_with(token))
    await until_gone(work_folders() - before)


async def test_auto_takes_a_tier_that_contains_and_never_the_unsafe_one() -> None:
    chosen, probe = await choose_sandbox("auto")
    assert probe.tier in {"bubblewrap", "landlock", "none"}
    assert (await chosen.probe()).tier == probe.tier


async def test_where_no_tier_works_nothing_is_run() -> None:
    chosen, probe = await choose_sandbox("no-such-tier")
    assert (probe.tier, probe.works) == ("none", False)
    with pytest.raises(SandboxError):
        await chosen.run({}, ("python", "-c", "pass"), limits=LIMITS)


AS_USER = """
import asyncio, json
from ai_agent_server.sandbox._choose import choose_sandbox
from ai_agent_server.sandbox.base import SandboxLimits
LIMITS = SandboxLimits(cpu_s=2, wall_s=60.0, memory_mb=100, processes=8, file_mb=4, output_kb=16)
BOMB = "import os, time\\nfor _ in range(40):\\n    if os.fork() == 0:\\n        time.sleep(1)"
async def main():
    said = {}
    for tier in ("bubblewrap", "landlock"):
        chosen, probe = await choose_sandbox(tier)
        bomb = await chosen.run({"a.py": BOMB}, ("python", "a.py"), limits=LIMITS) if probe.works else None
        said[tier] = [probe.works, probe.detail, bomb and bomb.verdict]
    print(json.dumps(said))
asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests are this one already")
async def test_an_ordinary_user_has_the_same_tiers_as_root() -> None:
    user = 54321
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-B", "-c", AS_USER,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            user=user, group=user, extra_groups=[], cwd="/", env={"HOME": "/"},
        )  # fmt: skip
    except PermissionError:
        pytest.skip("another user cannot reach this interpreter")
    out, err = await process.communicate()
    if process.returncode != 0 and b"Permission denied" in err:
        pytest.skip("another user cannot read this checkout")
    said = json.loads(out)
    for tier in ("bubblewrap", "landlock"):
        mine = await choose_sandbox(tier)
        assert said[tier][0] == mine[1].works, said
        if said[tier][0]:
            assert said[tier][2] == "fail"
