"""How long the planner takes: a whole plan, boundaries, and all layouts of some GPUs.

    python benchmarks/planner.py [--repetitions N]

Time of the processor in this process, and of the clock, which other work on the machine makes
longer; after one run to warm up. Nothing of a recipe's layouts is kept between calls but the sizes
of its pieces. Writes `benchmarks/results/planner.json` and `planner.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megacpp_nemo import __version__
from megacpp_nemo.contract import recipe
from megacpp_nemo.planner.balance import balance
from megacpp_nemo.planner.fit import fit
from megacpp_nemo.planner.plan import plan

RESULTS = Path(__file__).parent / "results" / "planner.json"
NAM56R = recipe("nam56r")
# No layout of it is refused for context parallelism: the most there is to look at.
WIDE = recipe("nam56r", changes={"sparse_attention": False})
CUT = recipe("nam56r", changes={"pipeline_model_parallel_size": 4})
CASES: dict[str, Callable[[], Any]] = {
    "plan of nam56r, with its data": lambda: plan(NAM56R).to_dict(),
    "plan of nam56r in 4 stages": lambda: plan(CUT).to_dict(),
    "balance of nam56r, 4 stages": lambda: balance(NAM56R, 4),
    "fit of nam56r over 8 H200": lambda: fit(NAM56R, count=8),
    "fit of nam56r over 64 H200": lambda: fit(NAM56R, count=64),
    "fit over 64 H200, without DSA": lambda: fit(WIDE, count=64),
}
# The most that a case may take, in milliseconds of the processor.
LIMITS = {"plan of nam56r, with its data": 50.0, "fit of nam56r over 64 H200": 2000.0}


def milliseconds(action: Callable[[], Any], repetitions: int) -> dict[str, float]:
    """Return the least and the median of the processor's and the clock's time of a run."""
    processor, clock = [], []
    for _ in range(1 + repetitions):
        start, began = time.process_time(), time.perf_counter()
        action()
        processor.append(1000 * (time.process_time() - start))
        clock.append(1000 * (time.perf_counter() - began))
    return {
        "cpu_ms_min": round(min(processor[1:]), 2),
        "cpu_ms_median": round(statistics.median(processor[1:]), 2),
        "wall_ms_min": round(min(clock[1:]), 2),
        "wall_ms_median": round(statistics.median(clock[1:]), 2),
    }


def table(report: dict[str, Any]) -> str:
    """Return the figures as a page."""
    lines = [
        "# The planner's own time",
        "",
        f"{report['machine']}, Python {report['python']}, load average {report['load']}; "
        f"{report['repetitions']} runs each, in milliseconds. Written by "
        "`python benchmarks/planner.py`.",
        "",
        "| what | processor, min | median | clock, min | median | limit |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in report["cases"].items():
        limit = f"{LIMITS[name]:g}" if name in LIMITS else ""
        lines.append(f"| {name} | {' | '.join(map(str, found.values()))} | {limit} |")
    lines += ["", f"Layouts of nam56r over 64 GPUs: {report['layouts']:,}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print and write; 1 if a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7)
    repetitions = parser.parse_args().repetitions
    cases = {name: milliseconds(action, repetitions) for name, action in CASES.items()}
    all_of_64 = fit(NAM56R, count=64)
    report = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "python": platform.python_version(),
        "version": __version__,
        "load": round(os.getloadavg()[0], 1),
        "repetitions": repetitions,
        "cases": cases,
        "layouts": sum(map(len, (all_of_64.candidates, all_of_64.too_large, all_of_64.refused))),
    }
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(table(report), encoding="utf-8")
    print(table(report))
    return int(any(cases[name]["cpu_ms_median"] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
