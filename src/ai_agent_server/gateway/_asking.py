"""What the surfaces share of a request: its headers, and a client that may leave."""

from collections.abc import Coroutine
from typing import Any, get_args

from litestar import Request, Response

from ai_agent_server.core.api_schemas import JSON
from ai_agent_server.core.chat import Tier
from ai_agent_server.core.event_stream import ClientLeftError, WhileConnected
from ai_agent_server.errors import InvalidPacketError

__all__ = ("NO_LONGER_READ", "header_text", "tier_named", "tier_of", "while_there")

NO_LONGER_READ = 499
"""What nginx logs for a client that left; nobody reads it."""
HEADER_CHARS = 300


def tier_of(request: Request[Any, Any, Any]) -> Tier | None:
    """The tier that `X-Tier` asks for. Raises `InvalidPacketError`."""
    return tier_named(request.headers.get("x-tier"))


def tier_named(given: str | None) -> Tier | None:
    """The tier of this name, None where none is given. Raises `InvalidPacketError`."""
    tier = next((tier for tier in get_args(Tier) if tier == given), None)
    if given is not None and tier is None:
        raise InvalidPacketError("no such tier", pointer="X-Tier", choices=get_args(Tier))
    return tier


def header_text(text: str) -> str:
    """`text` as a header can carry it."""
    return text.encode("ascii", "backslashreplace").decode()[:HEADER_CHARS]


async def while_there(
    request: Request[Any, Any, Any], work: Coroutine[Any, Any, Response[bytes]]
) -> Response[bytes]:
    """What `work` answers; as soon as the client is gone, the work is cancelled. The body has to be read."""
    try:
        async with WhileConnected(request.receive):
            return await work
    except ClientLeftError:
        return Response(b"", status_code=NO_LONGER_READ, media_type=JSON)
