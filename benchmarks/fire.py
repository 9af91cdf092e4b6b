"""FIRE's polar factor: how many iterations, seconds and bytes it takes, beside other ways.

    python benchmarks/fire.py [--repetitions N] [--shapes 768x768 ...]

- `paper`: the cubic map of the FIRE paper from the Frobenius norm, until the tolerance
- `bounded`: the same map, from the bound on the norm that `polar_` starts with
- `cubic`, `quintic`: `polar_` with polynomials of degree 3 or 5; it chooses one by shape
- `svd`: singular value decomposition, where the short side is at most 1100
- `floor`: for each iteration of the chosen one, two dense products and nothing else: less can be
  taken, as half of a Gram matrix is the other half

All of them run in turn on the same normal matrices, so that a machine that gets slower does so
for all. Seconds are wall-clock time on CUDA, where there is one, and else processor time, to
which other work on the machine adds little. Writes `benchmarks/results/fire.json` and `fire.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megacpp_nemo import __version__
from megacpp_nemo.callbacks import polar
from megacpp_nemo.callbacks.polar import defect, polar_
from megacpp_nemo.callbacks.symmetric import Symmetric

RESULTS = Path(__file__).parent / "results" / "fire.json"
SHAPES = ((64, 64), (768, 768), (3072, 768), (3584, 896), (3584, 3584))
TOLERANCE, MOST, SVD_UP_TO, LARGE = 1e-6, 80, 1100, 10_000_000
# The paper's own count for language models, and those of its failure at width.
COUNTED = (5, 10, 15, 20)
CUDA = torch.cuda.is_available()

# A way to the polar factor: iterations, the deviation left, and those on the way.
Way = Callable[[Tensor], dict[str, Any]]


def papers(start: Callable[[Tensor], Any], most: int = MOST) -> Way:
    """Return the paper's map, from the matrix over `start(matrix)`."""

    def run(matrix: Tensor) -> dict[str, Any]:
        x, on_the_way = matrix / start(matrix), {}
        for iteration in range(most + 1):
            gram = x.t() @ x
            left = defect(gram)
            if iteration in COUNTED:
                on_the_way[str(iteration)] = round(left, 4)
            if left <= TOLERANCE or iteration == most:
                break
            x = 1.5 * x - 0.5 * x @ gram
        return {"iterations": iteration, "left": left, "on_the_way": on_the_way}

    return run


def ours(quintic_from: float, most: int = MOST) -> Way:
    """Return `polar_`, with polynomials of degree 5 from a ratio of the sides on."""

    def run(matrix: Tensor) -> dict[str, Any]:
        usual, polar.QUINTIC_FROM = polar.QUINTIC_FROM, quintic_from
        try:
            outcome = polar_(
                matrix, shape=tuple(matrix.shape), tolerance=TOLERANCE, max_iterations=most
            )
        finally:
            polar.QUINTIC_FROM = usual
        return {"iterations": outcome.iterations, "left": outcome.after}

    return run


def svd(matrix: Tensor) -> dict[str, Any]:
    """Compute the polar factor from singular vectors."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    factor = left @ right
    return {"iterations": 0, "left": defect(factor.t() @ factor)}


def floor(iterations: int) -> Way:
    """Return two bare products per iteration, `[n, m] x [m, n]` and `[m, n] x [n, n]`."""

    def run(matrix: Tensor) -> dict[str, Any]:
        gram = matrix.new_empty(matrix.size(1), matrix.size(1))
        out = torch.empty_like(matrix)
        for _ in range(iterations):
            torch.mm(matrix.t(), matrix, out=gram)
            torch.mm(matrix, gram, out=out)
        return {"iterations": iterations, "left": math.nan}

    return run


def bound(matrix: Tensor) -> float:
    """Return the bound on the largest singular value that `polar_` starts with."""
    gram = Symmetric(matrix.size(1), like=matrix).gram_(matrix)
    return math.sqrt(polar.MARGIN * gram.largest())


def timed(way: Way, matrix: Tensor) -> dict[str, Any]:
    """Return what a way found, and the `seconds` it took."""
    clock = time.perf_counter if CUDA else time.process_time
    own = matrix.clone()
    _wait()
    start = clock()
    found = way(own)
    _wait()
    return {**found, "seconds": clock() - start}


def peak_bytes(way: Way, matrix: Tensor) -> int:
    """Return the most memory for tensors that a way takes at once, beside the matrix."""
    own = matrix.clone()
    if CUDA:
        _wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way(own)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        way(own)
    events = profiled.profiler.kineto_results.events()
    held = most = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += size
        most = max(most, held)
    return most


def measured(shape: tuple[int, int], repetitions: int) -> dict[str, Any]:
    """Return figures of every way at one shape `[rows, columns]`, rows not fewer."""
    ways: dict[str, Way] = {
        "paper": papers(torch.linalg.matrix_norm),
        "bounded": papers(bound),
        "cubic": ours(math.inf),
        "quintic": ours(0.0),
    }
    peaks: dict[str, Way] = {
        "paper": papers(torch.linalg.matrix_norm, 2),
        "cubic": ours(math.inf, 2),
        "quintic": ours(0.0, 2),
    }
    if min(shape) <= SVD_UP_TO:
        ways["svd"] = peaks["svd"] = svd
    chosen = "quintic" if shape[0] >= polar.QUINTIC_FROM * shape[1] else "cubic"
    # The largest take minutes, and differ less from draw to draw.
    repetitions = 1 if shape[0] * shape[1] > LARGE else repetitions
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in [*ways, "floor"]}
    device = "cuda" if CUDA else "cpu"
    for way in ways.values():  # the first call of each is slower
        way(torch.randn(min(shape[0], 256), min(shape[1], 256), device=device))
    for seed in range(repetitions):
        draw = torch.Generator().manual_seed(seed)
        matrix = torch.randn(*shape, generator=draw).to(device)
        for name, way in ways.items():
            runs[name].append(timed(way, matrix))
            print(f"  {name:8} {runs[name][-1]}", flush=True)
        runs["floor"].append(timed(floor(runs[chosen][-1]["iterations"]), matrix))
    size = 4 * shape[0] * shape[1]
    memory = {name: round(peak_bytes(way, matrix) / size, 2) for name, way in peaks.items()}
    return {
        "shape": list(shape),
        "repetitions": repetitions,
        "chosen": chosen,
        "ways": {name: summary(found, runs["floor"]) for name, found in runs.items()},
        "peak_over_matrix": memory,
        "papers_deviation": runs["paper"][0]["on_the_way"],
    }


def summary(runs: list[dict[str, Any]], floors: list[dict[str, Any]]) -> dict[str, float]:
    """Return medians over repetitions; `over_floor` is the median of ratios in one repetition."""
    ratios = [run["seconds"] / least["seconds"] for run, least in zip(runs, floors, strict=True)]
    return {
        "iterations": statistics.median(run["iterations"] for run in runs),
        "seconds": float(f"{statistics.median(run['seconds'] for run in runs):.3g}"),
        "over_floor": round(statistics.median(ratios), 2),
        "left": float(f"{max(run['left'] for run in runs):.1e}"),
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as a page."""
    lines = [
        "# FIRE's polar factor",
        "",
        f"{results['device']}, {results['threads']} threads, torch {results['torch']}, fp32, to "
        f"{TOLERANCE:g} of DfI / short side. Medians over {results['repetitions']} normal "
        "matrices, one of the largest shape. In bold: what `polar_` chooses. Written by "
        "`python benchmarks/fire.py`, which says what each way is.",
        "",
        "| shape | way | iterations | seconds | over floor | memory beside the matrix |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for found in results["shapes"]:
        shape = " x ".join(map(str, found["shape"]))
        for name, way in found["ways"].items():
            memory = found["peak_over_matrix"].get(name, "")
            figures = (f"{way['iterations']:g}", f"{way['seconds']:g}", f"{way['over_floor']:g}")
            name = f"**{name}**" if name == found["chosen"] else name
            lines.append(f"| {shape} | {name} | {' | '.join(figures)} | {memory} |")
    lines += ["", "DfI / short side that the paper's map leaves, first matrix:", ""]
    lines += ["| shape | " + " | ".join(f"n = {n}" for n in COUNTED) + " |"]
    lines += ["| --- |" + " --- |" * len(COUNTED)]
    for found in results["shapes"]:
        left = [str(found["papers_deviation"].get(str(n), "reached")) for n in COUNTED]
        lines.append(f"| {' x '.join(map(str, found['shape']))} | {' | '.join(left)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES])
    asked = parser.parse_args()
    shapes = [tuple(map(int, text.split("x"))) for text in asked.shapes]
    results = {
        "device": torch.cuda.get_device_name() if CUDA else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": __version__,
        "repetitions": asked.repetitions,
        "tolerance": TOLERANCE,
        "shapes": [measured((high, wide), asked.repetitions) for high, wide in shapes],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    page = table(results)
    RESULTS.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
