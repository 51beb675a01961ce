"""The command: measures what is missing in a file, prints the table, writes the plot and the summary.

python -m bench.loop_quality --problems 100:300 --out state/loop_quality/embedded.jsonl
"""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ai_agent_server import log
from ai_agent_server.config import settings as configuration
from ai_agent_server.errors import AgentServerError
from ai_agent_server.sandbox._choose import choose_sandbox
from bench import figures
from bench.lines import RefusedError
from bench.loop_quality import arms, best_of_n, problems, setup
from bench.loop_quality.lines import ARMS, Arm, Line, Lines, Setup, missing
from bench.loop_quality.plot import svg
from bench.loop_quality.problems import Problem
from bench.loop_quality.summary import Summary, summarise, table

REFUSED, INTERRUPTED = 2, 130


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The command line."""

    out: Path
    problems: str
    arms: tuple[Arm, ...]
    config: Path | None
    llm: str | None
    seed: int
    temperature: float | None
    calls: int | None
    at_once: int


def parsed(arguments: Sequence[str] | None = None) -> Options:
    """The command line, read."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.loop_quality", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="the lines; a rerun goes on with it")
    parser.add_argument("--problems", default="100:300", help="FROM:TO, positions in the order of the ids")
    parser.add_argument("--arms", default=",".join(ARMS), help="best_of_n needs the lines of the other two")
    parser.add_argument("--config", type=Path, help="a configuration.json; by default the packaged one")
    parser.add_argument("--llm", help="the LLM that serves every role, where more than one is configured")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other answers")
    parser.add_argument(
        "--temperature",
        type=float,
        help="of best_of_n's further draws; by default the loop's warmest coder's",
    )
    parser.add_argument("--calls", type=int, help="a task's limit of LLM calls; by default as configured")
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        help="problems at the same time, no more than the LLM has slots; their seconds are then shared ones",
    )
    given = parser.parse_args(arguments)
    if given.at_once < 1:
        parser.error("--at-once: at least 1")
    chosen = tuple(arm for arm in ARMS if arm in given.arms.split(","))
    if unknown := set(given.arms.split(",")) - set(ARMS):
        parser.error(f"--arms: {', '.join(sorted(unknown))}: choose from {', '.join(ARMS)}")
    return Options(**{**vars(given), "arms": chosen})


async def measure(options: Options, progress: Progress) -> Summary:
    """Measure what is missing; answers the summary. Raises `RefusedError` or an `AgentServerError`."""
    everything = problems.load()
    try:
        chosen = [everything[at] for at in problems.positions(options.problems, len(everything))]
    except ValueError as exc:
        raise RefusedError(f"--problems: {exc}") from exc
    llm, settings = setup.with_one_llm(configuration.load(options.config), options.llm)
    folder = options.config.parent if options.config else None
    profile = setup.profile_of(settings, folder)
    sandbox, probe = await choose_sandbox(settings.sandbox.tier)
    if not probe.works:
        raise RefusedError(f"no sandbox works here: {probe.detail}; {probe.advice}")
    made_with = Setup(
        llm=llm,
        engine=settings.llms[llm].engine,
        model=settings.llms[llm].model,
        problems=options.problems,
        seed=options.seed,
        temperature=setup.warmest(settings) if options.temperature is None else options.temperature,
        limits=setup.limits_of(profile, options.calls),
        tier=probe.tier,
        llm_sha256=setup.llm_sha256(settings.llms[llm]),
        profile_sha256=setup.profile_sha256(profile),
        program_sha256=setup.program_sha256(),
        data_sha256=problems.sha256(),
        at_once=options.at_once,
    )
    with Lines(options.out, made_with) as lines:
        run = _Run(chosen, options.arms, lines, progress, options.at_once)
        if run.todo():
            environ = configuration.environment()
            async with arms.running(
                setup=made_with,
                settings=settings,
                folder=folder,
                sandbox=sandbox,
                environ=environ,
                at_once=options.at_once,
            ) as made:
                await run.go_on(made)
        return summarise(made_with, figures.machine(options.out.parent), run.outcomes())


class _Run:
    """What of one measurement is there, and what is not."""

    def __init__(
        self,
        chosen: Sequence[Problem],
        wanted: tuple[Arm, ...],
        lines: Lines,
        progress: Progress,
        at_once: int,
    ) -> None:
        self._at_once = at_once
        self._problems = {problem.task_id: problem for problem in chosen}
        self._wanted, self._lines, self._progress = wanted, lines, progress
        if "best_of_n" in wanted:
            lacking = [arm for arm in ARMS if arm != "best_of_n" and arm not in wanted and self._missing(arm)]
            if lacking:
                raise RefusedError(f"best_of_n needs the lines of {' and '.join(lacking)}; measure them too")

    def _missing(self, arm: Arm) -> tuple[int, ...]:
        return missing(tuple(self._problems), self._lines.of(arm))

    def _next_round(self) -> tuple[int, ...]:
        budget = sum(line.tokens for line in self._lines.of("loop").values())
        return best_of_n.next_round(self._lines.draws(), budget)

    def todo(self) -> bool:
        """Whether anything is missing."""
        return any(self._missing(arm) for arm in self._wanted if arm != "best_of_n") or (
            "best_of_n" in self._wanted and bool(self._next_round())
        )

    async def go_on(self, made: arms.Arms) -> None:
        """Measure what is missing: best-of-n last, since its tokens are the loop's."""
        if "one_call" in self._wanted:
            await self._each("one_call", made)
        if "loop" in self._wanted:
            await self._each("loop", made)
        if "best_of_n" in self._wanted:
            await self._rounds(made)

    async def _each(self, arm: Arm, made: arms.Arms) -> None:
        left = self._missing(arm)
        bar = self._progress.add_task(
            arm, total=len(self._problems), completed=len(self._problems) - len(left)
        )

        async def measure_one(task_id: int) -> None:
            problem = self._problems[task_id]
            self._lines.add(await (made.loop(problem) if arm == "loop" else made.one_call(problem)))
            self._progress.advance(bar)

        await self._all(left, measure_one)

    async def _rounds(self, made: arms.Arms) -> None:
        budget = sum(line.tokens for line in self._lines.of("loop").values())
        bar = self._progress.add_task("best_of_n, tokens", total=budget)
        while problems_left := self._next_round():
            numbers = {task_id: len(drawn) + 1 for task_id, drawn in self._lines.draws().items()}

            async def draw_one(task_id: int, numbers: dict[int, int] = numbers) -> None:
                self._lines.add(await made.draw(self._problems[task_id], numbers[task_id]))

            await self._all(problems_left, draw_one)
            spent = sum(line.tokens for drawn in self._lines.draws().values() for line in drawn)
            self._progress.update(bar, completed=min(spent, budget))
        self._progress.update(bar, completed=budget)

    async def _all(self, ids: Sequence[int], do: Callable[[int], Awaitable[None]]) -> None:
        """`do` each in order, `at_once` at the same time."""
        left = iter(ids)

        async def work() -> None:
            for task_id in left:
                await do(task_id)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._at_once):
                    group.create_task(work())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def outcomes(self) -> dict[Arm, list[Line]]:
        """One line a problem and arm, problems in order, for the arms that were asked for."""
        draws = self._lines.draws()
        found: dict[Arm, list[Line]] = {}
        for arm in self._wanted:
            of = self._lines.of(arm)
            found[arm] = [
                best_of_n.chosen(draws[task_id]) if arm == "best_of_n" else of[task_id]
                for task_id in self._problems
            ]
        return found


def main() -> int:
    """Measure, print, keep; answers 1 when a target is missed."""
    options = parsed()
    log.configure("error")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            found = asyncio.run(measure(options, progress))
    except (RefusedError, AgentServerError, OSError) as exc:
        print(f"not measured: {exc}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on with {options.out}", file=sys.stderr)
        return INTERRUPTED
    options.out.with_suffix(".svg").write_text(svg(found), encoding="utf-8")
    summary = msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n"
    options.out.with_suffix(".summary.json").write_bytes(summary)
    print(table(found))
    return int(any(figure.kept is False for figure in found.figures))


if __name__ == "__main__":
    sys.exit(main())
