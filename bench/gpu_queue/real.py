"""The same queue on the real embedded engine: two models, room for one, and what memory was predicted."""

import asyncio
import random
from collections.abc import Mapping

import msgspec

from ai_agent_server.config.settings import Accelerator, BalancerSettings, LLMSettings
from ai_agent_server.core.chat import ChatRequest, RouteHints, message
from ai_agent_server.llm_engines.base import EngineSpec, EngineTimeouts, chat
from ai_agent_server.llm_engines.local.llama_cpp_engine import LlamaCppEngine
from ai_agent_server.load_balancer.balanced_engine import BalancedEngine, Member
from ai_agent_server.load_balancer.base import MemoryView
from ai_agent_server.load_balancer.strategies.resident_first import ResidentFirst

MODEL = "SmolLM2-135M-Instruct"
CONTEXTS: Mapping[str, int] = {"short": 512, "long": 2048}
MEMORY_MB = 700
MB = 2**20
PATIENT = EngineTimeouts(first_token_s=600, idle_s=600)


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


async def stays(times: int = 3) -> list[Stay]:
    """Have the two models answer in turn, each `times` times; every answer needs a swap."""
    engines = {
        name: LlamaCppEngine(
            EngineSpec(name=name, model=MODEL, context_tokens=context, timeouts=PATIENT),
            LlamaCppEngine.Options(threads=1),
        )
        for name, context in CONTEXTS.items()
    }
    settings = {
        name: LLMSettings(
            engine="local.llama_cpp", model=MODEL, source="local", accelerator="ram", context=context
        )
        for name, context in CONTEXTS.items()
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
                    messages=(message("user", "Say hello."),), route=RouteHints(llm=name), max_tokens=8
                )
                await chat(balanced, asked)
                (card,) = await engine.models()
                took_mb = (card.memory_bytes or 0) / MB
                found.append(Stay(llm=name, number=number, predicted_mb=predicted_mb, took_mb=took_mb))
    finally:
        await balanced.aclose()
    return found


def _booked(balanced: BalancedEngine, name: str) -> MemoryView:
    (view,) = balanced.accelerators()
    return next(each for each in view.llms if each.llm == name)


def table(found: list[Stay]) -> str:
    """The stays as Markdown."""
    lines = ["| model | stay | predicted MB | took MB | error |", "|---|--:|--:|--:|--:|"]
    lines += [
        f"| {each.llm}, {CONTEXTS[each.llm]} tokens | {each.number} | {each.predicted_mb:.0f} "
        f"| {each.took_mb:.0f} | {100 * each.error:.1f} % |"
        for each in found
    ]
    return "\n".join(lines)
