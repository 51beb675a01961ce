"""A double of a collector of OpenTelemetry's: takes traces over HTTP as protobuf, and keeps the spans."""

import asyncio
from typing import Any, Self

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class OtlpDouble:
    """Used as an async context manager. `spans` are all that came; `status` is what it answers."""

    def __init__(self, port: int = 0) -> None:
        self.port, self.status = port, 200
        self.spans: list[Span] = []
        self.resource: dict[str, Any] = {}
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self._changed = asyncio.Condition()

    @property
    def endpoint(self) -> str:
        """Where it takes traces."""
        return f"http://127.0.0.1:{self.port}/v1/traces"

    def named(self, name: str) -> list[Span]:
        """The spans of this name, in the order in which they came."""
        return [span for span in self.spans if span.name == name]

    async def until(self, spans: int) -> None:
        """Until so many have come."""
        async with self._changed, asyncio.timeout(60):
            await self._changed.wait_for(lambda: len(self.spans) >= spans)

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        if self.status != 200:
            return web.Response(status=self.status)
        self.bodies.append(body)
        told = ExportTraceServiceRequest.FromString(body)
        for each in told.resource_spans:
            self.resource = {pair.key: value(pair.value) for pair in each.resource.attributes}
            for scope in each.scope_spans:
                self.spans += scope.spans
        async with self._changed:
            self._changed.notify_all()
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf"
        )


def value(given: AnyValue) -> Any:
    """An attribute's value as Python has it."""
    kind = given.WhichOneof("value")
    if kind == "array_value":
        return [value(each) for each in given.array_value.values]
    return getattr(given, kind or "string_value")


def attributes(span: Span) -> dict[str, Any]:
    """What is said of a span."""
    return {pair.key: value(pair.value) for pair in span.attributes}
