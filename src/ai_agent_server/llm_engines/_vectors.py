"""Vectors as engines send them: OpenAI's `/v1/embeddings` and plain lists, checked and packed."""

import base64
import binascii
import math
import sys
from array import array
from collections.abc import Sequence

import msgspec

from ai_agent_server.core.chat import ChatUsage, JSONObject, tokens_said
from ai_agent_server.core.embedding import EmbeddingReply, EmbeddingRequest
from ai_agent_server.errors import EngineProtocolError

FLOAT_BYTES = 4


class _Row(msgspec.Struct, frozen=True):
    embedding: str | tuple[float, ...]
    index: int = 0


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int | None = 0


class Embeddings(msgspec.Struct, frozen=True):
    """The body of an answer; unknown keys are of no interest."""

    data: tuple[_Row, ...]
    usage: _Usage | None = None
    model: str | None = None


def payload(request: EmbeddingRequest, model: str) -> JSONObject:
    """The body of POST /v1/embeddings. A server that knows no base64 answers lists, which are taken too."""
    body: JSONObject = {"model": model, "input": list(request.inputs), "encoding_format": "base64"}
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    return body


def reply(answer: Embeddings, request: EmbeddingRequest, *, engine: str) -> EmbeddingReply:
    """What `answer` says. Raises `EngineProtocolError` for one that does not fit the request."""
    rows = sorted(answer.data, key=lambda row: row.index)
    if [row.index for row in rows] != list(range(len(rows))):
        raise EngineProtocolError("the vectors are not numbered from 0", engine=engine)
    return EmbeddingReply(
        vectors=checked(tuple(_packed(row.embedding, engine=engine) for row in rows), request, engine=engine),
        usage=ChatUsage(input_tokens=tokens_said(answer.usage.prompt_tokens if answer.usage else None)),
        model=answer.model or "",
    )


def checked(vectors: tuple[bytes, ...], request: EmbeddingRequest, *, engine: str) -> tuple[bytes, ...]:
    """`vectors`, one for each input and all of one length. Raises `EngineProtocolError`."""
    if len(vectors) != len(request.inputs):
        raise EngineProtocolError(
            f"{len(vectors)} vectors came for {len(request.inputs)} inputs", engine=engine
        )
    sizes = {len(vector) // FLOAT_BYTES for vector in vectors}
    if len(sizes) != 1 or 0 in sizes:
        raise EngineProtocolError("the vectors are empty or not of one length", engine=engine)
    if request.dimensions is not None and sizes != {request.dimensions}:
        raise EngineProtocolError(
            f"vectors of {sizes.pop()} dimensions came where {request.dimensions} were asked for",
            engine=engine,
        )
    return vectors


def packed(numbers: Sequence[float], *, engine: str) -> bytes:
    """`numbers` as little-endian float32. Raises `EngineProtocolError` for what is no finite number."""
    try:
        floats = array("f", numbers)
    except (OverflowError, TypeError) as exc:
        raise EngineProtocolError("a vector holds what is no number", engine=engine) from exc
    if not all(map(math.isfinite, floats)):
        raise EngineProtocolError("a vector holds a number that is not finite", engine=engine)
    if sys.byteorder == "big":
        floats.byteswap()
    return floats.tobytes()


def _packed(embedding: str | tuple[float, ...], *, engine: str) -> bytes:
    if not isinstance(embedding, str):
        return packed(embedding, engine=engine)
    try:
        vector = base64.b64decode(embedding, validate=True)
        floats = array("f", vector)
    except (binascii.Error, ValueError) as exc:
        raise EngineProtocolError("a vector is no base64 of float32", engine=engine) from exc
    if sys.byteorder == "big":
        floats.byteswap()
    if not all(map(math.isfinite, floats)):
        raise EngineProtocolError("a vector holds a number that is not finite", engine=engine)
    return vector
