"""Spans as OTLP over HTTP, to a collector of OpenTelemetry's or to whatever takes what it takes."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import aiohttp
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Status
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan

from ai_agent_server.tracing.base import Attribute, Span, SpanKind, is_traceparent

__all__ = ("OtlpTracer",)

log = structlog.get_logger(__name__)

SCOPE: Final = "ai_agent_server"
MAX_QUEUED: Final = 4096
"""Spans that wait to be sent; of more the newest are lost, and counted."""
BATCH: Final = 512
EVERY_S: Final = 2.0
SEND_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 2.0
MAY_RECOVER: Final = frozenset({429, 502, 503, 504})
"""What the protocol says may be sent again."""
_KINDS: Final = {"server": WireSpan.SPAN_KIND_SERVER, "client": WireSpan.SPAN_KIND_CLIENT}
_SAMPLED: Final = 1


class OtlpTracer:
    """Keeps spans until they are sent, a few seconds at most. Use it as `async with`.

    A receiver that is away costs nothing but the spans: what it may still take is sent again, what is
    too much is dropped, and the log says so once until it works again.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        headers: Mapping[str, str],
        resource: Mapping[str, Attribute],
        share: float,
        now_ns: Callable[[], int],
        random: Callable[[int], bytes],
    ) -> None:
        """`share` of the traces that begin here are told, 0 to 1; of others their beginner decides.

        `resource` is who tells, in OpenTelemetry's words; `now_ns` are nanoseconds since the epoch.
        """
        self._endpoint, self._share = endpoint, share
        self._headers = {"Content-Type": "application/x-protobuf", **headers}
        self._resource = Resource(attributes=_pairs(resource))
        self._now_ns, self._random = now_ns, random
        self._waiting: deque[WireSpan] = deque()
        self._lost = 0
        self._has_failed = False
        self._session: aiohttp.ClientSession | None = None
        self._sending: asyncio.Task[None] | None = None

    def begin(self, name: str, *, kind: SpanKind, parent: str, attributes: Mapping[str, Attribute]) -> Span:
        """See `Tracer.begin`."""
        span_id = self._random(8)
        if is_traceparent(parent):
            _, trace, before, flags = parent.split("-")
            trace_id, parent_id = bytes.fromhex(trace), bytes.fromhex(before)
            is_told = bool(int(flags, 16) & _SAMPLED)
        else:
            trace_id, parent_id = self._random(16), b""
            is_told = int.from_bytes(trace_id[8:]) < self._share * 2**64
        span = WireSpan(
            trace_id=trace_id,
            span_id=span_id,
            parent_span_id=parent_id,
            name=name,
            kind=_KINDS[kind],
            start_time_unix_nano=self._now_ns(),
            attributes=_pairs(attributes),
            flags=int(is_told),
        )
        return _Open(span, self._now_ns, self._take if is_told else None)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=SEND_TIMEOUT_S))
        self._sending = asyncio.create_task(self._send_always(), name="tracing")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None and self._sending is not None
        self._sending.cancel()
        with suppress(asyncio.CancelledError):
            await self._sending
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._send_all(self._session)
        await self._session.close()

    def _take(self, span: WireSpan) -> None:
        if len(self._waiting) >= MAX_QUEUED:
            self._lost += 1
        else:
            self._waiting.append(span)

    async def _send_always(self) -> None:
        assert self._session is not None
        while True:
            await asyncio.sleep(EVERY_S)
            await self._send_all(self._session)

    async def _send_all(self, session: aiohttp.ClientSession) -> None:
        """Send what waits, until nothing does or the receiver will not take it now."""
        while self._waiting:
            batch = tuple(self._waiting)[:BATCH]
            problem, may_recover = await self._post(session, self._encoded(batch))
            if problem and not self._has_failed:
                log.warning("tracing.not_sent", endpoint=self._endpoint, problem=problem, spans=len(batch))
            self._has_failed = bool(problem)
            if problem and may_recover:
                return
            for _ in batch:
                self._waiting.popleft()
            if not problem and self._lost:
                log.warning("tracing.lost", spans=self._lost)
                self._lost = 0

    async def _post(self, session: aiohttp.ClientSession, body: bytes) -> tuple[str, bool]:
        """What went wrong, empty where nothing did; and whether it is worth trying again."""
        try:
            async with session.post(
                self._endpoint, data=body, headers=self._headers, allow_redirects=False
            ) as answer:
                if answer.status == 200:
                    return "", False
                return f"HTTP {answer.status}", answer.status in MAY_RECOVER
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            return type(exc).__name__, True

    def _encoded(self, spans: Iterable[WireSpan]) -> bytes:
        told = ScopeSpans(scope=InstrumentationScope(name=SCOPE), spans=spans)
        request = ExportTraceServiceRequest(
            resource_spans=[ResourceSpans(resource=self._resource, scope_spans=[told])]
        )
        return request.SerializeToString()


class _Open:
    """A span under way."""

    __slots__ = ("_now_ns", "_span", "_take", "traceparent")

    def __init__(
        self, span: WireSpan, now_ns: Callable[[], int], take: Callable[[WireSpan], None] | None
    ) -> None:
        self._span, self._now_ns, self._take = span, now_ns, take
        self.traceparent = f"00-{span.trace_id.hex()}-{span.span_id.hex()}-{span.flags:02x}"

    def add(self, attributes: Mapping[str, Attribute]) -> None:
        self._span.attributes.extend(_pairs(attributes))

    def end(self, error: str = "") -> None:
        if self._take is None:
            return
        self._span.end_time_unix_nano = self._now_ns()
        if error:
            self._span.status.code = Status.STATUS_CODE_ERROR
            self.add({"error.type": error})
        self._take(self._span)


def _pairs(attributes: Mapping[str, Attribute]) -> list[KeyValue]:
    return [KeyValue(key=name, value=_value(value)) for name, value in attributes.items()]


def _value(value: Attribute) -> AnyValue:
    match value:
        case bool():
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case str():
            return AnyValue(string_value=value)
        case tuple():
            return AnyValue(array_value=ArrayValue(values=[_value(each) for each in value]))
