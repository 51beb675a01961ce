"""One call of an engine: what of its deltas goes on, what they show of it, and what a trace is told."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec

from ai_agent_server.core.chat import ChatDelta, ChatRequest, ChatUsage, FinishReason
from ai_agent_server.errors import EngineError, EngineProtocolError
from ai_agent_server.load_balancer.admission import Lease
from ai_agent_server.load_balancer.standing import Standing
from ai_agent_server.tracing.base import Attribute, Span, Tracer


class Call:
    """A `with` around an engine's stream; a span of `tracer` as long as it lasts.

    What comes before the first token is held back: it binds nobody yet. `first_token` is told when
    that came.
    """

    def __init__(
        self,
        lease: Lease,
        request: ChatRequest,
        *,
        queued_s: float,
        clock: Callable[[], float],
        first_token: Callable[[Lease], None],
        tracer: Tracer | None,
    ) -> None:
        self.request = request
        """What the engine is to be asked: in this call's span, where there is one."""
        self._lease, self._queued_s = lease, queued_s
        self._clock, self._first_token, self._tracer = clock, first_token, tracer
        self._span: Span | None = None
        self._usage, self._model = ChatUsage(), ""
        self._finish_reason: FinishReason | None = None
        self._sent_s = self._given_s = clock()
        self._held_back_s = 0.0

    def __enter__(self) -> Self:
        if self._tracer is not None:
            standing = self._lease.standing
            self._span = self._tracer.begin(
                f"chat {standing.settings.model}",
                kind="client",
                parent=self.request.traceparent,
                attributes=_described(standing, self.request),
            )
            self.request = msgspec.structs.replace(self.request, traceparent=self._span.traceparent)
        return self

    def take(self, delta: ChatDelta) -> ChatDelta | None:
        """What of the engine's next delta goes on now; `given` is to be called when it was taken."""
        self._usage, self._model = delta.usage or self._usage, delta.model or self._model
        self._finish_reason = delta.finish_reason or self._finish_reason
        lease = self._lease
        if lease.first_token_s is None:
            if not (delta.text or delta.tool_calls or delta.reasoning or self._finish_reason):
                return None
            self._first_token(lease)
            delta = msgspec.structs.replace(
                delta,
                usage=self._usage if delta.usage is None and self._usage != ChatUsage() else delta.usage,
                model=self._model,
                llm=lease.standing.name,
                source=lease.standing.settings.source,
                decision=lease.decision,
                engine_ms=1000 * (self._clock() - self._sent_s),
                queued_ms=1000 * self._queued_s,
            )
        self._given_s = self._clock()
        return delta

    def given(self) -> None:
        """The asker comes back for more: the time until now was the asker's, not the engine's."""
        self._held_back_s += self._clock() - self._given_s

    def finish(self) -> None:
        """The engine has no more deltas. Raises `EngineProtocolError` where none of them said why."""
        lease = self._lease
        if self._finish_reason is None:
            problem = "the stream ended without a finish_reason"
            raise EngineProtocolError(problem, engine=lease.standing.name)
        writing_s = self._clock() - (lease.first_token_s or lease.started_s) - self._held_back_s
        lease.standing.finished(self._usage, writing_s)
        lease.shown = lease.answered = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._span is None:
            return
        reason = self._finish_reason
        self._span.add(
            {
                "gen_ai.usage.input_tokens": self._usage.input_tokens,
                "gen_ai.usage.output_tokens": self._usage.output_tokens,
                **({} if reason is None else {"gen_ai.response.finish_reasons": (reason,)}),
            }
        )
        self._span.end(type(error).__name__ if isinstance(error, EngineError) else "")


def _described(standing: Standing, request: ChatRequest) -> dict[str, Attribute]:
    """What a trace is told of a call: never what it says."""
    bounds: dict[str, float | int | None] = {
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": request.temperature,
        "gen_ai.request.top_p": request.top_p,
        "gen_ai.request.seed": request.seed,
    }
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": standing.settings.provider,
        "gen_ai.request.model": standing.settings.model,
        "ai_agent_server.llm": standing.name,
        **{name: value for name, value in bounds.items() if value is not None},
    }
