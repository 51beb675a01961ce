"""The arms: one problem through one call, through one more draw, through the real loop; and its score."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import uuid_utils

from ai_agent_server.agents.base import Agent, AgentContext
from ai_agent_server.assembly import members_for, profiles_for, strategy_for
from ai_agent_server.cluster.alone import Alone
from ai_agent_server.config.settings import Settings
from ai_agent_server.core.chat import ChatDelta, ChatReply, ChatRequest
from ai_agent_server.core.next_step import drafts
from ai_agent_server.core.orchestration_engine import OrchestrationEngine, Profile, Role
from ai_agent_server.core.task_packet import (
    Limits,
    LimitsDraft,
    Reason,
    StepFinished,
    TaskDraft,
    TaskPacket,
    TaskStatus,
)
from ai_agent_server.errors import (
    InvalidOutputError,
    InvalidPacketError,
    InvalidTransitionError,
)
from ai_agent_server.llm_engines.base import LLMEngine, ModelCard, chat
from ai_agent_server.load_balancer.balanced_engine import BalancedEngine
from ai_agent_server.load_balancer.base import Sent
from ai_agent_server.sandbox.base import Sandbox
from ai_agent_server.tasks_state.memory_store import MemoryStore
from bench.lines import RefusedError
from bench.loop_quality.lines import Line, Setup
from bench.loop_quality.problems import Problem
from bench.loop_quality.score import Score
from bench.loop_quality.setup import ENTRY, PROFILE

SEEDS_A_TASK = 1000
"""How far two `--seed`s are apart: more than a task has steps or a problem draws."""
GRACE_S = 30.0
"""To end a task whose time is used up."""
NOT_THE_MODELS_FAULT: frozenset[Reason | None] = frozenset(
    {"llm_unavailable", "sandbox_unavailable", "internal", "poison"}
)


class Seeded:
    """An LLM whose requests get another seed; nothing else about them is changed."""

    def __init__(self, engine: BalancedEngine, shift: int) -> None:
        self._engine, self._shift = engine, shift

    async def stream(
        self, request: ChatRequest, *, sent: Sent | None = None
    ) -> AsyncGenerator[ChatDelta, None]:
        """Answer `request` from its seed on."""
        request = msgspec.structs.replace(request, seed=(request.seed or 0) + self._shift)
        async with aclosing(self._engine.stream(request, sent=sent)) as deltas:
            async for delta in deltas:
                yield delta

    async def models(self) -> tuple[ModelCard, ...]:
        """As the engine has them."""
        return await self._engine.models()

    async def load(self) -> None:
        """Bring the model into memory."""
        await self._engine.load()

    async def unload(self) -> None:
        """Give its memory back."""
        await self._engine.unload()

    async def aclose(self) -> None:
        """Close the engine."""
        await self._engine.aclose()


class Arms:
    """Every arm over the same LLM, agents and sandbox. Made by `running`."""

    def __init__(
        self,
        *,
        setup: Setup,
        profile: Profile,
        engine: OrchestrationEngine,
        llm: LLMEngine,
        sandbox: Sandbox,
        monotonic: Callable[[], float],
    ) -> None:
        self._setup, self._profile = setup, profile
        self._engine, self._llm, self._sandbox = engine, llm, sandbox
        self._monotonic = monotonic
        self._score = Score(sandbox, self._entry.spec.sandbox_limits)

    async def one_call(self, problem: Problem) -> Line:
        """Fast-coder once, exactly as the loop begins."""
        return await self._drawn(problem, 1, self._entry.spec.temperature)

    async def draw(self, problem: Problem, number: int) -> Line:
        """The draw `number` (from 2 on) of best-of-n: the same prompt, another seed, warm."""
        line = await self._drawn(problem, number, self._setup.temperature)
        return msgspec.structs.replace(line, arm="best_of_n", draw=number)

    async def loop(self, problem: Problem) -> Line:
        """A task of the real engine, from fast-coder to its end."""
        limits = self._setup.limits
        draft = TaskDraft(
            payload=problem.payload,
            profile=PROFILE,
            role=ENTRY,
            limits=LimitsDraft(**msgspec.structs.asdict(limits)),
        )
        began = self._monotonic()
        packet, _ = await self._engine.submit(draft, via="internal")
        packet = await self._engine.wait(packet.task_id, limits.wall_s + GRACE_S)
        seconds = self._monotonic() - began
        in_time = packet.status.is_final
        if not in_time:
            with suppress(InvalidTransitionError):
                await self._engine.cancel(packet.task_id)
            packet = await self._engine.read(packet.task_id)
        await self._engine.delete(packet.task_id)
        if packet.reason in NOT_THE_MODELS_FAULT:
            said = packet.error.message if packet.error else ""
            raise RefusedError(f"problem {problem.task_id} ended with {packet.reason}: {said}")
        return await self._judged(problem, packet, seconds, in_time=in_time)

    async def _judged(self, problem: Problem, packet: TaskPacket, seconds: float, *, in_time: bool) -> Line:
        limits, usage = packet.limits, packet.usage
        versions = drafts(packet, self._profile.workflow)
        first = versions[0].artifact.content if versions else ""
        final = (packet.result or {}).get("artifact", {}).get("content", "")
        visible, right = await self._score(problem, final)
        _, first_right = (visible, right) if first == final else await self._score(problem, first)
        return Line(
            problem=problem.task_id,
            arm="loop",
            visible=visible,
            right=right,
            completed=packet.status is TaskStatus.COMPLETED,
            first_right=first_right,
            past_limit=not in_time
            or usage.calls > limits.calls
            or usage.tokens > limits.tokens
            or usage.feedback_hops > limits.feedback_hops
            or seconds > limits.wall_s + GRACE_S,
            calls=usage.calls,
            tokens=usage.tokens,
            seconds=round(seconds, 3),
            ended=packet.reason or str(packet.status),
            path=tuple(f"{e.role}.{e.outcome}" for e in packet.history if isinstance(e, StepFinished)),
            code=final,
        )

    async def _drawn(self, problem: Problem, number: int, temperature: float) -> Line:
        reply: ChatReply | None = None

        async def ask(request: ChatRequest) -> ChatReply:
            nonlocal reply
            reply = await chat(
                self._llm, msgspec.structs.replace(request, seed=number, route=self._entry.hints)
            )
            return reply

        context = AgentContext(
            packet=_packet(problem, self._setup.limits),
            spec=msgspec.structs.replace(self._entry.spec, temperature=temperature),
            attempt=1,
            chat=ask,
            sandbox=self._sandbox,
            read_file=_no_file,
        )
        began = self._monotonic()
        code, ended = "", "answered"
        try:
            async with asyncio.timeout(self._setup.limits.wall_s):
                outcome = await self._agent.run(context)
        except InvalidOutputError:
            ended = "invalid_output"
        except TimeoutError:
            ended = "budget_wall"
        else:
            code = outcome.artifact.content if outcome.artifact else ""
        seconds = self._monotonic() - began
        visible, right = await self._score(problem, code)
        return Line(
            problem=problem.task_id,
            arm="one_call",
            visible=visible,
            right=right,
            calls=1,
            tokens=reply.usage.input_tokens + reply.usage.output_tokens if reply else 0,
            seconds=round(seconds, 3),
            ended=ended,
            code=code,
        )

    @property
    def _entry(self) -> Role:
        return self._profile.roles[ENTRY]

    @property
    def _agent(self) -> Agent:
        agent = self._entry.agent
        if agent is None:
            raise RefusedError(f"{PROFILE}/{ENTRY} is filled by an outside agent")
        return agent


@asynccontextmanager
async def running(
    *,
    setup: Setup,
    settings: Settings,
    folder: Path | None,
    sandbox: Sandbox,
    environ: Mapping[str, str],
    at_once: int = 1,
) -> AsyncIterator[Arms]:
    """The engine, the balancer and the agents, put together as the server does, with the model loaded."""
    monotonic = asyncio.get_running_loop().time
    profiles = profiles_for(settings, folder)
    store = MemoryStore()
    balancer = BalancedEngine(
        members_for(settings, {}, environ),
        strategy=strategy_for(settings),
        settings=settings.balancer,
        clock=monotonic,
        rng=random.Random(setup.seed),
    )
    llm = Seeded(balancer, setup.seed * SEEDS_A_TASK)
    engine = OrchestrationEngine(
        profiles=profiles,
        store=store,
        leases=Alone(),
        llm=llm,
        sandbox=sandbox,
        clock=lambda: datetime.now(UTC),
        new_id=lambda: str(uuid_utils.uuid7()),
        monotonic=monotonic,
        read_file=_no_file,
        max_running=at_once,
    )
    try:
        await balancer.load(setup.llm)
        await engine.start()
        yield Arms(
            setup=setup,
            profile=profiles[PROFILE],
            engine=engine,
            llm=llm,
            sandbox=sandbox,
            monotonic=monotonic,
        )
    finally:
        await engine.aclose()
        await balancer.aclose()


def _packet(problem: Problem, limits: Limits) -> TaskPacket:
    return TaskPacket(
        task_id=str(uuid_utils.uuid7()),
        context_id=str(uuid_utils.uuid7()),
        profile=PROFILE,
        role=ENTRY,
        payload=problem.payload,
        created_at=datetime.now(UTC),
        limits=limits,
    )


async def _no_file(path: str) -> bytes:
    raise InvalidPacketError(f"{path} is not allowed")
