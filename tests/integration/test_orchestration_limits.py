"""The same adversaries in the real engine: agents, an LLM and outsiders that mean no good, many at once."""

import asyncio
import random
from collections.abc import AsyncGenerator
from datetime import UTC, datetime

import msgspec
import uuid_utils

from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome, RoleSpec
from ai_agent_server.cluster.alone import Alone
from ai_agent_server.config import settings as configuration
from ai_agent_server.core.chat import ChatDelta, ChatRequest, ChatUsage, message
from ai_agent_server.core.exchange import SLACK_PIECES
from ai_agent_server.core.orchestration_engine import OrchestrationEngine, Profile, Role
from ai_agent_server.core.task_packet import Artifact, LimitsDraft, TaskDraft, TaskPacket, TaskStatus
from ai_agent_server.core.workflow import Workflow
from ai_agent_server.errors import InvalidOutputError, InvalidPacketError
from ai_agent_server.llm_engines.base import ModelCard
from ai_agent_server.load_balancer.base import Sent
from ai_agent_server.sandbox._choose import NoSandbox
from ai_agent_server.tasks_state.memory_store import MemoryStore
from tests.adversaries import KINDS, ROLES, Adversary, check, random_workflow

TASKS_A_KIND = 20
PACKAGED = (
    configuration.load(None).profiles["developer"].workflow,
    msgspec.convert(configuration.packaged_debug_loop()["workflow"], Workflow),
)


class Spiteful:
    """An LLM that says as much as it is told to and heeds no bound."""

    async def stream(
        self, request: ChatRequest, *, sent: Sent | None = None
    ) -> AsyncGenerator[ChatDelta, None]:
        assert sent is not None
        sent("m", "local")
        wanted = int(request.messages[0].text.partition(" ")[0])
        assert request.max_tokens is not None
        for _ in range(wanted):
            yield ChatDelta(text="w ", llm="m", model="m", source="local")
        usage = ChatUsage(input_tokens=5, output_tokens=wanted)
        yield ChatDelta(finish_reason="stop", usage=usage)

    async def models(self) -> tuple[ModelCard, ...]:
        return ()

    async def load(self) -> None: ...
    async def unload(self) -> None: ...
    async def aclose(self) -> None: ...


class Adverse:
    """An agent of one of the kinds; its randomness is its task's own."""

    card = AgentCard(name="adverse", description="Means no good.", outcomes=("done",))

    def __init__(self, adversary: Adversary) -> None:
        self._adversary = adversary

    async def run(self, context: AgentContext) -> Outcome:
        turn = len(context.packet.history)
        rng = random.Random(f"{context.packet.payload['seed']} {turn}")
        move = self._adversary(rng, context.spec.role, turn)
        if move.talks:
            text = f"{min(move.output_tokens, 300)} {move.prompt}"
            await context.chat(ChatRequest(messages=(message("user", text),), max_tokens=60))
        if move.outcome in {"invalid", "cut"}:
            raise InvalidOutputError(move.why)
        if move.outcome == "error":
            raise RuntimeError("broken on purpose")
        code = None if move.code is None else move.code[:50_000]
        artifact = None if code is None else Artifact(artifact_id=code[:40], kind="code", content=code)
        return Outcome(verdict=move.outcome, why=move.why[:1_000], artifact=artifact, report=move.report)


async def no_files(path: str) -> bytes:
    raise InvalidPacketError(f"{path} is not allowed")


def profile(kind: str) -> Profile:
    """A profile of such agents, its routes as packaged or as somebody might write who thinks of no end."""
    rng = random.Random(kind)
    roles = {
        name: Role(spec=RoleSpec(profile="developer", role=name), agent=Adverse(KINDS[kind]))
        for name in ROLES
    }
    return Profile(roles=roles, workflow=rng.choice((*PACKAGED, random_workflow(rng))))


async def ended(engine: OrchestrationEngine, kind: str, seed: int) -> TaskPacket:
    """A task run to its end; who is asked something does not answer."""
    draft = TaskDraft(
        payload={"seed": seed},
        profile=kind,
        role=ROLES[seed % len(ROLES)],
        limits=LimitsDraft(calls=8, tokens=600, wall_s=60.0, feedback_hops=4),
    )
    packet, _ = await engine.submit(draft, via="internal")
    packet = await engine.wait(packet.task_id, 60)
    if packet.status is TaskStatus.INPUT_REQUIRED:
        packet = await engine.cancel(packet.task_id)
    return packet


async def test_the_engine_ends_every_task_inside_its_limits_with_its_best_work() -> None:
    profiles = {kind.replace("_", "-"): profile(kind) for kind in KINDS}
    store = MemoryStore()
    await store.open()
    engine = OrchestrationEngine(
        profiles=profiles,
        store=store,
        leases=Alone(),
        llm=Spiteful(),
        sandbox=NoSandbox("none", "none"),
        clock=lambda: datetime.now(UTC),
        new_id=lambda: str(uuid_utils.uuid7()),
        monotonic=asyncio.get_running_loop().time,
        read_file=no_files,
        max_running=8,
    )
    await engine.start()
    try:
        for kind, found in profiles.items():
            packets = await asyncio.gather(*(ended(engine, kind, seed) for seed in range(TASKS_A_KIND)))
            for packet in packets:
                assert packet.status.is_final, (kind, packet.payload)
                check(packet, found.workflow)
                assert packet.usage.tokens <= packet.limits.tokens + SLACK_PIECES
    finally:
        await engine.aclose()
        await store.aclose()
    assert (engine.status().live, engine.status().running) == (0, 0)
