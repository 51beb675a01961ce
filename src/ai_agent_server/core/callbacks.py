"""Where a task's events may be sent, and how a message is signed (standardwebhooks.com). Pure."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

_BASE64_MARK = "whsec_"
_PORTS = {"http": 80, "https": 443}


def target_of(url: str, targets: Mapping[str, str]) -> str | None:
    """The name of the target below whose URL `url` is, None when it is below none.

    Scheme, host and port must be the same, and the path at or below the target's; a user, a query or a
    fragment is in none of them.
    """
    return next((name for name, allowed in targets.items() if _is_below(url, allowed)), None)


def is_plain(url: str) -> bool:
    """Whether `url` is http(s), with a host and nothing beside a path."""
    if not (url.isascii() and url.isprintable()) or any(mark in url for mark in " \\?#"):
        return False
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in _PORTS and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    segments = unquote(parts.path).replace("\\", "/").split("/")
    return is_whole and "@" not in parts.netloc and not {".", ".."} & set(segments)


def _is_below(url: str, allowed: str) -> bool:
    if not (is_plain(url) and is_plain(allowed)):
        return False
    given, limit = urlsplit(url), urlsplit(allowed)
    place, folder = given.path.rstrip("/"), limit.path.rstrip("/")
    return (
        (given.scheme, given.hostname, given.port or _PORTS[given.scheme])
        == (limit.scheme, limit.hostname, limit.port or _PORTS[limit.scheme])
        and (place == folder or place.startswith(f"{folder}/"))
    )  # fmt: skip


def signature(secret: str, *, message_id: str, timestamp_s: int, body: bytes) -> str:
    """The value of `webhook-signature`: HMAC-SHA256 over id, time and body.

    A secret that begins with `whsec_` is base64 after that, any other is taken as it stands. Raises
    `ValueError` for one that is no base64.
    """
    key = secret.encode()
    if secret.startswith(_BASE64_MARK):
        try:
            key = base64.b64decode(secret.removeprefix(_BASE64_MARK), validate=True)
        except binascii.Error as exc:
            raise ValueError("the secret is not base64 after whsec_") from exc
    signed = b"%s.%d.%s" % (message_id.encode(), timestamp_s, body)
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
