"""Every measurement, one after the other, then the table of the README."""

import subprocess
import sys
from pathlib import Path

from bench.figures import Report, read

MEASUREMENTS = ("orchestration", "startup", "task_files", "sandbox_overhead")


def main() -> int:
    """Measure, print the table; answers 1 when a figure misses its target."""
    for name in MEASUREMENTS:
        subprocess.run([sys.executable, "-m", f"bench.{name}"], check=True, cwd=Path(__file__).parent.parent)
    reports = [read(name) for name in MEASUREMENTS]
    print("\n" + table(reports))
    return int(any(figure.kept is False for report in reports for figure in report.figures))


def table(reports: list[Report]) -> str:
    """The figures as a Markdown table, with the machine that they were measured on."""
    machine = reports[0].machine
    rows = [
        f"| {figure.what} | {figure.value:.3g} {figure.unit} | {figure.target} |"
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
