"""Web pages from elsewhere: which may use the server, told to their browsers (CORS)."""

from collections.abc import Callable
from typing import Any, Final

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ("Cors",)

METHODS: Final = b"GET, HEAD, POST, PATCH, DELETE"
KEPT_FOR_S: Final = b"600"
MAX_ASKED_BYTES: Final = 4096
EXPOSED: Final = b", ".join(
    (
        b"Age",
        b"Location",
        b"Retry-After",
        b"X-Cache",
        b"X-LLM",
        b"X-Overhead-Ms",
        b"X-Routing-Reason",
        b"X-Task-File",
        b"X-Tier",
        b"openai-processing-ms",
        b"request-id",
        b"x-ratelimit-limit-requests",
        b"x-ratelimit-limit-tokens",
        b"x-ratelimit-remaining-requests",
        b"x-ratelimit-remaining-tokens",
        b"x-ratelimit-reset-requests",
        b"x-ratelimit-reset-tokens",
        b"x-request-id",
        b"x-should-retry",
    )
)


class Cors:
    """An ASGI application around `app`. Origins are compared as they stand; there is no wildcard.

    It only tells browsers what they may show to a page. Who may do what is the door's to say: a key is a
    header, which a page has to have of its own.
    """

    def __init__(self, app: Any, *, origins: Callable[[], tuple[str, ...]]) -> None:
        self._app: ASGIApp = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a preflight, or let the request through and mark the answer."""
        origins = self._origins()
        if not origins or scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        asked = dict(scope["headers"])
        origin = asked.get(b"origin", b"")
        is_allowed = origin.decode("latin-1") in origins

        if is_allowed and scope["method"] == "OPTIONS" and b"access-control-request-method" in asked:
            await send({"type": "http.response.start", "status": 204, "headers": _preflight(asked)})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"vary", b"Origin")]
                if is_allowed:
                    headers += [
                        (b"access-control-allow-origin", origin),
                        (b"access-control-expose-headers", EXPOSED),
                    ]
                message["headers"] = headers
            await send(message)

        await self._app(scope, receive, marked)


def _preflight(asked: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    headers = [
        (b"access-control-allow-origin", asked[b"origin"]),
        (b"access-control-allow-methods", METHODS),
        (b"access-control-max-age", KEPT_FOR_S),
        (b"vary", b"Origin, Access-Control-Request-Headers"),
    ]
    names = asked.get(b"access-control-request-headers", b"")
    if names and len(names) <= MAX_ASKED_BYTES:
        headers.append((b"access-control-allow-headers", names))
    if asked.get(b"access-control-request-private-network") == b"true":
        headers.append((b"access-control-allow-private-network", b"true"))
    return headers
