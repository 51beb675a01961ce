"""Images that clients send along: data URLs, and nothing that would have to be fetched."""

import re

from ai_agent_server.core.chat import ImagePart
from ai_agent_server.errors import InvalidPacketError

__all__ = ("image_part",)

_DATA_URL = re.compile(r"data:(image/[a-z0-9.+-]{1,60});base64,([A-Za-z0-9+/=\s]+)", re.IGNORECASE)


def image_part(url: str, pointer: str) -> ImagePart:
    """The image in a data URL. Raises `InvalidPacketError`: nothing is fetched for a client."""
    match = _DATA_URL.fullmatch(url)
    if match is None:
        raise InvalidPacketError(
            "an image is sent along, as a data URL: this server fetches none from elsewhere",
            pointer=pointer,
            expected="data:image/png;base64,...",
        )
    return ImagePart(media_type=match[1].lower(), content="".join(match[2].split()))
