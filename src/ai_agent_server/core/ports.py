"""What the handlers know of the orchestration engine, and what the engine's state looks like."""

from collections.abc import AsyncIterator, Callable
from typing import Literal, Protocol

import msgspec

from ai_agent_server.core.chat import Decision, RouteHints
from ai_agent_server.core.task_packet import (
    AnyTaskEvent,
    FeedbackDraft,
    ForkDraft,
    LLMCall,
    Progress,
    Sender,
    TaskDraft,
    TaskPacket,
    Via,
)
from ai_agent_server.load_balancer.base import AcceleratorView, LLMView, Requirements
from ai_agent_server.tasks_state.base import TaskFilter, TaskPage


class WebhookStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What became of webhooks since the start."""

    pending: int
    """Tasks with messages that are not delivered."""
    delivered: int
    failed: int
    """Attempts."""
    given_up: int
    """Tasks whose messages are not tried any more."""
    disabled_targets: tuple[str, ...] = ()
    """Those that answered 410: they want nothing more until the next start."""


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Load of the orchestration engine now."""

    accepting: bool
    queued: int
    running: int
    live: int
    max_running: int
    max_live: int


Health = Literal["ok", "degraded", "down"]


class Component(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One part of the server as it stands. `advice` says what to do when it is not ok."""

    status: Health
    detail: str = ""
    advice: str = ""


class HealthReport(msgspec.Struct, frozen=True, kw_only=True):
    """The server as a whole: `down` when it cannot take a task, `degraded` when a part is missing."""

    status: Health
    version: str
    components: dict[str, Component] = {}
    """`engines`, `nats`, `store`, `sandbox`, `gpu`."""


class ReloadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a reload of the configuration changed, as JSON pointers into the file."""

    source: str
    changed: tuple[str, ...] = ()


class Balancer(Protocol):
    """The load balancer, as handlers see it."""

    def views(self) -> tuple[LLMView, ...]:
        """Every configured LLM as it stands now."""
        ...

    def accelerators(self) -> tuple[AcceleratorView, ...]:
        """Every accelerator: its memory, its queue, its last decisions."""
        ...

    def explain(self, wanted: Requirements) -> Decision:
        """Which LLM would serve, and why; nothing is called."""
        ...

    async def set_toggle(self, name: str, on: bool) -> None:
        """Switch an LLM on or off, kept over a restart. Raises `UnknownLLMError`."""
        ...


class Grant(Protocol):
    """A call of an LLM that a task may have."""

    @property
    def hints(self) -> RouteHints:
        """What was wanted of the balancer, made as strict as the task's sender is bound."""
        ...

    def charge(self, call: LLMCall | None) -> None:
        """Count what the call took, None: nothing. Once, however it ended."""
        ...

    def withdraw(self) -> None:
        """Count nothing, not even the request: it is made again. `charge` counts nothing then."""
        ...


class Senders(Protocol):
    """Those who send tasks: what the LLM calls of their tasks may use."""

    def admit(self, packet: TaskPacket, hints: RouteHints, *, tokens: int) -> Grant:
        """Let a call of the task in whose prompt and answer come to `tokens` at most.

        Raises `LimitExceededError`, and `ScopeError` for a key that is gone or sends no tasks any more.
        """
        ...


EventListener = Callable[[TaskPacket, tuple[AnyTaskEvent, ...]], None]
"""Called after a durable write with the packet as it became and the events that were new. Must not block."""


class Orchestration(Protocol):
    """The orchestration engine, as REST, NATS and the gateway use it. Errors are those of errors.py."""

    async def submit(
        self,
        draft: TaskDraft,
        *,
        via: Via,
        idempotency_key: str | None = None,
        sender: Sender | None = None,
    ) -> tuple[TaskPacket, bool]:
        """Take a task; `draft.profile` and `draft.role` are set. Answers when its file is safe.

        (packet, False) when it was taken before. Raises `IntakeError` children and `StoreError`s.
        """
        ...

    async def read(self, task_id: str) -> TaskPacket:
        """The task as it is. Raises `TaskNotFoundError`."""
        ...

    async def list(self, where: TaskFilter, *, limit: int, cursor: str | None = None) -> TaskPage:
        """A page of summaries, newest first. Raises `InvalidPacketError` for a cursor that is none."""
        ...

    async def cancel(self, task_id: str) -> TaskPacket:
        """End it now; answers the canceled packet. An ended task is an `InvalidTransitionError`."""
        ...

    async def fork(
        self,
        task_id: str,
        draft: ForkDraft,
        *,
        via: Via,
        idempotency_key: str | None = None,
        sender: Sender | None = None,
    ) -> tuple[TaskPacket, bool]:
        """Take a new task that goes on after a step of an ended one; a live one is a `TaskLiveError`.

        Answers and raises like `submit`, and `TaskNotFoundError`.
        """
        ...

    async def pause(self, task_id: str, *, via: Via) -> TaskPacket:
        """Hold it after the step that is under way, also over a restart. Paused already: nothing changes.

        An ended task is an `InvalidTransitionError`.
        """
        ...

    async def resume(self, task_id: str, *, via: Via) -> TaskPacket:
        """Let it go on. Not paused: nothing changes. An ended task is an `InvalidTransitionError`."""
        ...

    async def feedback(
        self, task_id: str, draft: FeedbackDraft, *, via: Via, message_id: str = ""
    ) -> TaskPacket:
        """Take an outside agent's report. An ended task is an `InvalidTransitionError`.

        A `message_id` that the task's history has already changes nothing: the message came again.
        """
        ...

    async def delete(self, task_id: str) -> None:
        """Remove an ended task; a live one is a `TaskLiveError`."""
        ...

    async def wait(self, task_id: str, timeout_s: float) -> TaskPacket:
        """The packet as soon as the task ended or needs input, or as it is after `timeout_s`."""
        ...

    def follow(self, task_id: str, *, since: int = 0) -> AsyncIterator[AnyTaskEvent | Progress]:
        """Every event after `since` in order, once, then as they happen, until the task ended.

        Raises `TaskNotFoundError`; a reader that falls too far behind is ended early, and comes
        back with the last `seq` it saw.
        """
        ...

    def observe(self, listener: EventListener) -> None:
        """Be told of every event of every task."""
        ...

    def status(self) -> EngineStatus:
        """Load now."""
        ...
