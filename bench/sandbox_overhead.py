"""What a sandbox costs: the wall time of an empty program in each tier, over a bare subprocess.

python bench/sandbox_overhead.py [--runs 100] [--json FILE]
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ai_agent_server.sandbox._choose import choose_sandbox
from ai_agent_server.sandbox.base import SandboxLimits
from ai_agent_server.sandbox.python_suite import run_suite

PROGRAM = {"main.py": "pass\n"}
TIERS = ("bubblewrap", "landlock", "unsafe")
CODE = "def f(x):\n    return x + 1\n"
TESTS = tuple(f"assert f({n}) == {n + 1}" for n in range(8))


def quantile(times_ms: list[float], share: float) -> float:
    """The nearest rank."""
    ordered = sorted(times_ms)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def bare(folder: Path) -> None:
    """The same interpreter and flags, with nothing around it."""
    process = await asyncio.create_subprocess_exec(
        os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8", "main.py",
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    await process.communicate()


async def measure(runs: int) -> dict[str, list[float]]:
    """Wall times in milliseconds; the arms take turns, so that a busy machine is busy for all."""
    import tempfile

    limits = SandboxLimits()
    sandboxes = {}
    for tier in TIERS:
        sandbox, probe = await choose_sandbox(tier)
        if probe.works:
            sandboxes[tier] = sandbox
        else:
            print(f"{tier}: does not work here ({probe.detail})")
    times: dict[str, list[float]] = {}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "main.py").write_text(PROGRAM["main.py"])
        for _ in range(runs):
            began = time.perf_counter()
            await bare(folder)
            times.setdefault("bare", []).append((time.perf_counter() - began) * 1000)
            for tier, sandbox in sandboxes.items():
                began = time.perf_counter()
                report = await sandbox.run(PROGRAM, ("python", "main.py"), limits=limits)
                times.setdefault(tier, []).append((time.perf_counter() - began) * 1000)
                if report.verdict != "ok":
                    raise SystemExit(f"{tier}: {report.verdict} {report.detail}")
                if tier != "unsafe":
                    began = time.perf_counter()
                    await run_suite(sandbox, code=CODE, anchors=(), tests=TESTS, limits=limits)
                    times.setdefault(f"{tier}, suite of 8", []).append((time.perf_counter() - began) * 1000)
    return times


def main() -> None:
    """Print one line an arm."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=100)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    times = asyncio.run(measure(chosen.runs))
    base = statistics.median(times["bare"])
    found = {}
    for arm, values in times.items():
        p50, p95 = statistics.median(values), quantile(values, 0.95)
        found[arm] = {"p50_ms": p50, "p95_ms": p95, "overhead_p50_ms": p50 - base}
        print(
            f"{arm:24} p50 {p50:7.1f} ms   p95 {p95:7.1f} ms   over a bare subprocess {p50 - base:+7.1f} ms"
        )
    if chosen.json:
        machine = {
            "machine": platform.machine(),
            "kernel": platform.release(),
            "python": platform.python_version(),
        }
        result = {"bench": "sandbox_overhead", "runs": chosen.runs, "cpus": os.cpu_count(), **machine}
        chosen.json.write_text(json.dumps({**result, "arms": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
