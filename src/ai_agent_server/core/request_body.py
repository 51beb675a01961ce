"""The body of a request, bounded and declared as JSON."""

from typing import Any

from litestar import Request
from litestar.exceptions import HTTPException

from ai_agent_server.core.api_schemas import JSON

__all__ = ("read_body",)


async def read_body(request: Request[Any, Any, Any], limit_bytes: int) -> bytes:
    """The body, read no further than `limit_bytes`."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != JSON and not (media_type.startswith("application/") and media_type.endswith("+json")):
        raise HTTPException(
            f"the body is declared as {media_type or 'nothing'}; send it with `Content-Type: {JSON}`",
            status_code=415,
        )
    too_large = HTTPException(f"the body may have {limit_bytes} bytes (server.max_body_mb)", status_code=413)
    if (request.content_length or 0) > limit_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise too_large
    return bytes(body)
