"""An agent's surroundings by hand: a scripted `chat` that keeps what was sent, a packet with history."""

import asyncio
import functools
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import msgspec

from ai_agent_server import agents, discovery
from ai_agent_server.agents.base import Agent, AgentContext, Outcome, RoleSpec
from ai_agent_server.config.settings import Settings, load
from ai_agent_server.core.chat import ChatReply, ChatRequest, FinishReason, JSONObject
from ai_agent_server.core.task_packet import (
    AnyTaskEvent,
    ErrorDetail,
    FeedbackReceived,
    Hop,
    Started,
    StepFinished,
    StepStarted,
    Submitted,
    TaskPacket,
    TestReport,
)
from ai_agent_server.core.transitions import fold
from ai_agent_server.errors import InvalidOutputError, InvalidPacketError
from ai_agent_server.sandbox.base import Sandbox
from ai_agent_server.sandbox.bubblewrap import Bubblewrap

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


class Chat:
    """Answers in turn with `replies`; every request is kept in `sent`."""

    def __init__(self, *replies: str, finish_reason: FinishReason = "stop") -> None:
        self.replies, self.finish_reason = list(replies), finish_reason
        self.sent: list[ChatRequest] = []

    async def __call__(self, request: ChatRequest) -> ChatReply:
        self.sent.append(request)
        await asyncio.sleep(0)
        return ChatReply(text=self.replies.pop(0), finish_reason=self.finish_reason, llm="by hand")

    @property
    def prompt(self) -> str:
        """All text of the last request."""
        return "\n".join(message.text for message in self.sent[-1].messages)


async def no_file(path: str) -> bytes:
    raise InvalidPacketError(f"{path} is not under an allowed folder", pointer="/payload")


@functools.cache
def packaged() -> Settings:
    """The packaged configuration, read once."""
    return load(None)


def spec(profile: str, role: str, **changes: Any) -> RoleSpec:
    """A role as the packaged configuration has it, or one of a user's own that only `changes` say."""
    settings = packaged().profiles[profile].roles.get(role)
    if settings is None:
        return msgspec.structs.replace(RoleSpec(profile=profile, role=role), **changes)
    file = resources.files("ai_agent_server.config") / "prompts" / profile / f"{role}.md"
    found = RoleSpec(
        profile=profile,
        role=role,
        prompt=file.read_text(encoding="utf-8"),
        result_schema=settings.result_schema,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        temperature_again=settings.temperature_again,
        stop=settings.stop,
        options=settings.options,
    )
    return msgspec.structs.replace(found, **changes)


def agent(profile: str, role: str) -> Agent:
    """The agent that the role has by default."""
    kind = f"{profile}.{role.replace('-', '_')}"
    there = discovery.kinds(agents)
    found: Agent = discovery.implementation(agents, kind if kind in there else "prompt")()
    return found


class Task:
    """A task that roles are run on one after the other, by hand."""

    def __init__(self, profile: str, role: str, payload: JSONObject) -> None:
        self.packet = TaskPacket(
            task_id="0199c3d2-0000-7000-8000-000000000001",
            context_id="0199c3d2-0000-7000-8000-000000000002",
            profile=profile,
            role=role,
            payload=payload,
            created_at=NOON,
        )
        self._add(Submitted(at=NOON, via="internal"), Started(at=NOON, generation=1))

    async def run(
        self,
        role: str,
        chat: Chat,
        *,
        attempt: int = 1,
        sandbox: Sandbox | None = None,
        files: dict[str, bytes] | None = None,
        **changes: Any,
    ) -> Outcome:
        """Run `role` and put what it ended as into the history. Raises as the agent does."""

        async def read_file(path: str) -> bytes:
            return files[path] if files and path in files else await no_file(path)

        context = AgentContext(
            packet=self.packet,
            spec=spec(self.packet.profile, role, **changes),
            attempt=attempt,
            chat=chat,
            sandbox=sandbox or Bubblewrap(),
            read_file=read_file,
        )
        try:
            outcome = await agent(self.packet.profile, role).run(context)
        except InvalidOutputError as exc:
            error = ErrorDetail(code="InvalidOutput", message=str(exc))
            self.finish(role, Outcome(verdict="invalid", error=error))
            raise
        self.finish(role, outcome)
        return outcome

    def finish(self, role: str, outcome: Outcome) -> None:
        """Put a step into the history as the engine does."""
        step = 1 + sum(isinstance(event, StepStarted) for event in self.packet.history)
        self._add(
            StepStarted(at=NOON, step=step, role=role, attempt=1, hop=Hop(on="entry", why="by hand")),
            StepFinished(
                at=NOON,
                step=step,
                role=role,
                outcome=outcome.verdict,
                why=outcome.why,
                output=outcome.output,
                artifact=outcome.artifact,
                report=outcome.report,
                error=outcome.error,
            ),
        )

    def feedback(self, role: str, outcome: str, *, why: str = "", failing: Iterable[str] = ()) -> None:
        """An outside agent or a person reports."""
        report = None
        if outcome == "fail":
            report = TestReport(verdict="fail", tier="outside", failing=tuple(failing), detail=why)
        self._add(
            FeedbackReceived(at=NOON, role=role, outcome=outcome, via="internal", why=why, report=report)
        )

    def _add(self, *events: AnyTaskEvent) -> None:
        self.packet = fold(self.packet, events)
