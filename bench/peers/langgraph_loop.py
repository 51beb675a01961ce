"""The peer: the same five steps as a LangGraph graph that checkpoints into SQLite.

Runs in an environment of its own (see `bench.orchestration`), so nothing of ours is imported.
`python langgraph_loop.py TASKS AT_ONCE FOLDER DURABILITY` prints the tasks per second. With `async`, its
default, the next step does not wait until the last one's checkpoint is on the disk; with `sync` it does.
SQLite is as the saver sets it up: a write-ahead log, which each commit fsyncs (`synchronous` is FULL).
"""

import asyncio
import operator
import sys
import time
from pathlib import Path
from typing import Annotated, Any, TypedDict

import uvloop
from langgraph.checkpoint.sqlite.aio import (  # type: ignore[import-not-found]  # only in the peer's venv
    AsyncSqliteSaver,
)
from langgraph.graph import (  # type: ignore[import-not-found]  # only in the peer's venv
    END,
    START,
    StateGraph,
)

TEXT = "x" * 200
WARM_UP = 16
FULL = 2


class Loop(TypedDict):
    """What a run carries from step to step."""

    task: str
    done: Annotated[list[dict[str, str]], operator.add]
    verdicts: int


def step(role: str) -> Any:
    async def node(_state: Loop) -> dict[str, Any]:
        return {"done": [{"role": role, "text": TEXT}]}

    return node


async def qa(state: Loop) -> dict[str, Any]:
    return {"done": [{"role": "qa", "text": TEXT}], "verdicts": state["verdicts"] + 1}


def after_qa(state: Loop) -> str:
    return "debug" if state["verdicts"] == 1 else str(END)


def graph() -> Any:
    steps = StateGraph(Loop)
    for role in ("planner", "coder", "debug"):
        steps.add_node(role, step(role))
    steps.add_node("qa", qa)
    steps.add_edge(START, "planner")
    steps.add_edge("planner", "coder")
    steps.add_edge("coder", "qa")
    steps.add_conditional_edges("qa", after_qa)
    steps.add_edge("debug", "qa")
    return steps


async def measure(tasks: int, at_once: int, folder: Path, durability: str) -> float:
    async with AsyncSqliteSaver.from_conn_string(str(folder / "checkpoints.sqlite")) as saver:
        app = graph().compile(checkpointer=saver)
        free = asyncio.Semaphore(at_once)

        async def one(name: str) -> None:
            async with free:
                ended = await app.ainvoke(
                    {"task": name, "done": [], "verdicts": 0},
                    {"configurable": {"thread_id": name}},
                    durability=durability,
                )
            assert [entry["role"] for entry in ended["done"]] == ["planner", "coder", "qa", "debug", "qa"]

        await asyncio.gather(*(one(f"warm-{number}") for number in range(WARM_UP)))
        async with saver.conn.execute("PRAGMA synchronous") as synchronous:
            assert await synchronous.fetchone() == (FULL,)
        started = time.perf_counter()
        await asyncio.gather(*(one(f"task-{number}") for number in range(tasks)))
        return tasks / (time.perf_counter() - started)


if __name__ == "__main__":
    print(uvloop.run(measure(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])))
