"""`make bench`: the measurements of minutes one after the other, the README's table, and what was left out.

    python -m bench.run [NAME ...]

Answers 1 when a figure misses its target or a measurement breaks.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.figures import RESULTS, Report, read

FOLDER = Path(__file__).parent
ARGUMENTS = {"stream_faults": ("--write",)}
LEFT_OUT = {
    "disconnect": "600 trials on the embedded model, a quarter of an hour",
    "tools": "1,000 calls of the embedded model, an hour or two",
    "loop_quality": "hundreds of problems on the embedded model, half a day",
    "chaos": "100 kills, an hour; its judgement is a test's, not a figure",
    "readers": "1,000 cut readers, minutes; a breach ends it, there is no figure",
    "gateway_peers": "needs LiteLLM's proxy and Portkey's, which are no dependencies",
}
"""Name -> why; each runs by itself, `python -m bench.NAME`."""
PARTS = frozenset({"dribbler", "run"})
"""Programs that measure nothing by themselves."""


def measurements() -> tuple[str, ...]:
    """Every program of this folder that is not left out."""
    programs = (
        path.parent.name if path.name == "__main__.py" else path.stem
        for path in (*FOLDER.glob("*.py"), *FOLDER.glob("*/__main__.py"))
        if '__name__ == "__main__"' in path.read_text("utf-8")
    )
    return tuple(sorted(set(programs) - LEFT_OUT.keys() - PARTS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table."""
    known = measurements()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; else all")
    names = parser.parse_args(arguments).names or known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(known)}")
    broken = [name for name in names if _run(name)]
    reports = [read(name) for name in names if (RESULTS / f"{name}.json").exists()]
    if reports:
        print("\n" + table(reports))
    print("\nNot measured here:")
    for name, why in LEFT_OUT.items():
        print(f"  python -m bench.{name}: {why}")
    missed = [
        f"{report.name}: {figure.name}"
        for report in reports
        for figure in report.figures
        if figure.kept is False
    ]
    for what in (*missed, *(f"{name} broke or missed a target" for name in broken)):
        print(what, file=sys.stderr)
    return int(bool(missed or broken))


def _run(name: str) -> int:
    print(f"== {name}", flush=True)
    command = [sys.executable, "-m", f"bench.{name}", *ARGUMENTS.get(name, ())]
    return subprocess.run(command, check=False, cwd=FOLDER.parent).returncode


def table(reports: list[Report]) -> str:
    """The figures as a Markdown table, with the machine that they were measured on."""
    machine = reports[0].machine
    rows = [
        f"| {figure.what or figure.name} | {figure.value:.3g} {figure.unit} | {figure.target} |"
        for report in reports
        for figure in report.figures
    ]
    where = (
        f"{machine.cores} cores of {machine.cpu}, {machine.memory_gb:g} GB, Linux {machine.kernel}, "
        f"{machine.filesystem}, Python {machine.python}"
    )
    return "\n".join(
        (
            "| What | Measured | Target |",
            "|---|---|---|",
            *rows,
            "",
            f"Measured {reports[0].measured_at:%Y-%m-%d} on {where}.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
