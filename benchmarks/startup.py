"""How long `megacpp lower nam56r` takes as a whole process, beside an empty Python.

    python benchmarks/startup.py [--repetitions N]

The two run in turn, so that a machine that gets slower does so for both, and each run is a fresh
process. Wall time is from the start of the process to its end; the peak of resident memory is
the kernel's own account of each finished process, which is at least that of this one as it
forked. Writes `benchmarks/results/startup.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from megacpp_nemo import __version__

RESULTS = Path(__file__).parent / "results" / "startup.json"
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "megacpp lower nam56r": [sys.executable, "-m", "megacpp_nemo.cli", "lower", "nam56r"],
}
WARM_UP = 3
# The most that the command may take: this many empty Pythons, and this much more.
PYTHONS, MORE_MS, MOST_MIB = 3, 60, 40


class Run(NamedTuple):
    """One process: its wall time and its peak of resident memory."""

    wall_ms: float
    peak_mib: float


def measured(command: list[str]) -> Run:
    """Return how a process went, its output thrown away."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall_ms = (time.perf_counter() - start) * 1000
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(wall_ms, usage.ru_maxrss * unit / 2**20)


def summary(runs: list[Run]) -> dict[str, float]:
    """Return the median and the spread of some runs."""
    walls = [run.wall_ms for run in runs]
    return {
        "wall_ms_min": round(min(walls), 1),
        "wall_ms_median": round(statistics.median(walls), 1),
        "wall_ms_max": round(max(walls), 1),
        "peak_mib_max": round(max(run.peak_mib for run in runs), 1),
    }


def main() -> int:
    """Measure, print a table and write the results; 1 if a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=50)
    repetitions = parser.parse_args().repetitions
    runs: dict[str, list[Run]] = {name: [] for name in COMMANDS}
    for turn in range(WARM_UP + repetitions):
        for name, command in COMMANDS.items():
            run = measured(command)
            if turn >= WARM_UP:
                runs[name].append(run)
    empty, ours = (summary(found) for found in runs.values())
    pairs = [b.wall_ms / a.wall_ms for a, b in zip(*runs.values(), strict=True)]
    limit_ms = PYTHONS * empty["wall_ms_median"] + MORE_MS
    results = {
        "repetitions": repetitions,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "version": __version__,
        "commands": dict(zip(COMMANDS, (empty, ours), strict=True)),
        "ratio_median": round(statistics.median(pairs), 2),
        "limit": {"wall_ms": round(limit_ms, 1), "peak_mib": MOST_MIB},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for name, found in results["commands"].items():
        figures = "  ".join(f"{key} {value:6.1f}" for key, value in found.items())
        print(f"{name:<22} {figures}")
    print(f"median ratio of the pairs {results['ratio_median']}; limit {limit_ms:.0f} ms")
    return int(ours["wall_ms_median"] > limit_ms or ours["peak_mib_max"] > MOST_MIB)


if __name__ == "__main__":
    raise SystemExit(main())
