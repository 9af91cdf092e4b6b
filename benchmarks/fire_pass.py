"""One pass of FIRE over a whole model: what the planner says, and what it takes.

    python benchmarks/fire_pass.py [--recipe nam56r] [--threads 1]

Every distinct shape among a recipe's projections is projected once, from normal numbers, and its
time counted as often as the shape occurs. The planner's operations are held against it at the rate
of bare fp32 matrix products, measured in the same run. Writes `results/fire_pass.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megacpp_nemo.callbacks.polar import polar_
from megacpp_nemo.contract import recipe
from megacpp_nemo.contract.parameters import Selection
from megacpp_nemo.planner.levers import fire_cost, placement
from megacpp_nemo.planner.parameters import inventory

RESULTS = Path(__file__).parent / "results" / "fire_pass.json"


def seconds_of(device: torch.device, action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall-clock seconds of an action, to its end on the device, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def flops_per_second(device: torch.device, size: int = 2048) -> float:
    """Return the rate of bare fp32 matrix products, the best of three."""
    a = torch.randn(size, size, device=device)
    return 2 * size**3 / float(min(seconds_of(device, lambda: a @ a)[0] for _ in range(4)))


# What is measured: the layers themselves.
PLAIN: dict[str, Any] = {"sparse_attention": False, "mtp.num_layers": 0}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="nam56r", help="recipe by name")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    placed = placement(inventory(recipe(given.recipe, changes=PLAIN)).parameters, Selection())
    chosen = [item for item in placed if item.refusal is None]
    counts = Counter(item.shape for item in chosen)
    rate = flops_per_second(device)
    rows: list[dict[str, Any]] = []
    for shape, count in counts.items():
        weight = torch.randn(*shape, device=device)
        took, outcome = seconds_of(device, partial(polar_, weight, shape=shape))
        one = next(item for item in chosen if item.shape == shape)
        planned = fire_cost([one], iterations=outcome.iterations).flops
        row = {"shape": shape, "count": count, "seconds": took}
        row |= {"iterations": outcome.iterations, "over_planned": took * rate / planned}
        rows.append(row)
        print(row, flush=True)
    total = sum(row["seconds"] * row["count"] for row in rows)
    cost = fire_cost(chosen)
    summary = {
        "recipe": given.recipe,
        "device": str(device),
        "threads": given.threads,
        "matrices": len(chosen),
        "gigaflops_per_second": rate / 1e9,
        "planned_flops": cost.flops,
        "planned_seconds": cost.flops / rate,
        "measured_seconds": total,
        "measured_over_planned": total * rate / cost.flops,
        "shapes": rows,
    }
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n")
    print({key: value for key, value in summary.items() if key != "shapes"})


if __name__ == "__main__":
    main()
