"""Start: time until the server is ready, with and without a model, and the memory it takes."""

import shutil
import time
from pathlib import Path

import httpx
import msgspec
import psutil

from ai_agent_server.core.task_packet import StepFinished, TaskPacket
from bench.figures import Figure, at_most, keep, median
from bench.server import Running, serving, without_model

ROUNDS = 5
WORK = Path(__file__).parent.parent / ".bench"
MB = 1024 * 1024


def main() -> None:
    """Start it a few times each way; the middle ones count."""
    folder = WORK / "startup"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        figures = [*_without_model(folder), *_with_model(folder)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    keep("startup", figures, folder=WORK)


def _without_model(folder: Path) -> list[Figure]:
    config = without_model(folder)
    ready_s: list[float] = []
    memory_mb: list[float] = []
    for number in range(ROUNDS):
        with serving(folder / f"without-{number}", config) as server:
            ready_s.append(server.ready_s)
            memory_mb.append(_memory_mb(server))
    return [
        at_most("ready_without_model_s", median(ready_s), "s", 2, "from start to a healthy answer, no model"),
        at_most(
            "memory_without_model_mb",
            median(memory_mb),
            "MB",
            150,
            "resident, the server and its nats-server",
        ),
    ]


def _with_model(folder: Path) -> list[Figure]:
    ready_s: list[float] = []
    first_token_s: list[float] = []
    memory_mb: list[float] = []
    model_mb: list[float] = []
    for number in range(ROUNDS):
        with serving(folder / f"with-{number}") as server:
            ready_s.append(server.ready_s)
            first_token_s.append(_first_token_s(server))
            memory_mb.append(_memory_mb(server))
            model_mb.append(_model_mb(server))
    return [
        Figure(
            name="ready_embedded_s",
            value=median(ready_s),
            unit="s",
            what="the same with the embedded model configured",
        ),
        at_most(
            "first_token_embedded_s",
            median(first_token_s),
            "s",
            4,
            "from start to the first token of a task: model loaded, prompt read",
        ),
        at_most(
            "memory_embedded_mb",
            median(memory_mb),
            "MB",
            150,
            "resident after a task, the model's own process apart",
        ),
        Figure(name="model_memory_mb", value=median(model_mb), unit="MB", what="the model's own process"),
    ]


def _first_token_s(server: Running) -> float:
    """Seconds from the start of the process to the first token of a task that is sent at once."""
    asked = time.perf_counter()
    answer = httpx.post(
        f"{server.url}/api/v1/productivity/summarize",
        params={"wait": 60},
        json={"payload": {"text": "The server was started a moment ago and has its first task."}},
        timeout=90,
    )
    answer.raise_for_status()
    packet = msgspec.json.decode(answer.content, type=TaskPacket)
    call = next(event.call for event in packet.history if isinstance(event, StepFinished))
    assert call is not None, packet.error
    return asked - server.started + call.time_to_first_token_ms / 1000


def _memory_mb(server: Running) -> float:
    return sum(_rss_mb(pid) for pid in (server.pid, *server.children()) if not _is_model(pid))


def _model_mb(server: Running) -> float:
    return sum(_rss_mb(pid) for pid in server.children() if _is_model(pid))


def _is_model(pid: int) -> bool:
    return any("_llama_child" in word for word in psutil.Process(pid).cmdline())


def _rss_mb(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / MB


if __name__ == "__main__":
    main()
