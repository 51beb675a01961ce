"""Orchestration: tasks a second through planner, coder, qa (fail), debug, qa (pass), every step durable.

The LLM is the scripted engine, which answers at once, behind the load balancer; task files are on a
real disk, each step fsynced before it is told (one fsync for all that wait). The peer is LangGraph
with its SQLite saver, in the same run, by turns: as it comes, where the next step does not wait until
the last one is on the disk, and with `durability="sync"`, where it does, as ours always. Its saver
fsyncs the write-ahead log at each commit in both. A figure is the middle one of all rounds; a ratio is
the middle one of the ratios within a round, whose runs had the same disk a few seconds apart. `make
bench` makes the peer's environment.

Not within six minutes of another run, or of anything else that removed thousands of files: ext4 gives
no inode out again for so long, and looks over those that it must not give for each file that is made,
0.2 to 0.6 ms instead of 0.01.
"""

import asyncio
import random
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import uuid_utils
import uvloop

from ai_agent_server import log, process
from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome, RoleSpec
from ai_agent_server.assembly import members_for, strategy_for
from ai_agent_server.cluster.alone import Alone
from ai_agent_server.config import settings as configuration
from ai_agent_server.config.settings import LLMSettings, Settings
from ai_agent_server.core.chat import ChatRequest, message
from ai_agent_server.core.orchestration_engine import OrchestrationEngine, Profile, Role
from ai_agent_server.core.task_packet import Artifact, StepFinished, TaskDraft, TaskStatus
from ai_agent_server.core.workflow import Workflow
from ai_agent_server.errors import InvalidPacketError
from ai_agent_server.load_balancer.balanced_engine import BalancedEngine
from ai_agent_server.sandbox.unsafe import Unsafe
from ai_agent_server.tasks_state.json_file_store import JsonFileStore
from bench.figures import Figure, at_least, keep, median

TASKS = 2000
PEER_TASKS = 300
AT_ONCE = 32
ROUNDS = 7
WARM_UP = 16
TEXT = "x" * 200
ROLES = ("planner", "fast-coder", "qa", "debug")
PEER_PACKAGES = (
    "langgraph==1.2.22",
    "langgraph-checkpoint-sqlite==3.1.2",
    "aiosqlite==0.22.1",
    "uvloop==0.23.0",
)
HERE = Path(__file__).parent
WORK = HERE.parent / ".bench"


class Asking:
    """An agent that asks its LLM once; qa fails what was not debugged. No code is run."""

    card = AgentCard(name="asking", description="", outcomes=("done", "pass", "fail"))

    async def run(self, context: AgentContext) -> Outcome:
        """Ask, and take the answer as the work."""
        reply = await context.chat(ChatRequest(messages=(message("user", context.spec.role),)))
        match context.spec.role:
            case "qa":
                made = [e.role for e in context.packet.history if isinstance(e, StepFinished) and e.artifact]
                return Outcome(verdict="pass" if "debug" in made else "fail", output={"text": reply.text})
            case "planner":
                return Outcome(verdict="done", output={"text": reply.text})
            case role:
                artifact = Artifact(artifact_id=f"{role}-1", kind="code", content=reply.text)
                return Outcome(verdict="done", artifact=artifact)


@asynccontextmanager
async def engine(folder: Path) -> AsyncIterator[OrchestrationEngine]:
    """The server's engine, balancer and file store, as `app` puts them together."""
    scripted = LLMSettings(
        engine="local.scripted",
        model="scripted",
        source="local",
        slots=AT_ONCE,
        options={"replies": [TEXT]},
    )
    settings = Settings(llms={"scripted": scripted}, profiles={})
    loop = asyncio.get_running_loop()
    store = JsonFileStore(folder)
    balancer = BalancedEngine(
        members_for(settings, {}, {}),
        strategy=strategy_for(settings),
        settings=settings.balancer,
        clock=loop.time,
        rng=random.Random(0),
    )
    made = OrchestrationEngine(
        profiles={
            "developer": Profile(
                roles={
                    role: Role(spec=RoleSpec(profile="developer", role=role), agent=Asking())
                    for role in (*ROLES, "deep-coder")
                },
                workflow=msgspec.convert(configuration.packaged_debug_loop()["workflow"], Workflow),
            )
        },
        store=store,
        leases=Alone(),
        llm=balancer,
        sandbox=Unsafe(),
        clock=lambda: datetime.now(UTC),
        new_id=lambda: str(uuid_utils.uuid7()),
        monotonic=loop.time,
        read_file=_no_file,
        max_running=AT_ONCE,
    )
    await store.open()
    await made.start()
    try:
        yield made
    finally:
        await made.aclose()
        await balancer.aclose()
        await store.aclose()


async def measure(tasks: int, at_once: int, folder: Path) -> float:
    """Tasks per second, `at_once` of them at the same time, each waited for to its end."""
    async with engine(folder) as made:
        free = asyncio.Semaphore(at_once)

        async def one() -> None:
            draft = TaskDraft(payload={"task": TEXT}, profile="developer", role="planner")
            async with free:
                packet, _ = await made.submit(draft, via="internal")
                ended = await made.wait(packet.task_id, 60.0)
            assert ended.status is TaskStatus.COMPLETED, ended.error
            ran = [event.role for event in ended.history if isinstance(event, StepFinished)]
            assert ran == ["planner", "fast-coder", "qa", "debug", "qa"], ran

        await asyncio.gather(*(one() for _ in range(WARM_UP)))
        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(tasks)))
        return tasks / (time.perf_counter() - started)


def main() -> None:
    """Measure both by turns and print the ratio."""
    peer = _peer_python()
    ours: list[float] = []
    theirs: dict[str, list[float]] = {"async": [], "sync": []}
    state = WORK / "state"
    shutil.rmtree(state, ignore_errors=True)
    try:
        for number in range(ROUNDS):
            command = [sys.executable, "-m", "bench.orchestration"]
            ours.append(_timed(command, TASKS, state / f"ours-{number}"))
            command = [str(peer), str(HERE / "peers" / "langgraph_loop.py")]
            for durability, made in theirs.items():
                folder = state / f"theirs-{durability}-{number}"
                made.append(_timed(command, PEER_TASKS, folder, durability))
    finally:
        # Not between rounds: removing thousands of files may slow the making of the next ones.
        shutil.rmtree(state, ignore_errors=True)
    mine, loose, durable = median(ours), median(theirs["async"]), median(theirs["sync"])
    ahead = {
        durability: [here / there for here, there in zip(ours, made, strict=True)]
        for durability, made in theirs.items()
    }
    print("rounds:", *(f"{each:.2f}" for each in ahead["sync"]))
    keep(
        "orchestration",
        [
            Figure(name="orchestration_tasks_per_s", value=mine, unit="1/s", what="tasks, an fsync per step"),
            Figure(name="orchestration_steps_per_s", value=5 * mine, unit="1/s", what="steps"),
            Figure(
                name="langgraph_tasks_per_s",
                value=loose,
                unit="1/s",
                what="LangGraph with its SQLite saver, steps do not wait for the fsync",
            ),
            Figure(
                name="langgraph_durable_tasks_per_s",
                value=durable,
                unit="1/s",
                what="LangGraph with its SQLite saver, an fsync per step",
            ),
            at_least(
                "orchestration_to_langgraph",
                median(ahead["async"]),
                "x",
                3,
                "times LangGraph's tasks per second",
            ),
            at_least(
                "orchestration_to_durable_langgraph",
                median(ahead["sync"]),
                "x",
                5,
                "times those of a LangGraph as durable",
            ),
        ],
        folder=WORK,
    )


def _timed(command: list[str], tasks: int, folder: Path, *more: str) -> float:
    folder.mkdir(parents=True)
    ran = subprocess.run(
        [*command, str(tasks), str(AT_ONCE), str(folder), *more],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=HERE.parent,
    )
    return float(ran.stdout.split()[-1])


def _peer_python() -> Path:
    """The peer's interpreter, in `.bench/langgraph`; made here when it is not there."""
    home = WORK / "langgraph"
    python = home / "bin" / "python"
    stamp = home / "installed.txt"
    wanted = "\n".join(PEER_PACKAGES)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    WORK.mkdir(exist_ok=True)
    (WORK / ".gitignore").write_text("*\n")
    uv = HERE.parent / ".uv" / "bin" / "uv"
    if uv.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(home)], check=True)
        install = [str(uv), "pip", "install", "--quiet", "--python", str(python)]
    else:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *PEER_PACKAGES], check=True)
    stamp.write_text(wanted)
    return python


async def _no_file(path: str) -> bytes:
    raise InvalidPacketError(f"{path} is not allowed")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        log.configure("warning")
        process.collect_rarely()
        print(uvloop.run(measure(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main()
