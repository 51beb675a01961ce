"""A client that leaves: how long until the engine's slot works for the next one.

The server with the embedded model and one slot. Somebody holds the slot with a long answer (streamed or
whole) and leaves at a random moment; another client waits for it, and the time from the leaving to that
one's first token is taken. Queued: one who waits for the slot leaves first, and the next after him must
not wait for his answer. The next one's own prompt is in that time; what it takes after an answer that
ended by itself is measured too, and taken off. The load of the machine is told, since all of this is CPU
time of a model.

    python -m bench.disconnect [--trials 200] [--seed 1] [--out FILE]

Each trial is kept in the file as it ends, and a rerun goes on with those that are not there.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import aiohttp
import msgspec

from ai_agent_server.config.settings import packaged_configuration
from bench.figures import Figure, at_most, keep, median, p95
from bench.lines import LineFile, RefusedError
from bench.server import serving

Kind = Literal["streamed", "whole", "queued"]
What = Literal["idle", "streamed", "whole", "queued"]
TRIALS = 200
OUT = Path("state/disconnect/embedded.jsonl")
TOLD_EVERY = 50
BOUND_MS = 500.0
WAIT_S = 120.0
LONG = "Write a very long story about a fox who walks around the world. Tell of every day."


class Setup(msgspec.Struct, frozen=True):
    """All that a trial depends on beside its number."""

    seed: int
    version: int = 1


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One that was had. `idle`: nobody left, the answer before had ended."""

    what: What
    number: int
    seconds: float
    """From the leaving to the next one's first token."""


class Left(Exception):
    """Not an error: the answer ended before its client could leave, and the trial is had again."""


class Client:
    """Asks, waits and leaves."""

    def __init__(self, http: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
        self._http, self._url, self._rng = http, url, rng

    async def trial(self, kind: Kind) -> float:
        """Seconds from the leaving to the next one's first token."""
        match kind:
            case "streamed":
                return await self._leaves(stream=True)
            case "whole":
                return await self._leaves(stream=False)
            case _:
                return await self._leaves_the_queue()

    async def idle_s(self) -> float:
        """What the next one's first token takes after an answer that has ended."""
        async with self._asked(LONG, max_tokens=8, stream=False) as answer:
            await answer.read()
        began_s = time.perf_counter()
        await self._first_token()
        return time.perf_counter() - began_s

    async def _leaves(self, *, stream: bool) -> float:
        holder = asyncio.create_task(self._hold(stream=stream))
        await self._until(lambda llm: llm["in_flight"] == 1, holder)
        following = asyncio.create_task(self._first_token())
        await asyncio.sleep(self._rng.uniform(0.05, 0.5))
        left_s = time.perf_counter()
        await _leave(holder, following)
        await following
        return time.perf_counter() - left_s

    async def _leaves_the_queue(self) -> float:
        holder = asyncio.create_task(self._hold(stream=True))
        await self._until(lambda llm: llm["in_flight"] == 1, holder)
        queued = asyncio.create_task(self._hold(stream=self._rng.random() < 0.5))
        await asyncio.sleep(self._rng.uniform(0.05, 0.25))
        following = asyncio.create_task(self._first_token())
        await asyncio.sleep(self._rng.uniform(0.05, 0.25))
        left_s = time.perf_counter()
        await _leave(queued, following)
        await _leave(holder, following)
        await following
        return time.perf_counter() - left_s

    async def _hold(self, *, stream: bool) -> None:
        async with self._asked(LONG, max_tokens=2000, stream=stream) as answer:
            await answer.read()

    async def _first_token(self) -> None:
        text = f"Say {self._rng.randrange(1000)}."
        async with self._asked(text, max_tokens=4, stream=True) as answer:
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    assert "error" not in event, event
                    return
        raise RuntimeError("the next one got no answer")

    def _asked(self, text: str, *, max_tokens: int, stream: bool) -> Any:
        said = [{"role": "user", "content": text}]
        body = {"model": "embedded", "messages": said, "max_tokens": max_tokens, "stream": stream}
        return self._http.post(self._url + "/v1/chat/completions", json=body)

    async def _until(self, is_so: Callable[[Any], bool], holder: asyncio.Task[None]) -> None:
        while True:
            async with self._http.get(self._url + "/api/v1/llms") as answer:
                (llm,) = (await answer.json())["items"]
            if is_so(llm):
                return
            if holder.done():
                raise Left
            await asyncio.sleep(0.005)


async def _leave(holder: asyncio.Task[None], following: asyncio.Task[None]) -> None:
    """Close the connection of `holder`."""
    if holder.done():
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        raise Left
    holder.cancel()
    await asyncio.gather(holder, return_exceptions=True)


async def measured(url: str, lines: LineFile[Setup, Trial], *, seed: int, trials: int) -> None:
    """Have the trials that are not in `lines`: so many of each kind, and a quarter of idle ones."""
    known = {(trial.what, trial.number) for trial in lines.lines}
    missing = [
        (what, number)
        for number in range(trials)
        for what in get_args(What)
        if (what, number) not in known and (what != "idle" or number % 4 == 0)
    ]
    # A connection of its own for each request: to leave is to close it.
    connector = aiohttp.TCPConnector(force_close=True)
    timeout = aiohttp.ClientTimeout(total=WAIT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        await Client(http, url, random.Random(seed)).idle_s()
        for what, number in missing:
            client = Client(http, url, random.Random(f"{seed} {what} {number}"))
            seconds = await (
                client.idle_s() if what == "idle" else _again(lambda c=client, w=what: c.trial(w))  # type: ignore[misc]
            )
            lines.add(Trial(what=what, number=number, seconds=seconds))
            if len(lines.lines) % TOLD_EVERY == 0:
                print(len(lines.lines), "trials", flush=True)


async def _again(trial: Callable[[], Awaitable[float]]) -> float:
    while True:
        try:
            return await trial()
        except Left:
            continue


def one_slot(folder: Path) -> Path:
    """The packaged configuration, the embedded model with one slot."""
    document: dict[str, Any] = json.loads(packaged_configuration())
    document["llms"]["embedded"]["slots"] = 1
    document["messaging"] = {"enabled": False}
    path = folder / "configuration.json"
    path.write_text(json.dumps(document))
    return path


def figures(trials: Sequence[Trial]) -> list[Figure]:
    """In milliseconds."""
    told = []
    alone_ms = 1000 * median([trial.seconds for trial in trials if trial.what == "idle"])
    for kind in get_args(Kind):
        times_s = [trial.seconds for trial in trials if trial.what == kind]
        ms = [max(0.0, 1000 * each - alone_ms) for each in times_s]
        what = f"from a {kind} request's leaving until the slot works for the next"
        told += [
            Figure(name=f"{kind}_p50_ms", value=median(ms), unit="ms", what=f"{what}, p50"),
            at_most(f"{kind}_p95_ms", p95(ms), "ms", BOUND_MS, f"{what}, p95"),
            Figure(name=f"{kind}_max_ms", value=max(ms), unit="ms", what=f"{what}, max"),
        ]
    return [
        *told,
        Figure(
            name="idle_p50_ms",
            value=alone_ms,
            unit="ms",
            what="a first token after an answer that ended, p50",
        ),
        Figure(name="trials", value=len(times_s), unit="", what="of each kind"),
        Figure(
            name="load", value=os.getloadavg()[0], unit="", what="processes that ran or waited, at the end"
        ),
    ]


def main() -> int:
    """Measure, print and keep; answers 1 when a figure misses its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--out", type=Path, default=OUT, help="the trials; a rerun goes on with it")
    arguments = parser.parse_args()
    seed, count = arguments.seed, arguments.trials
    try:
        with (
            LineFile(arguments.out, Setup(seed), Trial) as lines,
            tempfile.TemporaryDirectory() as folder,
            serving(Path(folder) / "state", one_slot(Path(folder))) as server,
        ):
            asyncio.run(measured(server.url, lines, seed=seed, trials=count))
            told = figures([trial for trial in lines.lines if trial.number < count])
    except (RefusedError, OSError) as exc:
        print(exc, file=sys.stderr)
        return 2
    keep("disconnect", told, folder=Path())
    return int(any(figure.kept is False for figure in told))


if __name__ == "__main__":
    sys.exit(main())
