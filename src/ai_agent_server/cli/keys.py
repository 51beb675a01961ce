"""`keys`: the keys that clients show, made, listed and revoked. They are kept as hashes, beside the tasks."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter
from rich.table import Table

from ai_agent_server.cli import Exit
from ai_agent_server.cli.options import AsJSON, StateDir, console, print_json, state_folder
from ai_agent_server.config import settings as configuration
from ai_agent_server.config.settings import ADMIN_KEY, Allowance, KeyRights, KeyScope, Settings
from ai_agent_server.core.chat import Privacy
from ai_agent_server.errors import InvalidPacketError
from ai_agent_server.gateway.keys import (
    KeptKey,
    changing,
    hashed,
    is_key_name,
    keys_path,
    new_secret,
    read_kept,
)

__all__ = ("keys",)

keys = App(name="keys", help="List the keys that clients show; make one, revoke one.")

Config = Annotated[
    Path | None,
    Parameter(env_var="AI_AGENT_SERVER_CONFIG", help="The server's configuration.json."),
]

_LIMIT_FORM = ",".join(f"{name}=NUMBER" for name in Allowance.__struct_fields__)


@keys.default
def list_keys(*, config: Config = None, state_dir: StateDir = None, as_json: AsJSON = False) -> int:
    """List the keys that were made here. Their secrets are nowhere."""
    kept = read_kept(_path(config, state_dir)[0])
    if as_json:
        print_json({"items": [_shown(name, key) for name, key in kept.items()]})
        return Exit.OK
    table = Table(box=None, pad_edge=False)
    for column in ("NAME", "SCOPES", "LLMS", "PRIVACY", "LIMITS", "MADE"):
        table.add_column(column, overflow="fold")
    for name, key in kept.items():
        table.add_row(
            name,
            " ".join(key.scopes),
            " ".join(key.allowed_llms) or "all",
            key.privacy,
            "; ".join(map(_limit_text, key.limits)) or "none",
            f"{key.created_at:%Y-%m-%d %H:%M}",
        )
    console().print(table if kept else "no keys; make one: ai-agent-server keys new NAME", soft_wrap=True)
    return Exit.OK


@keys.command
def new(
    name: str,
    /,
    *,
    scope: Annotated[
        tuple[KeyScope, ...],
        Parameter(negative=(), show_default=False, help="What it is for; by default all but admin."),
    ] = (),
    llm: Annotated[
        tuple[str, ...], Parameter(negative=(), show_default=False, help="LLMs it may use; by default all.")
    ] = (),
    privacy: Annotated[Privacy, Parameter(help="local: nothing of it leaves this machine.")] = "any",
    cache: Annotated[
        bool | None,
        Parameter(
            show_default=False,
            help="Whether its chats use the exact cache; by default as gateway.cache.by_default says.",
        ),
    ] = None,
    limit: Annotated[
        tuple[str, ...],
        Parameter(
            negative=(),
            show_default=False,
            help="So much in any stretch of seconds: per_s=60,requests=30,tokens=50000,gpu_s=20,usd=0.5; "
            "in total without per_s. May be said again.",
        ),
    ] = (),
    config: Config = None,
    state_dir: StateDir = None,
    as_json: AsJSON = False,
) -> int:
    """Make a key and print it, this once. A running server takes it within two seconds."""
    path, settings = _path(config, state_dir)
    _check_name(name, settings)
    for allowed in llm:
        if allowed not in settings.llms:
            raise InvalidPacketError(f"unknown LLM {allowed!r}", expected=" or ".join(settings.llms))
    key = new_secret(os.urandom)
    rights = KeyRights(
        scopes=scope or KeyRights().scopes,
        allowed_llms=llm,
        privacy=privacy,
        cache=cache,
        limits=tuple(map(_limit, limit)),
    )
    made = KeptKey(
        **msgspec.structs.asdict(rights),
        sha256=hashed(key.encode()),
        created_at=datetime.now(UTC).replace(microsecond=0),
    )
    with changing(path) as kept:
        if name in kept:
            raise InvalidPacketError(f"there is a key {name!r}; revoke it first, or take another name")
        kept[name] = made
    if as_json:
        print_json({**_shown(name, made), "key": key})
    else:
        # The key alone, so that it can be caught in a variable.
        sys.stdout.write(f"{key}\n")
        sys.stderr.write(f"the key {name!r}: keep it now, it is not shown again (its hash is in {path})\n")
    return Exit.OK


@keys.command
def revoke(name: str, /, *, config: Config = None, state_dir: StateDir = None) -> int:
    """Revoke a key. A running server refuses it within two seconds."""
    path, settings = _path(config, state_dir)
    with changing(path) as kept:
        if name not in kept:
            where = "; that one stands in the configuration" if name in settings.gateway.keys else ""
            raise InvalidPacketError(f"there is no key {name!r} in {path}{where}", choices=tuple(kept))
        del kept[name]
    sys.stderr.write(f"the key {name!r} is revoked\n")
    return Exit.OK


def _path(config: Path | None, state_dir: Path | None) -> tuple[Path, Settings]:
    settings = configuration.load(config.absolute() if config else None)
    return keys_path(settings, state_folder(state_dir)), settings


def _check_name(name: str, settings: Settings) -> None:
    if not is_key_name(name):
        raise InvalidPacketError(
            f"{name[:80]!r} is no name", expected="lower-case letters, digits and '-', 63 at most"
        )
    if name == ADMIN_KEY or name in settings.gateway.keys:
        raise InvalidPacketError(f"the name {name!r} is taken by a key of the environment")


def _limit(text: str) -> Allowance:
    parts = [part.partition("=") for part in text.split(",")]
    try:
        # Numbers are words here.
        found = msgspec.convert({name.strip(): value for name, _, value in parts}, Allowance, strict=False)
    except msgspec.ValidationError as exc:
        raise InvalidPacketError(
            f"--limit {text[:100]!r}: {exc}", choices=Allowance.__struct_fields__
        ) from exc
    if found == Allowance(per_s=found.per_s):
        raise InvalidPacketError(
            f"--limit {text[:100]!r} bounds nothing", choices=Allowance.__struct_fields__
        )
    return found


def _limit_text(limit: Allowance) -> str:
    what = ", ".join(
        f"{value:g} {unit}"
        for unit in ("requests", "tokens", "gpu_s", "usd")
        if (value := getattr(limit, unit)) is not None
    )
    return f"{what} in {limit.per_s:g} s" if limit.per_s is not None else f"{what} in total"


def _shown(name: str, key: KeptKey) -> dict[str, object]:
    shown: dict[str, object] = msgspec.to_builtins(key)
    del shown["sha256"]
    return {"name": name, **shown}
