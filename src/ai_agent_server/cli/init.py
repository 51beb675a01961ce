"""`init`: writes a configuration.json from what this machine has, and says what it chose and why."""

import asyncio
import json
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter
from rich.text import Text

from ai_agent_server import discovery, llm_engines, probes
from ai_agent_server.cli import Exit
from ai_agent_server.cli.options import AsJSON, caller, console, print_json
from ai_agent_server.config import settings
from ai_agent_server.core.chat import JSONObject
from ai_agent_server.errors import ConfigurationError
from ai_agent_server.probes import MIB, Found, LocalModel, LocalServer

__all__ = ("Proposal", "init", "propose")

GPU_HEADROOM_MB = 512
RAM_SHARE = 0.6
"""How much of the RAM models may take where there is no GPU: the person works on this machine too."""
OVERHEAD = 1.15
OVERHEAD_MB = 300
"""What a loaded model needs beyond its file: the KV cache of a usual context, and buffers."""
MAX_CONTEXT = 8192
MIN_SMALL_BYTES = 400 * MIB
MAX_LISTED = 8

# Names that stand for a vendor's current model where there is one, so that they last.
APIS: dict[str, tuple[str, str, JSONObject]] = {
    # OpenAI's reasoning models refuse a temperature and stop words.
    "OPENAI_API_KEY": ("openai", "gpt-5.4-mini", {"omit": ["temperature", "top_p", "stop"]}),
    "OPENROUTER_API_KEY": ("openrouter", "openrouter/auto", {"base_url": "https://openrouter.ai/api/v1"}),
    "MISTRAL_API_KEY": ("mistral", "mistral-large-latest", {"base_url": "https://api.mistral.ai/v1"}),
    "DEEPSEEK_API_KEY": ("deepseek", "deepseek-chat", {"base_url": "https://api.deepseek.com/v1"}),
}
"""Variable -> (name of the LLM, model, options); all speak OpenAI's form."""
ENGINES: dict[probes.ServerKind, str] = {
    "ollama": "local.ollama",
    "llama-server": "local.llama_server",
    "vllm": "local.vllm",
}


class Proposal(NamedTuple):
    """A configuration, and a sentence on each choice."""

    document: JSONObject
    reasons: tuple[str, ...]


class _Offer(NamedTuple):
    """A model on a server, as a candidate."""

    server: LocalServer
    model: LocalModel
    need_mb: int

    @property
    def label(self) -> str:
        size = f", {self.need_mb / 1024:.1f} GB loaded" if self.need_mb else ""
        return f"{self.model.name} on {self.server.kind}{size}"


def propose(found: Found, base: JSONObject, debug_loop: JSONObject, *, apis: bool = False) -> Proposal:
    """The configuration for what was found: `base` (the packaged one) with its LLMs replaced.

    Where a model other than the embedded one serves, the developer's loop is `debug_loop`. `apis`
    switches on what costs money and sends text away. Pure.
    """
    reasons: list[str] = []
    # One GPU is planned for, the largest; engines that spread a model over several do so by themselves.
    gpu = max(found.gpus, key=lambda each: each.memory_mb, default=None)
    accelerators: dict[str, dict[str, int]] = {}
    budget_mb, where = int(found.memory_mb * RAM_SHARE), "memory (no NVIDIA GPU was found)"
    if gpu is not None and gpu.memory_mb > GPU_HEADROOM_MB:
        accelerators["gpu0"] = {"memory_mb": gpu.memory_mb, "headroom_mb": GPU_HEADROOM_MB}
        budget_mb, where = gpu.memory_mb - GPU_HEADROOM_MB, f"the GPU ({gpu.name})"
    reasons.append(f"models may take {budget_mb / 1024:.1f} GB of {where}")

    llms: JSONObject = {}
    chosen = _choose(_offers(found), budget_mb, reasons)
    for offer, tier, on in chosen:
        llms[_free_name(offer.model.name, llms)] = _local(offer, tier, on, accelerators)
    if not any(server.models for server in found.servers):
        reasons.append("no Ollama, llama-server or vLLM with a model answers on this machine")
    any_local = any(on for _, _, on in chosen)
    for name, llm in base.get("llms", {}).items():
        llms[name] = {**llm, "toggle": not any_local}
        reasons.append(
            f"{name} ({llm['model']}) is kept but off: it is for trying the server out"
            if any_local
            else f"{name} ({llm['model']}) is on, so that the server works at once; expect little of it"
        )
    _add_apis(found, llms, reasons, apis)
    document = {**base, "accelerators": accelerators, "llms": llms}
    if any(llm["toggle"] for name, llm in llms.items() if name not in base.get("llms", {})):
        document["profiles"] = with_loop(base.get("profiles", {}), debug_loop)
        reasons.append(
            "the developer's loop debugs code that fails; the packaged one draws it anew, which is better "
            "for the embedded model alone"
        )
    return Proposal(document, tuple(reasons))


def with_loop(profiles: JSONObject, loop: JSONObject) -> JSONObject:
    """`profiles` whose developer works by `loop`, {"roles", "workflow"}."""
    developer = profiles["developer"]
    roles = {**developer["roles"], **loop["roles"]}
    return {**profiles, "developer": {**developer, "roles": roles, "workflow": loop["workflow"]}}


def _offers(found: Found) -> list[_Offer]:
    return [
        _Offer(server, model, _need_mb(model))
        for server in found.servers
        for model in server.models
        if "chat" in model.capabilities
    ]


def _need_mb(model: LocalModel) -> int:
    return int(model.size_bytes * OVERHEAD / MIB) + OVERHEAD_MB if model.size_bytes else 0


def _choose(offers: list[_Offer], budget_mb: int, reasons: list[str]) -> list[tuple[_Offer, str, bool]]:
    """(offer, tier, on) of each that goes into the file."""
    # What llama-server and vLLM serve is in memory already; its size decides nothing.
    running = [offer for offer in offers if offer.server.kind != "ollama"]
    by_size = sorted((o for o in offers if o.server.kind == "ollama"), key=lambda o: o.need_mb)
    fitting = [offer for offer in by_size if offer.need_mb <= budget_mb]
    chosen: list[tuple[_Offer, str, bool]] = [(offer, "main", True) for offer in running]
    reasons += [f"{offer.label}: main, because it is running" for offer in running]
    if fitting and not running:
        main = fitting[-1]
        chosen.append((main, "main", True))
        reasons.append(f"{main.label}: main, the largest that fits")
    rest = [offer for offer in fitting if all(offer is not taken for taken, _, _ in chosen)]
    small = next((o for o in rest if (o.model.size_bytes or 0) >= MIN_SMALL_BYTES), None)
    if small is not None:
        chosen.append((small, "small", True))
        reasons.append(f"{small.label}: small, for short work; the smallest of use")
    if not any("vision" in taken.model.capabilities for taken, _, _ in chosen):
        sees = next((offer for offer in rest if "vision" in offer.model.capabilities), None)
        if sees is not None:
            chosen.append((sees, "small", True))
            reasons.append(f"{sees.label}: on for the role vision")
    taken_already = {id(offer) for offer, _, _ in chosen}
    others = [offer for offer in by_size if id(offer) not in taken_already][-MAX_LISTED:]
    for offer in others:
        chosen.append((offer, "main", False))
        why = "not needed now" if offer.need_mb <= budget_mb else f"larger than {budget_mb / 1024:.1f} GB"
        reasons.append(f"{offer.label}: off, {why}")
    return chosen


def _local(offer: _Offer, tier: str, on: bool, accelerators: dict[str, dict[str, int]]) -> JSONObject:
    server, model = offer.server, offer.model
    engine = ENGINES[server.kind]
    llm: JSONObject = {
        "engine": engine,
        "model": model.name,
        "source": "local",
        "toggle": on,
        "tier": tier,
        "context": min(model.context_tokens or MAX_CONTEXT, MAX_CONTEXT)
        if server.kind == "ollama"
        else model.context_tokens or MAX_CONTEXT,
        "slots": server.slots,
        "capabilities": list(model.capabilities),
        "options": {"base_url": server.url},
    }
    if offer.need_mb:
        llm["memory_mb"] = offer.need_mb
    for name, card in accelerators.items():
        # What does not fit the card runs partly beside it: the card's queue could never load it.
        if offer.need_mb <= card["memory_mb"] - card["headroom_mb"]:
            llm["accelerator"] = name
    return llm


def _add_apis(found: Found, llms: JSONObject, reasons: list[str], on: bool) -> None:
    for variable in sorted(found.api_keys):
        api = APIS.get(variable)
        if api is None or "api.openai" not in found.engines:
            reasons.append(f"{variable} is set, but there is no engine for it")
            continue
        wanted, model, options = api
        name = _free_name(wanted, llms)
        llms[name] = {
            "engine": "api.openai",
            "model": model,
            "source": "api",
            "toggle": on,
            "tier": "main",
            "context": 128_000,
            "slots": 4,
            "capabilities": ["chat", "json_schema", "tools"],
            "api_key": {"env": variable},
            "options": options,
        }
        reasons.append(
            f"{name} ({model}): on, as --apis says; it costs money and text goes out"
            if on
            else f"{name} ({model}): there, but off: it costs money and text goes out; "
            f"ai-agent-server llms on {name}"
        )


def _free_name(model: str, taken: JSONObject) -> str:
    """A name for the LLM that the configuration takes: lower case, digits, '-'."""
    stem = (
        re.sub(r"[^a-z0-9]+", "-", Path(model).name.removesuffix(".gguf").lower()).strip("-")[:56].strip("-")
    )
    stem = stem or "llm"
    name, number = stem, 2
    while name in taken or name == "embedded":
        name, number = f"{stem}-{number}", number + 1
    return name


async def _look() -> Found:
    environ = settings.environment()
    servers, gpus = await asyncio.gather(probes.servers(probes.urls(environ)), probes.gpus())
    return Found(
        servers=servers,
        gpus=gpus,
        memory_mb=probes.memory_mb(),
        api_keys=probes.api_keys(environ),
        engines=frozenset(discovery.kinds(llm_engines)),
    )


def init(
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("configuration.json"),
    force: Annotated[bool, Parameter(negative=())] = False,
    apis: Annotated[bool, Parameter(negative=())] = False,
    as_json: AsJSON = False,
) -> int:
    """Write a configuration.json from what this machine has.

    Looks for Ollama, a llama-server and a vLLM on this machine, an NVIDIA GPU, and API keys in the
    environment; says what it chose and why. Nothing is sent to any API.

    Parameters
    ----------
    output
        The file to write.
    force
        Write over a file that is there.
    apis
        Switch the APIs on whose keys are set; they cost money and text goes out.
    """
    if output.exists() and not force:
        raise ConfigurationError("is there already; --force writes over it", source=str(output))
    base: Any = json.loads(settings.packaged_configuration())
    found = asyncio.run(_look())
    document, reasons = propose(found, base, settings.packaged_debug_loop(), apis=apis)
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    settings.parse(text.encode(), source="the proposal")
    _write(output, text)
    if as_json:
        print_json({"output": str(output), "reasons": reasons, "configuration": document})
        return Exit.OK
    out = console()
    for reason in reasons:
        out.print(Text(f"- {reason}"), soft_wrap=True)
    now = caller(None).command("serve", "--config", str(output))
    out.print(f"wrote {output}; now: {now}", soft_wrap=True)
    return Exit.OK


def _write(path: Path, text: str) -> None:
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as temporary:
            temporary.write(text)
        Path(temporary.name).chmod(0o644)
        Path(temporary.name).replace(path)
    except OSError as exc:
        raise ConfigurationError(f"cannot be written: {exc.strerror}", source=str(path)) from exc
