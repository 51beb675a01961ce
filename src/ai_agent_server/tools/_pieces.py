"""A long text in pieces that end where a paragraph, a line or a sentence does. Pure."""

import math
import re

from ai_agent_server.load_balancer.estimate import BYTES_PER_TOKEN

EVEN = 1.15
"""How much longer than the average a piece may be, to end well."""
_STOP = r"[.!?\u2026\u3002\uff01\uff1f]"
_WIDE_STOP = r"[\u3002\uff01\uff1f]"
"""Chinese and Japanese put no space after these."""
_CLOSING = r"[\"'\u201d\u2019)\]]*"
_ENDS = tuple(
    re.compile(mark) for mark in (r"\n\s*\n", r"\n", rf"{_STOP}{_CLOSING}(?:\s+|(?<={_WIDE_STOP}))", r"\s+")
)
_SENTENCE_END = re.compile(rf"{_STOP}{_CLOSING}(?=\s|$)|{_WIDE_STOP}")


def tokens(text: str) -> int:
    """Tokens of `text`, estimated."""
    return math.ceil(_size_bytes(text) / BYTES_PER_TOKEN)


def pieces(text: str, piece_tokens: int) -> tuple[str, ...]:
    """`text` in pieces of about one size, none estimated over `piece_tokens`; joined they are `text`."""
    total = tokens(text)
    if total <= piece_tokens:
        return (text,)
    limit_bytes = max(4, int(piece_tokens * BYTES_PER_TOKEN))
    even_bytes = _size_bytes(text) / math.ceil(total / piece_tokens)
    found: list[str] = []
    start = 0
    while start < len(text):
        longest = _chars(text, start, min(limit_bytes, math.ceil(even_bytes * EVEN)))
        end = start + longest
        if end < len(text):
            end = _good_end(text, start + longest // 2, end)
        found.append(text[start:end])
        start = end
    return tuple(found)


def whole_sentences(text: str) -> str:
    """`text` up to the end of its last whole sentence, all of it where there is none."""
    end = 0
    for match in _SENTENCE_END.finditer(text):
        end = match.end()
    return text[:end] if end else text


def _good_end(text: str, earliest: int, latest: int) -> int:
    """Where to cut between the two: after the last paragraph, line, sentence or word that ends there."""
    for mark in _ENDS:
        end = 0
        for match in mark.finditer(text, earliest, latest):
            end = match.end()
        if end:
            return end
    return latest


def _chars(text: str, start: int, size_bytes: int) -> int:
    """How many characters from `start` fit in `size_bytes` of UTF-8; at least one."""
    head = text[start : start + size_bytes].encode("utf-8", "replace")[:size_bytes]
    return max(1, len(head.decode("utf-8", "ignore")))


def _size_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))
