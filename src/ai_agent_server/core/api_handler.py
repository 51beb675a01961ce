"""The REST API: routes, authentication, problem details, event streams. It decides nothing about tasks."""

import math
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias, TypeVar

import msgspec
import structlog
from litestar import Litestar, Request, Response, delete, get, patch, post, route
from litestar.connection import ASGIConnection
from litestar.enums import MediaType
from litestar.exceptions import HTTPException
from litestar.handlers import ASGIRouteHandler, BaseRouteHandler, HTTPRouteHandler
from litestar.params import FromPath
from litestar.response.base import ASGIResponse
from litestar.types import Guard
from msgspec import UNSET

from ai_agent_server.config.settings import LLMSettings, RoleSettings, Settings, json_schema, secret
from ai_agent_server.core import api_document
from ai_agent_server.core.api_operations import Operation
from ai_agent_server.core.api_schemas import (
    INTERNAL,
    JSON,
    MAX_WAIT_S,
    PROBLEM_JSON,
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
    ProfileCard,
    ProfileList,
    RoleCard,
    SubmitQuery,
    ToggleDraft,
    problem,
    refusal,
)
from ai_agent_server.core.event_stream import EventStream
from ai_agent_server.core.metrics import Metrics
from ai_agent_server.core.packet_json import decode, decode_query
from ai_agent_server.core.ports import Balancer, HealthReport, Orchestration, ReloadReport
from ai_agent_server.core.prometheus_text import PROMETHEUS_TEXT
from ai_agent_server.core.request_body import read_body
from ai_agent_server.core.task_frames import Frame, frames
from ai_agent_server.core.task_packet import (
    FeedbackDraft,
    ForkDraft,
    StepFinished,
    TaskDraft,
    TaskPacket,
    is_task_id,
)
from ai_agent_server.errors import (
    AccessError,
    AgentServerError,
    InvalidPacketError,
    TaskNotFoundError,
    UnknownLLMError,
    UnknownRoleError,
)
from ai_agent_server.load_balancer.base import LLMView

log = structlog.get_logger(__name__)

KEEP_ALIVE_S = 15.0
WRITE_TIMEOUT_S = 30.0
MAX_HEADER_CHARS = 300
DOCS = "/api/v1/docs"

AnyRequest: TypeAlias = Request[Any, Any, Any]
T = TypeVar("T")

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_WAIT = re.compile(r"\s*wait\s*=\s*\"?(\d{1,9})\"?\s*(;.*)?", re.IGNORECASE)
_NOT_IN_A_HEADER = re.compile(r"[^\x20-\x7e]")
# Litestar adds the charset to a text by itself.
_PROMETHEUS = PROMETHEUS_TEXT.partition("; charset")[0]
_NO_STORE = {"Cache-Control": "no-store"}


def create_app(
    *,
    engine: Orchestration,
    balancer: Balancer,
    settings: Callable[[], Settings],
    health: Callable[[], Awaitable[HealthReport]],
    metrics: Metrics,
    reload: Callable[[], Awaitable[ReloadReport]],
    task_file: Callable[[str], str],
    version: str,
    guard: Guard,
    environ: Mapping[str, str] | None = None,
    keep_alive_s: float = KEEP_ALIVE_S,
    write_timeout_s: float = WRITE_TIMEOUT_S,
    more: Sequence[HTTPRouteHandler | ASGIRouteHandler] = (),
    refused: Callable[[AnyRequest, Exception], Response[bytes] | None] = lambda _request, _exc: None,
    described: Sequence[Operation] = (),
) -> Litestar:
    """The ASGI application.

    `settings` answers the configuration in force, `task_file` where a person finds a task's state.
    `environ` is where the keys of LLMs are looked for, to say whether they are set.
    `guard` lets a request in or raises an `AccessError`. `reload` raises `ConfigurationError` and
    then has changed nothing. `more` are other surfaces' routes; `refused` answers an error in the form
    of such a surface, or None where the path is none of theirs; `described` is what the API's document
    says of them.
    """
    tasks = TaskRoutes(
        engine=engine,
        settings=settings,
        task_file=task_file,
        keep_alive_s=keep_alive_s,
        write_timeout_s=write_timeout_s,
    )
    server = ServerRoutes(
        balancer=balancer,
        settings=settings,
        health=health,
        metrics=metrics,
        reload=reload,
        version=version,
        environ=environ or {},
        described=described,
    )
    handlers = [*tasks.handlers(), *server.handlers(), *more]

    def in_form(answer: Callable[[AnyRequest, Any], Response[bytes]]) -> Any:
        def handler(request: AnyRequest, exc: Exception) -> Response[bytes]:
            return refused(request, exc) or answer(request, exc)

        return handler

    async def at_the_door(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        # Litestar runs a guard that is not async in a thread, which costs more than all of its work.
        guard(connection, handler)

    return Litestar(
        # Litestar's own OPTIONS of a path knows the first method that was registered there, and only it.
        route_handlers=[*_options(handlers), *handlers],
        guards=[at_the_door],
        exception_handlers={
            AgentServerError: in_form(_on_our_error),
            HTTPException: in_form(_on_refusal),
            Exception: in_form(_on_failure),
        },
        # Bodies are bounded by the configuration in force, in `read_body`.
        request_max_body_size=None,
        openapi_config=None,
        logging_config=None,
    )


class TaskRoutes:
    """Everything below /api/v1/tasks, and the intake."""

    def __init__(
        self,
        *,
        engine: Orchestration,
        settings: Callable[[], Settings],
        task_file: Callable[[str], str],
        keep_alive_s: float,
        write_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._task_file = task_file
        self._keep_alive_s = keep_alive_s
        self._write_timeout_s = write_timeout_s

    def handlers(self) -> list[HTTPRouteHandler]:
        """The routes."""
        return [
            post("/api/v1/{profile:str}/{role:str}")(self.submit),
            get("/api/v1/tasks")(self.list),
            get("/api/v1/tasks/{task_id:str}")(self.read),
            delete("/api/v1/tasks/{task_id:str}", status_code=204)(self.delete),
            post("/api/v1/tasks/{task_id:str}/cancel", opt={"counted": False})(self.cancel),
            post("/api/v1/tasks/{task_id:str}/pause", opt={"counted": False})(self.pause),
            post("/api/v1/tasks/{task_id:str}/resume", opt={"counted": False})(self.resume),
            post("/api/v1/tasks/{task_id:str}/fork")(self.fork),
            post("/api/v1/tasks/{task_id:str}/feedback")(self.feedback),
            get("/api/v1/tasks/{task_id:str}/events")(self.events),
        ]

    async def submit(
        self, request: AnyRequest, profile: FromPath[str], role: FromPath[str]
    ) -> Response[bytes]:
        """Take a task; 202 when its file is safe, 200 when it ended in time or came before."""
        query = _query(request, SubmitQuery)
        key = _idempotency_key(request)
        is_local = _asks_for_local(request) or _caller(request).privacy == "local"
        draft = decode(await self._body(request), TaskDraft)
        _same("profile", draft.profile, profile)
        _same("role", draft.role, role)
        draft = msgspec.structs.replace(
            draft, profile=profile, role=role, privacy="local" if is_local else draft.privacy
        )
        packet, is_new = await self._engine.submit(
            draft, via="rest", idempotency_key=key, sender=_caller(request).sender
        )

        preferred = _preferred_wait_s(request)
        wait_s = preferred if query.wait is UNSET else query.wait
        if wait_s:
            packet = await self._engine.wait(packet.task_id, wait_s)
        headers = {
            "Location": f"/api/v1/tasks/{packet.task_id}",
            **self._headers(packet),
        }
        if preferred is not None and query.wait is UNSET:
            headers["Preference-Applied"] = f"wait={preferred:.0f}"
        done = packet.status.is_final or not is_new
        return _json(packet, status=200 if done else 202, headers=headers)

    async def list(self, request: AnyRequest) -> Response[bytes]:
        """A page of tasks, newest first."""
        query = _query(request, ListQuery)
        try:
            cursor = None if query.cursor is UNSET else query.cursor
            page = await self._engine.list(query.where(), limit=query.limit, cursor=cursor)
        except InvalidPacketError as exc:
            raise BadParameterError(exc.problem, pointer="cursor", expected=exc.expected) from exc
        return _json(page)

    async def read(self, request: AnyRequest, task_id: FromPath[str]) -> Response[bytes]:
        """One task, whole."""
        _query(request, NoQuery)
        packet = await self._engine.read(_checked_id(task_id))
        return _json(packet, headers=self._headers(packet))

    async def delete(self, request: AnyRequest, task_id: FromPath[str]) -> None:
        """Remove an ended task."""
        _query(request, NoQuery)
        await self._engine.delete(_checked_id(task_id))

    async def cancel(self, request: AnyRequest, task_id: FromPath[str]) -> Response[bytes]:
        """End a task now."""
        _query(request, NoQuery)
        packet = await self._engine.cancel(_checked_id(task_id))
        return _json(packet, status=200, headers=self._headers(packet))

    async def pause(self, request: AnyRequest, task_id: FromPath[str]) -> Response[bytes]:
        """Hold a task."""
        _query(request, NoQuery)
        packet = await self._engine.pause(_checked_id(task_id), via="rest")
        return _json(packet, status=200, headers=self._headers(packet))

    async def resume(self, request: AnyRequest, task_id: FromPath[str]) -> Response[bytes]:
        """Let a task go on."""
        _query(request, NoQuery)
        packet = await self._engine.resume(_checked_id(task_id), via="rest")
        return _json(packet, status=200, headers=self._headers(packet))

    async def fork(self, request: AnyRequest, task_id: FromPath[str]) -> Response[bytes]:
        """Take a task that goes on after a step of an ended one."""
        _query(request, NoQuery)
        key = _idempotency_key(request)
        is_local = _asks_for_local(request) or _caller(request).privacy == "local"
        checked = _checked_id(task_id)
        draft = decode(await self._body(request), ForkDraft)
        draft = msgspec.structs.replace(draft, privacy="local" if is_local else draft.privacy)
        packet, is_new = await self._engine.fork(
            checked, draft, via="rest", idempotency_key=key, sender=_caller(request).sender
        )
        headers = {"Location": f"/api/v1/tasks/{packet.task_id}", **self._headers(packet)}
        return _json(packet, status=202 if is_new else 200, headers=headers)

    async def feedback(self, request: AnyRequest, task_id: FromPath[str]) -> Response[bytes]:
        """Take an outside agent's report."""
        _query(request, NoQuery)
        checked = _checked_id(task_id)
        draft = decode(await self._body(request), FeedbackDraft)
        _same("task_id", draft.task_id, checked)
        packet = await self._engine.feedback(checked, draft, via="rest")
        return _json(packet, status=202, headers=self._headers(packet))

    async def events(self, request: AnyRequest, task_id: FromPath[str]) -> ASGIResponse:
        """The task's events as they happen."""
        query = _query(request, EventsQuery)
        since = _last_event_id(request)
        packet = await self._engine.read(_checked_id(task_id))
        if since is None:
            since = 0 if query.since is UNSET else query.since
        followed = self._engine.follow(packet.task_id, since=since)
        return EventStream(
            _stream(frames(packet, followed, since=since, keep_alive_s=self._keep_alive_s)),
            about={"task_id": packet.task_id},
            write_timeout_s=self._write_timeout_s,
        )

    def _headers(self, packet: TaskPacket) -> dict[str, str]:
        """Where the task is kept, and which LLM answered last and why."""
        headers = {"X-Task-File": _header_text(self._task_file(packet.task_id))}
        call = next(
            (e.call for e in reversed(packet.history) if isinstance(e, StepFinished) and e.call), None
        )
        if call is not None:
            headers["X-LLM"] = _header_text(call.llm)[:MAX_HEADER_CHARS]
            if call.decision is not None:
                headers["X-Routing-Reason"] = _header_text(call.decision.reason)[:MAX_HEADER_CHARS]
        return headers

    async def _body(self, request: AnyRequest) -> bytes:
        return await read_body(request, int(self._settings().server.max_body_mb * 1024 * 1024))


class ServerRoutes:
    """The server itself: profiles, LLMs, configuration, metrics, health, docs."""

    def __init__(
        self,
        *,
        balancer: Balancer,
        settings: Callable[[], Settings],
        health: Callable[[], Awaitable[HealthReport]],
        metrics: Metrics,
        reload: Callable[[], Awaitable[ReloadReport]],
        version: str,
        environ: Mapping[str, str],
        described: Sequence[Operation],
    ) -> None:
        self._environ = environ
        self._balancer = balancer
        self._settings = settings
        self._health = health
        self._metrics = metrics
        self._reload = reload
        self._document = api_document.document(version, described)

    def handlers(self) -> list[HTTPRouteHandler]:
        """The routes."""
        return [
            get("/api/v1/profiles")(self.profiles),
            get("/api/v1/llms")(self.llms),
            get("/api/v1/accelerators")(self.accelerators),
            patch("/api/v1/llms/{name:str}", opt={"scope": "admin"})(self.set_toggle),
            post("/api/v1/load-balancer/explain", opt={"counted": False})(self.explain),
            post("/api/v1/config/reload", opt={"scope": "admin"})(self.reload),
            get("/api/v1/metrics")(self.metrics),
            get("/metrics")(self.prometheus),
            route(["/health", "/api/v1/health"], http_method=["GET", "HEAD"], opt={"public": True})(
                self.health
            ),
            get("/")(self.front_door),
            get("/api/v1/schema/task-packet")(self.task_packet_schema),
            get("/api/v1/schema/configuration")(self.configuration_schema),
            get("/api/v1/openapi.json")(self.openapi),
            get(DOCS)(self.docs),
        ]

    async def profiles(self, request: AnyRequest) -> Response[bytes]:
        """Every profile and its roles."""
        _query(request, NoQuery)
        return _json(ProfileList(items=_profile_cards(self._settings())))

    async def llms(self, request: AnyRequest) -> Response[bytes]:
        """Every configured LLM."""
        _query(request, NoQuery)
        return _json(LLMList(items=self._cards()))

    async def accelerators(self, request: AnyRequest) -> Response[bytes]:
        """Every accelerator: its memory, its queue, its last decisions."""
        _query(request, NoQuery)
        return _json(AcceleratorList(items=self._balancer.accelerators()))

    async def set_toggle(self, request: AnyRequest, name: FromPath[str]) -> Response[bytes]:
        """Switch an LLM on or off."""
        _query(request, NoQuery)
        draft = decode(await self._body(request), ToggleDraft)
        await self._balancer.set_toggle(name, draft.toggle)
        cards = self._cards()
        for card in cards:
            if card.name == name:
                return _json(card)
        raise UnknownLLMError(name, tuple(card.name for card in cards))

    async def explain(self, request: AnyRequest) -> Response[bytes]:
        """Which LLM would serve, and why."""
        _query(request, NoQuery)
        draft = decode(await self._body(request), ExplainDraft)
        settings = self._settings()
        role = _role_asked(draft, settings)
        if role is not None and role.llm is not None and _stays_here(settings.llms.get(role.llm)):
            role = msgspec.structs.replace(role, privacy="local")
        return _json(self._balancer.explain(draft.requirements(role)), status=200)

    async def reload(self, request: AnyRequest) -> Response[bytes]:
        """Read the configuration again."""
        _query(request, NoQuery)
        return _json(await self._reload(), status=200)

    async def metrics(self, request: AnyRequest) -> Response[bytes]:
        """The metrics as JSON."""
        _query(request, NoQuery)
        return Response(self._metrics.encode(), media_type=JSON, headers=_NO_STORE)

    async def prometheus(self) -> Response[bytes]:
        """The same metrics for Prometheus."""
        return Response(
            self._metrics.prometheus(),
            media_type=_PROMETHEUS,
            headers=_NO_STORE,
        )

    async def health(self) -> Response[bytes]:
        """Whether the server can work."""
        report = await self._health()
        return _json(report, status=503 if report.status == "down" else 200, headers=_NO_STORE)

    async def task_packet_schema(self) -> Response[bytes]:
        """The JSON Schema of the task packet."""
        return Response(msgspec.json.encode(api_document.task_packet_schema()), media_type=JSON)

    async def configuration_schema(self) -> Response[bytes]:
        """The JSON Schema of configuration.json."""
        return Response(msgspec.json.encode(json_schema()), media_type=JSON)

    async def openapi(self) -> Response[bytes]:
        """This API, described."""
        return Response(msgspec.json.encode(self._document), media_type=JSON)

    async def front_door(self) -> Response[None]:
        """Who comes with a browser is led to the docs."""
        return Response(None, status_code=303, headers={"Location": DOCS})

    async def docs(self) -> Response[str]:
        """This API, for people."""
        return Response(api_document.page(self._document), media_type=MediaType.HTML)

    async def _body(self, request: AnyRequest) -> bytes:
        return await read_body(request, int(self._settings().server.max_body_mb * 1024 * 1024))

    def _cards(self) -> tuple[LLMCard, ...]:
        settings = self._settings()
        return tuple(_llm_card(view, settings, self._environ) for view in self._balancer.views())


async def _stream(told: AsyncGenerator[Frame]) -> AsyncGenerator[bytes]:
    """The frames as server-sent events."""
    async with aclosing(told) as coming:
        async for frame in coming:
            match frame.event:
                case "keep-alive":
                    yield b": keep-alive\n\n"
                case "cut":
                    yield b": cut; come back with Last-Event-ID\n\n"
                case name:
                    place = b"id: %d\n" % frame.id if frame.id is not None else b""
                    yield b"%sevent: %s\ndata: %s\n\n" % (place, name.encode(), bytes(frame.data))


def _options(handlers: Sequence[HTTPRouteHandler | ASGIRouteHandler]) -> list[HTTPRouteHandler]:
    methods: dict[str, set[str]] = {}
    for handler in handlers:
        if not isinstance(handler, HTTPRouteHandler):
            continue
        for path in handler.paths:
            methods.setdefault(path, {"OPTIONS"}).update(handler.http_methods)

    def answering(allowed: str) -> Callable[[], Awaitable[Response[None]]]:
        async def options() -> Response[None]:
            return Response(None, status_code=204, headers={"Allow": allowed})

        return options

    return [
        route(path, http_method=["OPTIONS"])(answering(", ".join(sorted(allowed))))
        for path, allowed in methods.items()
    ]


def _query(request: AnyRequest, kind: type[T]) -> T:
    try:
        return decode_query(request.query_params.multi_items(), kind)
    except InvalidPacketError as exc:
        raise BadParameterError(
            exc.problem, pointer=exc.pointer.removeprefix("/"), expected=exc.expected, choices=exc.choices
        ) from exc


def _idempotency_key(request: AnyRequest) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise BadParameterError(
            "not an idempotency key", pointer="Idempotency-Key", expected="1 to 255 visible ASCII characters"
        )
    return key


def _caller(request: AnyRequest) -> Any:
    """Who calls, as the guard has found."""
    return request.scope["state"]["caller"]


def _asks_for_local(request: AnyRequest) -> bool:
    """`X-Privacy`. Whoever says it twice is taken at the stricter word."""
    given = {value.strip().lower() for value in request.headers.getall("x-privacy", [])}
    if not given <= {"any", "local"}:
        raise BadParameterError("no such privacy", pointer="X-Privacy", choices=("any", "local"))
    return "local" in given


def _role_asked(draft: ExplainDraft, settings: Settings) -> RoleSettings | None:
    """The role that a request is explained for."""
    if draft.profile is None and draft.role is None:
        return None
    if draft.profile is None or draft.role is None:
        missing = "profile" if draft.profile is None else "role"
        raise InvalidPacketError(f"{missing!r} is missing", pointer=f"/{missing}", expected="string")
    profile = settings.profiles.get(draft.profile)
    if profile is None:
        raise UnknownRoleError("profile", draft.profile[:80], tuple(settings.profiles))
    role = profile.roles.get(draft.role)
    if role is None:
        raise UnknownRoleError("role", draft.role[:80], tuple(profile.roles))
    return role


def _stays_here(llm: LLMSettings | None) -> bool:
    """Whether a role that is assigned to `llm` never leaves this machine."""
    return llm is not None and llm.locked and llm.source == "local"


def _last_event_id(request: AnyRequest) -> int | None:
    given = request.headers.get("last-event-id")
    if given is None:
        return None
    if not re.fullmatch(r"\d{1,15}", given, re.ASCII):
        raise BadParameterError("no event has such an id", pointer="Last-Event-ID", expected="a whole number")
    return int(given)


def _preferred_wait_s(request: AnyRequest) -> float | None:
    """`Prefer: wait=N` (RFC 7240), cut to what is allowed; a preference that is unreadable is none."""
    for preference in ",".join(request.headers.getall("prefer", [])).split(","):
        if match := _WAIT.fullmatch(preference):
            return min(float(match[1]), MAX_WAIT_S)
    return None


def _checked_id(task_id: str) -> str:
    """`task_id` where it is one; nothing else ever gets near a file's name."""
    if not is_task_id(task_id):
        raise TaskNotFoundError(task_id[:64])
    return task_id


def _same(name: str, in_body: str | None, in_path: str) -> None:
    if in_body is not None and in_body != in_path:
        raise InvalidPacketError(
            f"the body says {in_body[:80]!r}, the path {in_path[:80]!r}",
            pointer=f"/{name}",
            expected="nothing, or the same as the path",
        )


def _profile_cards(settings: Settings) -> tuple[ProfileCard, ...]:
    return tuple(
        ProfileCard(
            name=name,
            description=profile.description,
            routes=profile.workflow.routes,
            roles=tuple(
                RoleCard(
                    name=role_name,
                    endpoint=f"/api/v1/{name}/{role_name}",
                    description=role.description,
                    agent=role.agent,
                    llm=role.llm,
                    tier=role.tier,
                    prefer=role.prefer,
                    privacy=role.privacy,
                    payload_schema=role.payload_schema or profile.payload_schema,
                    result_schema=role.result_schema,
                )
                for role_name, role in profile.roles.items()
            ),
        )
        for name, profile in settings.profiles.items()
    )


def _llm_card(view: LLMView, settings: Settings, environ: Mapping[str, str]) -> LLMCard:
    configured = settings.llms.get(view.name)
    needs_key = configured is not None and configured.api_key is not None
    return LLMCard(
        name=view.name,
        engine=configured.engine if configured else None,
        model=configured.model if configured else None,
        source=view.source,
        tier=view.tier,
        has_key=bool(secret(configured.api_key, environ)) if configured and needs_key else None,
        toggle=view.toggle,
        locked=view.locked,
        capabilities=tuple(sorted(view.capabilities)),
        context_tokens=view.context_tokens,
        slots=view.slots,
        in_flight=view.in_flight,
        circuit=view.circuit,
        resident=view.resident,
        time_to_first_token_ms=view.time_to_first_token_ms,
        tokens_per_s=view.tokens_per_s,
        failures=view.failures,
        cost_per_million_input_usd=view.cost_per_million_input_usd,
        cost_per_million_output_usd=view.cost_per_million_output_usd,
    )


def _json(
    value: object, *, status: int | None = None, headers: dict[str, str] | None = None
) -> Response[bytes]:
    return Response(msgspec.json.encode(value), media_type=JSON, status_code=status, headers=headers or {})


def _header_text(text: str) -> str:
    """`text` as a header can carry it: a folder's name may hold anything."""
    return _NOT_IN_A_HEADER.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _on_our_error(request: AnyRequest, exc: AgentServerError) -> Response[bytes]:
    answer = problem(exc, request.scope["path"])
    if answer.status == INTERNAL.status:
        return _on_failure(request, exc)
    headers = dict(exc.headers) if isinstance(exc, AccessError) else {}
    if answer.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(answer.retry_after_s)))
    return _problem(answer, headers)


def _on_refusal(request: AnyRequest, exc: HTTPException) -> Response[bytes]:
    kind = REFUSALS.get(exc.status_code)
    if kind is None:
        return _on_failure(request, exc)
    return _problem(refusal(kind, exc.detail, request.scope["path"]), exc.headers)


def _on_failure(request: AnyRequest, exc: Exception) -> Response[bytes]:
    log.error("api.failed", method=request.method, path=request.scope["path"], exc_info=exc)
    return _problem(refusal(INTERNAL, "the server failed; its log says more", request.scope["path"]))


def _problem(answer: Problem, headers: dict[str, str] | None = None) -> Response[bytes]:
    return Response(
        msgspec.json.encode(answer),
        media_type=PROBLEM_JSON,
        status_code=answer.status,
        headers=headers or {},
    )
