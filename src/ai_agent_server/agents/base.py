"""The agent port: one role's work on one task, at most one exchange with an LLM a step."""

from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from ai_agent_server.core.chat import ChatReply, ChatRequest, JSONObject
from ai_agent_server.core.task_packet import Artifact, ErrorDetail, TaskPacket, TestReport
from ai_agent_server.sandbox.base import Sandbox, SandboxLimits


class AgentCard(msgspec.Struct, frozen=True, kw_only=True):
    """An agent described by itself. `outcomes` are the words that its steps may end with."""

    name: str
    description: str
    outcomes: tuple[str, ...]
    needs_llm: bool = True
    skills: tuple[str, ...] = ()


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a step ended. `verdict` is one of the card's outcomes; the routes look it up."""

    verdict: str
    why: str = ""
    output: JSONObject | None = None
    artifact: Artifact | None = None
    report: TestReport | None = None
    error: ErrorDetail | None = None


class RoleSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A role as configured: what its agent is given beside the task."""

    profile: str
    role: str
    prompt: str = ""
    """The text of the prompt file; `$name` is replaced."""
    result_schema: JSONObject | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    temperature_again: float | None = None
    """Of the role's later answers in the same task; None: as the first."""
    stop: tuple[str, ...] = ()
    """An answer ends before any of these."""
    options: JSONObject = msgspec.field(default_factory=dict)
    sandbox_limits: SandboxLimits = SandboxLimits()
    """What one run of model-written code may use, as `sandbox.limits` says."""


class AgentContext(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent may use during a step.

    `chat` may be awaited once: it routes, counts and journals. `attempt` is 1 on the first try of
    this role since its input changed and rises with each invalid output.
    """

    packet: TaskPacket
    spec: RoleSpec
    attempt: int
    chat: Callable[[ChatRequest], Awaitable[ChatReply]]
    sandbox: Sandbox
    read_file: Callable[[str], Awaitable[bytes]]
    """Reads a file under the allowed folders; raises `InvalidPacketError` for any other."""


class Agent(Protocol):
    """One role's work.

    Promises, tested on every implementation by tests/conformance/test_agent.py: ends in exactly one
    outcome out of its card; at most one call of `chat`; cancelling it leaves nothing running.
    """

    @property
    def card(self) -> AgentCard:
        """Who this is."""
        ...

    async def run(self, context: AgentContext) -> Outcome:
        """Do the step. Raises `InvalidOutputError` when the LLM's answer cannot be used."""
        ...
