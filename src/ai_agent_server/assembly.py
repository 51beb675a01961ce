"""What a configuration describes, built: engines, strategies, agents, prompts."""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from importlib import resources
from pathlib import Path
from typing import TypeVar

import msgspec

from ai_agent_server import __version__, agents, llm_engines, memory_gauges, tools, tracing
from ai_agent_server.agents.base import Agent, RoleSpec
from ai_agent_server.config import settings as configuration
from ai_agent_server.config.settings import LLMSettings, Settings
from ai_agent_server.core.chat import JSONObject, RouteHints
from ai_agent_server.core.orchestration_engine import Profile, Role
from ai_agent_server.core.packet_json import json_pointer
from ai_agent_server.discovery import implementation, kinds
from ai_agent_server.errors import ConfigurationError, InvalidPacketError
from ai_agent_server.gateway.tool_runner import ReadyTool
from ai_agent_server.llm_engines.base import EmbeddingEngine, EngineSpec, LLMEngine
from ai_agent_server.load_balancer import strategies
from ai_agent_server.load_balancer.balanced_engine import Member
from ai_agent_server.load_balancer.base import BalancingStrategy
from ai_agent_server.memory_gauges.base import MemoryGauge
from ai_agent_server.tracing.base import Tracer

T = TypeVar("T", bound=msgspec.Struct)

TOOLS_PROFILE = "productivity"
"""Its roles and the text tools share their prompts."""
MAX_FILE_BYTES = 16 * 1024 * 1024


def engine_for(name: str, llm: LLMSettings, environ: Mapping[str, str]) -> LLMEngine:
    """The engine that `llms.<name>` describes. Raises `ConfigurationError`."""
    return _maker(name, llm, environ)()


def members_for(
    settings: Settings, switched: Mapping[str, bool], environ: Mapping[str, str]
) -> dict[str, Member]:
    """Every configured LLM with its engine, switched as it was left. Raises `ConfigurationError`."""
    # Every mistake is found before the first engine is made: what is made has to be closed.
    makers = {name: _maker(name, llm, environ) for name, llm in settings.llms.items()}
    return {
        name: Member(settings=llm, engine=makers[name](), switched=switched.get(name))
        for name, llm in settings.llms.items()
    }


def _maker(name: str, llm: LLMSettings, environ: Mapping[str, str]) -> Callable[[], LLMEngine]:
    """Makes the engine, and finds what is wrong with its description before. Raises `ConfigurationError`."""
    here = ("llms", name)
    engine_class = implementation(llm_engines, llm.engine, pointer=json_pointer((*here, "engine")))
    options = _options(llm.options, engine_class.Options, here)
    if "embeddings" in llm.capabilities and not issubclass(engine_class, EmbeddingEngine):
        raise ConfigurationError(
            f"the engine {llm.engine} gives no vectors", pointer=json_pointer((*here, "capabilities"))
        )
    spec = EngineSpec(
        name=name,
        model=llm.model,
        context_tokens=llm.context,
        slots=llm.slots,
        timeouts=llm.timeouts,
        api_key=configuration.secret(llm.api_key, environ),
    )

    def make() -> LLMEngine:
        engine: LLMEngine = engine_class(spec, options)
        return engine

    return make


def _options(given: JSONObject, kind: type[T], here: tuple[str, ...]) -> T:
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as exc:
        known = tuple(field.encode_name for field in msgspec.structs.fields(kind))
        raise ConfigurationError(str(exc), pointer=json_pointer((*here, "options")), choices=known) from exc


def gauges_for(settings: Settings) -> dict[str, MemoryGauge]:
    """Accelerator -> its gauge, of those that have one. Raises `ConfigurationError`."""
    found: dict[str, MemoryGauge] = {}
    for name, accelerator in settings.accelerators.items():
        kind, _, where = (accelerator.device or _usual_device(name)).partition(":")
        if kind != "none":
            here = json_pointer(("accelerators", name, "device"))
            gauge = implementation(memory_gauges, kind, pointer=here)
            try:
                found[name] = gauge(where)
            except ValueError as exc:
                raise ConfigurationError(str(exc), pointer=here) from exc
    return found


def _usual_device(name: str) -> str:
    if name == "cpu":
        return "ram"
    card = re.fullmatch(r"gpu(\d*)", name)
    return "none" if card is None else f"nvidia:{card[1] or 0}"


def tracer_for(settings: Settings, environ: Mapping[str, str]) -> AbstractAsyncContextManager[Tracer] | None:
    """Who is told of spans, None where nobody is. Raises `ConfigurationError`."""
    wanted = settings.tracing
    if wanted.endpoint is None:
        return None
    headers = {}
    for name, reference in wanted.headers.items():
        value = configuration.secret(reference, environ) or ""
        if not value or not (value.isascii() and value.isprintable()):
            why = "has what no header may have" if value else "is not set"
            raise ConfigurationError(
                f"the variable {reference.env} {why}", pointer=json_pointer(("tracing", "headers", name))
            )
        headers[name] = value
    try:
        otlp = implementation(tracing, "otlp", pointer="/tracing")
    except ImportError as exc:
        raise ConfigurationError(
            "traces need one package more: pip install 'ai-agent-server[otlp]'", pointer="/tracing/endpoint"
        ) from exc
    tracer: AbstractAsyncContextManager[Tracer] = otlp(
        wanted.endpoint,
        headers=headers,
        resource={"service.name": wanted.service_name, "service.version": __version__},
        share=wanted.share,
        now_ns=time.time_ns,
        random=os.urandom,
    )
    return tracer


def strategy_for(settings: Settings) -> BalancingStrategy:
    """The configured strategy."""
    name = settings.balancer.strategy
    strategy: BalancingStrategy = implementation(strategies, name, pointer="/balancer/strategy")()
    return strategy


def profiles_for(settings: Settings, folder: Path | None) -> dict[str, Profile]:
    """Every configured profile, ready to run. `folder` is where the configuration's prompts are."""
    return {
        name: Profile(
            roles={role_name: _role(settings, name, role_name, folder) for role_name in profile.roles},
            workflow=profile.workflow,
        )
        for name, profile in settings.profiles.items()
    }


def ready_tools(settings: Settings, folder: Path | None) -> dict[str, ReadyTool]:
    """The text tools, each with the prompt of the role of its name. Raises `ConfigurationError`."""
    found: dict[str, ReadyTool] = {}
    profile = settings.profiles.get(TOOLS_PROFILE)
    for name in sorted(kinds(tools)):
        role = profile.roles.get(name) if profile else None
        here = ("profiles", TOOLS_PROFILE, "roles", name)
        named = role.prompt if role else None
        prompt = _prompt(named, TOOLS_PROFILE, name, folder, required=True, here=here)
        found[name] = ReadyTool(implementation(tools, name)(), prompt)
    return found


def _role(settings: Settings, profile_name: str, role_name: str, folder: Path | None) -> Role:
    profile = settings.profiles[profile_name]
    role = profile.roles[role_name]
    here = ("profiles", profile_name, "roles", role_name)
    own = f"{profile_name}.{role_name.replace('-', '_')}"
    kind = role.agent or (own if own in kinds(agents) else "prompt")
    locked_local = role.llm is not None and (
        settings.llms[role.llm].locked and settings.llms[role.llm].source == "local"
    )
    spec = RoleSpec(
        profile=profile_name,
        role=role_name,
        prompt=_prompt(role.prompt, profile_name, role_name, folder, required=kind == "prompt", here=here),
        result_schema=role.result_schema,
        max_tokens=role.max_tokens,
        temperature=role.temperature,
        temperature_again=role.temperature_again,
        stop=role.stop,
        options=role.options,
        sandbox_limits=settings.sandbox.limits,
    )
    return Role(
        spec=spec,
        agent=None if kind == "external" else _agent(kind, role.options, here),
        hints=RouteHints(
            llm=role.llm,
            tier=role.tier,
            prefer=role.prefer,
            privacy="local" if locked_local else role.privacy,
            urgency=role.urgency,
        ),
        limits=role.limits.over(settings.limits) if role.limits else settings.limits,
        payload_schema=role.payload_schema or profile.payload_schema,
    )


def _agent(kind: str, options: JSONObject, here: tuple[str, ...]) -> Agent:
    agent_class = implementation(agents, kind, pointer=json_pointer((*here, "agent")))
    if hasattr(agent_class, "Options"):
        _options(options, agent_class.Options, here)  # the agent reads them at each step; a typo is found now
    agent: Agent = agent_class()
    return agent


def _prompt(
    named: str | None, profile: str, role: str, folder: Path | None, *, required: bool, here: tuple[str, ...]
) -> str:
    pointer = json_pointer((*here, "prompt"))
    relative = named or f"{profile}/{role}.md"
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        raise ConfigurationError("a prompt file is named relative to the configuration", pointer=pointer)
    packaged = resources.files("ai_agent_server.config").joinpath("prompts", relative)
    places = [*([folder / relative] if folder else []), packaged]
    for place in places:
        try:
            if place.is_file():
                return place.read_text(encoding="utf-8")
        except UnicodeDecodeError as exc:
            raise ConfigurationError(
                f"the prompt file {str(place)!r} is not UTF-8 at byte {exc.start}", pointer=pointer
            ) from exc
        except OSError as exc:
            raise ConfigurationError(
                f"the prompt file {str(place)!r} cannot be read: {exc.strerror}", pointer=pointer
            ) from exc
    if named or required:
        raise ConfigurationError(
            f"there is no prompt file {relative!r}", pointer=pointer, choices=tuple(str(p) for p in places)
        )
    return ""


def file_reader(allowed: tuple[str, ...]) -> Callable[[str], Awaitable[bytes]]:
    """Reads files below the allowed folders, links resolved, for payloads that name one."""
    folders = tuple(Path(folder).expanduser().resolve() for folder in allowed)

    def read(path: str) -> bytes:
        wanted = Path(path).expanduser().resolve()
        if not any(wanted.is_relative_to(folder) for folder in folders):
            raise InvalidPacketError(
                f"{path[:200]!r} is not below an allowed folder",
                pointer="/payload",
                expected=f"a file below server.allowed_folders: {', '.join(map(str, folders)) or 'none'}",
            )
        try:
            if wanted.stat().st_size > MAX_FILE_BYTES:
                raise InvalidPacketError(
                    f"{path[:200]!r} is over {MAX_FILE_BYTES // 2**20} MiB", pointer="/payload"
                )
            return wanted.read_bytes()
        except OSError as exc:
            raise InvalidPacketError(
                f"{path[:200]!r} cannot be read: {exc.strerror}", pointer="/payload"
            ) from exc

    async def reader(path: str) -> bytes:
        return await asyncio.to_thread(read, path)

    return reader
