"""The body of a request, bounded and declared as JSON."""

from typing import Any

from litestar import Request
from litestar.exceptions import HTTPException
from litestar.types import Receive

from ai_agent_server.core.api_schemas import JSON

__all__ = ("body_of", "read_body")


async def read_body(request: Request[Any, Any, Any], limit_bytes: int) -> bytes:
    """The body, read no further than `limit_bytes`."""
    return await body_of(request.scope, request.receive, limit_bytes)


async def body_of(scope: Any, receive: Receive, limit_bytes: int) -> bytes:
    """The same for an ASGI connection."""
    headers = dict(scope["headers"])
    declared = headers.get(b"content-type", b"").decode("latin-1")
    media_type = declared.partition(";")[0].strip().lower()
    if media_type != JSON and not (media_type.startswith("application/") and media_type.endswith("+json")):
        raise HTTPException(
            f"the body is declared as {media_type or 'nothing'}; send it with `Content-Type: {JSON}`",
            status_code=415,
        )
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > limit_bytes:
        raise _too_large(limit_bytes)
    body = b""
    more: bytearray | None = None
    while True:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            raise HTTPException("the client left before its request was whole", status_code=400)
        piece = message.get("body", b"")
        if more is None and not message.get("more_body"):
            body = piece
        else:
            more = bytearray() if more is None else more
            more += piece
        if len(body if more is None else more) > limit_bytes:
            raise _too_large(limit_bytes)
        if not message.get("more_body"):
            return body if more is None else bytes(more)


def _too_large(limit_bytes: int) -> HTTPException:
    return HTTPException(f"the body may have {limit_bytes} bytes (server.max_body_mb)", status_code=413)
