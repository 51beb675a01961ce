"""Shapes of the REST API that are not task packets: queries, bodies, listings, and problem details.

HTTP statuses stand here, in `PROBLEMS` and `REFUSALS`, and in the two other `api_` modules alone.
"""

from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from ai_agent_server import errors
from ai_agent_server.config.settings import RoleSettings
from ai_agent_server.core.chat import Capability, JSONObject, Privacy, Tier
from ai_agent_server.core.task_packet import TaskStatus
from ai_agent_server.core.workflow import Edge
from ai_agent_server.load_balancer.base import AcceleratorView, CircuitState, Requirements, Source
from ai_agent_server.tasks_state.base import TaskFilter

MAX_WAIT_S = 600.0
MAX_PAGE = 200
JSON = "application/json"
PROBLEM_JSON = "application/problem+json"

WaitSeconds = Annotated[
    float, msgspec.Meta(ge=0, le=MAX_WAIT_S, description="Seconds to wait for the task's end.")
]
Tokens = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]
Dollars = Annotated[float, msgspec.Meta(ge=0, le=1_000_000_000)]


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What went wrong (RFC 9457). `pointer` is a JSON pointer into the body that was sent."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    pointer: str | None = None
    parameter: str | None = None
    """The query parameter or header that is wrong."""
    expected: str | None = None
    choices: tuple[str, ...] = ()
    """The names that would have been taken."""
    retry_after_s: float | None = None
    task_id: str | None = None


class ProblemKind(msgspec.Struct, frozen=True):
    """A kind of problem: its place in the docs, its HTTP status and its title."""

    slug: str
    status: int
    title: str

    @property
    def type(self) -> str:
        """The URI of the kind; the docs page answers it."""
        return f"/api/v1/docs#{self.slug}"


class BadParameterError(errors.InvalidPacketError):
    """A query parameter or a header is wrong; `pointer` names it."""


INTERNAL = ProblemKind("internal", 500, "The server failed")

PROBLEMS: dict[type[errors.AgentServerError], ProblemKind] = {
    errors.KeyNeededError: ProblemKind("key-needed", 401, "An API key is needed"),
    errors.ScopeError: ProblemKind("wrong-scope", 403, "The key is not for this"),
    errors.ForeignPageError: ProblemKind("foreign-page", 403, "A page from elsewhere may not ask"),
    errors.LimitExceededError: ProblemKind("limit-reached", 429, "The caller's share is used up"),
    errors.UnknownRoleError: ProblemKind("unknown-role", 404, "No such profile or role"),
    errors.UnknownLLMError: ProblemKind("unknown-llm", 404, "No such LLM"),
    errors.UnknownToolError: ProblemKind("unknown-tool", 404, "No such tool"),
    errors.MalformedPacketError: ProblemKind("malformed", 400, "The body is not readable JSON"),
    BadParameterError: ProblemKind("bad-parameter", 422, "A parameter is wrong"),
    errors.InvalidPacketError: ProblemKind("invalid-packet", 422, "The body has another shape"),
    errors.IdempotencyConflictError: ProblemKind("idempotency-conflict", 409, "The key was used before"),
    errors.IntakeFullError: ProblemKind("intake-full", 429, "As many tasks are live as may be"),
    errors.ShuttingDownError: ProblemKind("shutting-down", 503, "The server is stopping"),
    errors.TaskNotFoundError: ProblemKind("task-not-found", 404, "No such task"),
    errors.TaskArchivedError: ProblemKind("task-archived", 410, "The task was archived"),
    errors.TaskLiveError: ProblemKind("task-live", 409, "The task has not ended"),
    errors.InvalidTransitionError: ProblemKind("invalid-transition", 409, "The task's status forbids it"),
    errors.TaskConflictError: ProblemKind("task-conflict", 409, "Somebody else wrote first"),
    errors.StoreFullError: ProblemKind("store-full", 507, "The disk is full"),
    errors.StoreError: ProblemKind("store-failed", 503, "The state folder failed"),
    errors.ConfigurationError: ProblemKind("configuration", 422, "The configuration is wrong"),
    errors.NoLLMError: ProblemKind("no-llm", 503, "No LLM may serve it now"),
    errors.ContextOverflowError: ProblemKind("context-overflow", 422, "The text is too long"),
    errors.EngineRequestError: ProblemKind("engine-refused", 422, "The LLM's engine refused the request"),
    errors.EngineBusyError: ProblemKind("engine-busy", 429, "The LLM's engine has no place now"),
    errors.EngineError: ProblemKind("engine-failed", 502, "The LLM's engine failed"),
    errors.InvalidOutputError: ProblemKind("invalid-output", 502, "The LLM's answer is not of the form"),
}
"""Our errors as answers, found by the nearest class; what has none here is `INTERNAL`."""

REFUSALS: dict[int, ProblemKind] = {
    400: ProblemKind("bad-request", 400, "The request is wrong"),
    404: ProblemKind("no-such-route", 404, "Nothing is here"),
    405: ProblemKind("method-not-allowed", 405, "The method is not allowed here"),
    413: ProblemKind("body-too-large", 413, "The body is too large"),
    415: ProblemKind("not-json", 415, "The body is not declared as JSON"),
}
"""Refusals that come before any of our parts is asked."""


def problem_kind(cls: type[BaseException]) -> ProblemKind:
    """The kind of problem that errors of `cls` are."""
    for ancestor in cls.__mro__:
        if ancestor in PROBLEMS:
            return PROBLEMS[ancestor]
    return INTERNAL


def problem(exc: errors.AgentServerError, instance: str) -> Problem:
    """`exc` as problem details; nothing of an internal one but that it was."""
    kind = problem_kind(type(exc))
    if kind is INTERNAL:
        return refusal(kind, "the server failed; its log says more", instance)
    where = getattr(exc, "pointer", None) or None
    is_parameter = isinstance(exc, BadParameterError)
    return Problem(
        type=kind.type,
        title=kind.title,
        status=kind.status,
        detail=getattr(exc, "problem", "") or str(exc),
        instance=instance,
        pointer=None if is_parameter else where,
        parameter=where if is_parameter else None,
        expected=(exc.expected or None) if isinstance(exc, errors.InvalidPacketError) else None,
        choices=getattr(exc, "choices", ()),
        retry_after_s=getattr(exc, "retry_after_s", None),
        task_id=getattr(exc, "task_id", None),
    )


def refusal(kind: ProblemKind, detail: str, instance: str) -> Problem:
    """A problem of which there is nothing more to say."""
    return Problem(type=kind.type, title=kind.title, status=kind.status, detail=detail, instance=instance)


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What comes from outside: an unknown key is refused."""


class SubmitQuery(_Strict, frozen=True, kw_only=True):
    """Query of POST /api/v1/{profile}/{role}."""

    wait: WaitSeconds | UnsetType = UNSET


class ListQuery(_Strict, frozen=True, kw_only=True):
    """Query of GET /api/v1/tasks."""

    profile: (
        Annotated[str, msgspec.Meta(description="Only tasks of this profile; none where it is unknown.")]
        | UnsetType
    ) = UNSET
    role: (
        Annotated[
            str, msgspec.Meta(description="Only tasks that entered at this role; none where it is unknown.")
        ]
        | UnsetType
    ) = UNSET
    status: Annotated[TaskStatus, msgspec.Meta(description="Only tasks in this status.")] | UnsetType = UNSET
    context_id: Annotated[str, msgspec.Meta(description="Only tasks of this context.")] | UnsetType = UNSET
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE, description="Tasks on a page.")] = 50
    cursor: Annotated[str, msgspec.Meta(description="`next_cursor` of the page before.")] | UnsetType = UNSET

    def where(self) -> TaskFilter:
        """The same for the store."""
        asked = msgspec.structs.asdict(self)
        return TaskFilter(
            **{name: asked[name] for name in TaskFilter.__struct_fields__ if asked[name] is not UNSET}
        )


class EventsQuery(_Strict, frozen=True, kw_only=True):
    """Query of GET /api/v1/tasks/{task_id}/events."""

    since: (
        Annotated[
            int,
            msgspec.Meta(ge=0, le=2**53, description="The last `seq` seen; `Last-Event-ID` goes before it."),
        ]
        | UnsetType
    ) = UNSET


class NoQuery(_Strict, frozen=True, kw_only=True):
    """Query of a route that takes none."""


class ToggleDraft(_Strict, frozen=True, kw_only=True):
    """Switches an LLM on or off."""

    toggle: bool


class ExplainDraft(_Strict, frozen=True, kw_only=True):
    """A request to the balancer in thought: which LLM would serve it?

    With `profile` and `role` it is a request of that role as configured; what is said here goes
    before it, but `privacy: any` never weakens a role that is `local`.
    """

    profile: str | None = None
    role: str | None = None
    llm: str | UnsetType | None = UNSET
    """Exactly this LLM."""
    tier: Tier | UnsetType | None = UNSET
    prefer: tuple[str, ...] | UnsetType = UNSET
    privacy: Privacy = "any"
    needs: tuple[Capability, ...] | UnsetType = UNSET
    """By default `chat`, and what the role needs."""
    input_tokens: Tokens = 0
    output_tokens: Tokens | UnsetType = UNSET
    """By default the role's `max_tokens`, else 256."""
    max_cost_usd: Dollars | None = None
    exclude: tuple[str, ...] = ()

    def requirements(self, role: RoleSettings | None = None) -> Requirements:
        """The same for the balancer; what is not said is as `role` has it."""
        wanted = Requirements(
            privacy=self.privacy,
            input_tokens=self.input_tokens,
            max_cost_usd=self.max_cost_usd,
            exclude=frozenset(self.exclude),
        )
        if role is not None:
            wanted = msgspec.structs.replace(
                wanted,
                llm=role.llm,
                tier=role.tier,
                prefer=role.prefer,
                privacy="local" if "local" in (self.privacy, role.privacy) else "any",
                needs=frozenset(_role_needs(self, role)),
                output_tokens=role.max_tokens,
            )
        said = {
            name: value
            for name, value in (
                ("llm", self.llm),
                ("tier", self.tier),
                ("prefer", self.prefer),
                ("needs", UNSET if self.needs is UNSET else frozenset(self.needs)),
                ("output_tokens", self.output_tokens),
            )
            if value is not UNSET
        }
        return msgspec.structs.replace(wanted, **said)


def _role_needs(draft: ExplainDraft, role: RoleSettings) -> Iterator[Capability]:
    yield "chat"
    if role.result_schema is not None:
        yield "json_schema"
    if (role.agent or f"{draft.profile}.{draft.role}").endswith(".vision"):
        yield "vision"


class RoleCard(msgspec.Struct, frozen=True, kw_only=True):
    """A role that takes tasks."""

    name: str
    endpoint: str
    """Where its packets are POSTed."""
    description: str
    agent: str | None
    llm: str | None
    tier: Tier | None
    prefer: tuple[str, ...]
    privacy: Privacy
    payload_schema: JSONObject | None
    result_schema: JSONObject | None


class ProfileCard(msgspec.Struct, frozen=True, kw_only=True):
    """A profile, its roles, and the table of routes that its tasks follow."""

    name: str
    description: str
    roles: tuple[RoleCard, ...]
    routes: dict[str, tuple[Edge, ...]]


class ProfileList(msgspec.Struct, frozen=True, kw_only=True):
    """Every profile."""

    items: tuple[ProfileCard, ...]


class LLMCard(msgspec.Struct, frozen=True, kw_only=True):
    """A configured LLM and how it stands now. None: nobody knows."""

    name: str
    engine: str | None
    model: str | None
    source: Source
    tier: Tier
    has_key: bool | None = None
    """Whether the API key that it names is set in the server's environment; None: it names none."""
    toggle: bool
    locked: bool
    capabilities: tuple[Capability, ...]
    context_tokens: int
    slots: int
    in_flight: int
    circuit: CircuitState
    resident: bool | None
    time_to_first_token_ms: float | None
    tokens_per_s: float | None
    failures: int
    cost_per_million_input_usd: float
    cost_per_million_output_usd: float


class AcceleratorList(msgspec.Struct, frozen=True, kw_only=True):
    """Every configured accelerator."""

    items: tuple[AcceleratorView, ...]


class LLMList(msgspec.Struct, frozen=True, kw_only=True):
    """Every configured LLM."""

    items: tuple[LLMCard, ...]
