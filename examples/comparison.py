"""What the comparisons of this folder share: arms in processes of their own, curves, a plot."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

Points = list[tuple[int, float]]


class Curve(Callback):
    """Keep the validation loss by step, in nats per token."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.points: Points = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the loss of a validation that ended."""
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None:
            self.points.append((trainer.global_step, float(loss)))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.points))


def run_arms(script: str, words: Sequence[object], arms: Sequence[tuple[int, str]], at_once: int):
    """Run `script WORDS --only SEED ARM` for each arm: Megatron keeps a run in its modules.

    Ends the program with the last lines of an arm that fails.
    """

    def one(job: tuple[int, str]) -> None:
        seed, arm = job
        print(f"seed {seed}: {arm}", flush=True)
        command = [sys.executable, script, *words, "--only", seed, arm]
        ended = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, check=False
        )
        if ended.returncode:
            sys.exit(f"{Path(script).stem}: seed {seed}, {arm} failed:\n{ended.stderr[-2000:]}")

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, arms))


def read_curves(folder: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, list[Points]]:
    """Return the curves that the arms of each seed have left in `folder/seed_N/ARM`."""
    return {
        arm: [
            json.loads((folder / f"seed_{seed}" / arm / "curve.json").read_text()) for seed in seeds
        ]
        for arm in arms
    }


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation; of one value that is not a number."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def plot(curves: dict[str, list[Points]], path: Path, across: str, up: str) -> None:
    """Draw each arm's mean over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for arm, runs in curves.items():
        steps = [step for step, _ in runs[0]]
        values = zip(*([value for _, value in points] for points in runs), strict=True)
        axes.plot(steps, [statistics.mean(each) for each in values], label=arm)
    axes.set(xlabel=across, ylabel=up)
    axes.legend()
    figure.savefig(path, dpi=120)
