"""Trials: which request is sent, and where which fault meets its answer. Pure; a seed gives it again."""

import json
import random
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

import msgspec

Engine = Literal["openai", "llama-server", "ollama", "anthropic"]
Surface = Literal["chat", "responses", "messages"]
Fault = Literal[
    "silent",  # reads the request, answers nothing
    "refused",  # 429, 500 or 503 instead of an answer
    "cut",  # the connection closes, the body unfinished
    "reset",  # RST
    "stalled",  # nothing more comes, the connection stays
    "unfinished",  # the body ends as if it were whole
    "malformed",  # bytes that belong to nothing, then the rest
    "error",  # an error object as the next event, then the end
]
Place = Literal[
    "instead_of_an_answer",
    "before_the_first_token",
    "between_tokens",
    "inside_a_character",
    "inside_a_line",
    "before_the_end",
]
INSTEAD: tuple[Fault, ...] = ("silent", "refused", "cut", "reset")
WITHIN: tuple[Fault, ...] = ("cut", "reset", "stalled", "unfinished", "malformed", "error")
REFUSALS = (429, 500, 503)
GARBAGE = (b'\xff\xfe"{[oops', b'"{[oops', b"\n", b"\n\n")
"""Bytes that a body has too many of. One that is harmless where it falls must not spoil the answer."""
WORDS = (
    *("Grüße", "aus", "Köln", "世界", "größer", "naïve", "🦊", "springt", "über"),
    *("Ångström", "Здравствуй", "zwölf", "Boxkämpfer", "jagen", "Viktor"),
)
_NUMBER = re.compile(r"trial (\d+):")


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One request and what befalls its answer."""

    number: int
    engine: Engine
    surface: Surface
    streamed: bool
    calls_tool: bool
    fault: Fault
    place: Place
    text: str
    """The right answer, or the argument of the tool that is called."""
    seed: int

    @property
    def prompt(self) -> str:
        """What is asked; the double knows the trial by it."""
        return f"trial {self.number}: say it"


class Break(msgspec.Struct, frozen=True, kw_only=True):
    """Where an answer's body breaks. `at` is the bytes that come before it."""

    at: int
    before_first_token: bool


class Span(msgspec.Struct, frozen=True):
    """An event in a body: its bytes, and whether it has something of the answer's content in it."""

    start: int
    end: int
    is_token: bool


def planned(seed: int, count: int) -> list[Trial]:
    """`count` trials."""
    rng = random.Random(seed)
    trials = []
    for number in range(count):
        place: Place = rng.choice(get_args(Place))
        instead = place == "instead_of_an_answer"
        trials.append(
            Trial(
                number=number,
                engine=rng.choice(get_args(Engine)),
                surface=rng.choice(get_args(Surface)),
                streamed=rng.random() < 2 / 3,
                calls_tool=rng.random() < 1 / 4,
                fault=rng.choice(INSTEAD if instead else WITHIN),
                place=place,
                text=" ".join(rng.choices(WORDS, k=rng.randint(4, 24))),
                seed=rng.getrandbits(32),
            )
        )
    return trials


def number_in(text: str) -> int | None:
    """The number of the trial whose prompt stands in `text`."""
    found = _NUMBER.search(text)
    return int(found[1]) if found else None


def spans(body: bytes, engine: Engine) -> list[Span]:
    """The events of a whole body."""
    mark = b"\n" if engine == "ollama" else b"\n\n"
    found, start = [], 0
    while (end := body.find(mark, start)) >= 0:
        end += len(mark)
        payload = body[start:end].rpartition(b"data:")[2].strip()
        found.append(Span(start, end, _has_content(payload, engine)))
        start = end
    return found


def _has_content(payload: bytes, engine: Engine) -> bool:
    if not payload.startswith(b"{"):
        return False
    event: Any = json.loads(payload)
    match engine:
        case "anthropic":
            # A call of a tool begins with its block.
            block = event.get("content_block", {})
            return bool(event["type"] == "content_block_delta" or block.get("type") == "tool_use")
        case "ollama":
            message = event["message"]
            return bool(message["content"] or message.get("tool_calls"))
        case _:
            delta = event["choices"][0]["delta"] if event["choices"] else {}
            return bool(delta.get("content") or delta.get("tool_calls"))


def breaking(trial: Trial, body: bytes) -> Break:
    """Where `body`, the whole answer, breaks. A place that this body lacks becomes the one before its end."""
    rng = random.Random(trial.seed)
    events = spans(body, trial.engine)
    tokens = [event for event in events if event.is_token]
    first, last = tokens[0], tokens[-1]
    tail = next((event for event in events if event.start >= last.end), last)
    choices: dict[Place, Callable[[], list[int]]] = {
        "instead_of_an_answer": lambda: [0],
        # Its line's end may be enough for a reader.
        "before_the_first_token": lambda: list(range(first.end - 2)),
        "between_tokens": lambda: list(range(first.end, last.start + 1)),
        "inside_a_character": lambda: [
            at for at in range(first.end, last.end) if body[at] & 0b1100_0000 == 0b1000_0000
        ],
        "inside_a_line": lambda: [
            at for token in tokens[1:] for at in range(token.start + 1, min(token.start + 12, token.end))
        ],
        "before_the_end": lambda: list(range(last.end, max(last.end + 1, tail.end - 2))),
    }
    places = choices[trial.place]() or choices["before_the_end"]()
    if trial.fault == "error":
        # An event of its own: it stands between two others.
        places = [event.start for event in events if places[0] <= event.start <= places[-1]] or [last.end]
    at = rng.choice(places)
    return Break(at=at, before_first_token=at <= first.end - 2)
