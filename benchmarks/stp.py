"""What semantic tube prediction costs, and what it does, on `nam56r_tiny`.

    python benchmarks/stp.py [--pairs N] [--steps N]

Cost: one training run whose steps come in threes, in random order: without STP, without it again
and with it (weight .02, 4 spans, last layer). Each step with it is compared to the one without of
its three; so is the second one without, which shows how well such a comparison can tell. Time is
wall time from before the step to after the optimizer; processor time beside it is less disturbed
by what else the machine does. Effect: runs of the same seed and data, with the loss only measured,
in force at that weight, and at the largest one of the paper. Writes `benchmarks/results/stp.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "stp.json"
WEIGHT, SPANS, SEED = 0.02, 4, 1234
WARM_UP, BLOCK, LATE = 10, 10, 100
WEIGHTS = (0.0, WEIGHT, 0.16)
PLAIN, AGAIN, WITH = "without", "without_again", "with"
CLOCKS = ("wall", "processor")
Times = dict[str, list[tuple[float, float]]]
# The most that the loss may add to a step, in percent.
LIMIT = 1.0


def configured(folder: str, steps: int) -> Any:
    """Return the NeMo recipe of `nam56r_tiny` over some steps, without checkpoints."""
    from megacpp_nemo.contract import recipe
    from megacpp_nemo.recipes import to_nemo

    changes = {"train_steps": steps, "decay_steps": steps}
    partial = to_nemo(recipe("nam56r_tiny", changes=changes), log_dir=folder)
    partial.trainer.callbacks = []
    partial.trainer.log_every_n_steps = 1
    partial.trainer.num_sanity_val_steps = 0
    partial.log.tensorboard = None
    partial.log.ckpt.save_interval = 10 * steps
    return partial


def run(partial: Any, callback: Any) -> Any:
    """Train, and return the callback."""
    import fiddle
    import torch

    torch.set_num_threads(1)
    built = fiddle.build(partial)
    built.keywords["trainer"].callbacks.append(callback)
    built()
    return callback


def tube_of(trainer: Any, weight: float) -> Any:
    """Return STP on a trainer's model, in force from the first step or only measured."""
    from megacpp_nemo.callbacks.matrices import hybrid_models
    from megacpp_nemo.callbacks.stp import SemanticTube
    from megacpp_nemo.contract.plasticity import StpLever

    lever = StpLever(weight=weight, start_step=0, spans=SPANS, measure=True)
    return SemanticTube(hybrid_models(trainer.strategy.megatron_parallel), lever, SEED)


def cost(threes: int) -> Times:
    """Return wall and processor milliseconds of each kind of step, three by three."""
    import lightning.pytorch as pl

    chosen = random.Random(SEED)
    order: list[str | None] = [None] * WARM_UP
    for _ in range(threes):
        order += chosen.sample((PLAIN, AGAIN, WITH), 3)

    class Timer(pl.Callback):
        def __init__(self) -> None:
            self.times: Times = {PLAIN: [], AGAIN: [], WITH: []}
            self.order = iter(order)

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.kind = next(self.order)
            # Hooks are only there in steps with it, and are put on outside what is timed.
            self.tube = tube_of(trainer, WEIGHT) if self.kind in (WITH, None) else None
            self.begin = time.perf_counter(), time.process_time()
            if self.tube:
                self.tube.begin_step(trainer.global_step)

        def on_train_batch_end(self, *_: Any) -> None:
            if self.tube:
                self.tube.end_step()
                self.tube.close()
            wall, processor = time.perf_counter(), time.process_time()
            if self.kind:
                spent = (wall - self.begin[0]) * 1000, (processor - self.begin[1]) * 1000
                self.times[self.kind].append(spent)

    with tempfile.TemporaryDirectory() as folder:
        partial = configured(folder, WARM_UP + 3 * threes)
        partial.trainer.limit_val_batches = 0
        times: Times = run(partial, Timer()).times
    return times


def effect(weight: float, steps: int) -> dict[str, Any]:
    """Return the curves of a run: means of blocks of steps, and validation losses."""
    import lightning.pytorch as pl

    class Curves(pl.Callback):
        def __init__(self) -> None:
            self.loss: list[float] = []
            self.straightness: list[float] = []
            self.validation: list[float] = []

        def on_train_start(self, trainer: Any, *_: Any) -> None:
            self.tube = tube_of(trainer, weight)

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.tube.begin_step(trainer.global_step)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.tube.end_step()
            self.loss.append(float(trainer.callback_metrics["reduced_train_loss"]))
            self.straightness.append(self.tube.straightness)

        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            self.validation.append(round(float(trainer.callback_metrics["val_loss"]), 4))

    with tempfile.TemporaryDirectory() as folder:
        curves = run(configured(folder, steps), Curves())
    return {
        "weight": weight,
        "straightness_late": round(statistics.fmean(curves.straightness[-LATE:]), 4),
        "training_loss": blocks(curves.loss),
        "straightness": blocks(curves.straightness),
        "validation_loss": curves.validation,
    }


def blocks(values: list[float]) -> list[float]:
    """Return means of blocks of steps."""
    means = [statistics.fmean(values[at : at + BLOCK]) for at in range(0, len(values), BLOCK)]
    return [round(mean, 4) for mean in means]


def overhead(times: Times, kind: str, clock: int) -> dict[str, float]:
    """Return by how many percent a kind of step is longer, and a 95% bootstrap interval."""
    pairs = zip(times[kind], times[PLAIN], strict=True)
    ratios = [(one[clock] / other[clock] - 1) * 100 for one, other in pairs]
    chosen = random.Random(SEED)
    medians = sorted(statistics.median(chosen.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {
        "median_percent": round(statistics.median(ratios), 2),
        "low_percent": round(medians[50], 2),
        "high_percent": round(medians[-51], 2),
    }


def main() -> int:
    """Measure, print and write the results; 1 if the limit is passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    times = alone([(cost, given.pairs)])[0]
    runs = alone([(effect, weight, given.steps) for weight in WEIGHTS])
    step_ms = statistics.median(wall for wall, _ in times[PLAIN])
    results: dict[str, Any] = {
        "recipe": "nam56r_tiny",
        "weight": WEIGHT,
        "spans": SPANS,
        "layers": "last",
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "cost": {
            "pairs": given.pairs,
            "step_ms_median": round(step_ms, 1),
            **{
                f"{clock}_{kind}": overhead(times, kind, index)
                for index, clock in enumerate(CLOCKS)
                for kind in (WITH, AGAIN)
            },
        },
        "effect": {"steps": given.steps, "steps_per_value": BLOCK, "seed": SEED, "runs": runs},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(results)
    return int(results["cost"]["wall_with"]["median_percent"] > LIMIT)


def alone(jobs: list[tuple[Any, ...]]) -> list[Any]:
    """Return what functions give, each in a process of its own, all at the same time.

    Megatron keeps the state of a run in its modules.
    """
    with ExitStack() as stack:
        started = []
        for function, *given in jobs:
            pool = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            started.append(pool.submit(function, *given))
        return [future.result() for future in started]


def show(results: dict[str, Any]) -> None:
    """Print tables of the cost and the effect."""
    cost = results["cost"]
    print(f"step without STP {cost['step_ms_median']} ms; {cost['pairs']} pairs")
    for name in (f"{clock}_{kind}" for clock in CLOCKS for kind in (WITH, AGAIN)):
        median, low, high = cost[name].values()
        print(f"{name:<24} {median:+.2f}% ({low:+.2f} to {high:+.2f})")
    for one in results["effect"]["runs"]:
        straightness, validation = one["straightness_late"], one["validation_loss"][-1:]
        print(f"weight {one['weight']}: straightness {straightness}, validation {validation}")


if __name__ == "__main__":
    raise SystemExit(main())
