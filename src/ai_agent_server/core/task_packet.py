"""Values of a task: the packet, its status, its events, its limits. The words are A2A's."""

import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from ai_agent_server.core.chat import Decision, JSONObject, Privacy

SCHEMA_VERSION = 1
_CANONICAL = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def is_task_id(text: str) -> bool:
    """Whether `text` is a UUID in lower case with hyphens: ids become file names and subjects."""
    return _CANONICAL.fullmatch(text) is not None


class TaskStatus(StrEnum):
    """Where a task stands. The last four are final."""

    SUBMITTED = "submitted"
    WORKING = "working"
    INPUT_REQUIRED = "input-required"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"
    REJECTED = "rejected"

    @property
    def is_final(self) -> bool:
        """Whether nothing can happen to the task any more."""
        return self in FINAL


FINAL = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELED, TaskStatus.REJECTED})

Reason = Literal[
    "budget_tokens",
    "budget_calls",
    "budget_wall",
    "budget_cost",
    "budget_sender",
    "sender_refused",
    "loop_detected",
    "no_progress",
    "max_debug",
    "llm_unavailable",
    "invalid_output",
    "invalid_payload",
    "sandbox_unavailable",
    "input_expired",
    "canceled_by_client",
    "poison",
    "internal",
]
"""Why a task ended otherwise than `completed`."""

Scope = Literal["workflow", "role"]
Via = Literal["rest", "nats", "internal"]


Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1_000_000_000)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one task may use before it is ended with a `budget_...` reason."""

    calls: Count = 16
    tokens: Count = 60_000
    """In and out. A call whose prompt alone would pass it, as estimated, is not begun."""
    wall_s: Amount = 900.0
    feedback_hops: Count = 8
    cost_usd: Amount | None = None


class LimitsDraft(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits that a caller sets; what is left out is as configured."""

    calls: Count | None = None
    tokens: Count | None = None
    wall_s: Amount | None = None
    feedback_hops: Count | None = None
    cost_usd: Amount | None = None

    def over(self, base: Limits) -> Limits:
        """`base` with what is set here."""
        given = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return msgspec.structs.replace(base, **given)


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What the task has used so far."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    feedback_hops: int = 0
    cost_usd: float = 0.0

    @property
    def tokens(self) -> int:
        """All tokens, in and out."""
        return self.input_tokens + self.output_tokens


class TestReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What running an artifact's tests showed.

    Anchors are the examples that the task itself gave. `disputed` tests failed while every anchor
    passed, and wait for QA to look at them again; dropped ones are in neither count.
    """

    __test__ = False  # not a pytest class

    verdict: Literal[
        "pass", "fail", "error", "timeout", "memory", "signal", "output_limit", "sandbox_error", "unverified"
    ]
    tier: str
    """The sandbox tier that ran it."""
    suite_sha256: str = ""
    anchors_passed: int = 0
    anchors_total: int = 0
    tests_passed: int = 0
    tests_total: int = 0
    failing: tuple[str, ...] = ()
    """The failing tests' source lines, first failing first."""
    disputed: tuple[str, ...] = ()
    detail: str = ""
    """What the first failure said: actual against expected, the end of the traceback."""
    agreeing: int = 0
    """Versions so far, this one with them, that pass every example and do the same on other inputs; 0:
    nobody looked."""
    cpu_ms: float = 0.0
    wall_ms: float = 0.0
    memory_peak_kb: int = 0


class Artifact(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something an agent made: code, say. `artifact_id` is the SHA-256 of its content."""

    artifact_id: str
    kind: Literal["code", "tests", "plan", "document"]
    content: str
    language: str = ""
    repairs: tuple[str, ...] = ()
    """Mechanical repairs that were made to what the LLM wrote (`fences`, `missing_import`, ...)."""


class LLMCall(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The one exchange with an LLM that a step had."""

    llm: str
    model: str
    source: Literal["local", "api", ""]
    input_tokens: int
    output_tokens: int
    finish_reason: str
    time_to_first_token_ms: float
    duration_ms: float
    prompt_sha256: str
    cost_usd: float = 0.0
    decision: Decision | None = None


class Hop(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a step was taken: the edge that led to it."""

    on: str
    """`entry`, or the role and its outcome: `qa.fail`."""
    why: str
    feedback: bool = False
    """Whether the edge counts as a feedback hop."""


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What went wrong, for a person."""

    code: str
    message: str


class TaskEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Something that happened to a task. `seq` is 1, 2, 3, ...; the store gives it at the durable write."""

    at: datetime
    seq: int = 0


class Sender(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Under which names the work is counted: a key's, never its secret, and a project's."""

    key: str = ""
    project: str = ""


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """Where a task begins that goes on from another one."""

    task_id: str
    step: int
    """The last of its steps that was taken over."""
    seq: int
    """The new task's events up to this one are copies: they count as nothing that it did itself."""


class Submitted(TaskEvent, frozen=True, kw_only=True, omit_defaults=True, tag="task.submitted"):
    """The packet was accepted and is safe."""

    via: Via
    sender: Sender | None = None
    forked_from: Fork | None = None


class Started(TaskEvent, frozen=True, kw_only=True, omit_defaults=True, tag="task.started"):
    """A worker took the task; `generation` rises with each worker that does."""

    generation: int
    holder: str = ""
    """The server that it is a worker of, where several share the tasks."""


class Recovered(TaskEvent, frozen=True, kw_only=True, omit_defaults=True, tag="task.recovered"):
    """A server came back, or was left by another one, and found the task without a worker."""

    generation: int
    why: str
    holder: str = ""


class StepStarted(TaskEvent, frozen=True, kw_only=True, tag="step.started"):
    """A role begins. `step` is 1, 2, 3, ... within the task."""

    step: int
    role: str
    attempt: int
    hop: Hop


class StepFinished(TaskEvent, frozen=True, kw_only=True, omit_defaults=True, tag="step.finished"):
    """A role is done. `outcome` is the word that the routes look up: done, pass, fail, unclear, ..."""

    step: int
    role: str
    outcome: str
    why: str = ""
    output: JSONObject | None = None
    """What the role produced, as its result schema says."""
    artifact: Artifact | None = None
    report: TestReport | None = None
    call: LLMCall | None = None
    error: ErrorDetail | None = None
    duration_ms: float = 0.0


class FeedbackReceived(TaskEvent, frozen=True, kw_only=True, omit_defaults=True, tag="feedback.received"):
    """An outside agent reports for a role; it takes the same route as our own agent's outcome."""

    role: str
    outcome: str
    via: Via
    sender: str = ""
    message_id: str = ""
    """The transport's id of the message: one that is delivered again changes nothing."""
    why: str = ""
    output: JSONObject | None = None
    artifact: Artifact | None = None
    report: TestReport | None = None


class InputRequired(TaskEvent, frozen=True, kw_only=True, omit_defaults=True, tag="input.required"):
    """The task waits for a packet on its feedback route, at the latest until `expires_at`."""

    role: str
    question: str
    expires_at: datetime
    hop: Hop | None = None
    """Why that role is asked; None in a task that was kept before this was recorded."""


class Paused(TaskEvent, frozen=True, kw_only=True, tag="task.paused"):
    """Somebody asked to hold it. A step that is under way ends; none begins before `task.resumed`."""

    via: Via


class Resumed(TaskEvent, frozen=True, kw_only=True, tag="task.resumed"):
    """It goes on."""

    via: Via


class Completed(TaskEvent, frozen=True, kw_only=True, tag="task.completed"):
    """The task ended well."""

    result: JSONObject


class Failed(TaskEvent, frozen=True, kw_only=True, omit_defaults=True, tag="task.failed"):
    """The task ended without what was asked; `result` holds the best there was."""

    reason: Reason
    error: ErrorDetail
    result: JSONObject | None = None


class Canceled(TaskEvent, frozen=True, kw_only=True, omit_defaults=True, tag="task.canceled"):
    """Somebody asked for the end."""

    reason: Reason = "canceled_by_client"
    result: JSONObject | None = None


class Rejected(TaskEvent, frozen=True, kw_only=True, omit_defaults=True, tag="task.rejected"):
    """An agent declined the task."""

    reason: Reason
    error: ErrorDetail


AnyTaskEvent: TypeAlias = (
    Submitted
    | Started
    | Recovered
    | StepStarted
    | StepFinished
    | FeedbackReceived
    | InputRequired
    | Paused
    | Resumed
    | Completed
    | Failed
    | Canceled
    | Rejected
)


FINAL_EVENTS = (Completed, Failed, Canceled, Rejected)
"""After one of these nothing follows."""


EventName = Literal[
    "task.submitted",
    "task.started",
    "task.recovered",
    "step.started",
    "step.finished",
    "feedback.received",
    "input.required",
    "task.paused",
    "task.resumed",
    "task.completed",
    "task.failed",
    "task.canceled",
    "task.rejected",
]


class Callback(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where somebody wants to be told of a task's events. It holds no secret."""

    url: str
    """At or below the URL of one of the configured targets, which has the secret that signs."""
    events: tuple[EventName, ...] = (
        "task.completed",
        "task.failed",
        "task.canceled",
        "task.rejected",
        "input.required",
    )


class TaskPacket(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON task packet: what was asked, and the fold of everything that happened since.

    `task_id`, `status`, `payload` and `history` are the four fields that the plan names. Everything
    from `status` down is derived: `transitions.fold` makes it from `history`.
    """

    task_id: str
    context_id: str
    profile: str
    role: str
    payload: JSONObject
    created_at: datetime
    limits: Limits = Limits()
    scope: Scope = "workflow"
    privacy: Privacy = "any"
    callback: Callback | None = None
    idempotency_key: str | None = None
    request_sha256: str = ""
    schema_version: int = SCHEMA_VERSION

    status: TaskStatus = TaskStatus.SUBMITTED
    reason: Reason | None = None
    history: tuple[AnyTaskEvent, ...] = ()
    result: JSONObject | None = None
    error: ErrorDetail | None = None
    usage: Usage = Usage()
    generation: int = 0
    holder: str = ""
    """The server that took it last, where several share the tasks; it alone may go on with it."""
    started_at: datetime | None = None
    updated_at: datetime | None = None
    paused_at: datetime | None = None
    """Since when it is held; None: it is not. `status` stays what it was."""
    forked_from: Fork | None = None
    revision: int = 0
    """The `seq` of the last event."""

    @property
    def copied_seq(self) -> int:
        """The `seq` of the last event that a fork took over from another task; 0: it is no fork."""
        return self.forked_from.seq if self.forked_from is not None else 0


class TaskSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A packet without its payload and history, as lists show it."""

    task_id: str
    context_id: str
    profile: str
    role: str
    status: TaskStatus
    reason: Reason | None
    usage: Usage
    revision: int
    created_at: datetime
    updated_at: datetime | None
    paused_at: datetime | None = None
    holder: str = ""
    callback: Callback | None = None
    idempotency_key: str | None = None
    request_sha256: str = ""


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """How far a running step is. Told to who is listening, never kept, without a `seq`."""

    task_id: str
    step: int
    role: str
    llm: str
    why: str
    """Why this LLM: the decision's reason."""
    output_tokens: int
    elapsed_ms: float


class TaskDraft(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a caller may send; only `payload` must be there.

    `profile` and `role` come from the path on REST and must be in the packet on NATS.
    `status` and `history` are part of the packet's form and are accepted empty or as submitted.
    """

    payload: dict[str, Any]
    task_id: str | None = None
    context_id: str | None = None
    profile: str | None = None
    role: str | None = None
    limits: LimitsDraft | None = None
    scope: Scope = "workflow"
    privacy: Privacy = "any"
    callback: Callback | None = None
    """Where the task's events are sent to, beside all who follow it."""
    status: Literal["submitted"] | None = None
    history: tuple[()] = ()


class FeedbackDraft(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A packet from an outside agent: it speaks for `role` and reports `outcome`.

    `task_id` is in the path on REST and must be in the packet on NATS. `code` replaces the current
    artifact (an outside coder); `failing` are tests that failed (an outside QA).
    """

    role: str
    outcome: str
    task_id: str | None = None
    sender: str = ""
    why: str = ""
    output: dict[str, Any] | None = None
    code: str | None = None
    failing: tuple[str, ...] = ()
    answers: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """The `seq` of the `input.required` that this is for: it is refused once that was answered."""


class ForkDraft(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new task in the context of an ended one, which goes on after one of its steps."""

    step: Count
    """Its steps up to this one are taken over; 0: none, it begins anew."""
    payload: dict[str, Any] | None = None
    """Keys of the payload that are to be others; null takes one away."""
    task_id: str | None = None
    limits: LimitsDraft | None = None
    """What is left out is as in the ended task. What that one used does not count."""
    privacy: Privacy = "any"
    """`any` never weakens what the ended task has."""
    callback: Callback | None = None


def sender_of(packet: TaskPacket) -> Sender:
    """Under which names the task's work is counted."""
    submitted = next((event for event in packet.history[:1] if isinstance(event, Submitted)), None)
    return (submitted.sender if submitted is not None else None) or Sender()


def summary(packet: TaskPacket) -> TaskSummary:
    """The packet's summary."""
    return TaskSummary(
        task_id=packet.task_id,
        context_id=packet.context_id,
        profile=packet.profile,
        role=packet.role,
        status=packet.status,
        reason=packet.reason,
        usage=packet.usage,
        revision=packet.revision,
        created_at=packet.created_at,
        updated_at=packet.updated_at,
        paused_at=packet.paused_at,
        holder=packet.holder,
        callback=packet.callback,
        idempotency_key=packet.idempotency_key,
        request_sha256=packet.request_sha256,
    )
