"""The one exchange with an LLM that a step may have: routed, bounded, counted, told of."""

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import aclosing

import msgspec

from ai_agent_server.core.chat import ChatDelta, ChatReply, ChatRequest, ChatUsage, RouteHints
from ai_agent_server.core.ports import Grant, Senders
from ai_agent_server.core.task_packet import (
    Limits,
    LLMCall,
    Progress,
    TaskPacket,
    Usage,
)
from ai_agent_server.errors import AgentServerError, EngineProtocolError, NoLLMError
from ai_agent_server.llm_engines.base import JoinedStream
from ai_agent_server.load_balancer.base import SendingLLM, Source
from ai_agent_server.load_balancer.estimate import input_tokens

PROGRESS_EVERY_S = 0.25
CUT = "error"
"""The finish_reason that is recorded for a call that gave no whole answer."""
SLACK_PIECES = 16
"""What an answer may have beyond its tokens before it is cut: an opening or an end that are no token."""
MAX_ANSWER_CHARS = 2_000_000
"""More than any agent reads. An answer that has grown beyond it will not end by itself."""


class BudgetSpentError(AgentServerError):
    """A limit of the task is used up; `outcome` is what its step ends with."""

    def __init__(self, outcome: str) -> None:
        self.outcome = outcome
        super().__init__(outcome)


def spent(usage: Usage, limits: Limits) -> str | None:
    """The outcome of a step that may not ask an LLM any more; None while it may."""
    if usage.calls >= limits.calls:
        return "budget_calls"
    if usage.tokens >= limits.tokens:
        return "budget_tokens"
    if limits.cost_usd is not None and usage.cost_usd >= limits.cost_usd > 0:
        return "budget_cost"
    return None


def _chars(delta: ChatDelta) -> int:
    chars = len(delta.text) + len(delta.reasoning)
    for call in delta.tool_calls:
        chars += len(call.arguments)
    return chars


class Anybody:
    """Senders who are bound by nothing but their tasks' own limits."""

    def admit(self, packet: TaskPacket, hints: RouteHints, *, tokens: int) -> Grant:  # noqa: ARG002
        """See `Senders.admit`."""
        return _Unbound(hints)


class _Unbound:
    def __init__(self, hints: RouteHints) -> None:
        self.hints = hints

    def charge(self, call: LLMCall | None) -> None:
        """Nobody counts it."""

    def withdraw(self) -> None:
        """Nobody counted it."""


class Exchange:
    """What an agent's `chat` is. `call` is the record of it, also of one that broke midway."""

    def __init__(
        self,
        *,
        packet: TaskPacket,
        step: int,
        role: str,
        route: Callable[[], RouteHints],
        max_tokens: int,
        llm: SendingLLM,
        senders: Senders,
        price: Callable[[str, ChatUsage], float],
        monotonic: Callable[[], float],
        tell: Callable[[Progress], None],
    ) -> None:
        """`route` says where the role's requests go, by the configuration as it is then."""
        self._packet, self._step, self._role = packet, step, role
        self._route, self._max_tokens = route, max_tokens
        self._llm, self._price, self._monotonic, self._tell = llm, price, monotonic, tell
        self._senders = senders
        self._used = False
        self._sent_to: tuple[str, Source] | None = None
        self.call: LLMCall | None = None

    async def chat(self, request: ChatRequest) -> ChatReply:
        """Ask an LLM. Raises `BudgetSpentError`, `AccessError`s, `NoLLMError` and `EngineError` children."""
        if self._used:
            raise RuntimeError("an agent may talk to an LLM once a step")
        self._used = True
        if (outcome := spent(self._packet.usage, self._packet.limits)) is not None:
            raise BudgetSpentError(outcome)
        prompt_tokens = input_tokens(request)
        while True:
            route = self._route()
            bounded, max_tokens = self._bounds(request, route, prompt_tokens)
            grant = self._senders.admit(self._packet, bounded, tokens=prompt_tokens + max_tokens)
            try:
                return await self._ask(
                    msgspec.structs.replace(request, max_tokens=max_tokens, route=grant.hints),
                    prompt_tokens,
                    max_tokens,
                )
            except NoLLMError:
                if self._route() == route:
                    raise
                # It was to go to an LLM that a reload took away: it goes where the role's requests go now.
                grant.withdraw()
            finally:
                # Also when it broke or was cut off: what was used was used.
                grant.charge(self.call)

    async def _ask(self, request: ChatRequest, prompt_tokens: int, max_tokens: int) -> ChatReply:
        digest = hashlib.sha256(msgspec.json.encode(request.messages)).hexdigest()
        joined = JoinedStream()
        began = self._monotonic()
        first_token_s, told_s, pieces, chars = 0.0, 0.0, 0, 0
        was_read = False
        try:
            async with aclosing(self._llm.stream(request, sent=self._note_sent)) as deltas:
                async for delta in deltas:
                    if pieces >= max_tokens + SLACK_PIECES and delta.finish_reason is None:
                        # The engine does not heed its bound, so the bound is kept here.
                        joined.add(ChatDelta(finish_reason="length"))
                        break
                    joined.add(delta)
                    elapsed_s = self._monotonic() - began
                    if delta.text or delta.tool_calls:
                        pieces += 1
                        first_token_s = first_token_s or elapsed_s
                    chars += _chars(delta)
                    if chars > MAX_ANSWER_CHARS:
                        raise EngineProtocolError("the answer went on beyond any bound", engine=joined.llm)
                    if elapsed_s - told_s >= PROGRESS_EVERY_S:
                        told_s = elapsed_s
                        self._progress(joined, pieces, elapsed_s)
        except asyncio.CancelledError:
            if not pieces and self._sent_to is not None:
                # Whoever had the request has read the prompt, though it had said nothing.
                joined.llm, joined.source = self._sent_to
                was_read = True
            raise
        finally:
            if was_read or pieces or joined.finish_reason is not None:
                self.call = self._record(
                    joined,
                    digest,
                    ChatUsage(input_tokens=prompt_tokens, output_tokens=pieces),
                    first_token_s,
                    self._monotonic() - began,
                )
        reply = joined.reply(
            time_to_first_token_ms=first_token_s * 1000, duration_ms=(self._monotonic() - began) * 1000
        )
        # A model that is cut in the middle of a pair leaves half of it, which is no text.
        text = reply.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return msgspec.structs.replace(reply, text=text)

    def _note_sent(self, llm: str, source: Source) -> None:
        self._sent_to = llm, source

    def _bounds(self, request: ChatRequest, route: RouteHints, prompt_tokens: int) -> tuple[RouteHints, int]:
        """Where it may go, by what is left of the task's limits, and how many tokens its answer may have."""
        used, limits = self._packet.usage, self._packet.limits
        room = limits.tokens - used.tokens - prompt_tokens
        if room < 1:
            raise BudgetSpentError("budget_tokens")
        max_tokens = min(request.max_tokens or self._max_tokens, room)
        cost_left = None if limits.cost_usd is None else max(0.0, limits.cost_usd - used.cost_usd)
        return msgspec.structs.replace(route, max_cost_usd=cost_left), max_tokens

    def _record(
        self,
        joined: JoinedStream,
        digest: str,
        counted: ChatUsage,
        first_token_s: float,
        duration_s: float,
    ) -> LLMCall:
        # An engine that broke, or was cut, told no usage: every piece is a token at least.
        usage = joined.usage if joined.usage.output_tokens else counted
        return LLMCall(
            llm=joined.llm,
            model=joined.model,
            source=joined.source,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            finish_reason=joined.finish_reason or CUT,
            time_to_first_token_ms=round(first_token_s * 1000, 3),
            duration_ms=round(duration_s * 1000, 3),
            prompt_sha256=digest,
            cost_usd=self._price(joined.llm, usage),
            decision=joined.decision,
        )

    def _progress(self, joined: JoinedStream, tokens: int, elapsed_s: float) -> None:
        self._tell(
            Progress(
                task_id=self._packet.task_id,
                step=self._step,
                role=self._role,
                llm=joined.llm,
                why=joined.decision.reason if joined.decision else "",
                output_tokens=tokens,
                elapsed_ms=elapsed_s * 1000,
            )
        )
