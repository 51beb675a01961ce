"""Keys: where they are kept, how one is known again, what it is good for. Of a secret the hash is kept."""

import base64
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec

from ai_agent_server.config.settings import (
    ADMIN_KEY,
    API_KEY,
    NAME_PATTERN,
    KeyRights,
    Settings,
    secret,
)
from ai_agent_server.core.packet_json import json_pointer
from ai_agent_server.durable import translated, write_whole
from ai_agent_server.errors import ConfigurationError
from ai_agent_server.gateway.caller import ALL_SCOPES

__all__ = (
    "KeptKey",
    "Key",
    "KeyRing",
    "changing",
    "hashed",
    "is_key_name",
    "key_ring",
    "keys_path",
    "new_secret",
    "read_kept",
)

PREFIX = "aas-"
SECRET_BYTES = 32
MAX_FILE_BYTES = 4 * 1024 * 1024

KeyName = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]


class KeptKey(KeyRights, frozen=True, kw_only=True):
    """A key of the file. Its secret is long and random, so that a plain hash cannot be turned back."""

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    created_at: datetime


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A key that is known, without its secret."""

    name: str
    rights: KeyRights


class KeyRing:
    """Every key that is known, by the hash of its secret."""

    def __init__(self, keys: Mapping[str, Key]) -> None:
        """`keys` are by the SHA-256 of the secret, in hexadecimal digits."""
        self._keys = dict(keys)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys.values())

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, shown: bytes) -> Key | None:
        """The key whose secret is `shown`.

        It is looked up by its hash: the time that takes may tell of a hash, which nobody can steer, and
        never of a secret.
        """
        return self._keys.get(hashed(shown))


def key_ring(settings: Settings, environ: Mapping[str, str], kept: Mapping[str, KeptKey]) -> KeyRing:
    """The keys of the environment, of the configuration and of the file. Raises `ConfigurationError`."""
    ring: dict[str, Key] = {}

    def add(digest: str, name: str, rights: KeyRights, *where: str) -> None:
        taken = ring.setdefault(digest, Key(name=name, rights=rights))
        if taken.name != name:
            raise ConfigurationError(f"the same key as {taken.name!r}", pointer=json_pointer(where))

    if admin := environ.get(API_KEY):
        add(hashed(_plain(admin)), ADMIN_KEY, KeyRights(scopes=tuple(sorted(ALL_SCOPES))))
    for name, key in settings.gateway.keys.items():
        here = ("gateway", "keys", name)
        shown = secret(key.api_key, environ)
        if not shown:
            # Left out in silence it would be a server that lets in fewer than was meant, or everybody.
            raise ConfigurationError(
                f"the variable {key.api_key.env} is not set", pointer=json_pointer((*here, "api_key"))
            )
        if name in kept:
            raise ConfigurationError("the keys file has a key of this name too", pointer=json_pointer(here))
        add(hashed(_plain(shown)), name, key, *here, "api_key")
    for name, found in kept.items():
        add(found.sha256, name, found, "gateway", "keys_file")
    return KeyRing(ring)


def keys_path(settings: Settings, state_dir: Path) -> Path:
    """Where the hashed keys are kept. What is relative is so to the state folder."""
    return state_dir / Path(settings.gateway.keys_file or "keys.json").expanduser()


def read_kept(path: Path) -> dict[str, KeptKey]:
    """The keys of the file by name; none where there is no file. Blocking. Raises `ConfigurationError`."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
        if len(text) > MAX_FILE_BYTES:
            raise ConfigurationError(f"larger than {MAX_FILE_BYTES // 2**20} MiB", source=str(path))
        kept = msgspec.json.decode(text, type=dict[KeyName, KeptKey])
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise ConfigurationError(f"cannot be read: {exc.strerror}", source=str(path)) from exc
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"not a file of keys: {exc}", source=str(path)) from exc
    if ADMIN_KEY in kept:
        raise ConfigurationError(f"{ADMIN_KEY!r} is the name of the key in {API_KEY}", source=str(path))
    return kept


@contextmanager
def changing(path: Path) -> Iterator[dict[str, KeptKey]]:
    """The keys of the file, to be changed: durable when this ends well, as they were when it does not.

    One process at a time. Blocking. Raises `ConfigurationError`, `StoreFullError`, `StoreUnusableError`.
    """
    lock = path.with_name(path.name + ".lock")
    with translated(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A file of its own, since the other is replaced; it stays, or two would each lock one.
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        kept = read_kept(path)
        yield kept
        content = msgspec.json.format(msgspec.json.encode(dict(sorted(kept.items()))), indent=2)
        with translated(path):
            write_whole(path, content)
    finally:
        os.close(descriptor)


def is_key_name(name: str) -> bool:
    """Whether a key may have this name."""
    return re.fullmatch(NAME_PATTERN, name) is not None


def new_secret(random: Callable[[int], bytes]) -> str:
    """A secret that nobody can guess. `random` answers so many random bytes: `os.urandom`."""
    return PREFIX + base64.urlsafe_b64encode(random(SECRET_BYTES)).decode().rstrip("=")


def hashed(shown: bytes) -> str:
    """What is kept of a secret: its SHA-256, in hexadecimal digits."""
    return hashlib.sha256(shown).hexdigest()


def _plain(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
