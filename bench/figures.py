"""Figures: measured values with their units, printed one a line and kept as JSON with the machine."""

import math
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

RESULTS = Path(__file__).parent / "results"


class Figure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One measured value. `target` is what it has to keep to, in words; `kept` whether it did."""

    name: str
    value: float
    unit: str
    what: str = ""
    target: str = ""
    kept: bool | None = None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it was measured."""

    cpu: str
    cores: int
    memory_gb: float
    kernel: str
    python: str
    filesystem: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All figures of one measurement."""

    name: str
    measured_at: datetime
    machine: Machine
    figures: tuple[Figure, ...]


def at_most(name: str, value: float, unit: str, bound: float, what: str) -> Figure:
    """A figure that is good when it is low."""
    return Figure(
        name=name, value=value, unit=unit, what=what, target=f"<= {bound:g} {unit}", kept=value <= bound
    )


def at_least(name: str, value: float, unit: str, bound: float, what: str) -> Figure:
    """A figure that is good when it is high."""
    return Figure(
        name=name, value=value, unit=unit, what=what, target=f">= {bound:g} {unit}", kept=value >= bound
    )


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def p95(values: Sequence[float]) -> float:
    """The value that 95 in 100 do not exceed (nearest rank)."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def p99(values: Sequence[float]) -> float:
    """The value that 99 in 100 do not exceed (nearest rank)."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line of least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def keep(name: str, figures: Sequence[Figure], *, folder: Path) -> None:
    """Print `figures` and write `results/<name>.json`. `folder` is on the disk that was measured."""
    for figure in figures:
        told = f" target={figure.target!r} kept={figure.kept}" if figure.target else ""
        print(f"FIGURE name={figure.name} value={figure.value:.4g} unit={figure.unit}{told}", flush=True)
    report = Report(
        name=name,
        measured_at=datetime.now(UTC).replace(microsecond=0),
        machine=machine(folder),
        figures=tuple(figures),
    )
    RESULTS.mkdir(exist_ok=True)
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    (RESULTS / f"{name}.json").write_bytes(text + b"\n")


def read(name: str) -> Report:
    """What `keep` wrote."""
    return msgspec.json.decode((RESULTS / f"{name}.json").read_bytes(), type=Report)


def machine(folder: Path) -> Machine:
    """This machine; `folder` says whose filesystem counts."""
    return Machine(
        cpu=_first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        kernel=platform.release(),
        python=platform.python_version(),
        filesystem=_filesystem(folder),
    )


def _first(file: str, key: str) -> str:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _filesystem(folder: Path) -> str:
    there = folder.resolve()
    best = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mounted, kind, *_ = line.split()
        if there.is_relative_to(mounted) and len(mounted) >= len(best[0]):
            best = (mounted, kind)
    return best[1]
