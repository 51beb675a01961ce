"""The door: who calls, whether he may, what he has used. Every request of the server comes through it."""

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any, Final, Self, get_args

import msgspec
import structlog
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from ai_agent_server.config.settings import KeyRights, KeyScope, Settings
from ai_agent_server.core.chat import ChatRequest, ChatUsage, RouteHints, Tier
from ai_agent_server.core.task_packet import LLMCall, Sender, TaskPacket, sender_of
from ai_agent_server.durable import translated, write_whole
from ai_agent_server.errors import (
    ConfigurationError,
    ForeignPageError,
    InvalidPacketError,
    KeyNeededError,
    LimitExceededError,
    ScopeError,
    StoreError,
)
from ai_agent_server.gateway.caller import ALL_SCOPES, CacheUse, Caller, Hold, Priority
from ai_agent_server.gateway.keys import KeptKey, Key, KeyRing, key_ring, keys_path, read_kept
from ai_agent_server.gateway.limits import (
    Amounts,
    Bound,
    KeptMeter,
    Limiter,
    Refusal,
    Share,
    Taken,
    bounds,
    standing_headers,
)
from ai_agent_server.gateway.projects import UNKNOWN, Projects
from ai_agent_server.loopback import is_loopback_url
from ai_agent_server.tracing.base import is_traceparent

__all__ = ("COUNTED", "SCOPE", "Access", "Door", "access_for")

log = structlog.get_logger(__name__)

SCOPE: Final = "scope"
"""A route's `opt` of this name says which scope it needs; else its path does."""
COUNTED: Final = "counted"
"""A route's `opt` of this name, False, keeps a POST from being counted as a request for work."""
LOOK_S: Final = 1.0
"""A key that was made or revoked is known after so long."""
SAVE_S: Final = 5.0
"""A kill loses what was used for so long at most."""
FILE: Final = "limits.json"

_SCOPES_BY_PATH: Final[tuple[tuple[str, KeyScope], ...]] = (
    ("/v1/", "chat"),
    ("/mcp", "tools"),
    ("/api/v1/metrics", "metrics"),
    ("/metrics", "metrics"),
    ("/api/v1/", "tasks"),
    ("/", "tasks"),
)
_COUNTED_SCOPES: Final = frozenset({"chat", "tools", "tasks"})
_READ: Final = frozenset(
    {
        b"authorization",
        b"x-api-key",
        b"origin",
        b"host",
        b"x-project",
        b"x-privacy",
        b"x-priority",
        b"x-cache",
        b"traceparent",
    }
)
_PRIORITIES: Final[dict[str, Priority]] = {priority: priority for priority in get_args(Priority)}
_CACHE_USES: Final[dict[str, CacheUse]] = {use: use for use in get_args(CacheUse)}
_WORDS: Final = {
    "requests": "requests",
    "tokens": "tokens",
    "gpu_s": "seconds of GPU time",
    "usd": "US dollars",
}


class KeptUse(msgspec.Struct, frozen=True, kw_only=True):
    """The file of what was used. Times are seconds since the epoch."""

    version: int = 1
    meters: tuple[KeptMeter, ...] = ()


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """What the door goes by: a configuration and the keys, made ready."""

    ring: KeyRing
    rights: dict[str, KeyRights]
    """By the key's name."""
    origins: frozenset[str]
    projects: Projects
    by_project: dict[str, tuple[str, tuple[str, ...], tuple[Share, ...]]]
    """Name -> privacy, LLM preferences, share."""
    by_key: dict[str, tuple[Share, ...]]
    by_profile: dict[str, tuple[Share, ...]]
    address: tuple[Bound, ...]
    context: tuple[Bound, ...]
    tiers: dict[Tier, tuple[Bound, ...]]


class _Held:
    """What was set aside for one request, in all shares. See `Hold`."""

    __slots__ = ("taken",)

    def __init__(self, taken: list[Taken]) -> None:
        self.taken = taken


class StepGrant:
    """A call of an LLM for a task that somebody sent. See `Grant`."""

    def __init__(
        self, door: "Door", caller: Caller, hints: RouteHints, hold: Hold, *, is_in_tier: bool
    ) -> None:
        self.hints = hints
        self._door, self._caller, self._hold, self._is_in_tier = door, caller, hold, is_in_tier

    def charge(self, call: LLMCall | None) -> None:
        """See `Grant.charge`."""
        if call is None:
            self._door.charge(self._caller, ChatUsage(), llm="", hold=self._hold)
            return
        usage = ChatUsage(input_tokens=call.input_tokens, output_tokens=call.output_tokens)
        gpu_s = call.duration_ms / 1000 if call.source == "local" else 0.0
        self._door.charge(
            self._caller, usage, llm=call.llm, gpu_s=gpu_s, cost_usd=call.cost_usd, hold=self._hold
        )
        if not self._is_in_tier:
            tokens = usage.input_tokens + usage.output_tokens
            used = Amounts(requests=1, tokens=tokens, gpu_s=gpu_s, usd=call.cost_usd)
            self._door.count_tier(self._caller, call.llm, used)

    def withdraw(self) -> None:
        """See `Grant.withdraw`."""
        self._door.withdraw(self._hold)


def access_for(settings: Settings, environ: Mapping[str, str], kept: Mapping[str, KeptKey]) -> Access:
    """What the door goes by. Raises `ConfigurationError`."""
    ring = key_ring(settings, environ, kept)
    limits = settings.gateway.limits
    return Access(
        ring=ring,
        rights={key.name: key.rights for key in ring},
        origins=frozenset(settings.gateway.cors),
        projects=Projects(settings.projects),
        by_project={
            name: (project.privacy, project.prefer, _shares(f"project:{name}", bounds(project.limits)))
            for name, project in settings.projects.items()
        },
        by_key={key.name: _shares(f"key:{key.name}", bounds(key.rights.limits)) for key in ring},
        address=bounds(limits.address),
        by_profile={
            name: _shares(f"profile:{name}", bounds(allowances))
            for name, allowances in limits.profiles.items()
        },
        context=bounds(limits.context),
        tiers={"small": bounds(limits.tiers.small), "main": bounds(limits.tiers.main)},
    )


class Door:
    """Knows callers by their keys, sets `request.state.caller`, and keeps the accounts of what they use.

    Use it as `async with`: it then keeps what was used in the state folder, and sees keys that are made
    or revoked. Where there is a key, every route that is not public asks for one; a server that asked for
    keys once goes on asking though the last of them is revoked.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        environ: Mapping[str, str],
        state_dir: Path,
        clock: Callable[[], float],
        now: Callable[[], float],
    ) -> None:
        """Reads the keys file; that blocks. Raises `ConfigurationError`.

        `clock` is monotonic, in seconds; `now` are the seconds since the epoch.
        """
        self._environ, self._state_dir = environ, state_dir
        self._settings = settings
        self._file = state_dir / FILE
        self._kept_stamp = _stamp(keys_path(settings, state_dir))
        self._keys_problem = ""
        self._access = access_for(settings, environ, read_kept(keys_path(settings, state_dir)))
        self._asks_for_keys = bool(self._access.ring)
        self._limiter = Limiter()
        # Counters outlive the process, so they are on the clock of the world; within one run they
        # must not jump with it.
        self._clock = clock
        self._epoch_s = now() - clock()
        self._saved: bytes = b""
        self._save_failed = False
        self._keeping: asyncio.Task[None] | None = None

    @property
    def asks_for_keys(self) -> bool:
        """Whether a caller has to show a key."""
        return self._asks_for_keys

    def origins(self) -> tuple[str, ...]:
        """Pages of these origins may use the server."""
        return tuple(self._access.origins)

    async def prepared(self, settings: Settings) -> Access:
        """What would be gone by under `settings`; nothing changes. Raises `ConfigurationError`."""
        kept = await asyncio.to_thread(read_kept, keys_path(settings, self._state_dir))
        return access_for(settings, self._environ, kept)

    def go_by(self, settings: Settings, access: Access) -> None:
        """From now on by what was `prepared`."""
        self._settings, self._access = settings, access
        self._asks_for_keys = self._asks_for_keys or bool(access.ring)

    def guard(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        """A Litestar guard: sets the caller, or raises an `AccessError`."""
        scope: Any = connection.scope
        headers = {name: value for name, value in scope["headers"] if name in _READ}
        is_public = bool(handler.opt.get("public"))
        needed = handler.opt.get(SCOPE) or _scope_of(scope["path"])
        key = self._key(headers, is_public=is_public)
        client = scope.get("client")
        caller = self._caller(key, client[0] if client else "unknown", headers, scope["headers"])
        scope["state"]["caller"] = caller
        if is_public:
            return
        if needed not in caller.scopes:
            raise ScopeError(
                f"the key {caller.key!r} is not for this: it needs the scope {needed!r} and has "
                f"{', '.join(sorted(caller.scopes)) or 'none'}"
            )
        if scope.get("method") == "POST" and needed in _COUNTED_SCOPES and handler.opt.get(COUNTED, True):
            self._take(self._shares_of(caller), Amounts(requests=1), caller)

    def placed(self, caller: Caller, request: ChatRequest) -> Caller:
        """See `Accounts.placed`."""
        name = self._access.projects.found(request)
        # A name that is none of ours must not lead past the project that the request belongs to.
        if caller.project and caller.project != UNKNOWN:
            # One that is ours says where it is counted, and never that what is private may leave.
            is_private = name and self._access.by_project[name][0] == "local"
            return msgspec.structs.replace(caller, privacy="local") if is_private else caller
        if not name:
            return caller
        caller = self._in_project(caller, name)
        if share := self._access.by_project[name][2]:
            self._take(share, Amounts(requests=1), caller)
        return caller

    def reserve(
        self,
        caller: Caller,
        *,
        tokens: int,
        tier: Tier | None,
        cost_usd: float = 0.0,
        work: tuple[Share, ...] = (),
    ) -> Hold:
        """See `Accounts.reserve`. A call is one request of the tier and of `work`."""
        held: list[Taken] = []
        if shares := self._shares_of(caller):
            held.append(self._take(shares, Amounts(tokens=tokens, usd=cost_usd), caller))
        if tier is not None and (of_tier := self._access.tiers[tier]):
            work = (Share(f"tier:{tier}:{self._who(caller)}", of_tier), *work)
        if work:
            try:
                held.append(self._take(work, Amounts(requests=1, tokens=tokens, usd=cost_usd), caller))
            except LimitExceededError:
                self._settle(held, Amounts())
                raise
        return _Held(held)

    def charge(
        self,
        caller: Caller,
        usage: ChatUsage,
        *,
        llm: str,  # noqa: ARG002 - the accounts are by caller; the port tells more than this one needs
        gpu_s: float = 0.0,
        cost_usd: float = 0.0,
        hold: Hold | None = None,
    ) -> None:
        """See `Accounts.charge`."""
        used = Amounts(tokens=usage.input_tokens + usage.output_tokens, gpu_s=gpu_s, usd=cost_usd)
        if isinstance(hold, _Held):
            self._settle(hold.taken, used)
            hold.taken = []
        else:
            self._limiter.count(self._shares_of(caller), used, self._now())

    def withdraw(self, hold: Hold) -> None:
        """Give all of it back, the request too."""
        if isinstance(hold, _Held):
            for taken in hold.taken:
                self._limiter.withdraw(taken, self._now())
            hold.taken = []

    def headers(self, caller: Caller) -> dict[str, str]:
        """See `Accounts.headers`."""
        shares = self._shares_of(caller)
        if not shares:
            return {}
        now_s = self._now()
        return standing_headers(
            {unit: self._limiter.standing(shares, unit, now_s) for unit in ("requests", "tokens")}
        )

    def admit(self, packet: TaskPacket, hints: RouteHints, *, tokens: int) -> "StepGrant":
        """See `Senders.admit`."""
        sender = sender_of(packet)
        rights = self._access.rights.get(sender.key)
        if rights is None and sender.key and self._asks_for_keys:
            raise ScopeError(f"the key {sender.key!r} that sent the task is known no more")
        if rights is not None and "tasks" not in rights.scopes:
            raise ScopeError(f"the key {sender.key!r} that sent the task may send none any more")
        hints = self._bound(hints, sender, rights or KeyRights())
        caller = Caller(key=sender.key, project=sender.project)
        tier = hints.tier or self._tier_of(hints.llm or "")
        hold = self.reserve(
            caller, tokens=tokens, tier=tier if sender.key else None, work=self._shares_with(packet)
        )
        return StepGrant(self, caller, hints, hold, is_in_tier=tier is not None)

    def _bound(self, hints: RouteHints, sender: Sender, rights: KeyRights) -> RouteHints:
        """`hints` as strict as the key and the project are."""
        privacy, prefer, _ = self._access.by_project.get(sender.project, ("any", (), ()))
        return msgspec.structs.replace(
            hints,
            privacy="local" if "local" in (hints.privacy, rights.privacy, privacy) else "any",
            allowed=rights.allowed_llms,
            prefer=hints.prefer or prefer,
            key=sender.key,
        )

    def _shares_with(self, packet: TaskPacket) -> tuple[Share, ...]:
        """What the task has together with others of its profile and its context."""
        shares = self._access.by_profile.get(packet.profile, ())
        if self._access.context:
            subject = self._limiter.subject("context", packet.context_id)
            shares = (*shares, Share(subject, self._access.context))
        return shares

    def _tier_of(self, llm: str) -> Tier | None:
        found = self._settings.llms.get(llm)
        return found.tier if found is not None else None

    def count_tier(self, caller: Caller, llm: str, used: Amounts) -> None:
        """Count with the tier of the LLM that served, where none was known before."""
        tier = self._tier_of(llm)
        if caller.key and tier is not None and (bound := self._access.tiers[tier]):
            share = Share(f"tier:{tier}:{self._who(caller)}", bound)
            self._limiter.count((share,), used, self._now())

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._restore)
        self._keeping = asyncio.create_task(self._keep(), name="door")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeping
        await self._save()

    def _key(self, headers: dict[bytes, bytes], *, is_public: bool) -> Key | None:
        """The key that is shown. Raises `KeyNeededError` or `ForeignPageError`."""
        if not self._asks_for_keys:
            _refuse_foreign_page(headers, self._access.origins)
            return None
        key = self._access.ring.find(_shown(headers))
        if key is None and not is_public:
            raise KeyNeededError("send a key of this server as `Authorization: Bearer KEY` or as `x-api-key`")
        return key

    def _caller(
        self, key: Key | None, address: str, headers: dict[bytes, bytes], every: Iterable[tuple[bytes, bytes]]
    ) -> Caller:
        is_open = not self._asks_for_keys
        project = ""
        if (named := headers.get(b"x-project")) is not None:
            project = self._access.projects.named(named.decode("latin-1"))
        is_local = b"x-privacy" in headers and any(
            # Whatever else was meant by it, it was not `any`.
            name == b"x-privacy" and value.strip().lower() not in {b"any", b""}
            for name, value in every
        )
        traceparent = headers.get(b"traceparent", b"").decode("latin-1").strip()
        caller = Caller(
            key=key.name if key is not None else "",
            address=address,
            privacy="local" if is_local or (key is not None and key.rights.privacy == "local") else "any",
            allowed_llms=key.rights.allowed_llms if key is not None else (),
            scopes=ALL_SCOPES if is_open else frozenset(key.rights.scopes if key is not None else ()),
            priority=_PRIORITIES.get(
                headers.get(b"x-priority", b"").decode("latin-1").strip().lower(), "interactive"
            ),
            traceparent=traceparent if is_traceparent(traceparent) else "",
            cache=self._cache_use(key, headers.get(b"x-cache")),
        )
        return self._in_project(caller, project) if project else caller

    def _cache_use(self, key: Key | None, header: bytes | None) -> CacheUse:
        if header is not None:
            use = _CACHE_USES.get(header.decode("latin-1").strip().lower())
            if use is None:
                raise InvalidPacketError(
                    "no such use of the cache", pointer="X-Cache", choices=tuple(_CACHE_USES)
                )
            return use
        wanted = key.rights.cache if key is not None else None
        return "use" if (self._settings.gateway.cache.by_default if wanted is None else wanted) else "off"

    def _in_project(self, caller: Caller, name: str) -> Caller:
        privacy, prefer, _ = self._access.by_project.get(name, (caller.privacy, (), ()))
        return msgspec.structs.replace(
            caller,
            project=name,
            privacy="local" if "local" in (privacy, caller.privacy) else "any",
            prefer=prefer,
        )

    def _shares_of(self, caller: Caller) -> tuple[Share, ...]:
        shares = self._access.by_key.get(caller.key, ())
        # A task has a sender and no address.
        if not caller.key and caller.address and self._access.address:
            shares = (
                Share(self._limiter.subject("address", _network(caller.address)), self._access.address),
            )
        if caller.project and caller.project in self._access.by_project:
            shares += self._access.by_project[caller.project][2]
        return shares

    def _who(self, caller: Caller) -> str:
        if caller.key:
            return f"key:{caller.key}"
        return self._limiter.subject("address", _network(caller.address))

    def _take(self, shares: tuple[Share, ...], wanted: Amounts, caller: Caller) -> Taken:
        if not shares:
            return Taken()
        found = self._limiter.take(shares, wanted, self._now())
        if isinstance(found, Refusal):
            raise self._exceeded(found, caller)
        return found

    def _settle(self, taken: Iterable[Taken], used: Amounts) -> None:
        for each in taken:
            self._limiter.settle(each, used, self._now())

    def _exceeded(self, refusal: Refusal, caller: Caller) -> LimitExceededError:
        headers = self.headers(caller)
        if refusal.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(refusal.retry_after_s)))
            headers["retry-after-ms"] = str(max(1, math.ceil(refusal.retry_after_s * 1000)))
        if not refusal.should_retry:
            headers["x-should-retry"] = "false"
        return LimitExceededError(
            _sentence(refusal),
            unit=refusal.unit,
            retry_after_s=refusal.retry_after_s,
            is_quota=refusal.is_quota,
            headers=headers,
        )

    def _now(self) -> float:
        return self._epoch_s + self._clock()

    async def _keep(self) -> None:
        passed_s = 0.0
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look_at_keys()
            passed_s += LOOK_S
            if passed_s >= SAVE_S:
                passed_s = 0.0
                await self._save()

    async def _look_at_keys(self) -> None:
        settings = self._settings
        path = keys_path(settings, self._state_dir)
        stamp = await asyncio.to_thread(_stamp, path)
        if stamp == self._kept_stamp:
            return
        try:
            access = await self.prepared(settings)
        except ConfigurationError as exc:
            # Looked at again in a second: it may have been the disk, and a revoked key must not stay.
            if exc.problem != self._keys_problem:
                log.warning("keys.refused", path=str(path), problem=exc.problem)
            self._keys_problem = exc.problem
            return
        self._keys_problem = ""
        if settings is self._settings:
            self.go_by(settings, access)
            self._kept_stamp = stamp
            log.info("keys.read", keys=len(access.ring))
        if not access.ring and self._asks_for_keys:
            log.warning("keys.none_left", advice="nobody is let in until there is a key again")

    def _restore(self) -> None:
        try:
            content = self._file.read_bytes()
            kept = msgspec.json.decode(content, type=KeptUse)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as exc:
            log.warning("limits.unreadable", path=str(self._file), problem=str(exc))
            return
        self._limiter.restore(kept.meters, self._now())
        self._saved = content

    async def _save(self) -> None:
        """Keep what was used, where it changed. A disk that fails is told once, until it works again."""
        self._limiter.prune(self._now())
        content = msgspec.json.encode(KeptUse(meters=self._limiter.kept()))
        if content == self._saved or (not self._saved and not self._limiter.kept()):
            return
        try:
            await asyncio.to_thread(_write, self._file, content)
        except StoreError as exc:
            if not self._save_failed:
                log.warning("limits.not_kept", problem=str(exc))
            self._save_failed = True
            return
        self._saved, self._save_failed = content, False


def _write(path: Path, content: bytes) -> None:
    with translated(path):
        write_whole(path, content)


def _shares(subject: str, bound: tuple[Bound, ...]) -> tuple[Share, ...]:
    return (Share(subject, bound),) if bound else ()


def _stamp(path: Path) -> tuple[int, int, int]:
    """What differs where a file was written again; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def _scope_of(path: str) -> KeyScope:
    return next(scope for prefix, scope in _SCOPES_BY_PATH if path.startswith(prefix))


def _shown(headers: dict[bytes, bytes]) -> bytes:
    """The secret that is shown: a bearer's goes before `x-api-key`."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def _refuse_foreign_page(headers: dict[bytes, bytes], origins: frozenset[str]) -> None:
    """Without a key, a page that the user's browser has open elsewhere must neither give work nor read.

    Its `Origin` betrays it; where its name was made to point here (DNS rebinding), its `Host` does.
    """
    origin = headers.get(b"origin")
    host = headers.get(b"host")
    if (origin is not None and not _is_ours(origin.decode("latin-1"), origins)) or (
        host and not is_loopback_url(f"http://{host.decode('latin-1')}")
    ):
        raise ForeignPageError(
            "a page from elsewhere may not use a server that asks for no API key; start it with one"
        )


def _is_ours(origin: str, origins: frozenset[str]) -> bool:
    return origin in origins or is_loopback_url(origin)


def _network(address: str) -> str:
    """Under which name an address is counted: whoever has an IPv6 address has 2^64 of them."""
    try:
        found = ip_address(address)
    except ValueError:
        return address[:64]
    if not isinstance(found, IPv6Address):
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return f"{IPv6Address(int(found) >> 64 << 64)}/64"


def _sentence(refusal: Refusal) -> str:
    kind, _, name = refusal.subject.partition(":")
    who = (
        f"the {kind} {name!r}" if kind != "tier" else f"the tier {name.partition(':')[0]!r}, for this caller,"
    )
    window = f"in {refusal.per_s:g} s" if refusal.per_s is not None else "in total"
    unit = _WORDS[refusal.unit]
    used = f"{refusal.used:.6g} are used" + (
        f", this asks for {refusal.wanted:.6g}" if refusal.wanted else ""
    )
    when = (
        f"try again in {math.ceil(refusal.retry_after_s)} s"
        if refusal.retry_after_s is not None
        else "there will be no more"
    )
    return f"{who} may use {refusal.allowed:.10g} {unit} {window}: {used}; {when}"
