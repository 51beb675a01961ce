"""The composition root: reads the settings, builds everything, owns start and stop. No decisions."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import structlog
import uuid_utils
import watchfiles

from ai_agent_server import __version__, tasks_state
from ai_agent_server.assembly import (
    file_reader,
    gauges_for,
    members_for,
    profiles_for,
    ready_tools,
    strategy_for,
    tracer_for,
)
from ai_agent_server.channels._embedded_nats import EmbeddedNats
from ai_agent_server.channels.base import Channel
from ai_agent_server.channels.memory_channel import MemoryChannel
from ai_agent_server.channels.nats_channel import NatsChannel
from ai_agent_server.cluster.alone import Alone, FileShelf
from ai_agent_server.cluster.base import Leases, Peers, Shelf
from ai_agent_server.cluster.nats_leases import NatsLeases, server_id
from ai_agent_server.cluster.nats_shelf import NatsShelf
from ai_agent_server.cluster.nats_store import SHELVES, STREAM, NatsTaskStore, stream
from ai_agent_server.config import settings as configuration
from ai_agent_server.config.settings import Settings
from ai_agent_server.config.toggles import Toggles
from ai_agent_server.core.api_handler import KEEP_ALIVE_S, WRITE_TIMEOUT_S, create_app
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.core.event_socket import EventSockets
from ai_agent_server.core.genai_metrics import GenAIModel
from ai_agent_server.core.mcp_handler import McpHandler, McpHealth
from ai_agent_server.core.metrics import Metrics
from ai_agent_server.core.orchestration_engine import OrchestrationEngine
from ai_agent_server.core.packet_json import json_pointer
from ai_agent_server.core.ports import Component, HealthReport, ReloadReport
from ai_agent_server.core.webhooks import Targets, Webhooks
from ai_agent_server.discovery import implementation
from ai_agent_server.errors import ConfigurationError, StoreUnusableError
from ai_agent_server.gateway._cors import Cors
from ai_agent_server.gateway.answer_cache import AnswerCache
from ai_agent_server.gateway.door import Door
from ai_agent_server.gateway.model_context import ModelContext
from ai_agent_server.gateway.tool_runner import ReadyTool
from ai_agent_server.load_balancer.balanced_engine import BalancedEngine
from ai_agent_server.nats_link import Link
from ai_agent_server.sandbox._choose import choose_sandbox
from ai_agent_server.sandbox.base import SandboxProbe
from ai_agent_server.surfaces import operations, surfaces_for
from ai_agent_server.tasks_state._archive import ARCHIVE, Archive
from ai_agent_server.tasks_state._retention import Housekeeper
from ai_agent_server.tasks_state.base import Retention, StoreHealth, TaskStore

log = structlog.get_logger(__name__)

NEEDS_RESTART = ("messaging", "cluster", "store", "sandbox", "server", "accelerators", "tracing")


STORE_LOOK_S = 1.0
"""Health is open to all, and a look at the store writes: no more than one for so long."""
WATCH_AGAIN_S = 1.0
GPU_TIMEOUT_S = 5.0


class StoreWatch:
    """The store as it was last looked at: many may ask, the disk is touched once in `STORE_LOOK_S`."""

    def __init__(self, store: TaskStore, clock: Callable[[], float]) -> None:
        """`clock` is monotonic, in seconds."""
        self._store, self._clock = store, clock
        self._looking = asyncio.Lock()
        self._last: StoreHealth | None = None
        self._looked_s = 0.0

    async def look(self) -> StoreHealth:
        """How the store is, found by writing to it."""
        async with self._looking:
            if self._last is None or self._clock() - self._looked_s >= STORE_LOOK_S:
                self._last = await self._store.health()
                self._looked_s = self._clock()
            return self._with_counts(self._last)

    def gauge(self) -> StoreHealth | None:
        """As it was last found; the metrics show it without touching the disk."""
        return None if self._last is None else self._with_counts(self._last)

    def _with_counts(self, health: StoreHealth) -> StoreHealth:
        return msgspec.structs.replace(health, tasks=sum(self._store.counts().values()))


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
        store_watch: StoreWatch,
        leases: Leases,
        messages: McpHandler,
        door: Door,
        cache: AnswerCache,
        sandbox_probe: SandboxProbe,
        tools: Mapping[str, ReadyTool],
        model_context: ModelContext,
        gpu: str,
    ) -> None:
        self.settings, self.tools = settings, tools
        self.state_dir = state_dir
        self.store, self.balancer, self.engine = store, balancer, engine
        self._config, self._environ, self._toggles = config, environ, toggles
        self._store_watch, self._leases, self._messages = store_watch, leases, messages
        self._door, self._cache = door, cache
        self._sandbox_probe = sandbox_probe
        self._model_context = model_context
        self._gpu = gpu
        self._reloading = asyncio.Lock()

    async def drain(self) -> None:
        """End what would keep connections open: running steps, those who follow tasks, sessions."""
        await self.engine.aclose()
        await self._model_context.aclose()

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
            folder = self._config.parent if self._config else None
            strategy, profiles, tools = await asyncio.to_thread(
                lambda: (strategy_for(new), profiles_for(new, folder), ready_tools(new, folder))
            )
            access = await self._door.prepared(new)
            configured = _toggles(new)
            # Nothing is awaited from here until all of it counts: no task starts between the halves.
            members = members_for(new, self._toggles.over(configured), self._environ)
            self.balancer.replace(members, settings=new.balancer, strategy=strategy)
            self.engine.configure(profiles)
            self._door.go_by(new, access)
            self.settings, self.tools = new, tools
            self._cache.forget({name for name, llm in old.llms.items() if new.llms.get(name) != llm})
            await self._toggles.forget(configured)
            changed = tuple(sorted(_differences(msgspec.to_builtins(old), msgspec.to_builtins(new))))
            log.info("config.reloaded", changed=len(changed))
            return ReloadReport(source=str(self._config or "packaged"), changed=changed)

    async def health(self) -> HealthReport:
        """Each part as it stands; no model is loaded nor kept warm by asking."""
        store = await self._store_watch.look()
        views = self.balancer.views()
        # Somebody switched those off; that is no fault.
        wanted = [view for view in views if view.toggle]
        usable = [view for view in wanted if view.circuit != "open"]
        probe = self._sandbox_probe
        components = {
            "engines": Component(
                status="down" if not usable else "ok" if len(usable) == len(wanted) else "degraded",
                detail=", ".join(
                    f"{view.name} ({'off' if not view.toggle else f'circuit {view.circuit}'})"
                    for view in views
                ),
                advice="" if usable else "switch an LLM on, or see why each fails: ai-agent-server doctor",
            ),
            "store": Component(
                status="down" if not store.ok else "degraded" if store.corrupt else "ok",
                detail=store.detail
                or f"{store.tasks} tasks in {store.location}"
                + (f"; {store.corrupt} broken files were moved aside" if store.corrupt else ""),
                advice="look at corrupt/ in the state folder, then empty it" if store.corrupt else "",
            ),
            "nats": _messaging(self._messages.health()),
            "sandbox": Component(
                status="ok" if probe.works and probe.tier != "unsafe" else "degraded",
                detail=f"{probe.tier}{f': {probe.detail}' if probe.detail else ''}",
                advice=probe.advice,
            ),
            "gpu": Component(status="ok", detail=self._gpu),
        }
        if self.settings.cluster.enabled:
            components["cluster"] = _cluster(self._leases.peers())
        accepting = self.engine.status().accepting
        down = not accepting or any(components[part].status == "down" for part in ("engines", "store"))
        degraded = any(component.status != "ok" for component in components.values())
        return HealthReport(
            status="down" if down else "degraded" if degraded else "ok",
            version=__version__,
            components=components,
        )


def _messaging(messages: McpHealth) -> Component:
    channel, behind = messages.channel, messages.unpublished_tasks
    if channel.url.startswith("memory:"):
        return Component(status="ok", detail="off (messaging.enabled is false)")
    detail = (
        f"{channel.state}{f' to {channel.url}' if channel.url else ''}"
        f"{' (embedded)' if channel.embedded else ''}"
        f"{f'; tasks with events to publish: {behind}' if behind else ''}"
    )
    if messages.ended:
        return Component(
            status="degraded",
            # The fault's name alone: health is open to all, and its words may be anybody's.
            detail=f"no messages are carried ({messages.fault.partition(':')[0] or 'stopped'}); {detail}",
            advice="REST goes on; see mcp.ended in the log, then restart",
        )
    connected = channel.state == "connected"
    return Component(
        status="ok" if connected else "degraded",
        detail=detail,
        advice="" if connected else "REST goes on; see messaging.url",
    )


def _cluster(peers: Peers) -> Component:
    others = ", ".join(f"{name} ({heard_s:.0f} s ago)" for name, heard_s in sorted(peers.others.items()))
    return Component(
        status="ok" if peers.connected else "degraded",
        detail=f"this is {peers.holder}; others: {others or 'none'}",
        advice="" if peers.connected else "no other server is heard; see messaging.url",
    )


def _toggles(settings: Settings) -> dict[str, bool]:
    return {name: llm.toggle for name, llm in settings.llms.items()}


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
    own_store: TaskStore = implementation(tasks_state, settings.store.kind, pointer="/store/kind")(state_dir)
    profiles = profiles_for(settings, config.parent if config else None)
    tools = ready_tools(settings, config.parent if config else None)
    strategy, gauges = strategy_for(settings), gauges_for(settings)
    tracing = tracer_for(settings, environ)
    await asyncio.to_thread(_make_folder, state_dir)
    async with AsyncExitStack() as stack:
        door = await asyncio.to_thread(
            Door,
            settings,
            environ=environ,
            state_dir=state_dir,
            clock=asyncio.get_running_loop().time,
            now=time.time,
        )
        store, leases, shelf = await _opened(own_store, settings, state_dir, environ, stack)
        # Closed after everything that uses: what is used up to the end is kept.
        await stack.enter_async_context(door)
        # Closed after whoever has spans to tell.
        tracer = await stack.enter_async_context(tracing) if tracing is not None else None
        toggles = await asyncio.to_thread(Toggles, state_dir / "llm_toggles.json")
        await toggles.forget(_toggles(settings))
        balancer = BalancedEngine(
            members_for(settings, toggles.over(_toggles(settings)), environ),
            strategy=strategy,
            settings=settings.balancer,
            clock=asyncio.get_running_loop().time,
            rng=random.Random(),
            keep_toggle=toggles.keep,
            accelerators=settings.accelerators,
            gauges=gauges,
            tracer=tracer,
        )
        stack.push_async_callback(balancer.aclose)
        balancer.start()
        try:
            async with asyncio.TaskGroup() as group:
                chosen = group.create_task(choose_sandbox(settings.sandbox.tier))
                connected = group.create_task(_channel(settings, state_dir, environ, stack))
                card = group.create_task(_gpu())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        (sandbox, probe), channel, gpu = chosen.result(), connected.result(), card.result()
        targets = Targets(lambda: server.settings.callbacks, environ)
        engine = OrchestrationEngine(
            profiles=profiles,
            store=store,
            leases=leases,
            llm=balancer,
            senders=door,
            sandbox=sandbox,
            clock=_now,
            new_id=_new_id,
            monotonic=asyncio.get_running_loop().time,
            price=balancer.cost_usd,
            read_file=file_reader(settings.server.allowed_folders),
            check_callback=targets.check,
            max_running=settings.server.max_running,
            max_live=settings.server.max_live,
            shutdown_s=settings.server.shutdown_s,
        )
        store_watch = StoreWatch(store, asyncio.get_running_loop().time)
        await store_watch.look()
        cache = AnswerCache(settings=lambda: server.settings, clock=asyncio.get_running_loop().time)
        webhooks = Webhooks(
            engine,
            targets=targets,
            clock=_now,
            rng=random.Random(),
            shelf=shelf,
        )
        metrics = Metrics(
            now=_now,
            version=__version__,
            engine=engine.status,
            tasks=store.counts,
            llms=balancer.views,
            nats=channel.health,
            store=store_watch.gauge,
            webhooks=webhooks.status,
            cache=cache.state,
            accelerators=balancer.accelerators,
            model_of=lambda llm: _model_of(server.settings, llm),
            names=lambda: server.settings.metrics.names,
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
        surfaces = surfaces_for(
            balancer=balancer,
            orchestration=engine,
            accounts=door,
            guard=door.guard,
            cache=cache,
            settings=lambda: server.settings,
            tools=lambda: server.tools,
            metrics=metrics,
            tracer=tracer,
            version=__version__,
            max_body_bytes=int(settings.server.max_body_mb * 1024 * 1024),
            clock=asyncio.get_running_loop().time,
            now_s=time.time,
            new_id=_new_id,
            write_timeout_s=WRITE_TIMEOUT_S,
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
            store_watch=store_watch,
            leases=leases,
            messages=handler,
            door=door,
            cache=cache,
            sandbox_probe=probe,
            tools=tools,
            model_context=surfaces.model_context,
            gpu=gpu,
        )
        # Closed twice: last here if the next lines fail, and first of all at a regular end, so that
        # the handler still publishes what the engine's last steps wrote.
        stack.push_async_callback(engine.aclose)
        await stack.enter_async_context(webhooks)
        await engine.start()
        await stack.enter_async_context(_housekeeping(settings.store.retention, store, state_dir))
        await stack.enter_async_context(handler)
        stack.push_async_callback(surfaces.model_context.aclose)
        stack.push_async_callback(engine.aclose)
        if config is not None:
            watch = asyncio.create_task(_reload_on_change(server, config), name="config-watch")
            stack.push_async_callback(_stopped, watch)
        yield (
            server,
            EventSockets(
                Cors(
                    surfaces.lane(
                        create_app(
                            engine=engine,
                            balancer=balancer,
                            settings=lambda: server.settings,
                            health=server.health,
                            metrics=metrics,
                            reload=server.reload,
                            task_file=store.location,
                            version=__version__,
                            guard=door.guard,
                            environ=environ,
                            more=surfaces.handlers,
                            refused=surfaces.refused,
                            described=operations(),
                        )
                    ),
                    origins=door.origins,
                ),
                engine=engine,
                guard=door.guard,
                keep_alive_s=KEEP_ALIVE_S,
                write_timeout_s=WRITE_TIMEOUT_S,
            ),
        )


def _model_of(settings: Settings, llm: str) -> GenAIModel:
    found = settings.llms.get(llm)
    if found is None:
        return GenAIModel(provider="unknown", model=llm)
    return GenAIModel(provider=found.provider, model=found.model)


def _housekeeping(
    retention: Retention, store: TaskStore, state_dir: Path
) -> AbstractAsyncContextManager[object]:
    if retention == Retention():
        return nullcontext()
    return Housekeeper(store, Archive(state_dir / ARCHIVE), retention, clock=_now)


def _make_folder(state_dir: Path) -> None:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise StoreUnusableError(f"the state folder {state_dir} cannot be made: {exc.strerror}") from exc


async def _opened(
    store: TaskStore,
    settings: Settings,
    state_dir: Path,
    environ: Mapping[str, str],
    stack: AsyncExitStack,
) -> tuple[TaskStore, Leases, Shelf]:
    """The store, the leases and the shelf, opened: this server's own, or as one of a cluster."""
    cluster, url = settings.cluster, settings.messaging.url
    callbacks = FileShelf(state_dir / "callbacks.json")
    if not cluster.enabled or url is None:
        await store.open()
        stack.push_async_callback(store.aclose)
        return store, Alone(), callbacks
    link = Link(
        url,
        credentials=configuration.secret(settings.messaging.credentials, environ),
        name="ai-agent-server tasks",
        streams=(stream(cluster.state_mb * 1024 * 1024),),
        replicas=cluster.replicas,
    )
    link.open()
    stack.push_async_callback(link.aclose)
    shared = NatsTaskStore(link, store)
    await shared.open()
    stack.push_async_callback(shared.aclose)
    server = await asyncio.to_thread(server_id, state_dir, cluster.name)
    leases = NatsLeases(link, server, lease_s=cluster.lease_s, clock=asyncio.get_running_loop().time)
    stack.push_async_callback(leases.aclose)
    shelf = NatsShelf(link, leases, callbacks, stream=STREAM, subject=SHELVES)
    return shared, leases.open(), shelf


async def _channel(
    settings: Settings, state_dir: Path, environ: Mapping[str, str], stack: AsyncExitStack
) -> Channel:
    messaging = settings.messaging
    if not messaging.enabled:
        memory = MemoryChannel()
        stack.push_async_callback(memory.aclose)
        return memory
    credentials = configuration.secret(messaging.credentials, environ)
    if messaging.url is not None:
        channel = await NatsChannel.connect(
            messaging.url,
            credentials=credentials,
            replicas=settings.cluster.replicas if settings.cluster.enabled else 1,
        )
    else:
        embedded = await EmbeddedNats.start(state_dir, port=messaging.port, credentials=credentials)
        stack.push_async_callback(embedded.aclose)
        channel = await NatsChannel.connect(
            embedded.url, credentials=embedded.credentials, embedded=True, wait_s=10.0
        )
    stack.push_async_callback(channel.aclose)
    return channel


async def _reload_on_change(server: Server, config: Path) -> None:
    """Reload when the file is saved. The folder is watched, since editors replace the file."""
    while True:
        try:
            async for changes in watchfiles.awatch(config.parent, recursive=False):
                if any(Path(path).name == config.name for _, path in changes):
                    await try_reload(server)
        except Exception:
            # Whatever befell the watch (the folder was replaced, say), the next save must be seen.
            log.exception("config.watch_failed", folder=str(config.parent))
        await asyncio.sleep(WATCH_AGAIN_S)


async def try_reload(server: Server) -> None:
    """Reload, and say so in the log when the new configuration is wrong; the old one goes on."""
    try:
        await server.reload()
    except ConfigurationError as exc:
        log.warning("config.refused", problem=exc.problem, pointer=exc.pointer)
    except Exception:
        # Nobody waits for this reload: what went wrong is told here or nowhere.
        log.exception("config.reload_failed")


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
        async with asyncio.timeout(GPU_TIMEOUT_S):
            out, _ = await process.communicate()
    except TimeoutError:
        return "nvidia-smi does not answer"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return (
        "; ".join(out.decode(errors="replace").split("\n")).strip("; ") or "none found; models run on the CPU"
    )


def _now() -> datetime:
    return datetime.now(UTC)


def _new_id() -> str:
    return str(uuid_utils.uuid7())
