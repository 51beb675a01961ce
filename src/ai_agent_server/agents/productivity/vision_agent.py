"""The eye: a question about an image, for an LLM that can see."""

import base64

from ai_agent_server.agents._prompt import request
from ai_agent_server.agents.base import AgentCard, AgentContext, Outcome
from ai_agent_server.core.answer import read_object, read_text
from ai_agent_server.core.chat import ImagePart
from ai_agent_server.core.prompt import as_text
from ai_agent_server.errors import InvalidPacketError

__all__ = ("VisionAgent",)

MAX_BYTES = 20 * 1024 * 1024
SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
)


class VisionAgent:
    """Sends the image as a part of the message, so that only an LLM with `vision` may be chosen.

    What kind of image it is, its first bytes say; the name of a file or the head of a data URL may
    be wrong, and engines differ in how they fail then.
    """

    card = AgentCard(
        name="vision",
        description="Answers a question about an image (PNG, JPEG, GIF or WebP).",
        outcomes=("done",),
        skills=("vision",),
    )

    async def run(self, context: AgentContext) -> Outcome:
        """Ask about `image`, a data URL or a path under an allowed folder: output {"text"}, or as the
        result schema says. Raises `InvalidPacketError` for what is no image, `InvalidOutputError`.
        """
        payload = context.packet.payload
        given = as_text(payload["image"])
        content = _from_data_url(given) if given.startswith("data:") else await _from_file(context, given)
        image = ImagePart(
            media_type=_media_type(content),
            content=base64.b64encode(content).decode("ascii"),
        )
        schema = context.spec.result_schema
        fields = {"task": as_text(payload.get("task"))}
        reply = await context.chat(request(context, fields, schema=schema, images=(image,)))
        output = {"text": read_text(reply)} if schema is None else read_object(reply, schema)
        return Outcome(verdict="done", output=output)


async def _from_file(context: AgentContext, path: str) -> bytes:
    if path.lower().startswith(("http://", "https://")):
        raise InvalidPacketError(
            "an image is not fetched from an address",
            pointer="/payload/image",
            expected="the image itself as a data URL, or a file on the server's machine",
        )
    try:
        return await context.read_file(path)
    except InvalidPacketError as exc:
        # The reader does not know which field named the file.
        raise InvalidPacketError(
            exc.problem, pointer="/payload/image", expected=exc.expected, choices=exc.choices
        ) from exc


def _from_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InvalidPacketError(
            "the data URL is not base64", pointer="/payload/image", expected="data:image/png;base64,..."
        )
    try:
        return base64.b64decode(body, validate=True)
    except ValueError as exc:
        raise InvalidPacketError(
            "the data URL is not base64", pointer="/payload/image", expected="data:image/png;base64,..."
        ) from exc


def _media_type(content: bytes) -> str:
    if len(content) > MAX_BYTES:
        raise InvalidPacketError(
            f"the image has {len(content)} bytes", pointer="/payload/image", expected=f"at most {MAX_BYTES}"
        )
    for signature, media_type in SIGNATURES:
        if content.startswith(signature):
            return media_type
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    raise InvalidPacketError(
        "the file is no image that is known here", pointer="/payload/image", expected="PNG, JPEG, GIF or WebP"
    )
