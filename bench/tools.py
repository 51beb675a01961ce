"""The text tools on a configured LLM: is each answer of the form asked for or a clear error, and right?

    python -m bench.tools [--calls 1000] [--config configuration.json --llm NAME] [--at-once 2] [--out FILE]

Without a configuration it is the packaged one, which is the embedded model. Every call is on a text of its
own, made from its number; each is kept in the file as it ends, and a rerun goes on with those that are not
there. The labelled texts of `data/classify.jsonl` were written for this; each time that one comes again its
labels are in another order.
"""

import argparse
import asyncio
import hashlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec
from jsonschema import Draft202012Validator

from ai_agent_server.config.settings import packaged_configuration
from bench.figures import Figure, at_least, keep, p95
from bench.lines import LineFile, RefusedError
from bench.server import serving

DATA = Path(__file__).parent / "data" / "classify.jsonl"
OUT = Path("state/tools/embedded.jsonl")
CALL_TIMEOUT_S = 600.0
TOLD_EVERY = 25
LONG_PARAGRAPHS = 40
"""More than two pieces: they are summarized one by one, and then together."""
FIRMS = ("Harbour Tools", "Lindqvist and Sons", "Blue Kettle Ltd", "Orchard Print", "Nordwind GmbH")
PEOPLE = ("Maria Lindqvist", "Tom Okafor", "Ines Duarte", "Pavel Novak", "Aiko Mori", "Sam Reid")
PLACES = ("Uppsala", "Porto", "Leeds", "Brno", "Sapporo", "Oslo", "Ghent")
PARTS = ("disk was full", "certificate had expired", "memory ran out", "clock was wrong", "queue overflowed")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "who": {"type": "string", "description": "The person, firm or thing it is about."},
        "numbers": {"type": "array", "items": {"type": "number"}, "maxItems": 5},
        "kind": {"enum": ["invoice", "person", "incident", "travel"]},
    },
    "required": ["who", "numbers", "kind"],
    "additionalProperties": False,
}
FIELDS = {
    "subject": {"type": "string", "description": "What it is about.", "required": True},
    "date": {"type": "string"},
    "amount": {"type": "number"},
}
FIELDS_SCHEMA: dict[str, Any] = {
    "required": list(FIELDS),
    "properties": {
        "subject": {"type": "string"},
        "date": {"type": ["string", "null"]},
        "amount": {"type": ["number", "null"]},
    },
}
STYLES = ("Make it shorter.", "Make it formal.", "Write it as one sentence for a child.")

Tool = Literal["classify", "extract", "summarize", "rewrite"]
Outcome = Literal["valid", "clear_error", "wrong"]


class Labelled(msgspec.Struct, frozen=True):
    """A text, the labels to choose from, and the right one."""

    text: str
    labels: list[str]
    label: str


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A call to be made. `right` is the label that a person would choose."""

    number: int
    tool: Tool
    arguments: dict[str, Any]
    schema: dict[str, Any]
    """What its output must obey."""
    right: str = ""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """All that a call depends on beside its number."""

    version: int = 1
    llm: str
    configuration_sha256: str
    at_once: int


class Call(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A call that was made."""

    number: int
    tool: Tool
    outcome: Outcome
    took_ms: float
    is_right: bool | None = None
    """Of classify."""
    told: str = ""
    """The error, where it is one."""


def main() -> int:
    """Make the calls that are missing, count, keep; answers 1 where an answer was neither valid nor clear."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=2, help="calls at the same time")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--llm", help="the one LLM that serves, where more than one is configured")
    parser.add_argument("--out", type=Path, default=OUT, help="the calls; a rerun goes on with it")
    chosen = parser.parse_args()
    try:
        document = with_one_llm(
            packaged_configuration() if chosen.config is None else chosen.config.read_bytes(), chosen.llm
        )
        calls = asyncio.run(measured(document, chosen.out, numbers=chosen.calls, at_once=chosen.at_once))
    except (RefusedError, OSError) as exc:
        print(exc, file=sys.stderr)
        return 2
    (llm,) = document["llms"]
    figures = _figures(calls)
    keep("tools" if chosen.config is None else f"tools_{llm}", figures, folder=DATA.parent)
    for told in sorted({call.told for call in calls if call.told}):
        print("not valid:", told)
    return int(any(figure.kept is False for figure in figures))


def with_one_llm(configuration: bytes, llm: str | None) -> dict[str, Any]:
    """The configuration with no LLM but `llm`, and no messaging. Raises `RefusedError` without such a one."""
    try:
        document: dict[str, Any] = json.loads(configuration)
        llms = document["llms"]
    except (ValueError, TypeError, KeyError) as exc:
        raise RefusedError(f"--config is no configuration: {exc!r}") from exc
    if llm is None and len(llms) == 1:
        (llm,) = llms
    if llm not in llms:
        raise RefusedError(f"--llm must be one of: {', '.join(llms)}")
    return {**document, "llms": {llm: llms[llm]}, "messaging": {"enabled": False}}


async def measured(document: dict[str, Any], out: Path, *, numbers: int, at_once: int) -> list[Call]:
    """The first `numbers` calls: those in `out`, and those that were missing there."""
    (llm,) = document["llms"]
    text = json.dumps(document, sort_keys=True)
    setup = Setup(llm=llm, configuration_sha256=hashlib.sha256(text.encode()).hexdigest(), at_once=at_once)
    with LineFile(out, setup, Call) as lines:
        known = {call.number for call in lines.lines}
        missing = [job for job in jobs(numbers) if job.number not in known]
        if missing:
            with tempfile.TemporaryDirectory() as name:
                config = Path(name) / "configuration.json"
                config.write_text(text)
                with serving(Path(name) / "state", config) as server:
                    await _make(server.url, missing, lines, at_once)
        return [call for call in lines.lines if call.number < numbers]


async def _make(url: str, missing: Iterable[Job], lines: LineFile[Setup, Call], at_once: int) -> None:
    places = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=CALL_TIMEOUT_S) as http:

        async def one(job: Job) -> None:
            async with places:
                lines.add(await _call(http, job))
            if len(lines.lines) % TOLD_EVERY == 0:
                outcomes = Counter(call.outcome for call in lines.lines)
                print(len(lines.lines), "calls:", dict(outcomes), flush=True)

        async with asyncio.TaskGroup() as group:
            for job in missing:
                group.create_task(one(job))


async def _call(http: httpx.AsyncClient, job: Job) -> Call:
    started = time.perf_counter()
    outcome: Outcome = "wrong"
    is_right: bool | None = None
    told = ""
    try:
        answer = await http.post(f"/mcp/tools/{job.tool}", json=job.arguments)
        body = answer.json()
    except (httpx.HTTPError, ValueError) as exc:
        told = f"no answer: {exc!r}"
    else:
        if answer.status_code == 200:
            output = body["output"]
            outcome = "valid" if Draft202012Validator(job.schema).is_valid(output) else "wrong"
            told = "" if outcome == "valid" else f"200 {json.dumps(output)[:200]}"
            is_right = output.get("label") == job.right if job.right else None
        else:
            is_problem = answer.headers["content-type"] == "application/problem+json"
            detail = str(body.get("detail", ""))
            if is_problem and detail and answer.status_code != 500:
                outcome = "clear_error"
            told = f"{answer.status_code} {detail[:200]}"
            is_right = False if job.right else None
    return Call(
        number=job.number,
        tool=job.tool,
        outcome=outcome,
        took_ms=round(1000 * (time.perf_counter() - started), 1),
        is_right=is_right,
        told=told,
    )


def jobs(numbers: int) -> list[Job]:
    """The calls of these numbers, each the same at every run. Half classify, the others share the rest."""
    labelled = [msgspec.json.decode(line, type=Labelled) for line in DATA.read_text().splitlines()]
    return [_job(number, labelled) for number in range(numbers)]


def _job(number: int, labelled: Sequence[Labelled]) -> Job:
    rng = random.Random(number)
    at, text = number // 2, _text(rng, number // 2)
    if number % 2 == 0:
        item = labelled[at % len(labelled)]
        labels = rng.sample(item.labels, len(item.labels))
        schema = {"required": ["label"], "properties": {"label": {"enum": labels}}}
        asked: dict[str, Any] = {"text": item.text, "labels": labels}
        return Job(number=number, tool="classify", arguments=asked, schema=schema, right=item.label)
    match at % 6:
        case 0 | 3:
            asked, schema = {"text": text, "instructions": STYLES[at % len(STYLES)]}, {"required": ["text"]}
            return Job(number=number, tool="rewrite", arguments=asked, schema=schema)
        case 1:
            asked = {"text": text, "schema": SCHEMA}
            return Job(number=number, tool="extract", arguments=asked, schema=SCHEMA)
        case 2:
            asked = {"text": text, "fields": FIELDS}
            return Job(number=number, tool="extract", arguments=asked, schema=FIELDS_SCHEMA)
        case 4:
            return Job(
                number=number, tool="summarize", arguments={"text": text}, schema={"required": ["summary"]}
            )
        case _:
            long = "\n\n".join(
                f"On day {day} the expedition walked {rng.randrange(9, 30)} kilometres. {_text(rng, day)}"
                for day in range(1, LONG_PARAGRAPHS + 1)
            )
            asked, schema = {"text": long, "words": 60}, {"required": ["summary", "pieces", "complete"]}
            return Job(number=number, tool="summarize", arguments=asked, schema=schema)


def _text(rng: random.Random, kind: int) -> str:
    clock = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    match kind % 4:
        case 0:
            prices = [f"{rng.randrange(200, 2000) / 100:.2f}" for _ in range(2)]
            return (
                f"Invoice {rng.randrange(100, 1000)} from {rng.choice(FIRMS)}, dated {rng.randrange(1, 29)} "
                f"March: {rng.randrange(2, 9)} hammers at {prices[0]} each and a box of nails at "
                f"{prices[1]}. Please pay within thirty days."
            )
        case 1:
            return (
                f"{rng.choice(PEOPLE)}, {rng.randrange(19, 70)}, has led the bakery in {rng.choice(PLACES)} "
                f"since {rng.randrange(1990, 2024)}. It employs {rng.randrange(3, 40)} "
                "people and opens early."
            )
        case 2:
            return (
                f"The server stopped at {clock} because its {rng.choice(PARTS)}. Nobody had looked at its "
                "logs for a week. The team mended it, added an alarm, and restarted the service soon after."
            )
        case _:
            return (
                f"Flight KL {rng.randrange(1000, 2000)} to {rng.choice(PLACES)} is delayed by "
                f"{rng.randrange(10, 90)} minutes and now leaves at {clock} from gate D {rng.randrange(40)}."
            )


def _figures(calls: Sequence[Call]) -> list[Figure]:
    outcomes = Counter(call.outcome for call in calls)
    answered = 100 * (outcomes["valid"] + outcomes["clear_error"]) / len(calls)
    figures = [
        at_least(
            "valid_or_clear_error_percent", answered, "%", 100, f"of {len(calls)} calls of the four tools"
        ),
        Figure(name="valid_percent", value=100 * outcomes["valid"] / len(calls), unit="%", what="of them"),
    ]
    judged = [call for call in calls if call.is_right is not None]
    if judged:
        asked = [job for job in jobs(max(call.number for call in judged) + 1) if job.right]
        chance = 100 * statistics.mean(1 / len(job.arguments["labels"]) for job in asked)
        texts = len({job.arguments["text"] for job in asked})
        figures.append(
            Figure(
                name="classify_accuracy_percent",
                value=100 * statistics.mean(bool(call.is_right) for call in judged),
                unit="%",
                what=f"right of {len(judged)}, on {texts} labelled texts; by chance {chance:.0f} %",
            )
        )
    for tool in sorted({call.tool for call in calls}):
        took = [call.took_ms for call in calls if call.tool == tool]
        figures += [
            Figure(
                name=f"{tool}_p50_ms", value=statistics.median(took), unit="ms", what=f"{len(took)} calls"
            ),
            Figure(name=f"{tool}_p95_ms", value=p95(took), unit="ms"),
        ]
    return figures


if __name__ == "__main__":
    sys.exit(main())
