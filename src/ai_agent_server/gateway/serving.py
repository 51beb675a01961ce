"""What every surface does with a chat request: find its route, choose its tier, stream it, count it."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from fnmatch import fnmatchcase
from typing import Literal, get_args

import msgspec

from ai_agent_server.config.settings import Settings, roles_as_models
from ai_agent_server.core.chat import ChatDelta, ChatReply, ChatRequest, ChatUsage, Tier
from ai_agent_server.core.metrics_snapshot import Served
from ai_agent_server.core.ports import Balancer, Orchestration
from ai_agent_server.core.task_packet import TaskPacket
from ai_agent_server.errors import (
    AgentServerError,
    ContextOverflowError,
    NoLLMError,
    ScopeError,
    UnknownLLMError,
)
from ai_agent_server.gateway import _role_chat
from ai_agent_server.gateway._errors import wire_error
from ai_agent_server.gateway._pump import Pump
from ai_agent_server.gateway.answer_cache import AnswerCache, Reading
from ai_agent_server.gateway.caller import Accounts, Caller, Hold
from ai_agent_server.gateway.tiers import TierChoice, choose, is_doubtful
from ai_agent_server.llm_engines.base import JoinedStream
from ai_agent_server.load_balancer import estimate
from ai_agent_server.load_balancer.base import BalancedLLM, Source
from ai_agent_server.tracing.base import Attribute, Span, Tracer

__all__ = ("KeepAlive", "ListedModel", "Opened", "Route", "Serving", "Surface", "Whole")

AUTO = "auto"
FIRST_BYTE_S = 1.0
"""A client that waits for a model to load hears of it within a second."""
HEADER_CHARS = 300

Surface = Literal["chat", "responses", "messages", "embeddings", "tools", "mcp"]
ModelKind = Literal["llm", "tier", "role", "auto"]


class KeepAlive(msgspec.Struct, frozen=True):
    """Nothing came for a while; the client should hear that the answer is still awaited."""


class ListedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A name that `model` may have."""

    id: str
    kind: ModelKind
    owned_by: str
    context_tokens: int | None = None
    tier: Tier | None = None


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's name means."""

    model: str
    """The name itself; where it was an alias, what that stands for."""
    kind: ModelKind
    tier: Tier | None = None
    """The tier that it names, or that of the LLM that it names."""


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that is complete."""

    id: str
    model: str
    """Who answered: the LLM's name, or the role's."""
    reply: ChatReply
    headers: dict[str, str]


class Serving:
    """The way of a chat request through the gateway, the same for every surface.

    `open` and `whole` raise `UnknownLLMError`, `ScopeError`, `LimitExceededError`,
    `ContextOverflowError` (also one that can be foreseen), `NoLLMError`, `EngineError`s and, for a role,
    what `Orchestration.submit` raises. Whatever happens, what was used is counted, once.
    """

    def __init__(
        self,
        *,
        llm: BalancedLLM,
        balancer: Balancer,
        orchestration: Orchestration,
        accounts: Accounts,
        cache: AnswerCache,
        settings: Callable[[], Settings],
        observe: Callable[[Served], None],
        price: Callable[[str, ChatUsage], float],
        tracer: Tracer | None,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        """`clock` is monotonic, in seconds; `price` answers US dollars for the usage of an LLM."""
        self._llm, self._balancer, self._orchestration = llm, balancer, orchestration
        self._accounts, self._cache, self._settings = accounts, cache, settings
        self._observe, self._price, self._clock, self._new_id = observe, price, clock, new_id
        self._tracer = tracer

    def models(self, caller: Caller | None = None) -> tuple[ListedModel, ...]:
        """Every name that `model` may have for `caller`, from what is known: no engine is asked."""
        allowed = caller.allowed_llms if caller is not None else ()
        llms = tuple(
            ListedModel(
                id=view.name,
                kind="llm",
                owned_by=view.source,
                context_tokens=view.context_tokens,
                tier=view.tier,
            )
            for view in self._balancer.views()
            if view.toggle and (not allowed or view.name in allowed)
        )
        routes = (
            ListedModel(id=AUTO, kind="auto", owned_by="balancer"),
            *(ListedModel(id=tier, kind="tier", owned_by="balancer", tier=tier) for tier in get_args(Tier)),
        )
        may_run = caller is None or _may_run_roles(caller)
        roles = roles_as_models(self._settings()) if may_run else ()
        known = {model.id for model in llms}
        return (
            *llms,
            *(route for route in routes if route.id not in known),
            *(ListedModel(id=role, kind="role", owned_by="orchestration") for role in roles),
        )

    def route(self, model: str, caller: Caller | None = None) -> Route:
        """What the name `model` means. Raises `UnknownLLMError` with the names that `caller` may see."""
        settings = self._settings()
        found = _route(model, settings)
        if found is None:
            for pattern, stands_for in settings.gateway.aliases.items():
                if fnmatchcase(model, pattern):
                    found = _route(stands_for, settings)
                    break
        if found is None:
            raise UnknownLLMError(model[:100], tuple(listed.id for listed in self.models(caller)))
        return found

    async def open(
        self,
        model: str,
        request: ChatRequest,
        caller: Caller,
        *,
        tier: Tier | None = None,
        surface: Surface = "chat",
        started_s: float | None = None,
        idempotency_key: str | None = None,
    ) -> "Opened":
        """Begin to answer: returns with the first piece there, or after a second without one.

        An error that comes within that second is raised; a later one comes out of `Opened.deltas`.
        """
        exchange = await self._begin(
            model,
            request,
            caller,
            tier=tier,
            surface=surface,
            started_s=started_s,
            idempotency_key=idempotency_key,
        )
        opened = Opened(exchange, self._counted(exchange), self._settings().gateway.keep_alive_s)
        try:
            await opened.begun()
        except BaseException:
            await opened.aclose()
            raise
        return opened

    async def whole(
        self,
        model: str,
        request: ChatRequest,
        caller: Caller,
        *,
        tier: Tier | None = None,
        surface: Surface = "chat",
        started_s: float | None = None,
        idempotency_key: str | None = None,
    ) -> Whole:
        """The whole answer. Streamed from the engine all the same: to be cancelled frees its slot at once."""
        exchange = await self._begin(
            model,
            request,
            caller,
            tier=tier,
            surface=surface,
            started_s=started_s,
            idempotency_key=idempotency_key,
        )
        async with aclosing(self._counted(exchange)) as deltas:
            async for _ in deltas:
                pass
        return Whole(
            id=exchange.id,
            model=exchange.model,
            reply=exchange.joined.reply(),
            headers=exchange.headers(),
        )

    async def count(self, model: str, request: ChatRequest, caller: Caller) -> int:
        """The prompt's tokens: by the LLM that `model` would lead to where it can count, else estimated.

        Raises `UnknownLLMError`.
        """
        route = self.route(model, caller)
        estimated = estimate.input_tokens(request)
        if route.kind == "role":
            return estimated
        caller = self._accounts.placed(caller, request)
        choice = choose(
            request,
            input_tokens=estimated,
            asked=route.tier if route.kind == "tier" else None,
            llm_tier=route.tier if route.kind == "llm" else None,
            settings=self._settings().gateway.tiers,
        )
        counted = await self._llm.count(_routed(request, route, choice, caller, named_tier=None))
        return estimated if counted is None else counted

    def now_s(self) -> float:
        """The clock that `started_s` is on."""
        return self._clock()

    # One request

    async def _begin(
        self,
        model: str,
        request: ChatRequest,
        caller: Caller,
        *,
        tier: Tier | None,
        surface: Surface,
        started_s: float | None,
        idempotency_key: str | None,
    ) -> "Exchange":
        now_s = self._clock()
        route = self.route(model, caller)
        if route.kind == "role" and not _may_run_roles(caller):
            raise ScopeError(f"this key may not run tasks, and {route.model!r} is a role")
        if route.kind == "llm" and caller.allowed_llms and route.model not in caller.allowed_llms:
            raise ScopeError(f"this key may not use {route.model!r}")
        caller = self._accounts.placed(caller, request)
        input_tokens = estimate.input_tokens(request)
        limits = self._settings().gateway.tiers
        if route.kind == "auto" and tier is None and is_doubtful(request, input_tokens, limits):
            small = TierChoice(tier="small", reason="", max_tokens=request.max_tokens)
            asked = _routed(request, route, small, caller, named_tier=None)
            input_tokens = await self._llm.count(asked) or input_tokens
        choice = choose(
            request,
            input_tokens=input_tokens,
            asked=tier or (route.tier if route.kind == "tier" else None),
            llm_tier=route.tier if route.kind == "llm" else None,
            settings=limits,
        )
        exchange = Exchange(
            request_id=self._new_id(),
            surface=surface,
            route=route,
            choice=choice,
            caller=caller,
            request=_routed(request, route, choice, caller, named_tier=tier),
            input_tokens=input_tokens,
            started_s=now_s if started_s is None else started_s,
            idempotency_key=idempotency_key,
            clock=self._clock,
            limits=self._accounts.headers,
        )
        is_task = route.kind == "role"  # whose steps are counted one by one
        if not is_task:
            exchange.reading = self._cache.reading(exchange.request, caller)
        is_free = is_task or (exchange.reading is not None and exchange.reading.is_kept)
        exchange.hold = self._accounts.reserve(
            caller,
            tokens=0 if is_free else input_tokens + (choice.max_tokens or estimate.OUTPUT_TOKENS),
            tier=None if is_task else choice.tier,
        )
        if self._tracer is not None:
            exchange.go_on_in(
                self._tracer.begin(
                    f"{exchange.operation} {route.model}",
                    kind="server",
                    parent=caller.traceparent,
                    attributes=exchange.described(),
                )
            )
        return exchange

    async def _counted(self, exchange: "Exchange") -> AsyncGenerator[ChatDelta, None]:
        """The answer's deltas; however it ends, it is charged and told to the metrics."""
        status, shown = "left", False
        try:
            async with aclosing(self._source(exchange)) as deltas:
                async for delta in deltas:
                    exchange.add(delta)
                    shown = True
                    yield delta
            status = "ok"
        except NoLLMError as exc:
            foreseen = None if shown else _foreseen_overflow(exc, exchange)
            status = wire_error(foreseen or exc).code or "failed"
            if foreseen is not None:
                raise foreseen from exc
            raise
        except AgentServerError as exc:
            status = wire_error(exc).code or "failed"
            raise
        except Exception:
            status = "failed"
            raise
        finally:
            self._settle(exchange, status)

    def _source(self, exchange: "Exchange") -> AsyncGenerator[ChatDelta, None]:
        if exchange.route.kind == "role":
            return self._task(exchange)
        if exchange.reading is not None:
            return exchange.reading.stream(
                lambda sent: self._llm.stream(exchange.request, sent=sent), sent=exchange.sent
            )
        return self._llm.stream(exchange.request, sent=exchange.sent)

    def _task(self, exchange: "Exchange") -> AsyncGenerator[ChatDelta, None]:
        profile_name, _, role_name = exchange.route.model.partition("/")
        profile = self._settings().profiles[profile_name]
        task = _role_chat.RoleTask(
            profile=profile_name,
            role=role_name,
            schema=profile.roles[role_name].payload_schema or profile.payload_schema,
            privacy=exchange.request.route.privacy,
            sender=exchange.caller.sender,
            idempotency_key=exchange.idempotency_key,
        )
        return _role_chat.stream(self._orchestration, exchange.request, task, exchange.saw)

    def _settle(self, exchange: "Exchange", status: str) -> None:
        if status == "left":
            exchange.leave()
        joined, ended_s = exchange.joined, self._clock()
        told = exchange.usage()
        # What another request paid for, or one before, is told as it was and costs nothing.
        usage = told if exchange.pays else ChatUsage()
        cost_usd = self._price(joined.llm, usage) if joined.llm else exchange.task_cost_usd
        is_task = exchange.route.kind == "role"  # whose steps were charged as they ended
        self._accounts.charge(
            exchange.caller,
            ChatUsage() if is_task else usage,
            llm=joined.llm,
            gpu_s=exchange.slot_s(ended_s) if exchange.pays else 0.0,
            cost_usd=0.0 if is_task else cost_usd,
            hold=exchange.hold,
        )
        is_hit = exchange.reading is not None and not exchange.pays
        if exchange.span is not None:
            exchange.span.add(exchange.answered(told))
            exchange.span.end("" if status in {"ok", "left"} else status)
        self._observe(
            Served(
                surface=exchange.surface,
                tier=exchange.choice.tier,
                llm=joined.llm,
                source=joined.source,
                status=status,
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
                cost_usd=cost_usd,
                is_task=is_task,
                cache="" if exchange.reading is None else "hit" if is_hit else "miss",
                saved_tokens=told.input_tokens + told.output_tokens if is_hit and status == "ok" else 0,
                duration_ms=1000 * (ended_s - exchange.started_s),
                time_to_first_token_ms=exchange.first_token_ms(),
                overhead_ms=exchange.overhead_ms(),
            )
        )


class Exchange:
    """One request from its acceptance to its end, and what is known of the answer so far."""

    def __init__(
        self,
        *,
        request_id: str,
        surface: Surface,
        route: Route,
        choice: TierChoice,
        caller: Caller,
        request: ChatRequest,
        input_tokens: int,
        started_s: float,
        idempotency_key: str | None,
        clock: Callable[[], float],
        limits: Callable[[Caller], dict[str, str]],
    ) -> None:
        self.id, self.surface, self.route, self.choice = request_id, surface, route, choice
        self.caller, self.request, self.input_tokens = caller, request, input_tokens
        self.started_s, self.idempotency_key = started_s, idempotency_key
        self.hold: Hold | None = None
        self.reading: Reading | None = None
        """Its way through the cache, where it takes one."""
        self.span: Span | None = None
        self.joined = JoinedStream()
        self.task_id = ""
        self.task_cost_usd = 0.0
        self._clock, self._limits = clock, limits
        self._sent_to: tuple[str, Source] | None = None
        self._sent_s = 0.0
        self._first_s: float | None = None
        self._engine_s = self._queued_s = 0.0
        self._pieces = 0

    @property
    def model(self) -> str:
        """Who answers: the LLM's name as soon as it is known, or the role's."""
        return self.joined.llm or self.route.model

    @property
    def operation(self) -> str:
        """What it is in OpenTelemetry's words."""
        return "invoke_agent" if self.route.kind == "role" else "chat"

    def go_on_in(self, span: Span) -> None:
        """Whoever is asked for this request is asked in the trace of `span`."""
        self.span = span
        self.request = msgspec.structs.replace(self.request, traceparent=span.traceparent)

    def described(self) -> dict[str, Attribute]:
        """What a trace is told of the request: never what it says."""
        return {
            "gen_ai.operation.name": self.operation,
            "gen_ai.provider.name": "ai_agent_server",
            "gen_ai.request.model": self.route.model,
            "ai_agent_server.request_id": self.id,
            "ai_agent_server.surface": self.surface,
            "ai_agent_server.tier": self.choice.tier,
            **({"ai_agent_server.key": self.caller.key} if self.caller.key else {}),
            **({"ai_agent_server.project": self.caller.project} if self.caller.project else {}),
        }

    def answered(self, usage: ChatUsage) -> dict[str, Attribute]:
        """What a trace is told of the answer."""
        finish_reason = self.joined.finish_reason
        return {
            "gen_ai.usage.input_tokens": usage.input_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            **({"gen_ai.response.finish_reasons": (finish_reason,)} if finish_reason else {}),
            **({"ai_agent_server.llm": self.joined.llm} if self.joined.llm else {}),
            **({"ai_agent_server.task_id": self.task_id} if self.task_id else {}),
            **({"ai_agent_server.cache": self.reading.outcome} if self.reading is not None else {}),
        }

    def sent(self, llm: str, source: Source) -> None:
        """The engine of `llm` has the request now."""
        self._sent_to, self._sent_s = (llm, source), self._clock()

    def leave(self) -> None:
        """The client left. An engine that had the request has read the prompt, though it had said nothing."""
        if self._first_s is None and self._sent_to is not None:
            self.joined.llm, self.joined.source = self._sent_to
            self.joined.usage = ChatUsage(input_tokens=self.input_tokens)

    @property
    def pays(self) -> bool:
        """Whether an LLM worked for this request. To be asked at its end."""
        return self.reading is None or self.reading.pays

    def add(self, delta: ChatDelta) -> None:
        """The next piece of the answer."""
        if self._first_s is None:
            self._first_s = self._clock()
            self._engine_s, self._queued_s = delta.engine_ms / 1000, delta.queued_ms / 1000
        self._pieces += 1
        self.joined.add(delta)

    def saw(self, packet: TaskPacket) -> None:
        """The role's task as it became."""
        self.task_id, self.task_cost_usd = packet.task_id, packet.usage.cost_usd
        self.joined.usage = ChatUsage(
            input_tokens=packet.usage.input_tokens, output_tokens=packet.usage.output_tokens
        )

    def usage(self) -> ChatUsage:
        """The tokens as the engine counted them; of an answer that was broken off, about how many it took."""
        if self.joined.usage != ChatUsage() or self._first_s is None or self.route.kind == "role":
            return self.joined.usage
        return ChatUsage(input_tokens=self.input_tokens, output_tokens=self._pieces)

    def slot_s(self, ended_s: float) -> float:
        """For how long a slot of a local LLM was taken."""
        if self.joined.source != "local":
            return 0.0
        if self._first_s is None:
            return ended_s - self._sent_s
        return ended_s - self._first_s + self._engine_s

    def first_token_ms(self) -> float | None:
        """From the request to its first token, None before that."""
        return None if self._first_s is None else 1000 * (self._first_s - self.started_s)

    def overhead_ms(self) -> float | None:
        """What of that was our own work; None before the first token, and for a task."""
        if self._first_s is None or self.route.kind == "role":
            return None
        return max(0.0, 1000 * (self._first_s - self.started_s - self._engine_s - self._queued_s))

    def headers(self) -> dict[str, str]:
        """What every answer tells beside its body."""
        first_ms = self.first_token_ms()
        taken_ms = 1000 * (self._clock() - self.started_s) if first_ms is None else first_ms
        headers = {
            "x-request-id": self.id,
            "openai-processing-ms": str(round(taken_ms)),
            "X-Tier": self.choice.tier,
            "X-Tier-Reason": self.choice.reason,
        }
        if self.joined.llm:
            headers["X-LLM"] = self.joined.llm
        if self.joined.decision is not None:
            headers["X-Routing-Reason"] = _header_text(self.joined.decision.reason)
        overhead_ms = self.overhead_ms()
        if overhead_ms is not None:
            headers["X-Overhead-Ms"] = f"{overhead_ms:.2f}"
        if self.task_id:
            headers["X-Task-Id"] = self.task_id
        if self.reading is not None:
            headers["X-Cache"] = self.reading.outcome
            if self.reading.outcome == "hit":
                headers["Age"] = str(int(self.reading.age_s))
        headers.update(self._limits(self.caller))
        return headers


class Opened:
    """An answer that began, or is still awaited. Closing `deltas` frees the engine's slot at once."""

    def __init__(
        self, exchange: Exchange, source: AsyncGenerator[ChatDelta, None], keep_alive_s: float
    ) -> None:
        self._exchange = exchange
        self._pump = Pump(source)
        self._keep_alive_s = keep_alive_s
        self._is_awaited = False
        self.deltas: AsyncGenerator[ChatDelta | KeepAlive, None] = self._deltas()
        """Raises what the engine raises after the first token; ends well only after a finish_reason."""

    @property
    def id(self) -> str:
        """The request's id."""
        return self._exchange.id

    @property
    def model(self) -> str:
        """Who answers: what was asked for until an LLM has begun, then its name."""
        return self._exchange.model

    @property
    def headers(self) -> dict[str, str]:
        """What is known now: without `X-LLM` while no LLM has begun."""
        return self._exchange.headers()

    @property
    def usage(self) -> ChatUsage:
        """The tokens so far."""
        return self._exchange.usage()

    async def begun(self) -> None:
        """Wait for the first piece, a second at most. Raises what came instead of it."""
        self._is_awaited = not await self._pump.wait(min(FIRST_BYTE_S, self._keep_alive_s))
        if not self._is_awaited:
            self._pump.look()

    async def aclose(self) -> None:
        """End the answer. May be called twice."""
        await self.deltas.aclose()
        # A generator that was never started does not run its `finally`.
        await self._pump.aclose()

    async def _deltas(self) -> AsyncGenerator[ChatDelta | KeepAlive, None]:
        try:
            if self._is_awaited:
                yield KeepAlive()
            while True:
                while not await self._pump.wait(self._keep_alive_s):
                    yield KeepAlive()
                delta = self._pump.take()
                if delta is None:
                    return
                yield delta
        finally:
            await self._pump.aclose()


def _route(model: str, settings: Settings) -> Route | None:
    llm = settings.llms.get(model)
    if llm is not None:
        return Route(model=model, kind="llm", tier=llm.tier)
    match model:
        case "small" | "main":
            return Route(model=model, kind="tier", tier=model)
        case "auto":
            return Route(model=model, kind="auto")
        case _:
            profile, _, role = model.partition("/")
            there = settings.profiles.get(profile)
            return Route(model=model, kind="role") if there is not None and role in there.roles else None


def _routed(
    request: ChatRequest, route: Route, choice: TierChoice, caller: Caller, *, named_tier: Tier | None
) -> ChatRequest:
    """`request` with the balancer's hints and the tier's limit."""
    hints = msgspec.structs.replace(
        request.route,
        llm=route.model if route.kind == "llm" else None,
        tier=named_tier if route.kind == "llm" else choice.tier,
        prefer=caller.prefer,
        allowed=caller.allowed_llms,
        privacy="local" if "local" in (caller.privacy, request.route.privacy) else "any",
        urgency=caller.priority,
        key=caller.key,
    )
    return msgspec.structs.replace(
        request, max_tokens=choice.max_tokens, route=hints, traceparent=caller.traceparent
    )


def _may_run_roles(caller: Caller) -> bool:
    return "tasks" in caller.scopes


def _foreseen_overflow(error: NoLLMError, exchange: Exchange) -> ContextOverflowError | None:
    """What a client understands, where nothing but the prompt's length keeps every LLM from serving."""
    rules = {llm: why.partition(":")[0] for llm, why in error.refusals.items()}
    short = [llm for llm, rule in rules.items() if rule == "LB-6 context"]
    if not short or any(rule in {"LB-8 tried", "LB-9 circuit"} for rule in rules.values()):
        return None
    return ContextOverflowError(
        f"the messages come to about {exchange.input_tokens} tokens, more than the maximum context length "
        f"of every LLM that may serve ({'; '.join(f'{llm}: {error.refusals[llm]}' for llm in short)})"
    )


def _header_text(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()[:HEADER_CHARS]
