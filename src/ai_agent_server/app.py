"""The composition root: reads the settings, builds everything, owns start and stop. No decisions."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import structlog
import uuid_utils
import watchfiles

from ai_agent_server import __version__, tasks_state
from ai_agent_server.assembly import file_reader, members_for, profiles_for, strategy_for
from ai_agent_server.channels._embedded_nats import EmbeddedNats
from ai_agent_server.channels.base import Channel
from ai_agent_server.channels.memory_channel import MemoryChannel
from ai_agent_server.channels.nats_channel import NatsChannel
from ai_agent_server.config import settings as configuration
from ai_agent_server.config.settings import Settings, json_pointer
from ai_agent_server.config.toggles import Toggles
from ai_agent_server.core.api_handler import create_app
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.mcp_handler import McpHandler
from ai_agent_server.core.metrics import Metrics
from ai_agent_server.core.orchestration_engine import OrchestrationEngine
from ai_agent_server.core.ports import Component, HealthReport, ReloadReport
from ai_agent_server.discovery import implementation
from ai_agent_server.errors import ConfigurationError
from ai_agent_server.load_balancer.balanced_engine import BalancedEngine
from ai_agent_server.sandbox._choose import choose_sandbox
from ai_agent_server.sandbox.base import SandboxProbe
from ai_agent_server.tasks_state.base import StoreHealth, TaskStore

events = structlog.get_logger(__name__)

API_KEY = "AI_AGENT_SERVER_API_KEY"
NEEDS_RESTART = ("messaging", "store", "sandbox", "server", "accelerators")


class Server:
    """Everything that runs, built from one configuration. Made by `running`."""

    def __init__(
        self,
        *,
        settings: Settings,
        config: Path | None,
        state_dir: Path,
        environ: Mapping[str, str],
        store: TaskStore,
        balancer: BalancedEngine,
        engine: OrchestrationEngine,
        toggles: Toggles,
        channel: Channel,
        sandbox_probe: SandboxProbe,
        gpu: str,
    ) -> None:
        self.settings = settings
        self.state_dir = state_dir
        self.store, self.balancer, self.engine, self.channel = store, balancer, engine, channel
        self._config, self._environ, self._toggles = config, environ, toggles
        self._sandbox_probe = sandbox_probe
        self._gpu = gpu
        self._reloading = asyncio.Lock()
        self.store_health: StoreHealth | None = None
        """As it was last looked at; the metrics show it without touching the disk."""

    async def reload(self) -> ReloadReport:
        """Read the configuration again: all of it applies or none. Raises `ConfigurationError`."""
        async with self._reloading:
            old = self.settings
            new = await asyncio.to_thread(configuration.load, self._config)
            for section in NEEDS_RESTART:
                if getattr(old, section) != getattr(new, section):
                    raise ConfigurationError(
                        "this section changes with a restart only; nothing was applied", pointer=f"/{section}"
                    )
            strategy = strategy_for(new)
            profiles = profiles_for(new, self._config.parent if self._config else None)
            members = members_for(new, self._toggles.read(), self._environ)
            await self.balancer.replace(members, settings=new.balancer, strategy=strategy)
            self.engine.configure(profiles)
            self.settings = new
            changed = tuple(sorted(_differences(msgspec.to_builtins(old), msgspec.to_builtins(new))))
            events.info("config.reloaded", changed=len(changed))
            return ReloadReport(source=str(self._config or "packaged"), changed=changed)

    def store_gauge(self) -> StoreHealth | None:
        """The store as it was last looked at, with today's count of tasks."""
        if self.store_health is None:
            return None
        return msgspec.structs.replace(self.store_health, tasks=sum(self.store.counts().values()))

    async def health(self) -> HealthReport:
        """Each part as it stands; no model is loaded nor kept warm by asking."""
        store = self.store_health = await self.store.health()
        channel = self.channel.health()
        views = self.balancer.views()
        usable = [view.name for view in views if view.toggle and view.circuit != "open"]
        probe = self._sandbox_probe
        components = {
            "engines": Component(
                status="ok" if len(usable) == len(views) else "degraded" if usable else "down",
                detail=", ".join(
                    f"{view.name} ({'off' if not view.toggle else f'circuit {view.circuit}'})"
                    for view in views
                ),
                advice="" if usable else "switch an LLM on, or see why each fails: ai-agent-server doctor",
            ),
            "store": Component(
                status="ok" if store.ok else "down",
                detail=store.detail or f"{store.tasks} tasks in {store.location}",
            ),
            "nats": Component(
                status="ok" if channel.state == "connected" else "degraded",
                detail=f"{channel.state}{f' to {channel.url}' if channel.url else ''}"
                f"{' (embedded)' if channel.embedded else ''}",
                advice="" if channel.state == "connected" else "REST goes on; see messaging.url",
            ),
            "sandbox": Component(
                status="ok" if probe.works and probe.tier != "unsafe" else "degraded",
                detail=f"{probe.tier}{f': {probe.detail}' if probe.detail else ''}",
                advice=probe.advice,
            ),
            "gpu": Component(status="ok", detail=self._gpu),
        }
        accepting = self.engine.status().accepting
        down = not accepting or any(components[part].status == "down" for part in ("engines", "store"))
        degraded = any(component.status != "ok" for component in components.values())
        return HealthReport(
            status="down" if down else "degraded" if degraded else "ok",
            version=__version__,
            components=components,
        )


def _differences(old: JSONObject, new: JSONObject, path: tuple[str, ...] = ()) -> list[str]:
    found: list[str] = []
    for key in old.keys() | new.keys():
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, (*path, key))
        elif before != after:
            found.append(json_pointer((*path, key)))
    return found


@asynccontextmanager
async def running(
    *, config: Path | None, state_dir: Path, environ: Mapping[str, str]
) -> AsyncIterator[tuple[Server, Any]]:
    """The whole server with its ASGI application, started; stopped in order at the end.

    Raises `ConfigurationError` or `StoreUnusableError` before anything listens.
    """
    settings = configuration.load(config)
    toggles = Toggles(state_dir / "llm_toggles.json")
    store: TaskStore = implementation(tasks_state, settings.store.kind, pointer="/store/kind")(state_dir)
    profiles = profiles_for(settings, config.parent if config else None)
    strategy = strategy_for(settings)
    async with AsyncExitStack() as stack:
        await store.open()
        stack.push_async_callback(store.aclose)
        balancer = BalancedEngine(
            members_for(settings, toggles.read(), environ),
            strategy=strategy,
            settings=settings.balancer,
            clock=asyncio.get_running_loop().time,
            rng=random.Random(),
            keep_toggle=toggles.keep,
        )
        stack.push_async_callback(balancer.aclose)
        balancer.start()
        (sandbox, probe), channel, gpu = await asyncio.gather(
            choose_sandbox(settings.sandbox.tier), _channel(settings, state_dir, environ, stack), _gpu()
        )
        engine = OrchestrationEngine(
            profiles=profiles,
            store=store,
            llm=balancer,
            sandbox=sandbox,
            clock=_now,
            new_id=_new_id,
            monotonic=asyncio.get_running_loop().time,
            price=balancer.cost_usd,
            read_file=file_reader(settings.server.allowed_folders),
            max_running=settings.server.max_running,
            max_live=settings.server.max_live,
            shutdown_s=settings.server.shutdown_s,
        )
        server = Server(
            settings=settings,
            config=config,
            state_dir=state_dir,
            environ=environ,
            store=store,
            balancer=balancer,
            engine=engine,
            toggles=toggles,
            channel=channel,
            sandbox_probe=probe,
            gpu=gpu,
        )
        server.store_health = await store.health()
        metrics = Metrics(
            now=_now,
            version=__version__,
            engine=engine.status,
            tasks=store.counts,
            llms=balancer.views,
            nats=channel.health,
            store=server.store_gauge,
        )
        engine.observe(metrics.observe)
        handler = McpHandler(
            engine,
            channel,
            clock=_now,
            metrics=metrics.encode,
            metrics_interval_s=settings.messaging.metrics_interval_s,
            state_path=state_dir / "published.json",
            shutdown_s=settings.server.shutdown_s,
        )
        # Closed twice: last here if the next lines fail, and first of all at a regular end, so that
        # the handler still publishes what the engine's last steps wrote.
        stack.push_async_callback(engine.aclose)
        await engine.start()
        await stack.enter_async_context(handler)
        stack.push_async_callback(engine.aclose)
        if config is not None:
            watch = asyncio.create_task(_reload_on_change(server, config), name="config-watch")
            stack.push_async_callback(_stopped, watch)
        yield (
            server,
            create_app(
                engine=engine,
                balancer=balancer,
                settings=lambda: server.settings,
                health=server.health,
                metrics=metrics,
                reload=server.reload,
                task_file=store.location,
                version=__version__,
                api_key=environ.get(API_KEY) or None,
            ),
        )


async def _channel(
    settings: Settings, state_dir: Path, environ: Mapping[str, str], stack: AsyncExitStack
) -> Channel:
    messaging = settings.messaging
    if not messaging.enabled:
        memory = MemoryChannel()
        stack.push_async_callback(memory.aclose)
        return memory
    if messaging.url is not None:
        credentials = configuration.secret(messaging.credentials, environ)
        channel = await NatsChannel.connect(messaging.url, credentials=credentials)
    else:
        embedded = await EmbeddedNats.start(state_dir)
        stack.push_async_callback(embedded.aclose)
        channel = await NatsChannel.connect(
            embedded.url, credentials=embedded.credentials, embedded=True, wait_s=10.0
        )
    stack.push_async_callback(channel.aclose)
    return channel


async def _reload_on_change(server: Server, config: Path) -> None:
    """Reload when the file is saved. The folder is watched, since editors replace the file."""
    async for changes in watchfiles.awatch(config.parent, recursive=False):
        if any(Path(path).name == config.name for _, path in changes):
            await try_reload(server)


async def try_reload(server: Server) -> None:
    """Reload, and say so in the log when the new configuration is wrong; the old one goes on."""
    try:
        await server.reload()
    except ConfigurationError as exc:
        events.error("config.refused", problem=exc.problem, pointer=exc.pointer)


async def _stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _gpu() -> str:
    """What nvidia-smi says of the card, or that there is none."""
    try:
        process = await asyncio.create_subprocess_exec(
            "nvidia-smi",
            "--query-gpu=name,memory.total,memory.used",
            "--format=csv,noheader",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return "none found; models run on the CPU"
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 5.0)
    except TimeoutError:
        process.kill()
        await process.wait()
        return "nvidia-smi does not answer"
    return (
        "; ".join(out.decode(errors="replace").split("\n")).strip("; ") or "none found; models run on the CPU"
    )


def _now() -> datetime:
    return datetime.now(UTC)


def _new_id() -> str:
    return str(uuid_utils.uuid7())
