"""Every operation of the REST API: what it takes, what it answers, what can go wrong, with examples."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from ai_agent_server import errors
from ai_agent_server.core.api_schemas import (
    INTERNAL,
    JSON,
    MAX_WAIT_S,
    REFUSALS,
    AcceleratorList,
    BadParameterError,
    EventsQuery,
    ExplainDraft,
    ListQuery,
    LLMCard,
    LLMList,
    NoQuery,
    Problem,
    ProblemKind,
    ProfileList,
    SubmitQuery,
    ToggleDraft,
    problem,
    problem_kind,
    refusal,
)
from ai_agent_server.core.chat import Candidate, Decision, JSONObject
from ai_agent_server.core.metrics_snapshot import MetricsSnapshot
from ai_agent_server.core.ports import Component, HealthReport, ReloadReport
from ai_agent_server.core.prometheus_text import PROMETHEUS_TEXT
from ai_agent_server.core.task_packet import (
    Completed,
    FeedbackDraft,
    ForkDraft,
    Hop,
    LLMCall,
    Started,
    StepFinished,
    StepStarted,
    Submitted,
    TaskDraft,
    TaskPacket,
    summary,
)
from ai_agent_server.core.transitions import fold
from ai_agent_server.load_balancer.base import AcceleratorView, MemoryView, QueueDecision, QueuedView
from ai_agent_server.memory_gauges.base import Gauged
from ai_agent_server.tasks_state.base import TaskPage

EVENT_STREAM = "text/event-stream"
HTML = "text/html; charset=utf-8"
ADDRESS = "http://127.0.0.1:3160"

TASK_ID = "01936f2a-7c1e-7b3a-9d55-2f4be0a1c9d7"
_AT = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)
_DRAFT: JSONObject = {
    "payload": {
        "task": "Write a function slug(text) that makes a URL slug.",
        "entry_point": "slug",
        "examples": ["assert slug('Hello, World!') == 'hello-world'"],
    },
    "limits": {"calls": 12, "wall_s": 600},
}
_FEEDBACK: JSONObject = {
    "role": "qa",
    "outcome": "fail",
    "sender": "nightly-qa",
    "why": "empty input gives '-'",
    "failing": ["assert slug('') == ''"],
}


class Header(msgspec.Struct, frozen=True):
    """A header of a request or an answer."""

    name: str
    about: str
    schema: JSONObject
    required: bool = False
    example: str | int = ""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A good answer. `kind` is the body's type, None for text or nothing."""

    status: int
    about: str
    kind: type[Any] | None = None
    media_type: str = JSON
    example: Any = None
    headers: tuple[Header, ...] = ()
    is_also_streamed: bool = False
    """With `stream` in the body it comes as server-sent events."""
    links_task: bool = False
    """The body is a task that other operations can be called with."""


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One route and method. What every operation can answer is not repeated in `problems`."""

    method: str
    path: str
    id: str
    tag: str
    summary: str
    about: str = ""
    query: type[Any] | None = NoQuery
    """None: the query is not looked at."""
    headers: tuple[Header, ...] = ()
    body: type[Any] | None = None
    body_example: Any = None
    answers: tuple[Answer, ...]
    problems: tuple[type[errors.AgentServerError], ...] = ()
    refusals: tuple[Answer, ...] = ()
    """What it answers instead of problem details: the errors of a surface that has a form of its own."""
    is_public: bool = False


TAGS = {
    "tasks": "Give work, follow it, end it.",
    "llms": "LLMs in the forms of OpenAI's and Anthropic's APIs, for their SDKs and for coding agents.",
    "tools": "Small jobs on a text, answered at once.",
    "server": "What is configured, and how the LLM is chosen.",
    "observe": "Health, metrics, and this description.",
}

_TASK = (errors.TaskNotFoundError, errors.TaskArchivedError)
_STORE = (errors.StoreError,)
_STORE_WRITE = (errors.StoreError, errors.StoreFullError)
_INTAKE = (
    errors.UnknownRoleError,
    errors.IdempotencyConflictError,
    errors.IntakeFullError,
    errors.ShuttingDownError,
    *_STORE_WRITE,
)
_LOCATION = Header(
    "Location", "Where the task is.", {"type": "string"}, required=True, example=f"/api/v1/tasks/{TASK_ID}"
)
_TASK_FILE = Header(
    "X-Task-File",
    "The JSON file that holds the task; empty where the store keeps none. While more than four tasks are "
    "written at the same time, a running task's file follows within 0.25 s.",
    {"type": "string"},
    required=True,
    example=f"/home/me/.local/state/ai-agent-server/tasks_state/d7/{TASK_ID}.json",
)
_APPLIED = Header(
    "Preference-Applied", "The preference that was followed.", {"type": "string"}, example="wait=30"
)
_IDEMPOTENCY_KEY = Header(
    "Idempotency-Key",
    "Makes a repeat safe.",
    {"type": "string", "pattern": "^[!-~]{1,255}$"},
    example="order-4711",
)
_PRIVACY = Header(
    "X-Privacy",
    "`local`: no LLM outside this machine sees the task. `any` never weakens what the body says.",
    {"type": "string", "enum": ["any", "local"]},
    example="local",
)
_CANCEL = "Stops what runs for it: the LLM's socket is closed and the sandbox's processes are killed."
_PAUSE = (
    "A step that is under way ends and is kept; no other begins until the task is resumed, also over a "
    "restart. The status stays what it was, and `paused_at` says since when. Time in which it is paused "
    "counts towards no limit. Paused already: nothing changes."
)
_ROUTING = (
    Header("X-LLM", "The LLM that answered last; absent before.", {"type": "string"}, example="embedded"),
    Header(
        "X-Routing-Reason",
        "Why the balancer chose it; the packet's history has the whole decision.",
        {"type": "string"},
        example="embedded: best of 2 (in memory)",
    ),
)
_EVENT_HEADERS = (
    Header("Cache-Control", "Never kept.", {"type": "string", "const": "no-store"}, True, "no-store"),
    Header("X-Accel-Buffering", "Proxies pass it on.", {"type": "string", "const": "no"}, True, "no"),
)


def operations() -> tuple[Operation, ...]:
    """Every operation, in the order in which a newcomer meets them."""
    done, submitted = _example_packets()
    task_headers = (_LOCATION, _TASK_FILE, _APPLIED, *_ROUTING)
    llm = _example_llm()
    decision = Decision(
        chosen="embedded",
        reason="embedded: fits tier small, resident, 2 slots free",
        strategy="resident_first",
        candidates=(
            Candidate(llm="embedded", score=0.1, parts={"wait_s": 0.1}),
            Candidate(llm="hosted", refused_by="LB-3 privacy", why="the request must stay on this machine"),
        ),
    )
    return (
        Operation(
            method="post",
            path="/api/v1/{profile}/{role}",
            id="submitTask",
            tag="tasks",
            summary="Submit a task",
            about="Takes a task packet for a role. It enters the profile's workflow there and follows "
            "the feedback routes to the end; with `scope: role` that role alone runs. The answer "
            "is given when the task's file is safe. With `?wait=N` or `Prefer: wait=N` (at most "
            f"{MAX_WAIT_S:.0f} s) it waits for the end first. A repeat with the same "
            "`Idempotency-Key` or `task_id` and body answers the earlier packet.",
            query=SubmitQuery,
            headers=(
                _IDEMPOTENCY_KEY,
                Header("Prefer", "`wait=N`, in seconds.", {"type": "string"}, example="wait=30"),
                _PRIVACY,
            ),
            body=TaskDraft,
            body_example=_DRAFT,
            answers=(
                Answer(
                    status=202,
                    about="Accepted; it has not ended.",
                    kind=TaskPacket,
                    example=submitted,
                    headers=task_headers,
                    links_task=True,
                ),
                Answer(
                    status=200,
                    about="It ended while waiting, or was submitted before.",
                    kind=TaskPacket,
                    example=done,
                    headers=task_headers,
                    links_task=True,
                ),
            ),
            problems=_INTAKE,
        ),
        Operation(
            method="get",
            path="/api/v1/tasks",
            id="listTasks",
            tag="tasks",
            summary="List tasks",
            about="Newest first, in pages. `next_cursor` is null on the last page. A profile or role that is "
            "not configured (any more) is no mistake: its tasks may still be there.",
            query=ListQuery,
            answers=(
                Answer(
                    status=200,
                    about="A page.",
                    kind=TaskPage,
                    example=TaskPage(items=(summary(done),), next_cursor=None),
                ),
            ),
            problems=_STORE,
        ),
        Operation(
            method="get",
            path="/api/v1/tasks/{task_id}",
            id="readTask",
            tag="tasks",
            summary="Read a task",
            answers=(
                Answer(
                    status=200,
                    about="The packet with its whole history.",
                    kind=TaskPacket,
                    example=done,
                    headers=(_TASK_FILE, *_ROUTING),
                ),
            ),
            problems=(*_TASK, *_STORE),
        ),
        Operation(
            method="delete",
            path="/api/v1/tasks/{task_id}",
            id="deleteTask",
            tag="tasks",
            summary="Delete an ended task",
            answers=(Answer(status=204, about="It is gone."),),
            problems=(*_TASK, errors.TaskLiveError, *_STORE_WRITE),
        ),
        *(
            Operation(
                method="post",
                path=f"/api/v1/tasks/{{task_id}}/{verb}",
                id=f"{verb}Task",
                tag="tasks",
                summary=title,
                about=about,
                answers=(
                    Answer(
                        status=200,
                        about="The packet as it is now.",
                        kind=TaskPacket,
                        example=example,
                        headers=(_TASK_FILE, *_ROUTING),
                    ),
                ),
                problems=(
                    *_TASK,
                    errors.InvalidTransitionError,
                    errors.TaskConflictError,
                    *_STORE_WRITE,
                ),
            )
            for verb, title, about, example in (
                ("cancel", "Cancel a task", _CANCEL, done),
                ("pause", "Pause a task", _PAUSE, submitted),
                ("resume", "Let a paused task go on", "Not paused: nothing changes.", submitted),
            )
        ),
        Operation(
            method="post",
            path="/api/v1/tasks/{task_id}/fork",
            id="forkTask",
            tag="tasks",
            summary="Fork an ended task",
            about="Takes a new task in the same context that goes on after the given step: what came before "
            "is copied, and counts towards none of its limits. `payload` and `limits` may differ. "
            "A repeat with the same `Idempotency-Key` or `task_id` and body answers the earlier packet.",
            headers=(_IDEMPOTENCY_KEY, _PRIVACY),
            body=ForkDraft,
            body_example={"step": 2, "payload": {"language": "python"}, "limits": {"calls": 20}},
            answers=(
                Answer(
                    status=202,
                    about="Accepted.",
                    kind=TaskPacket,
                    example=submitted,
                    headers=(_LOCATION, _TASK_FILE, *_ROUTING),
                    links_task=True,
                ),
                Answer(
                    status=200,
                    about="It was forked so before.",
                    kind=TaskPacket,
                    example=done,
                    headers=(_LOCATION, _TASK_FILE, *_ROUTING),
                    links_task=True,
                ),
            ),
            problems=(*_TASK, errors.TaskLiveError, *_INTAKE),
        ),
        Operation(
            method="post",
            path="/api/v1/tasks/{task_id}/feedback",
            id="giveFeedback",
            tag="tasks",
            summary="Report as an outside agent",
            about="Takes the same route as the outcome of our own agent for that role. As role `user` "
            "with outcome `answer` it answers a question of a task that needs input.",
            body=FeedbackDraft,
            body_example=_FEEDBACK,
            answers=(
                Answer(
                    status=202,
                    about="The packet with the report.",
                    kind=TaskPacket,
                    example=submitted,
                    headers=(_TASK_FILE, *_ROUTING),
                ),
            ),
            problems=(
                *_TASK,
                errors.InvalidTransitionError,
                errors.TaskConflictError,
                errors.ShuttingDownError,
                *_STORE_WRITE,
            ),
        ),
        Operation(
            method="get",
            path="/api/v1/tasks/{task_id}/events",
            id="followTask",
            tag="tasks",
            summary="Follow a task",
            about="Server-sent events. First `snapshot` (the packet, its history left out; no id); then"
            " each event after `Last-Event-ID` (or `?since=`) with its `seq` as id and its type "
            "as name, once and in order, as it happens; in between `progress` of the running step"
            " (no id). Ends after the final event. Leaving cancels nothing. A reader that is too "
            "slow is cut, and comes back with the last id it saw. A WebSocket at the same path and `/ws` "
            "tells the same as JSON texts (doc/how_to/follow_a_task.md).",
            query=EventsQuery,
            headers=(
                Header(
                    "Last-Event-ID",
                    "The last `seq` seen; goes before `since`.",
                    {"type": "string", "pattern": "^[0-9]{1,15}$"},
                    example="2",
                ),
            ),
            answers=(
                Answer(
                    status=200,
                    about="The stream.",
                    media_type=EVENT_STREAM,
                    example=_example_stream(done),
                    headers=_EVENT_HEADERS,
                ),
            ),
            problems=(*_TASK, *_STORE),
        ),
        Operation(
            method="get",
            path="/api/v1/profiles",
            id="listProfiles",
            tag="server",
            summary="Profiles and roles",
            about="With the JSON Schema of each role's payload and result, and the table of feedback routes.",
            answers=(Answer(status=200, about="Every profile.", kind=ProfileList),),
        ),
        Operation(
            method="get",
            path="/api/v1/llms",
            id="listLLMs",
            tag="server",
            summary="LLMs and how they stand",
            answers=(Answer(status=200, about="Every LLM.", kind=LLMList, example=LLMList(items=(llm,))),),
        ),
        Operation(
            method="get",
            path="/api/v1/accelerators",
            id="listAccelerators",
            tag="server",
            summary="Memory that LLMs share, and who waits for it",
            about="Of each accelerator: what its models take and on what that figure rests, who waits with "
            "place and estimated wait, and the last decisions with the rule of each.",
            answers=(
                Answer(
                    status=200,
                    about="Every configured accelerator.",
                    kind=AcceleratorList,
                    example=AcceleratorList(items=(_example_accelerator(),)),
                ),
            ),
        ),
        Operation(
            method="patch",
            path="/api/v1/llms/{name}",
            id="toggleLLM",
            tag="server",
            summary="Switch an LLM on or off",
            about="Kept over a restart. What runs on it goes on.",
            body=ToggleDraft,
            body_example={"toggle": False},
            answers=(
                Answer(
                    status=200,
                    about="The LLM as it stands now.",
                    kind=LLMCard,
                    example=msgspec.structs.replace(llm, toggle=False),
                ),
            ),
            problems=(errors.UnknownLLMError, *_STORE_WRITE),
        ),
        Operation(
            method="post",
            path="/api/v1/load-balancer/explain",
            id="explainChoice",
            tag="server",
            summary="Which LLM would serve, and why",
            about="Nothing is called. Every candidate is told with its score (lower is better) or the "
            "rule that refused it, as numbered in load_balancer_rules.md. `chosen` is null when "
            "nobody may serve. With `profile` and `role` it is asked for that role as configured.",
            body=ExplainDraft,
            body_example={"profile": "developer", "role": "planner", "privacy": "local"},
            answers=(Answer(status=200, about="The decision.", kind=Decision, example=decision),),
            problems=(errors.UnknownRoleError,),
        ),
        Operation(
            method="post",
            path="/api/v1/config/reload",
            id="reloadConfiguration",
            tag="server",
            summary="Read configuration.json again",
            about="All of it or nothing: with a mistake in the file, what is in force stays in force.",
            answers=(
                Answer(
                    status=200,
                    about="What changed, as JSON pointers.",
                    kind=ReloadReport,
                    example=ReloadReport(source="configuration.json", changed=("/llms/hosted/toggle",)),
                ),
            ),
            problems=(errors.ConfigurationError,),
        ),
        Operation(
            method="get",
            path="/api/v1/metrics",
            id="readMetrics",
            tag="observe",
            summary="Metrics",
            about="State now; performance and use since `since`, which is the start of the process: "
            "counters begin again with it. Quantiles are over the newest 1024 samples. The same "
            "bytes go out on the channel `ai-agent-server.metrics`.",
            answers=(Answer(status=200, about="The snapshot.", kind=MetricsSnapshot),),
        ),
        Operation(
            method="get",
            path="/metrics",
            id="scrapeMetrics",
            tag="observe",
            summary="Metrics for Prometheus",
            about="The numbers of /api/v1/metrics in Prometheus's text form, times in seconds.",
            query=None,
            answers=(
                Answer(
                    status=200,
                    about="The families.",
                    media_type=PROMETHEUS_TEXT,
                    example='ai_agent_server_tasks{status="working"} 2.0\n',
                ),
            ),
        ),
        *(
            Operation(
                method="get",
                path=path,
                id=name,
                tag="observe",
                summary="Health",
                about="`degraded`: it works, but a part is missing; `advice` says what to do. Never asks "
                "for a key.",
                query=None,
                answers=tuple(
                    Answer(status=status, about=about, kind=HealthReport, example=_example_health(state))
                    for status, about, state in (
                        (200, "It can take tasks.", "degraded"),
                        (503, "It cannot.", "down"),
                    )
                ),
                is_public=True,
            )
            for path, name in (("/health", "health"), ("/api/v1/health", "healthV1"))
        ),
        *(
            Operation(
                method="get",
                path=path,
                id=name,
                tag="observe",
                summary=title,
                query=None,
                answers=(Answer(status=200, about=about, media_type=media_type, kind=kind),),
            )
            for path, name, title, about, media_type, kind in (
                (
                    "/api/v1/schema/task-packet",
                    "taskPacketSchema",
                    "JSON Schema of the task packet",
                    "JSON Schema 2020-12.",
                    JSON,
                    dict,
                ),
                (
                    "/api/v1/schema/configuration",
                    "configurationSchema",
                    "JSON Schema of configuration.json",
                    "JSON Schema 2020-12.",
                    JSON,
                    dict,
                ),
                ("/api/v1/openapi.json", "openapi", "This description", "OpenAPI 3.1.", JSON, dict),
                ("/api/v1/docs", "docs", "This description for people", "One page.", HTML, None),
            )
        ),
    )


def problem_kinds(operation: Operation) -> dict[int, list[ProblemKind]]:
    """What can go wrong in `operation` and is told as problem details, by status."""
    if operation.refusals:
        return {}
    kinds = [REFUSALS[400], problem_kind(errors.ForeignPageError)]
    if not operation.is_public:
        kinds.extend((problem_kind(errors.KeyNeededError), problem_kind(errors.ScopeError)))
    if operation.method == "post":
        kinds.append(problem_kind(errors.LimitExceededError))
    kinds.extend(problem_kind(cls) for cls in operation.problems)
    if operation.body is not None:
        kinds.extend((REFUSALS[413], REFUSALS[415]))
        kinds.extend((problem_kind(errors.MalformedPacketError), problem_kind(errors.InvalidPacketError)))
    if operation.query is not None:
        kinds.append(problem_kind(BadParameterError))
    kinds.append(INTERNAL)
    by_status: dict[int, list[ProblemKind]] = {}
    for kind in kinds:
        by_status.setdefault(kind.status, []).append(kind)
    return dict(sorted(by_status.items()))


def problem_examples() -> dict[str, Problem]:
    """One problem of each kind, by its slug."""
    task, path = f"/api/v1/tasks/{TASK_ID}", "/api/v1/developer/planner"
    tool = "/mcp/tools/extract"
    ours: tuple[tuple[errors.AgentServerError, str], ...] = (
        (errors.KeyNeededError("send a key of this server as `Authorization: Bearer KEY` or as `x-api-key`"),
         path),
        (errors.ScopeError("the key 'laptop' is not for this: it needs the scope 'admin' and has chat"),
         "/api/v1/config/reload"),
        (errors.ForeignPageError("a page from elsewhere may not use a server that asks for no API key; start "
                                 "it with one"), path),
        (errors.LimitExceededError("the key 'laptop' may use 60 requests in 60 s: 60 are used, this asks for "
                                   "1; try again in 12 s", unit="requests", retry_after_s=12.0,
                                   is_quota=False, headers={}), path),
        (errors.UnknownRoleError("role", "plannr", ("planner", "qa")), "/api/v1/developer/plannr"),
        (errors.UnknownLLMError("embeded", ("embedded", "hosted")), "/api/v1/llms/embeded"),
        (errors.UnknownToolError("clasify", ("classify", "extract")), "/mcp/tools/clasify"),
        (errors.MalformedPacketError("nested too deep", expected="at most 64 levels"), path),
        (BadParameterError("out of bounds", pointer="limit", expected="int <= 200"), "/api/v1/tasks"),
        (errors.InvalidPacketError("'task' is missing", pointer="/payload/task", expected="string"), path),
        (errors.IdempotencyConflictError("order-4711", TASK_ID), path),
        (errors.IntakeFullError(1000, 12.0), path),
        (errors.ShuttingDownError(), path),
        (errors.TaskNotFoundError(TASK_ID), task),
        (errors.TaskArchivedError(TASK_ID, "/srv/state/archive/2026-10.jsonl.gz"), task),
        (errors.TaskLiveError(TASK_ID, "it is working; cancel it first"), task),
        (errors.InvalidTransitionError(TASK_ID, "it has ended (completed)"), f"{task}/cancel"),
        (errors.TaskConflictError(TASK_ID, expected=4, actual=5), f"{task}/feedback"),
        (errors.StoreFullError("no space is left in the state folder"), path),
        (errors.StoreError("the state folder cannot be written"), path),
        (errors.ConfigurationError("unknown LLM 'embeded'", pointer="/profiles/developer/roles/qa/llm",
                                   choices=("embedded",)), "/api/v1/config/reload"),
        (errors.NoLLMError("no LLM may serve the request", refusals={}), tool),
        (errors.ContextOverflowError("about 9000 tokens are more than every LLM's context"), tool),
        (errors.EngineRequestError("the grammar is too large", engine="embedded", status=400), tool),
        (errors.EngineBusyError("no slot is free", engine="embedded", retry_after_s=3.0), tool),
        (errors.EngineFailedError("internal error", engine="embedded", status=500), tool),
        (errors.InvalidOutputError("extract: no usable answer in 3 tries; the last: the answer was cut off "
                                   "before its JSON object ended"), tool),
    )  # fmt: skip
    examples = {problem_kind(type(exc)).slug: problem(exc, instance) for exc, instance in ours}
    for status, detail in (
        (400, "Invalid host header"),
        (404, "Not Found"),
        (405, "Method Not Allowed"),
        (413, "the body may have 8388608 bytes (server.max_body_mb)"),
        (415, "the body is declared as text/plain; send it with `Content-Type: application/json`"),
    ):
        examples[REFUSALS[status].slug] = refusal(REFUSALS[status], detail, path)
    examples[INTERNAL.slug] = refusal(INTERNAL, "the server failed; its log says more", path)
    return examples


def example_packet() -> TaskPacket:
    """A packet that ended well."""
    done, _ = _example_packets()
    return done


def _example_packets() -> tuple[TaskPacket, TaskPacket]:
    """A packet that ended and the same as it was submitted, folded as real ones are."""
    asked = TaskPacket(
        task_id=TASK_ID,
        context_id="01936f2a-7c1e-7b3a-9d55-2f4be0a1c9d8",
        profile="productivity",
        role="summarize",
        payload={"text": "A long text."},
        created_at=_AT,
    )
    submitted = fold(asked, [Submitted(at=_AT, via="rest")])
    call = LLMCall(
        llm="embedded",
        model="SmolLM2-135M-Instruct",
        source="local",
        input_tokens=112,
        output_tokens=18,
        finish_reason="stop",
        time_to_first_token_ms=41.0,
        duration_ms=390.0,
        prompt_sha256="9f2c6d4f1d3b0a58c1f0e9b7a6d5c4e3f2a1b0c9d8e7f6a5b4c3d2e1f0a9b8c7",
    )
    output = {"summary": "A text."}
    done = fold(
        submitted,
        [
            Started(at=_AT + timedelta(milliseconds=2), generation=1),
            StepStarted(
                at=_AT + timedelta(milliseconds=3),
                step=1,
                role="summarize",
                attempt=1,
                hop=Hop(on="entry", why="the task was submitted to this role"),
            ),
            StepFinished(
                at=_AT + timedelta(milliseconds=400),
                step=1,
                role="summarize",
                outcome="done",
                output=output,
                call=call,
                duration_ms=397.0,
            ),
            Completed(at=_AT + timedelta(milliseconds=401), result=output),
        ],
    )
    return done, submitted


def _example_stream(packet: TaskPacket) -> str:
    last = packet.history[-1]
    return (
        'event: snapshot\ndata: {"task_id":"' + packet.task_id + '","status":"working", ...}\n\n'
        'event: progress\ndata: {"type":"progress","step":1,"output_tokens":9, ...}\n\n'
        f"id: {last.seq}\nevent: task.completed\ndata: {msgspec.json.encode(last).decode()}\n\n"
    )


def _example_llm() -> LLMCard:
    return LLMCard(
        name="embedded",
        engine="local.llama_cpp",
        model="SmolLM2-135M-Instruct",
        source="local",
        tier="small",
        toggle=True,
        locked=False,
        capabilities=("chat", "json_schema", "tools"),
        context_tokens=4096,
        slots=2,
        in_flight=0,
        circuit="closed",
        resident=True,
        time_to_first_token_ms=41.0,
        tokens_per_s=52.0,
        failures=0,
        cost_per_million_input_usd=0.0,
        cost_per_million_output_usd=0.0,
    )


def _example_accelerator() -> AcceleratorView:
    return AcceleratorView(
        name="gpu0",
        memory_mb=16384,
        headroom_mb=512,
        external_mb=412,
        budget_mb=15460,
        used_mb=9120,
        llms=(
            MemoryView(
                llm="coder",
                engine="local.ollama",
                state="warm",
                draining=False,
                memory_mb=9120,
                basis="measured",
                held_mb=9120,
                slots=2,
                running=1,
                queued=0,
                load_s=6.4,
            ),
        ),
        queue=(
            QueuedView(
                request="gpu0.17", llm="planner", urgency="interactive", place=1, waited_s=2.5, wait_s=14.0
            ),
        ),
        recent=(
            QueueDecision(
                what="start", why="GQ-9 in memory, its turn", ago_s=1.5, llm="coder", request="gpu0.16"
            ),
        ),
        device=Gauged(device="NVIDIA GeForce RTX 5060 Ti", total_mb=16384, free_mb=6852),
    )


def _example_health(status: str) -> HealthReport:
    store = (
        Component(status="down", detail="read-only", advice="make the state folder writable")
        if status == "down"
        else Component(status="ok", detail="42 tasks")
    )
    return HealthReport(
        status="down" if status == "down" else "degraded",
        version="0.1.0",
        components={
            "store": store,
            "engines": Component(status="ok", detail="1 of 1 LLM up"),
            "gpu": Component(status="degraded", detail="none found", advice="models run on the CPU"),
        },
    )
