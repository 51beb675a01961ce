"""The configuration: one strict JSON file as frozen values, with its published JSON Schema."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import msgspec
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match

from ai_agent_server.core.callbacks import is_plain
from ai_agent_server.core.chat import Capability, JSONObject, Privacy, Tier, Urgency
from ai_agent_server.core.packet_json import json_pointer
from ai_agent_server.core.task_packet import Limits, LimitsDraft
from ai_agent_server.core.workflow import END, Workflow
from ai_agent_server.errors import ConfigurationError
from ai_agent_server.llm_engines.base import EngineTimeouts
from ai_agent_server.loopback import is_loopback_url
from ai_agent_server.sandbox.base import SandboxLimits
from ai_agent_server.tasks_state.base import Retention

API_KEY = "AI_AGENT_SERVER_API_KEY"
"""The variable that holds the key which clients must show."""
ADMIN_KEY = "admin"
"""The name of that key."""
SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"
MAX_BYTES = 4 * 1024 * 1024
NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
DEVICE_PATTERN = r"^[a-z_]{1,32}(:[A-Za-z0-9-]{1,64})?$"

RESERVED_PROFILES = frozenset(
    {
        "accelerators",
        "chat",
        "config",
        "context",
        "docs",
        "health",
        "llms",
        "load-balancer",
        "metrics",
        "models",
        "openapi",
        "profiles",
        "schema",
        "tasks",
        "tools",
    }
)
"""Path segments below /api/v1 that are routes of their own; a profile may not shadow them."""
RESERVED_ROLES = frozenset({END, "user"})
_ABSOLUTE = re.compile(r"/[^/]|[A-Za-z]:[\\/].")

Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=100_000_000)]
Megabytes = Annotated[int, msgspec.Meta(ge=0, le=100_000_000)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
Temperature = Annotated[float, msgspec.Meta(ge=0, le=10)]
Dollars = Annotated[float, msgspec.Meta(ge=0, le=1_000_000)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the file. An unknown key is refused."""


class Accelerator(_Section, frozen=True, kw_only=True):
    """Memory that models share: one GPU, or RAM under the name `cpu`."""

    memory_mb: Megabytes
    headroom_mb: Megabytes = 512
    max_wait_s: Seconds = 60.0
    """An LLM that was wanted for so long while it was out of memory comes in next; at most half of
    balancer.max_wait_s."""
    hold_s: Seconds = 120.0
    """For so long after an interactive request, background work takes no memory from its LLM."""
    max_queued: Count = 256
    device: Annotated[str, msgspec.Meta(pattern=DEVICE_PATTERN)] | None = None
    """Where free memory is read, so that what other programs take is not counted on: `nvidia:0` (the index
    or the UUID that nvidia-smi shows), `ram`, `none`. By default RAM under the name `cpu`, the card of that
    number under `gpu0` and the like, and none under any other name."""


class EnvSecret(_Section, frozen=True, kw_only=True):
    """Where a secret is found; the file itself never holds one."""

    env: str


class LLMSettings(_Section, frozen=True, kw_only=True):
    """A configured LLM: a model on an engine."""

    engine: str
    """A file below llm_engines: `local.llama_cpp`, `local.ollama`, `api.openai`."""
    model: str
    source: Literal["local", "api"]
    toggle: bool = True
    """On or off. PATCH /api/v1/llms/{name} switches it at run time; that is kept over a restart, until
    what stands here is changed."""
    locked: bool = False
    """What is assigned to this LLM is never moved to another."""
    tier: Tier = "small"
    context: Tokens = 4096
    slots: Count = 1
    capabilities: tuple[Capability, ...] = ("chat",)
    accelerator: str | None = None
    memory_mb: Megabytes | None = None
    api_key: EnvSecret | None = None
    cost_per_million_input_usd: Dollars = 0.0
    cost_per_million_output_usd: Dollars = 0.0
    timeouts: EngineTimeouts = EngineTimeouts()
    options: JSONObject = msgspec.field(default_factory=dict)

    @property
    def provider(self) -> str:
        """What OpenTelemetry's conventions call the provider: the engine's own name."""
        return self.engine.rpartition(".")[2]


class RoleSettings(_Section, frozen=True, kw_only=True):
    """A role of a profile. With a prompt file and a schema it needs no code of its own."""

    agent: str | None = None
    """A file below agents (`developer.qa`), `prompt`, `check`, or `external` (an outside agent reports by
    feedback). By default the file that has the profile's and role's name, else `prompt`."""
    description: str = ""
    llm: str | None = None
    tier: Tier | None = None
    prefer: tuple[str, ...] = ()
    privacy: Privacy = "any"
    urgency: Urgency = "interactive"
    """Whom an accelerator serves first: `interactive`, then `batch`, then `background`."""
    prompt: str | None = None
    """A file, relative to the configuration's folder or to the packaged prompts. By default
    `<profile>/<role>.md`."""
    payload_schema: JSONObject | None = None
    result_schema: JSONObject | None = None
    max_tokens: Tokens = 512
    temperature: Temperature = 0.0
    temperature_again: Temperature | None = None
    """Of the role's later answers in the same task: above 0 each is another try. By default as the first."""
    stop: Annotated[tuple[str, ...], msgspec.Meta(max_length=4)] = ()
    """An answer ends before any of these: before the code's closing fence, say, and what is said after it."""
    limits: LimitsDraft | None = None
    """What is left out is as in the file's own `limits`."""
    options: JSONObject = msgspec.field(default_factory=dict)


class ProfileSettings(_Section, frozen=True, kw_only=True):
    """A profile: its roles and how they follow each other."""

    roles: dict[str, RoleSettings]
    description: str = ""
    workflow: Workflow = Workflow()
    payload_schema: JSONObject | None = None
    """For every role that has none of its own."""


class CircuitSettings(_Section, frozen=True, kw_only=True):
    """When an LLM that fails is left alone."""

    failures: Count = 5
    cooldown_s: Seconds = 30.0


class RetrySettings(_Section, frozen=True, kw_only=True):
    """How an LLM call is repeated before its first token."""

    attempts: Count = 3
    backoff_s: Seconds = 0.25
    backoff_max_s: Seconds = 8.0


class BalancerSettings(_Section, frozen=True, kw_only=True):
    """How an LLM is chosen."""

    strategy: str = "resident_first"
    """A file below load_balancer/strategies."""
    circuit: CircuitSettings = CircuitSettings()
    retry: RetrySettings = RetrySettings()
    max_wait_s: Seconds = 120.0
    spill_after_s: Seconds | None = None
    """What would wait, or has waited, longer than this for an LLM of this machine goes to an API that may
    serve it: never what is private or assigned to a locked LLM, nor background work, nor past a bound on
    cost. By default waiting alone refuses no LLM, and the strategy weighs it."""


class MessagingSettings(_Section, frozen=True, kw_only=True):
    """The Message Control Protocol's transport."""

    enabled: bool = True
    url: str | None = None
    """Your nats-server; by default the one that is shipped runs as a private child on loopback."""
    port: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 0
    """Where the shipped nats-server listens, on loopback; 0 takes a free port."""
    credentials: EnvSecret | None = None
    """A variable that holds `user:password` or a token; for the shipped nats-server `user:password`,
    new at each start when it is not given."""
    metrics_interval_s: Annotated[float, msgspec.Meta(ge=0.1, le=86_400)] = 10.0


MetricNames = Literal["own", "otel", "both"]


class TracingSettings(_Section, frozen=True, kw_only=True):
    """Traces, told to a collector of OpenTelemetry's. What was asked and answered is never in them."""

    endpoint: str | None = None
    """Where OTLP is taken over HTTP: `http://127.0.0.1:4318/v1/traces`. Left out: nothing is told."""
    headers: dict[str, EnvSecret] = msgspec.field(default_factory=dict)
    """Headers that it asks for, each with the variable that holds its value."""
    service_name: str = "ai-agent-server"
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    """Of the traces that begin here; one that a client began is told where the client says so."""


class MetricsSettings(_Section, frozen=True, kw_only=True):
    """What Prometheus is told at /metrics."""

    names: MetricNames = "both"
    """`own`: `ai_agent_server_*`; `otel`: `gen_ai_*`, the histograms of OpenTelemetry's conventions for
    generative AI, alone."""


class ClusterSettings(_Section, frozen=True, kw_only=True):
    """Several servers that share their tasks over the nats-server of `messaging.url`."""

    enabled: bool = False
    name: Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)] | None = None
    """How this server is called in tasks' histories; an id of its own is put behind it."""
    lease_s: Annotated[float, msgspec.Meta(ge=1, le=600)] = 6.0
    """A server that is silent for so long is taken to be gone, and its tasks are run by the others."""
    replicas: Annotated[int, msgspec.Meta(ge=1, le=5)] = 1
    """On how many servers of a NATS cluster everything is kept: 3 outlives the loss of one."""
    state_mb: Annotated[int, msgspec.Meta(ge=16, le=100_000_000)] = 1024
    """How much NATS may keep of the tasks. When it is full new ones are refused."""


class StoreSettings(_Section, frozen=True, kw_only=True):
    """Where tasks are kept."""

    kind: str = "json_file_store"
    """A file below tasks_state."""
    retention: Retention = Retention()


class SandboxSettings(_Section, frozen=True, kw_only=True):
    """Where model-written code runs. `unsafe` runs it unconfined, and must be written out."""

    tier: Literal["auto", "bubblewrap", "landlock", "unsafe"] = "auto"
    limits: SandboxLimits = SandboxLimits()


class ServerSettings(_Section, frozen=True, kw_only=True):
    """Intake, work at the same time, and shutdown."""

    max_running: Count = 4
    max_live: Count = 1000
    max_body_mb: Annotated[float, msgspec.Meta(gt=0, le=1024)] = 8.0
    shutdown_s: Seconds = 10.0
    allowed_folders: tuple[str, ...] = ()
    """Folders from which a payload may name files (images for vision)."""


class TierLimits(_Section, frozen=True, kw_only=True):
    """How much a request of the tier `small` may read and write, in tokens."""

    max_input_tokens: Tokens = 2048
    """A request that is estimated to be longer is not of this tier by itself."""
    max_output_tokens: Tokens = 512
    """Never more than this, and as much as this where a request says nothing."""


class MainTierLimits(TierLimits, frozen=True, kw_only=True):
    """How much a request of the tier `main` may read and write, in tokens."""

    max_input_tokens: Tokens = 1_000_000
    max_output_tokens: Tokens = 2048


class TiersSettings(_Section, frozen=True, kw_only=True):
    """The two tiers of the gateway: small for quick jobs, main for the rest."""

    small: TierLimits = TierLimits()
    main: MainTierLimits = MainTierLimits()


KeyScope = Literal["chat", "tools", "tasks", "admin", "metrics"]


class Allowance(_Section, frozen=True, kw_only=True):
    """How much may be used in any stretch of `per_s` seconds. What is left out is not bounded."""

    per_s: Annotated[float, msgspec.Meta(ge=1, le=31_622_400)] | None = None
    """Left out: in total, for ever."""
    requests: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)] | None = None
    tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000_000)] | None = None
    gpu_s: Annotated[float, msgspec.Meta(gt=0, le=1_000_000_000)] | None = None
    """Seconds in which a slot of a local LLM is taken."""
    usd: Annotated[float, msgspec.Meta(gt=0, le=1_000_000_000)] | None = None


class KeyRights(_Section, frozen=True, kw_only=True):
    """What a key is good for."""

    scopes: tuple[KeyScope, ...] = ("chat", "tools", "tasks", "metrics")
    """`admin` is for switching LLMs and reloading the configuration."""
    allowed_llms: tuple[str, ...] = ()
    """Empty: all."""
    privacy: Privacy = "any"
    cache: bool | None = None
    """Whether its chats are answered from `gateway.cache`; left out: as `by_default` there says."""
    limits: tuple[Allowance, ...] = ()


class KeySettings(KeyRights, frozen=True, kw_only=True):
    """A key that clients show, kept in a variable of the environment."""

    api_key: EnvSecret


class ProjectSettings(_Section, frozen=True, kw_only=True):
    """A project: what belongs to it is bounded and counted together."""

    paths: tuple[str, ...] = ()
    """Absolute folders. A request whose system prompt names one of them as where it works is of this
    project."""
    privacy: Privacy = "any"
    prefer: tuple[str, ...] = ()
    """LLM names in order of preference."""
    limits: tuple[Allowance, ...] = ()


class TierAllowances(_Section, frozen=True, kw_only=True):
    """What each caller may use of the tiers."""

    small: tuple[Allowance, ...] = ()
    main: tuple[Allowance, ...] = ()


class CallerLimits(_Section, frozen=True, kw_only=True):
    """Limits that hold for each caller beside a key's own."""

    address: tuple[Allowance, ...] = ()
    """For each IP address (each /64 of IPv6) on a server that asks for no key."""
    tiers: TierAllowances = TierAllowances()
    profiles: dict[str, tuple[Allowance, ...]] = msgspec.field(default_factory=dict)
    """By profile: what all its tasks may use together. `requests` are calls of LLMs."""
    context: tuple[Allowance, ...] = ()
    """For each context: what the tasks in it may use together. Each needs `per_s`, contexts being many."""


class CacheSettings(_Section, frozen=True, kw_only=True):
    """The exact cache: answers to the very same question, kept in memory."""

    by_default: bool = False
    """Whether chats that say nothing of it use it. A key's own `cache` goes before, and a request's header
    `X-Cache: use`, `refresh` or `off` before both."""
    shared: bool = False
    """Whether what one key was answered may answer another one that may use the same LLMs. By default
    each key and each project has its own answers."""
    max_mb: Annotated[float, msgspec.Meta(ge=0, le=65_536)] = 64.0
    """0: there is no cache, whoever asks for it."""
    max_answers: Count = 10_000
    ttl_s: Annotated[float, msgspec.Meta(gt=0, le=31_622_400)] = 3600.0
    """For how long an answer is given again."""


class GatewaySettings(_Section, frozen=True, kw_only=True):
    """The OpenAI and Anthropic forms of the API, for SDKs and coding agents; and who may use the server."""

    tiers: TiersSettings = TiersSettings()
    aliases: dict[str, str] = msgspec.field(default_factory=dict)
    """Names that clients insist on: a pattern (`claude-*`) to an LLM, a tier, `profile/role` or `auto`;
    the first that fits counts."""
    keep_alive_s: Annotated[float, msgspec.Meta(ge=0.1, le=600)] = 5.0
    """In a silent stream something is sent this often; the first time after a second at most."""
    keys: dict[str, KeySettings] = msgspec.field(default_factory=dict)
    keys_file: str | None = None
    """Where `ai-agent-server keys` keeps the keys it makes, hashed; by default keys.json in the state
    folder."""
    limits: CallerLimits = CallerLimits()
    cache: CacheSettings = CacheSettings()
    cors: tuple[str, ...] = ()
    """Origins of web pages that may use the server, exactly as a browser sends them:
    `https://app.example.org`."""


class CallbackTarget(_Section, frozen=True, kw_only=True):
    """Where webhooks may go."""

    url: str
    """http(s), a host and a path: a task's callback has to be at or below it."""
    secret: EnvSecret
    """What signs the messages: `whsec_` and base64, or any text."""


class CallbackSettings(_Section, frozen=True, kw_only=True):
    """Webhooks: a task may name a URL that is told of its events. Without a target there are none."""

    targets: dict[str, CallbackTarget] = msgspec.field(default_factory=dict)
    attempts: Count = 12
    """So often a message is tried; then its task's messages are given up."""
    backoff_s: Annotated[float, msgspec.Meta(ge=0.01, le=3600)] = 1.0
    """Before the second attempt; twice as long before each that follows."""
    backoff_max_s: Annotated[float, msgspec.Meta(ge=0.01, le=86_400)] = 600.0
    timeout_s: Annotated[float, msgspec.Meta(ge=0.1, le=300)] = 10.0


class Settings(_Section, frozen=True, kw_only=True):
    """The whole file."""

    schema: str = msgspec.field(default="", name="$schema")
    accelerators: dict[str, Accelerator] = msgspec.field(default_factory=dict)
    llms: dict[str, LLMSettings]
    profiles: dict[str, ProfileSettings]
    balancer: BalancerSettings = BalancerSettings()
    messaging: MessagingSettings = MessagingSettings()
    cluster: ClusterSettings = ClusterSettings()
    store: StoreSettings = StoreSettings()
    sandbox: SandboxSettings = SandboxSettings()
    server: ServerSettings = ServerSettings()
    gateway: GatewaySettings = GatewaySettings()
    callbacks: CallbackSettings = CallbackSettings()
    projects: dict[str, ProjectSettings] = msgspec.field(default_factory=dict)
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    limits: Limits = Limits()


def json_schema() -> JSONObject:
    """The JSON Schema (2020-12) of configuration.json; it is what files are checked against."""
    schema = msgspec.json.schema(Settings)
    definitions = schema["$defs"]
    for section, key in (
        ("Settings", "llms"),
        ("Settings", "profiles"),
        ("Settings", "projects"),
        ("ProfileSettings", "roles"),
        ("GatewaySettings", "keys"),
        ("CallbackSettings", "targets"),
        ("CallerLimits", "profiles"),
    ):
        definitions[section]["properties"][key]["propertyNames"] = {"pattern": NAME_PATTERN}
    return {"$schema": SCHEMA_ID, "title": "configuration.json of AI-Agent-Server", **schema}


def packaged_configuration() -> bytes:
    """The packaged default, which needs no key and no network."""
    return resources.files("ai_agent_server.config").joinpath("configuration.json").read_bytes()


def packaged_debug_loop() -> JSONObject:
    """Roles and workflow of the developer's loop that mends code, for LLMs that can; {"roles", "workflow"}.

    The packaged default draws code anew instead, which is what the embedded model is better at.
    """
    found: JSONObject = json.loads(
        resources.files("ai_agent_server.config").joinpath("debug_loop.json").read_bytes()
    )
    return found


def load(path: Path | None) -> Settings:
    """The settings in `path`, or the packaged default. Raises `ConfigurationError`."""
    if path is None:
        return parse(packaged_configuration(), source="packaged configuration.json")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigurationError(f"larger than {MAX_BYTES // 1024 // 1024} MiB", source=str(path))
        text = path.read_bytes()
    except OSError as exc:
        raise ConfigurationError(f"cannot be read: {exc.strerror}", source=str(path)) from exc
    return parse(text, source=str(path))


def parse(text: bytes, *, source: str) -> Settings:
    """The settings in `text`. Raises `ConfigurationError` with the JSON pointer of the first mistake."""
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"not UTF-8 at byte {exc.start}", source=source) from exc
    except json.JSONDecodeError as exc:
        raise ConfigurationError(
            f"not JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}", source=source
        ) from exc
    except ValueError as exc:
        raise ConfigurationError("a number has too many digits", source=source) from exc
    except RecursionError as exc:
        raise ConfigurationError("nested too deep", source=source) from exc
    for path, problem in _not_json(document):
        raise ConfigurationError(problem, pointer=json_pointer(path), source=source)
    mistake = best_match(Draft202012Validator(json_schema()).iter_errors(document))
    if mistake is not None:
        raise _from_schema(mistake, source)
    # The schema has checked the types; to it 4.0 is an integer, as it is to JSON.
    settings = msgspec.convert(document, Settings, strict=False)
    _check_meaning(settings, source)
    return settings


def secret(reference: EnvSecret | None, environ: Mapping[str, str]) -> str | None:
    """The secret that is referred to, None where there is none."""
    return environ.get(reference.env) if reference is not None else None


def environment() -> Mapping[str, str]:
    """The process's environment, read here alone."""
    return os.environ


class _KeyTwice(dict[str, Any]):
    """An object in which `twice` stands twice."""

    def __init__(self, pairs: list[tuple[str, Any]], twice: str) -> None:
        super().__init__(pairs)
        self.twice = twice


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return _KeyTwice(pairs, key)
        seen.add(key)
    return dict(pairs)


def _not_json(document: object) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What Python's decoder lets through though no other would agree on it: where, and what is wrong."""
    parts: list[tuple[tuple[str | int, ...], object]] = [((), document)]
    while parts:
        path, part = parts.pop()
        match part:
            case _KeyTwice():
                yield (*path, part.twice), f"the key {part.twice!r} stands twice in one object"
            case dict():
                parts += [((*path, key), value) for key, value in reversed(part.items())]
            case list():
                parts += [((*path, index), value) for index, value in enumerate(part)]
            case float() if not math.isfinite(part):
                yield path, "not a number that can be used: it is NaN, infinite or too large"
            case _:
                pass


def _from_schema(mistake: ValidationError, source: str) -> ConfigurationError:
    path = tuple(mistake.absolute_path)
    choices: tuple[str, ...] = ()
    problem = mistake.message
    if mistake.validator == "additionalProperties" and isinstance(mistake.schema, Mapping):
        known = tuple(mistake.schema.get("properties", {}))
        found: Any = mistake.instance
        unknown = [key for key in found if key not in known]
        path, choices = (*path, unknown[0]), known
        problem = f"unknown key {unknown[0]!r}"
    elif mistake.validator == "enum":
        allowed: Any = mistake.validator_value
        choices = tuple(str(choice) for choice in allowed)
        problem = f"{_shown(mistake.instance)} is not one of the choices"
    elif "propertyNames" in mistake.absolute_schema_path:
        path = (*path, str(mistake.instance))
        problem = f"{_shown(mistake.instance)} must be lower-case letters, digits and '-', 63 at most"
    elif mistake.validator in {"type", "anyOf"}:
        # Without what stands there: it may be a key, written where the name of its variable should be.
        problem = f"must be {_types(mistake)}"
    return ConfigurationError(problem, pointer=json_pointer(path), choices=choices, source=source)


def _shown(value: object) -> str:
    return repr(value)[:80]


def _types(mistake: ValidationError) -> str:
    """The types that would be right. Of an `anyOf` each branch says its own."""
    allowed: Any = mistake.validator_value
    branches = allowed if mistake.validator == "anyOf" else ({"type": allowed},)
    return " or ".join(str(branch.get("type", "object")) for branch in branches)


def _check_meaning(settings: Settings, source: str) -> None:
    """What a schema cannot say: names that refer to each other."""

    def wrong(problem: str, *path: str | int, choices: tuple[str, ...] = ()) -> ConfigurationError:
        return ConfigurationError(problem, pointer=json_pointer(path), choices=choices, source=source)

    if not settings.llms:
        raise wrong("there must be at least one LLM", "llms")
    for name, llm in settings.llms.items():
        if llm.accelerator is not None and llm.accelerator not in settings.accelerators:
            raise wrong(
                f"unknown accelerator {llm.accelerator!r}",
                "llms", name, "accelerator",
                choices=tuple(settings.accelerators),
            )  # fmt: skip
        if llm.accelerator is not None:
            _check_memory(settings, name, llm, wrong)
        base_url = llm.options.get("base_url", "")
        if base_url and not _is_http(base_url):
            raise wrong("not an http(s) URL", "llms", name, "options", "base_url")
        remote = "base_url" in llm.options or llm.engine.startswith("api.")
        if llm.source == "local" and remote and not is_loopback_url(base_url):
            raise wrong(
                "an LLM with source 'local' is on this machine: its base_url has to be a loopback address",
                "llms", name, "source",
            )  # fmt: skip
    for name, accelerator in settings.accelerators.items():
        if accelerator.headroom_mb >= accelerator.memory_mb:
            raise wrong("headroom_mb leaves no memory", "accelerators", name, "headroom_mb")
    if settings.cluster.enabled and (settings.messaging.url is None or not settings.messaging.enabled):
        raise wrong(
            "servers share their tasks over a nats-server of yours: name it in messaging.url, "
            "and leave messaging.enabled on",
            "cluster", "enabled",
        )  # fmt: skip
    # The log says it: what a collector asks for stands in `headers`.
    if settings.tracing.endpoint is not None and not is_plain(settings.tracing.endpoint):
        raise wrong("not an http(s) URL of a host and a path alone", "tracing", "endpoint")
    _check_profiles(settings, wrong)
    _check_access(settings, wrong)
    _check_work(settings, wrong)
    models = ("auto", *get_args(Tier), *settings.llms, *roles_as_models(settings))
    for alias, model in settings.gateway.aliases.items():
        if model not in models:
            raise wrong(f"unknown model {model!r}", "gateway", "aliases", alias, choices=models)


def roles_as_models(settings: Settings) -> tuple[str, ...]:
    """Every `profile/role`, which is also the name of a model."""
    return tuple(f"{name}/{role}" for name, profile in settings.profiles.items() for role in profile.roles)


def _check_memory(settings: Settings, name: str, llm: LLMSettings, wrong: Any) -> None:
    """An LLM that shares an accelerator has to be able to be in it, alone at least."""
    if llm.source == "api":
        raise wrong("an API needs no accelerator: leave it out", "llms", name, "accelerator")
    accelerator = settings.accelerators[llm.accelerator or ""]
    room_mb = accelerator.memory_mb - accelerator.headroom_mb
    if llm.memory_mb is not None and llm.memory_mb > room_mb:
        raise wrong(
            f"it can never fit: models have {room_mb} MB of {llm.accelerator}; take "
            "a smaller model or quantisation, less context, or leave memory_mb out to have it measured",
            "llms", name, "memory_mb",
        )  # fmt: skip


def _check_profiles(settings: Settings, wrong: Any) -> None:
    llms = tuple(settings.llms)
    for profile_name, profile in settings.profiles.items():
        here: tuple[str | int, ...] = ("profiles", profile_name)
        if profile_name in RESERVED_PROFILES:
            raise wrong(
                f"the profile name {profile_name!r} would shadow the route /api/v1/{profile_name}", *here
            )
        if not profile.roles:
            raise wrong("a profile needs at least one role", *here, "roles")
        for role_name, role in profile.roles.items():
            there = (*here, "roles", role_name)
            if role_name in RESERVED_ROLES:
                raise wrong(f"the role name {role_name!r} is the engine's own", *there)
            for pointer, named in (
                ("llm", role.llm),
                *((f"prefer/{i}", n) for i, n in enumerate(role.prefer)),
            ):
                if named is not None and named not in settings.llms:
                    raise wrong(f"unknown LLM {named!r}", *there, *pointer.split("/"), choices=llms)
            for key in ("payload_schema", "result_schema"):
                _check_schema(getattr(role, key), wrong, *there, key)
        _check_schema(profile.payload_schema, wrong, *here, "payload_schema")
        _check_routes(profile, wrong, *here, "workflow", "routes")


def _check_access(settings: Settings, wrong: Any) -> None:
    llms = tuple(settings.llms)
    for index, origin in enumerate(settings.gateway.cors):
        if not _is_http(origin) or origin != _origin(origin):
            raise wrong(
                "not an origin as a browser sends it: scheme://host or scheme://host:port, in lower case",
                "gateway", "cors", index,
            )  # fmt: skip
    named = [
        *((("gateway", "keys", name, "allowed_llms"), key.allowed_llms)
          for name, key in settings.gateway.keys.items()),
        *((("projects", name, "prefer"), project.prefer) for name, project in settings.projects.items()),
    ]  # fmt: skip
    for where, names in named:
        for index, llm in enumerate(names):
            if llm not in settings.llms:
                raise wrong(f"unknown LLM {llm!r}", *where, index, choices=llms)
    if ADMIN_KEY in settings.gateway.keys:
        raise wrong(f"this name is that of the key in {API_KEY}", "gateway", "keys", ADMIN_KEY)
    owners: dict[str, str] = {}
    for name, project in settings.projects.items():
        for index, path in enumerate(project.paths):
            if not _ABSOLUTE.match(path):
                raise wrong("not an absolute path", "projects", name, "paths", index)
            if (owner := owners.setdefault(path.rstrip("/\\"), name)) != name:
                raise wrong(f"the project {owner!r} has this path too", "projects", name, "paths", index)


def _check_work(settings: Settings, wrong: Any) -> None:
    """What bounds tasks together, and where they may be told of."""
    for name in settings.gateway.limits.profiles:
        if name not in settings.profiles:
            raise wrong(
                f"unknown profile {name!r}", "gateway", "limits", "profiles", name,
                choices=tuple(settings.profiles),
            )  # fmt: skip
    for index, allowance in enumerate(settings.gateway.limits.context):
        if allowance.per_s is None:
            raise wrong("'per_s' is missing", "gateway", "limits", "context", index, "per_s")
    for name, target in settings.callbacks.targets.items():
        if not is_plain(target.url):
            raise wrong("not an http(s) URL of a host and a path alone", "callbacks", "targets", name, "url")


def _origin(url: str) -> str:
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}[parts.scheme]
    port = "" if parts.port in {None, default} else f":{parts.port}"
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}{port}"


def _is_http(url: object) -> bool:
    if not isinstance(url, str) or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _check_schema(schema: JSONObject | None, wrong: Any, *path: str | int) -> None:
    if schema is None:
        return
    mistake = best_match(Draft202012Validator(Draft202012Validator.META_SCHEMA).iter_errors(schema))
    if mistake is not None:
        raise wrong(f"not a JSON Schema: {mistake.message}", *path, *mistake.absolute_path)


def _check_routes(profile: ProfileSettings, wrong: Any, *path: str | int) -> None:
    roles = tuple(profile.roles)
    for on, edges in profile.workflow.routes.items():
        role = on.partition(".")[0]
        if role not in profile.roles:
            raise wrong(f"unknown role {role!r}", *path, on, choices=roles)
        for index, edge in enumerate(edges):
            if edge.to != END and edge.to not in profile.roles:
                raise wrong(f"unknown role {edge.to!r}", *path, on, index, "to", choices=(*roles, END))
            for since in edge.since:
                if since not in profile.roles:
                    raise wrong(f"unknown role {since!r}", *path, on, index, "since", choices=roles)
    for index, maker in enumerate(profile.workflow.makers):
        if maker not in profile.roles:
            raise wrong(f"unknown role {maker!r}", *path[:-1], "makers", index, choices=roles)
