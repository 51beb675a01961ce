"""The REST API on a real socket, around the orchestration double."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import uvicorn
from litestar import Litestar

from ai_agent_server.channels.base import ChannelHealth
from ai_agent_server.config.settings import API_KEY, Settings, load
from ai_agent_server.core.api_handler import create_app
from ai_agent_server.core.chat import Candidate, Decision
from ai_agent_server.core.event_socket import EventSockets
from ai_agent_server.core.metrics import Metrics
from ai_agent_server.core.ports import Component, HealthReport, ReloadReport
from ai_agent_server.core.task_packet import TaskStatus
from ai_agent_server.errors import ConfigurationError, UnknownLLMError
from ai_agent_server.gateway.door import Door
from ai_agent_server.load_balancer.base import AcceleratorView, LLMView, Requirements
from ai_agent_server.tasks_state.base import StoreHealth
from tests.servers.orchestration_double import OrchestrationDouble


class BalancerDouble:
    """One LLM called `embedded`, chosen unless it is switched off."""

    def __init__(self) -> None:
        self.asked: list[Requirements] = []
        self.llms = {"embedded": LLMView(name="embedded", source="local", tier="small")}

    def views(self) -> tuple[LLMView, ...]:
        """See `Balancer.views`."""
        return tuple(self.llms.values())

    def accelerators(self) -> tuple[AcceleratorView, ...]:
        """See `Balancer.accelerators`."""
        return ()

    def explain(self, wanted: Requirements) -> Decision:
        """See `Balancer.explain`."""
        self.asked.append(wanted)
        chosen = next((view.name for view in self.views() if view.toggle), None)
        candidates = tuple(Candidate(llm=view.name, score=1.0) for view in self.views())
        return Decision(chosen=chosen, reason=f"tier {wanted.tier}", strategy="double", candidates=candidates)

    async def set_toggle(self, name: str, on: bool) -> None:
        """See `Balancer.set_toggle`."""
        if name not in self.llms:
            raise UnknownLLMError(name, tuple(self.llms))
        self.llms[name] = msgspec.structs.replace(self.llms[name], toggle=on)


class Parts:
    """What the API stands on; a test changes it while the server runs."""

    def __init__(
        self,
        *,
        api_key: str | None = None,
        environ: Mapping[str, str] | None = None,
        keep_alive_s: float = 15.0,
        write_timeout_s: float = 30.0,
    ) -> None:
        self.engine = OrchestrationDouble()
        self.balancer = BalancerDouble()
        self.settings: Settings = load(None)
        self.health = HealthReport(status="ok", version="0", components={"store": Component(status="ok")})
        self.mistake: ConfigurationError | None = None
        self.metrics = Metrics(
            now=lambda: datetime.now(UTC),
            version="0",
            engine=self.engine.status,
            tasks=self.counts,
            llms=self.balancer.views,
            nats=lambda: ChannelHealth(state="connected", embedded=True),
            store=lambda: StoreHealth(kind="memory", ok=True),
        )
        self.engine.observe(self.metrics.observe)
        # It keeps nothing here: nobody enters it.
        self.door = Door(
            self.settings,
            environ={API_KEY: api_key} if api_key else {},
            state_dir=Path("/nowhere"),
            clock=time.monotonic,
            now=time.time,
        )
        self.app = create_app(
            engine=self.engine,
            balancer=self.balancer,
            settings=lambda: self.settings,
            health=self.ask_health,
            metrics=self.metrics,
            reload=self.reload,
            task_file=lambda task_id: f"/état/{task_id}.json",
            version="0",
            guard=self.door.guard,
            environ=environ,
            keep_alive_s=keep_alive_s,
            write_timeout_s=write_timeout_s,
        )
        self.with_sockets = EventSockets(
            self.app,
            engine=self.engine,
            guard=self.door.guard,
            keep_alive_s=keep_alive_s,
            write_timeout_s=write_timeout_s,
        )

    def counts(self) -> dict[TaskStatus, int]:
        """Tasks by status."""
        found: dict[TaskStatus, int] = {}
        for packet in self.engine.tasks.values():
            found[packet.status] = found.get(packet.status, 0) + 1
        return found

    async def ask_health(self) -> HealthReport:
        """The health that the test set."""
        return self.health

    async def reload(self) -> ReloadReport:
        """A reload, or the mistake that the test set."""
        if self.mistake is not None:
            raise self.mistake
        return ReloadReport(source="configuration.json", changed=("/llms/embedded/toggle",))

    def body_limit_bytes(self, limit: int) -> None:
        """Let bodies have `limit` bytes from now on."""
        server = msgspec.structs.replace(self.settings.server, max_body_mb=limit / 1024 / 1024)
        self.settings = msgspec.structs.replace(self.settings, server=server)


@asynccontextmanager
async def serving(app: Litestar | EventSockets) -> AsyncIterator[str]:
    """`app` on a free port of loopback: its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, ws="wsproto", log_config=None, timeout_graceful_shutdown=5))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with asyncio.timeout(60):
            while not server.started:
                await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        with suppress(asyncio.CancelledError):
            await running
        listener.close()
