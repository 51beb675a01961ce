"""Model servers that answer each trial rightly, but for the one whose fault is theirs."""

import asyncio
import json
from typing import Any

from tests.servers.anthropic_double import AnthropicDouble
from tests.servers.http_double import HTTPDouble, Out, Request
from tests.servers.llama_server_double import LlamaServerDouble
from tests.servers.ollama_double import OllamaDouble
from tests.servers.openai_double import OpenAIDouble

from bench.stream_faults.trials import GARBAGE, REFUSALS, Break, Engine, Trial, breaking, number_in


class _Broken(Exception):
    """Nothing more is to be written."""


class _Recorded(Out):
    """What an answer's body would be."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        super().__init__(writer)
        self.body = b""

    def begin(self, media_type: str) -> None:
        """Not sent."""

    async def piece(self, content: bytes) -> None:
        """Kept."""
        self.body += content


class _Breaking(Out):
    """An answer that breaks off at a byte."""

    def __init__(self, writer: asyncio.StreamWriter, trial: Trial, where: Break, error: bytes) -> None:
        super().__init__(writer)
        self._trial, self._where, self._error = trial, where, error
        self._sent = 0
        self.broke = False

    async def piece(self, content: bytes) -> None:
        """Written up to the break."""
        before = self._where.at - self._sent
        self._sent += len(content)
        if self.broke or before >= len(content):
            await super().piece(content)
            return
        self.broke = True
        if before:
            await super().piece(content[:before])
        match self._trial.fault:
            case "cut":
                self.cut()
            case "reset":
                self.reset()
            case "stalled":
                await asyncio.Event().wait()
            case "unfinished":
                await super().piece(b"")
            case "error":
                await super().piece(self._error)
                await super().piece(b"")
            case _:
                garbage = GARBAGE[self._trial.seed % len(GARBAGE)]
                await super().piece(garbage + content[before:])
                return
        raise _Broken


class BreakingDouble(HTTPDouble):
    """Mixed into a double: breaks the trials that are `engine`'s, and says in `injected` which it did."""

    engine: Engine | None = None
    trials: tuple[Trial, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.injected: dict[int, bool] = {}
        """The trial's number -> whether the first token had not come yet."""

    def text(self, body: Any) -> str:
        """The trial's own."""
        number = number_in(json.dumps(body))
        return self.reply if number is None else self.trials[number].text

    async def answer(self, request: Request, out: Out) -> None:
        """Answer one request, or break."""
        number = number_in(json.dumps(request.json)) if request.method == "POST" else None
        trial = self.trials[number] if number is not None else None
        if trial is None or trial.engine != self.engine:
            await super().answer(request, out)
        elif trial.place == "instead_of_an_answer":
            self.injected[trial.number] = True
            await self._instead(trial, out)
        else:
            recorded = _Recorded(out.writer)
            await super().answer(request, recorded)
            where = breaking(trial, recorded.body)
            self.injected[trial.number] = where.before_first_token
            broken = _Breaking(out.writer, trial, where, self._error_event())
            try:
                await super().answer(request, broken)
            except _Broken:
                out.ended = broken.ended

    async def _instead(self, trial: Trial, out: Out) -> None:
        match trial.fault:
            case "silent":
                await asyncio.Event().wait()
            case "cut":
                out.cut()
            case "reset":
                out.reset()
            case _:
                status = REFUSALS[trial.seed % len(REFUSALS)]
                await out.whole(status, self.error(status, "it will not", "unavailable"))

    def _error_event(self) -> bytes:
        said = json.dumps(self.error(500, "it broke", "server_error")).encode()
        match self.engine:
            case "ollama":
                return said + b"\n"
            case "anthropic":
                return b"event: error\ndata: " + said + b"\n\n"
            case _:
                return b"data: " + said + b"\n\n"


class BreakingOpenAI(BreakingDouble, OpenAIDouble):
    """An OpenAI-compatible API."""


class BreakingLlamaServer(BreakingDouble, LlamaServerDouble):
    """A llama-server."""


class BreakingOllama(BreakingDouble, OllamaDouble):
    """An Ollama."""


class BreakingAnthropic(BreakingDouble, AnthropicDouble):
    """Anthropic's API."""


def doubles(trials: tuple[Trial, ...]) -> dict[Engine | None, BreakingDouble]:
    """One for each engine, and under None one that never breaks."""
    kinds: dict[Engine | None, type[BreakingDouble]] = {
        "openai": BreakingOpenAI,
        "llama-server": BreakingLlamaServer,
        "ollama": BreakingOllama,
        "anthropic": BreakingAnthropic,
        None: BreakingOpenAI,
    }
    made: dict[Engine | None, BreakingDouble] = {}
    for engine, kind in kinds.items():
        made[engine] = kind()
        made[engine].engine, made[engine].trials = engine, trials
    return made
