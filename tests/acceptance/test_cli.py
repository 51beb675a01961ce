"""The command line as a user runs it: processes, a real server, exit codes, pipes."""

import asyncio
import errno
import json
import os
import pty
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from ai_agent_server.config import settings
from ai_agent_server.probes import lock_holder
from tests.servers.process import ServerProcess, scripted, write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

END_S = 100.0
FOR_EVER_S = 600.0
"""Longer than any test: what takes so long is still under way when it is looked at."""
RIGHT = "```python\ndef add(a, b):\n    return a + b\n```"
WRONG = "```python\ndef add(a, b):\n    return a - b\n```"
REPLIES = (
    {"when": "You plan code", "say": [{"plan": ["add them"]}]},
    {"when": "You test python", "say": ["assert add(2, 2) == 4\nassert add(0, 5) == 5"]},
    {"when": "whole corrected code", "say": [RIGHT]},
    {"when": "Answer with one block", "say": [WRONG]},
)
ADD = ("Add two numbers.", "--entry-point", "add", "-e", "assert add(1, 2) == 3")


class Ran(NamedTuple):
    code: int
    out: str
    errors: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


async def cli(*arguments: str, cwd: Path, given: str = "", **environ: str) -> Ran:
    """`ai-agent-server ARGUMENTS` with nothing of this shell's own settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AI_AGENT_SERVER_")}
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ai_agent_server", *arguments,
        cwd=cwd, env={**kept, **environ},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(END_S):
            out, errors = await child.communicate(given.encode())
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert child.returncode is not None
    return Ran(child.returncode, out.decode(), errors.decode())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("cli")
    config = write_config(folder, llms=scripted(*REPLIES), messaging={"enabled": False})
    async with ServerProcess(folder / "state", config) as running:
        yield running


@pytest.fixture
def at(server: ServerProcess) -> dict[str, str]:
    return {"AI_AGENT_SERVER_URL": server.url}


async def test_run_shows_each_step_its_llm_its_verdict_and_the_code(
    server: ServerProcess, at: dict[str, str], tmp_path: Path
) -> None:
    ran = await cli("run", *ADD, cwd=tmp_path, **at)
    assert ran.code == 0, ran
    lines = ran.out.splitlines()
    told = iter(lines)
    for part in (
        r"^task [0-9a-f-]{36}  developer/planner$",
        r"^ 1 planner  entry: ",
        r"scripted, the only one that may serve .*; \d+ tokens in, \d+ out",
        r"^ 2 fast-coder  planner\.done: ",
        r"^ 3 qa  fast-coder\.done: ",
        r"verdict fail: 0 of 1 examples, .*sandbox (bubblewrap|landlock)",
        r"^ 4 debug  feedback hop, qa\.fail: ",
        r"^ 5 qa  debug\.done: ",
        r"verdict pass: 1 of 1 examples",
        r"^completed$",
        r"^  def add\(a, b\):$",
        r"^      return a \+ b$",
        r"^file /.*\.json$",
        r"^next .*python.* -m ai_agent_server tasks show ",
    ):
        assert any(re.search(part, line) for line in told), f"{part} is not in its place:\n{ran.out}"
    assert "\x1b" not in ran.out
    file = Path(next(line for line in lines if line.startswith("file ")).removeprefix("file "))
    assert json.loads(file.read_bytes())["status"] == "completed"


async def test_run_prints_the_packet_alone_for_a_program(at: dict[str, str], tmp_path: Path) -> None:
    ran = await cli("run", "developer/planner", json.dumps({"task": "Add.", "entry_point": "add"}), "--json",
                    "-s", 'examples=["assert add(1, 2) == 3"]', cwd=tmp_path, **at)  # fmt: skip
    assert (ran.code, ran.json["status"]) == (0, "completed")
    assert ran.json["payload"]["examples"] == ["assert add(1, 2) == 3"]


async def test_a_task_that_fails_is_exit_code_1_with_the_reason(at: dict[str, str], tmp_path: Path) -> None:
    ran = await cli("run", *ADD, "--calls", "1", cwd=tmp_path, **at)
    assert ran.code == 1
    assert "failed (budget_calls)" in ran.out


async def test_submit_watch_and_show_tell_the_same_task(at: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "payload.json").write_text(json.dumps({"task": "Add.", "entry_point": "add"}))
    same = ("submit", "--payload", "payload.json", "-e", "assert add(1, 2) == 3", "--idempotency-key", "k")
    sent, again = [await cli(*same, cwd=tmp_path, **at) for _ in range(2)]
    assert sent.out == again.out
    task_id = sent.out.strip()
    watched = await cli("watch", task_id, "--json", cwd=tmp_path, **at)
    seqs = [event["seq"] for event in map(json.loads, watched.out.splitlines()) if "seq" in event]
    assert seqs == list(range(1, len(seqs) + 1))
    assert (watched.code, len(seqs) > 5) == (0, True)
    shown = await cli("tasks", "show", task_id, cwd=tmp_path, **at)
    assert " 4 debug  feedback hop" in shown.out
    assert "return a + b" in shown.out


async def test_tasks_are_listed_by_page_filtered_and_deleted(at: dict[str, str], tmp_path: Path) -> None:
    ids = [(await cli("submit", *ADD, cwd=tmp_path, **at)).out.strip() for _ in range(2)]
    for task_id in ids:
        await cli("watch", task_id, cwd=tmp_path, **at)
    first = (await cli("tasks", "--limit", "1", "--json", cwd=tmp_path, **at)).json
    second = (
        await cli("tasks", "--limit", "1", "--cursor", first["next_cursor"], "--json", cwd=tmp_path, **at)
    ).json
    assert [page["items"][0]["task_id"] for page in (first, second)] == ids[::-1]
    listed = await cli("tasks", "--status", "completed", cwd=tmp_path, **at)
    assert all(task_id in listed.out for task_id in ids)
    assert (await cli("tasks", "delete", ids[0], cwd=tmp_path, **at)).code == 0
    gone = await cli("tasks", "show", ids[0], cwd=tmp_path, **at)
    assert (gone.code, gone.errors) == (2, "error: no such task [404]\n")


async def test_an_llm_is_switched_off_and_the_choice_says_so(at: dict[str, str], tmp_path: Path) -> None:
    assert (await cli("llms", "off", "scripted", cwd=tmp_path, **at)).code == 0
    try:
        explained = await cli("llms", "explain", "--json", cwd=tmp_path, **at)
        assert (explained.code, explained.json["chosen"]) == (1, None)
        assert "toggle" in explained.json["candidates"][0]["refused_by"]
        why = await cli("llms", "--why", cwd=tmp_path, **at)
        assert "LB-1 toggle it is switched off" in " ".join(why.out.split())
    finally:
        assert (await cli("llms", "on", "scripted", cwd=tmp_path, **at)).code == 0
    listed = (await cli("llms", "--json", cwd=tmp_path, **at)).json
    assert [(card["name"], card["toggle"]) for card in listed["items"]] == [("scripted", True)]
    wrong = await cli("llms", "on", "scriptde", cwd=tmp_path, **at)
    assert (wrong.code, "there are: scripted" in wrong.errors) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run",), "say what is wanted"),
        (("run", "two", "words"), "'two' is not PROFILE/ROLE"),
        (("run", "nobody/planner", "x"), "unknown profile 'nobody'; there are: developer, productivity"),
        (("run", "x", "-s", "typo=1"), "typo"),
        (("tasks", "--status", "done"), "completed"),
        (("serve", "--port", "70000"), "70000"),
        (("serve", "--config", "none.json", "--port", "0"), "none.json: cannot be read"),
        (("serve", "--host", "0.0.0.0", "--port", "0"), "AI_AGENT_SERVER_API_KEY"),
    ],
)
async def test_wrong_usage_is_exit_code_2_and_a_sentence(
    arguments: Sequence[str], said: str, at: dict[str, str], tmp_path: Path
) -> None:
    ran = await cli(*arguments, cwd=tmp_path, **at)
    assert ran.code == 2, ran
    assert said in ran.errors
    assert "Traceback" not in ran.errors


async def test_no_server_is_exit_code_3_and_what_to_do(tmp_path: Path) -> None:
    for arguments in (("run", "x"), ("tasks",), ("llms",), ("watch", "x")):
        ran = await cli(*arguments, cwd=tmp_path, AI_AGENT_SERVER_PORT="9")
        assert (ran.code, ran.out) == (3, "")
        assert ran.errors.startswith("error: no server answers at http://127.0.0.1:9: ")
        assert "ai-agent-server serve" in ran.errors


async def test_help_needs_no_heavy_import(tmp_path: Path) -> None:
    ran = await cli("--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert ran.code == 0
    for command in ("serve", "init", "run", "submit", "watch", "tasks", "keys", "llms", "doctor", "demo"):
        assert f" {command} " in ran.out
    for heavy in ("litestar", "httpx", "openai", "nats", "jsonschema"):
        assert not re.search(rf"\| +{heavy}$", ran.errors, re.MULTILINE), f"--help imports {heavy}"


async def test_serve_reads_its_settings_from_a_dotenv_file_and_says_one_line(
    server: ServerProcess, tmp_path: Path
) -> None:
    assert server.config is not None
    (tmp_path / ".env").write_text(
        f"AI_AGENT_SERVER_CONFIG={server.config}\nAI_AGENT_SERVER_PORT=0\nAI_AGENT_SERVER_STATE_DIR=here\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AI_AGENT_SERVER_")}
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ai_agent_server", "serve",
        cwd=tmp_path, env=kept, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdout is not None
    try:
        async with asyncio.timeout(END_S):
            ready = (await child.stdout.readline()).decode()
            child.send_signal(signal.SIGTERM)
            rest = await child.stdout.read()
            code = await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert re.fullmatch(
        rf"AI-Agent-Server is ready at http://127\.0\.0\.1:\d+ \(state in {tmp_path}/here; .*\)\n", ready
    )
    assert (rest, code) == (b"", 0)
    assert (tmp_path / "here").is_dir()


async def test_a_port_that_is_taken_and_a_folder_in_use_are_said_plainly(
    server: ServerProcess, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = await cli("serve", "--port", str(port), "--state-dir", "s", cwd=tmp_path)
        assert (ran.code, f"cannot listen on 127.0.0.1:{port}" in ran.errors) == (2, True)
    ran = await cli("serve", "--port", "0", "--state-dir", str(server.state_dir), cwd=tmp_path)
    assert (ran.code, str(server.pid) in ran.errors) == (2, True)


async def test_a_pipe_that_closes_early_is_no_error(at: dict[str, str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ai_agent_server", "tasks", "--json",
        cwd=tmp_path, env={**os.environ, **at}, stdout=writing, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    os.close(writing)
    _, errors = await child.communicate()
    assert (child.returncode, errors) == (0, b"")


async def test_ctrl_c_leaves_the_task_running_and_says_how_to_come_back(
    tmp_path: Path,
) -> None:
    config = write_config(
        tmp_path,
        llms=scripted("x", delay_s=FOR_EVER_S),
        messaging={"enabled": False},
        server={"shutdown_s": 0.1},
    )
    async with ServerProcess(tmp_path / "state", config) as slow:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ai_agent_server", "run", "x",
            env={**os.environ, "AI_AGENT_SERVER_URL": slow.url, "PYTHONUNBUFFERED": "1"},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert child.stdout is not None
        async with asyncio.timeout(END_S):
            while b"planner  entry" not in await child.stdout.readline():
                pass
            child.send_signal(signal.SIGINT)
            _, errors = await child.communicate()
        assert child.returncode == 130
        found = re.search(r"the task goes on: .* -m ai_agent_server watch ([0-9a-f-]{36})", errors.decode())
        assert found, errors
        at = {"AI_AGENT_SERVER_URL": slow.url}
        listed = (await cli("tasks", "--json", cwd=tmp_path, **at)).json
        assert [(item["task_id"], item["status"]) for item in listed["items"]] == [(found[1], "working")]
        assert (await cli("tasks", "cancel", found[1], cwd=tmp_path, **at)).code == 0
        assert (await cli("watch", found[1], cwd=tmp_path, **at)).code == 1


def everything_on(terminal: int) -> bytes:
    """What is written to a terminal until its other side is closed."""
    seen = b""
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError as exc:
            assert exc.errno == errno.EIO
            return seen
        seen += piece


async def test_on_a_terminal_the_running_step_is_live(at: dict[str, str], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ai_agent_server", "run", *ADD,
        cwd=tmp_path, env={**os.environ, **at, "TERM": "xterm-256color", "COLUMNS": "100"},
        stdin=asyncio.subprocess.DEVNULL, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    # The longer it takes, the more is drawn: a terminal that nobody reads from is full some time.
    reading = asyncio.create_task(asyncio.to_thread(everything_on, ours))
    try:
        async with asyncio.timeout(END_S):
            assert await child.wait() == 0
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
        seen = (await reading).decode()
        os.close(ours)
    assert "choosing an LLM" in seen
    assert "\x1b[1;32mcompleted" in seen


async def demo_is_gone(state: Path) -> bool:
    """Whether the demo's server has let go of its folder."""
    async with asyncio.timeout(END_S):
        while lock_holder(state / "lock") is not None:
            await asyncio.sleep(0.1)
    return True


async def test_demo_solves_a_task_on_a_server_of_its_own_and_stops_it(
    server: ServerProcess, tmp_path: Path
) -> None:
    # What the person set for a server of his own is not for the demo's.
    (tmp_path / ".env").write_text("AI_AGENT_SERVER_API_KEY=secret\nAI_AGENT_SERVER_PORT=1\n")
    ran = await cli("demo", "--config", str(server.config), cwd=tmp_path)
    assert ran.code == 0, ran
    for part in ("POST /api/v1/developer/planner", " 2 fast-coder", "def add(a, b):", "Try next"):
        assert part in ran.out
    # The script knows another task: the loop ended by itself, and the demo says so.
    assert "without a solution" in ran.out
    (file,) = (tmp_path / "state/demo/tasks_state").rglob("*.json")
    assert f"file {file}" in ran.out
    assert '"server.stopped"' in (tmp_path / "state/demo/server.log").read_text()
    assert await demo_is_gone(tmp_path / "state/demo")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_whatever_ends_the_demo_ends_its_server(number: signal.Signals, tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        llms=scripted("x", delay_s=FOR_EVER_S),
        messaging={"enabled": False},
        server={"shutdown_s": 0.1},
    )
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ai_agent_server", "demo", "--config", str(config),
        cwd=tmp_path, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    async with asyncio.timeout(END_S):
        while b"planner  entry" not in await child.stdout.readline():
            pass
        assert lock_holder(tmp_path / "state/demo/lock") is not None
        child.send_signal(number)
        await child.communicate()
    assert child.returncode == 130
    assert await demo_is_gone(tmp_path / "state/demo")


async def test_doctor_says_of_each_part_how_it_is_and_what_to_do(
    server: ServerProcess, at: dict[str, str], tmp_path: Path
) -> None:
    ran = await cli(
        "doctor", "--config", str(server.config), "--state-dir", str(server.state_dir), "--json",
        cwd=tmp_path, **at,
    )  # fmt: skip
    checks = {check["part"]: check for check in ran.json["checks"]}
    assert ran.code == 0, ran
    for part in (
        "configuration",
        "server",
        "llm scripted",
        "ollama",
        "nats",
        "gpu",
        "sandbox",
        "state folder",
    ):
        assert checks[part]["status"] in {"ok", "warn"}, checks[part]
    assert str(server.pid) in checks["state folder"]["detail"]
    assert checks["sandbox"]["detail"].startswith(("bubblewrap", "landlock"))


async def test_doctor_fails_for_what_is_broken_and_names_the_remedy(tmp_path: Path) -> None:
    llm = {"engine": "local.ollama", "model": "qwen3:8b", "source": "local"}
    api = {"engine": "api.openai", "model": "m", "source": "api", "api_key": {"env": "NO_SUCH_KEY"}}
    config = write_config(
        tmp_path,
        llms={"big": {**llm, "options": {"base_url": "http://127.0.0.1:9"}}, "far": api},
        messaging={"url": "nats://127.0.0.1:9"},
        accelerators={
            "cpu": {"memory_mb": 99_000_000},
            "ram": {"memory_mb": 600, "device": "ram"},
            "far": {"memory_mb": 600, "device": "nvidia:977"},
            "own": {"memory_mb": 600},
        },
    )
    (tmp_path / "file").touch()
    ran = await cli("doctor", "--config", str(config), "--state-dir", "file", "--json", cwd=tmp_path,
                    AI_AGENT_SERVER_PORT="9")  # fmt: skip
    assert ran.code == 1
    failed = {check["part"]: check["advice"] for check in ran.json["checks"] if check["status"] == "fail"}
    assert failed.pop("accelerator cpu").startswith("set its memory_mb to ")
    checks = {check["part"]: check for check in ran.json["checks"]}
    assert "MB free; models may take 600 MB" in checks["accelerator ram"]["detail"]
    assert (checks["accelerator own"]["status"], checks["accelerator far"]["status"]) == ("ok", "warn")
    assert failed == {
        "llm big": "start it, or correct its base_url",
        "llm far": "set NO_SUCH_KEY in the environment or in .env",
        "nats": "start nats-server -js there, or leave messaging.url out to use the embedded one",
        "state folder": "give another with --state-dir",
    }


async def test_doctor_refuses_what_serve_refuses(tmp_path: Path) -> None:
    for wrong, pointer in (
        ({"balancer": {"strategy": "fastest"}}, "/balancer/strategy"),
        ({"store": {"kind": "sql"}}, "/store/kind"),
        ({"accelerators": {"a": {"memory_mb": 600, "device": "tpu"}}}, "/accelerators/a/device"),
    ):
        config = write_config(tmp_path, llms=scripted(*REPLIES), messaging={"enabled": False}, **wrong)
        ran = await cli("doctor", "--config", str(config), "--json", cwd=tmp_path, AI_AGENT_SERVER_PORT="9")
        assert ran.code == 1
        assert ran.json["checks"][0]["status"] == "fail"
        assert pointer in ran.json["checks"][0]["detail"]


async def test_an_error_is_a_problem_document_for_a_program(at: dict[str, str], tmp_path: Path) -> None:
    refused = await cli("run", "nobody/planner", "x", "--json", cwd=tmp_path, **at)
    assert (refused.code, refused.json["status"]) == (2, 404)
    assert "nobody" in refused.json["detail"]
    away = await cli("tasks", "--json", cwd=tmp_path, AI_AGENT_SERVER_PORT="9")
    assert (away.code, away.json["title"]) == (3, "No server answers")


async def test_init_writes_a_configuration_that_loads_and_leaves_one_that_is_there(tmp_path: Path) -> None:
    ran = await cli("init", cwd=tmp_path, OPENAI_API_KEY="sk-secret", OLLAMA_HOST="127.0.0.1:9")
    assert ran.code == 0, ran
    assert "openai (gpt" in ran.out
    written = (tmp_path / "configuration.json").read_text()
    assert "sk-secret" not in written
    assert "openai" in settings.load(tmp_path / "configuration.json").llms
    again = await cli("init", cwd=tmp_path, OLLAMA_HOST="127.0.0.1:9")
    assert (again.code, "--force" in again.errors) == (2, True)
    assert (tmp_path / "configuration.json").read_text() == written


async def test_a_missing_key_is_told_with_its_variable(tmp_path: Path) -> None:
    config = write_config(tmp_path, llms=scripted(*REPLIES), messaging={"enabled": False})
    async with ServerProcess(tmp_path / "state", config, AI_AGENT_SERVER_API_KEY="k") as running:
        ran = await cli("tasks", cwd=tmp_path, AI_AGENT_SERVER_URL=running.url)
    assert ran.code == 2
    assert "set AI_AGENT_SERVER_API_KEY" in ran.errors
