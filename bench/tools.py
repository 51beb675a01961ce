"""The text tools on a configured LLM: is each answer of the form asked for or a clear error, and right?

    python -m bench.tools [--calls 1000] [--config configuration.json] [--at-once 2]

Without a configuration it is the packaged one, which is the embedded model. The labelled texts of
`data/classify.jsonl` were written for this.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec
from jsonschema import Draft202012Validator

from bench.figures import Figure, at_least, keep, p95
from bench.server import serving

DATA = Path(__file__).parent / "data" / "classify.jsonl"
CALL_TIMEOUT_S = 300.0
INVOICE = (
    "Invoice 118 from Harbour Tools, dated 3 March: two hammers at 12.50 each and a box of nails at 4.00. "
    "Please pay within thirty days."
)
PERSON = (
    "Maria Lindqvist, 41, has led the bakery in Uppsala since 2012. She employs nine people and opens at six."
)
INCIDENT = (
    "The server stopped at 02:14 because its disk was full. Logs of the last week had not been rotated. "
    "The team deleted old files, added an alarm at eighty percent, and restarted the service at 02:50."
)
TRAVEL = "Flight KL 1107 to Oslo is delayed by forty minutes and now leaves from gate D 24."
TEXTS = (INVOICE, PERSON, INCIDENT, TRAVEL)
LONG = "\n\n".join(
    f"On day {day} the expedition walked {day % 7 + 9} kilometres. {TEXTS[day % len(TEXTS)]}"
    for day in range(1, 60)
)
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
STYLES = ("Make it shorter.", "Make it formal.", "Write it as one sentence for a child.")

Outcome = Literal["valid", "clear_error", "wrong"]


class Labelled(msgspec.Struct, frozen=True):
    """A text, the labels to choose from, and the right one."""

    text: str
    labels: list[str]
    label: str


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A call to be made. `right` is the label that a person would choose."""

    tool: str
    arguments: dict[str, Any]
    schema: dict[str, Any]
    """What its output must obey."""
    right: str = ""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A call that was made."""

    job: Job
    outcome: Outcome
    took_ms: float
    output: dict[str, Any] = {}
    told: str = ""


def main() -> None:
    """Call, count, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--config", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "state", chosen.config) as server:
        calls = asyncio.run(_calls(server.url, chosen.calls, chosen.at_once))
    keep("tools", _figures(calls), folder=DATA.parent)
    for told in {call.told for call in calls if call.outcome != "valid"}:
        print("not valid:", told)


async def _calls(url: str, number: int, at_once: int) -> list[Call]:
    jobs = _jobs()
    places = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=CALL_TIMEOUT_S) as http:

        async def one(job: Job) -> Call:
            async with places:
                return await _call(http, job)

        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(next(jobs))) for _ in range(number)]
    return [task.result() for task in running]


async def _call(http: httpx.AsyncClient, job: Job) -> Call:
    started = time.perf_counter()
    answer = await http.post(f"/mcp/tools/{job.tool}", json=job.arguments)
    took_ms = 1000 * (time.perf_counter() - started)
    body = answer.json()
    if answer.status_code == 200:
        valid = Draft202012Validator(job.schema).is_valid(body["output"])
        return Call(job=job, outcome="valid" if valid else "wrong", took_ms=took_ms, output=body["output"])
    is_problem = answer.headers["content-type"] == "application/problem+json"
    detail = str(body.get("detail", ""))
    outcome: Outcome = "clear_error" if is_problem and detail and answer.status_code != 500 else "wrong"
    return Call(job=job, outcome=outcome, took_ms=took_ms, told=f"{answer.status_code} {detail[:200]}")


def _jobs() -> Iterator[Job]:
    """Half of the calls classify, the other half is shared by the others."""
    labelled = [msgspec.json.decode(line, type=Labelled) for line in DATA.read_text().splitlines()]
    fields_schema = {"required": list(FIELDS), "properties": {"subject": {"type": "string"}}}
    for number in count():
        at, text = number // 2, TEXTS[number // 2 % len(TEXTS)]
        if number % 2 == 0:
            item = labelled[at % len(labelled)]
            schema = {"required": ["label"], "properties": {"label": {"enum": item.labels}}}
            arguments: dict[str, Any] = {"text": item.text, "labels": item.labels}
            yield Job(tool="classify", arguments=arguments, schema=schema, right=item.label)
            continue
        match at % 6:
            case 0:
                yield Job(tool="extract", arguments={"text": text, "schema": SCHEMA}, schema=SCHEMA)
            case 1:
                yield Job(tool="extract", arguments={"text": text, "fields": FIELDS}, schema=fields_schema)
            case 2 | 3:
                arguments = {"text": text, "instructions": STYLES[at % len(STYLES)]}
                yield Job(tool="rewrite", arguments=arguments, schema={"required": ["text"]})
            case 4:
                yield Job(tool="summarize", arguments={"text": text}, schema={"required": ["summary"]})
            case _:
                yield Job(
                    tool="summarize", arguments={"text": LONG, "words": 60}, schema={"required": ["summary"]}
                )


def _figures(calls: list[Call]) -> list[Figure]:
    outcomes = Counter(call.outcome for call in calls)
    answered = 100 * (outcomes["valid"] + outcomes["clear_error"]) / len(calls)
    figures = [
        at_least(
            "valid_or_clear_error_percent", answered, "%", 100, f"of {len(calls)} calls of the four tools"
        ),
        Figure(name="valid_percent", value=100 * outcomes["valid"] / len(calls), unit="%", what="of them"),
    ]
    sorted_right = [call.output.get("label") == call.job.right for call in calls if call.job.right]
    if sorted_right:
        texts = min(len(sorted_right), len(DATA.read_text().splitlines()))
        figures.append(
            Figure(
                name="classify_accuracy_percent",
                value=100 * statistics.mean(sorted_right),
                unit="%",
                what=f"{texts} labelled texts, 3 or 4 labels each",
            )
        )
    for tool in sorted({call.job.tool for call in calls}):
        took = [call.took_ms for call in calls if call.job.tool == tool]
        figures += [
            Figure(
                name=f"{tool}_p50_ms", value=statistics.median(took), unit="ms", what=f"{len(took)} calls"
            ),
            Figure(name=f"{tool}_p95_ms", value=p95(took), unit="ms"),
        ]
    return figures


if __name__ == "__main__":
    main()
