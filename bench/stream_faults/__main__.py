"""Faults in the streams of four kinds of engines, and what clients saw of them.

`python -m bench.stream_faults --seed 1 --trials 1000` starts the server as a user does, in front of doubles
of an OpenAI-compatible API, a llama-server, Ollama and Anthropic's API, and sends it requests in the forms
of chat, Responses and messages, streamed and whole. Each answer breaks in one of eight ways at a random
byte. The judge sees what the client saw. `--write` puts the table into the page that explains it.
"""

import argparse
import asyncio
import json
import re
import sys
import tempfile
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, get_args

import aiohttp
import msgspec
from tests.servers.process import ServerProcess, packaged

from bench.figures import Figure, at_least, at_most, keep
from bench.stream_faults.breaking import BreakingDouble, doubles
from bench.stream_faults.client import Seen, Verdict, ask
from bench.stream_faults.trials import Engine, Fault, Place, Trial, planned

PAGE = Path("doc/explanation/stream_integrity.md")
AT_ONCE = 16
TIMEOUTS = {"connect_s": 5, "first_token_s": 2, "idle_s": 1}


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A trial and what became of it."""

    trial: Trial
    seen: Seen
    before_first_token: bool | None
    """None: the fault never happened."""

    @property
    def is_unserved(self) -> bool:
        """Whether another LLM should have served and none did."""
        return self.before_first_token is True and self.seen.verdict != "whole"


def configuration(made: dict[Engine | None, BreakingDouble]) -> dict[str, Any]:
    """Five LLMs of one tier: four whose answers break, and one that stands in and never does."""

    def llm(engine: Engine | None, kind: str, path: str = "", **more: Any) -> dict[str, Any]:
        return {
            "engine": kind,
            "model": "double-1",
            "source": "local",
            "tier": "main",
            "context": 8192,
            "slots": 64,
            "capabilities": ["chat", "json_schema", "tools"],
            "timeouts": TIMEOUTS,
            "options": {"base_url": made[engine].url + path},
            **more,
        }

    spare: Any = {"timeouts": {**TIMEOUTS, "first_token_s": 60, "idle_s": 60}}
    # Not in anybody's way: it comes when the one that was asked for cannot.
    dear: Any = {"cost_per_million_input_usd": 1.0, "cost_per_million_output_usd": 1.0}
    return packaged(
        llms={
            "openai": llm("openai", "api.openai", "/v1", **dear),
            "llama-server": llm("llama-server", "local.llama_server", **dear),
            "ollama": llm("ollama", "local.ollama", **dear),
            "anthropic": llm("anthropic", "api.anthropic", **dear),
            "spare": llm(None, "api.openai", "/v1", **spare),
        },
        balancer={
            "strategy": "cheapest",
            "circuit": {"failures": 1_000_000, "cooldown_s": 1},
            "retry": {"attempts": 1, "backoff_s": 0.01},
            "max_wait_s": 60,
        },
        messaging={"enabled": False},
    )


async def played(seed: int, count: int) -> list[Outcome]:
    """Every trial, in the order of their numbers."""
    trials = tuple(planned(seed, count))
    made = doubles(trials)
    places = asyncio.Semaphore(AT_ONCE)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for double in made.values():
            await stack.enter_async_context(double)
        config = folder / "configuration.json"
        config.write_text(json.dumps(configuration(made)))
        server = await stack.enter_async_context(ServerProcess(folder / "state", config))
        http = await stack.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120))
        )

        async def one(trial: Trial) -> Outcome:
            async with places:
                seen = await ask(http, server.url, trial)
            met = made[trial.engine].injected.get(trial.number)
            return Outcome(trial=trial, seen=seen, before_first_token=met)

        return list(await asyncio.gather(*map(one, trials)))


def table(outcomes: list[Outcome]) -> str:
    """By fault and by place: what the clients saw."""
    verdicts: tuple[Verdict, ...] = ("whole", "error", "truncated", "torn")
    lines = [
        "| | faults | served whole | told as an error | truncated in silence | torn | not served |",
        "|---|---|---|---|---|---|---|",
    ]

    def row(name: str, of: list[Outcome]) -> None:
        seen = Counter(outcome.seen.verdict for outcome in of)
        unserved = sum(outcome.is_unserved for outcome in of)
        counts = " | ".join(str(seen[verdict]) for verdict in verdicts)
        lines.append(f"| {name} | {len(of)} | {counts} | {unserved} |")

    for fault in get_args(Fault):
        row(fault, [outcome for outcome in outcomes if outcome.trial.fault == fault])
    for place in get_args(Place):
        name = place.replace("_", " ")
        row(f"*{name}*", [outcome for outcome in outcomes if outcome.trial.place == place])
    row("**all**", outcomes)
    return "\n".join(lines)


def figures(outcomes: list[Outcome]) -> list[Figure]:
    """What the table comes to."""
    seen = Counter(outcome.seen.verdict for outcome in outcomes)
    injected = [outcome for outcome in outcomes if outcome.before_first_token is not None]
    before = [outcome for outcome in injected if outcome.before_first_token]
    unserved = sum(outcome.is_unserved for outcome in outcomes)
    return [
        at_least("faults_injected", len(injected), "", len(outcomes), "faults that an engine had"),
        at_most("silent_truncations", seen["truncated"], "", 0, "clean ends of answers that were not whole"),
        at_most("torn_answers", seen["torn"], "", 0, "answers with neither a clean end nor an error"),
        at_most("unserved_before_first_token", unserved, "", 0, "faults before the first token that showed"),
        Figure(name="before_first_token", value=len(before), unit="", what="faults before the first token"),
        Figure(name="told_as_errors", value=seen["error"], unit="", what="answers that ended with an error"),
    ]


def filled(page: str, seed: int, rows: str) -> str:
    """`page` with the table of this run."""
    block = f"<!-- table -->\nSeed {seed}:\n\n{rows}\n<!-- end -->"
    return re.sub(r"<!-- table -->.*?<!-- end -->", lambda _: block, page, flags=re.DOTALL)


def main() -> int:
    """Run, print; answers 1 where an answer was not as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--write", action="store_true", help=f"keep the figures, and the table in {PAGE}")
    arguments = parser.parse_args()
    outcomes = asyncio.run(played(arguments.seed, arguments.trials))
    for outcome in outcomes:
        if outcome.seen.verdict in {"truncated", "torn"} or outcome.is_unserved:
            print(outcome)
    print(table(outcomes))
    found = figures(outcomes)
    if arguments.write:
        keep("stream_faults", found, folder=Path())
        PAGE.write_text(filled(PAGE.read_text("utf-8"), arguments.seed, table(outcomes)), "utf-8")
    return int(any(figure.kept is False for figure in found))


if __name__ == "__main__":
    sys.exit(main())
