"""What the store and the shelf of a cluster both ask of its stream."""

from typing import Final

from nats.errors import Error
from nats.js.api import RawStreamMsg
from nats.js.errors import NotFoundError

from ai_agent_server.errors import ChannelError, StoreError
from ai_agent_server.nats_link import REQUEST_TIMEOUT_S, Link, told

__all__ = ("WRONG_LAST_SEQUENCE", "last_message")

WRONG_LAST_SEQUENCE: Final = frozenset({10071, 10164})
"""JetStream's error codes for a write that another came before."""


async def last_message(link: Link, stream: str, subject: str) -> RawStreamMsg | None:
    """The last message of `subject`, from the stream's leader: what was acknowledged is seen.

    None where there is none. Raises `StoreError`.
    """
    try:
        session = await link.session(REQUEST_TIMEOUT_S)
        return await session.or_lost(session.jetstream.get_last_msg(stream, subject), REQUEST_TIMEOUT_S)
    except NotFoundError:
        return None
    except (Error, OSError, TimeoutError, ChannelError) as exc:
        raise StoreError(f"NATS did not answer: {told(exc)}") from exc
