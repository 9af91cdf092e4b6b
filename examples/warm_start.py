"""Does a lever help a model that goes on with more data? Half a corpus first, then all of it.

    python examples/warm_start.py --folder runs/warm_start
    python examples/warm_start.py --seeds 1 --steps 60

For each seed a small model is trained on half of a corpus, by default torch's `c10` headers. From
its weights, training goes on with all of it: as they are (`warm`), after FIRE, after DASH, after
shrink-and-perturb (arXiv 1910.08475), and, beside them, from new weights (`scratch`). All see the
same batches and are validated on the same files. It writes a table, a plot and the numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from megacpp_nemo.contract import MegaCppError
from megacpp_nemo.data.corpus import CorpusSpec, build_corpus

HEADERS = Path(torch.__file__).parent / "include" / "c10"
ARMS = ("warm", "fire", "dash", "shrink_perturb", "scratch")
SMALL = {
    "hidden_size": 64,
    "seq_length": 128,
    "vocab_size": 2048,
    "micro_batch_size": 8,
    "global_batch_size": 8,
    "lr": 2e-3,
    "min_lr": 2e-4,
}


class ShrinkPerturb(Callback):
    """Shrink every projection and add noise of its initial size, before the first step."""

    def __init__(self, shrink: float = 0.4, noise: float = 0.1) -> None:
        self.shrink, self.noise = shrink, noise

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Change the weights, and tell the optimizer."""
        from megacpp_nemo.callbacks.matrices import hybrid_models, parameters_of
        from megacpp_nemo.callbacks.optimizers import OptimizerStates

        states = OptimizerStates(trainer.optimizers)
        for model in hybrid_models(trainer.strategy.megatron_parallel):
            draw = torch.Generator().manual_seed(model.config.seed)
            for parameter, weight in parameters_of(model):
                if parameter.kind.is_matrix:
                    fresh = torch.randn(weight.shape, generator=draw) * model.config.init_method_std
                    weight.data.mul_(self.shrink).add_(fresh * self.noise)
                    states.follow(weight, None, reset=False)


def train(given: argparse.Namespace, seed: int, arm: str) -> float:
    """Train one arm and return its last validation loss in nats per token."""
    import nemo_run as run
    from nemo.lightning import RestoreConfig

    from megacpp_nemo.recipes import cpp_folder, dash, fire, nam56r_tiny, use_data

    torch.set_num_threads(1)
    first = given.folder / f"seed_{seed}" / "first"
    folder = first.with_name(arm)
    recipe = nam56r_tiny(
        **SMALL,
        seed=seed,
        train_steps=given.steps,
        decay_steps=given.steps,
        warmup_steps=given.steps // 20,
        eval_interval=max(given.steps // 10, 1),
        log_dir=str(folder),
    )
    tokenizer = given.folder / "tokenizer"
    use_data(recipe, cpp_folder(root=str(given.corpus), tokenizer_dir=str(tokenizer)))
    if arm == "first":
        recipe.data.exclude = [given.later]
    elif arm != "scratch":
        start = first / "checkpoints" / f"step={given.steps}"
        recipe.resume.restore_config = run.Config(RestoreConfig, path=str(start))
    levers = {"fire": fire, "dash": dash}
    if arm in levers:
        recipe.trainer.callbacks.append(levers[arm](boundaries=["data"]))
    if arm == "shrink_perturb":
        recipe.trainer.callbacks.append(run.Config(ShrinkPerturb))
    recipe.trainer.callbacks.append(run.Config(Curve, path=str(folder / "curve.json")))
    recipe.log.tensorboard = None
    run.run(recipe, direct=True)
    return float(json.loads((folder / "curve.json").read_text())[-1][1])


class Curve(Callback):
    """Keep the validation loss by step."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.points: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the loss of a validation that ended."""
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None:
            self.points.append((trainer.global_step, float(loss)))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.points))


def report(given: argparse.Namespace, seeds: range) -> str:
    """Write the numbers and the plot, and return the table."""
    curves = {
        arm: [
            json.loads((given.folder / f"seed_{seed}" / arm / "curve.json").read_text())
            for seed in seeds
        ]
        for arm in ARMS
    }
    lines = [f"{'':<16}{'loss':>8}{'+-':>8}{'at half':>10}"]
    for arm, runs in curves.items():
        last = [points[-1][1] for points in runs]
        half = [points[len(points) // 2][1] for points in runs]
        spread = statistics.stdev(last) if len(last) > 1 else math.nan
        lines.append(
            f"{arm:<16}{statistics.mean(last):>8.4f}{spread:>8.4f}{statistics.mean(half):>10.4f}"
        )
    (given.folder / "warm_start.json").write_text(json.dumps(curves, indent=1))
    _plot(curves, given.folder / "warm_start.png")
    return "\n".join(lines)


def _plot(curves: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for arm, runs in curves.items():
        steps = [step for step, _ in runs[0]]
        means = [
            statistics.mean(values)
            for values in zip(*([loss for _, loss in points] for points in runs), strict=True)
        ]
        axes.plot(steps, means, label=arm)
    axes.set(xlabel="optimizer step on all data", ylabel="validation loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=120)


def _make_tokenizer(given: argparse.Namespace) -> None:
    """Train one tokenizer on all files, for every run."""
    built = build_corpus(CorpusSpec(root=str(given.corpus), vocab_size=SMALL["vocab_size"]))
    shutil.copytree(built.tokenizer_dir, given.folder / "tokenizer", dirs_exist_ok=True)


def main() -> None:
    """Read the command line, train every arm of every seed, and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/warm_start"), help="of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each phase")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--corpus", type=Path, default=HEADERS, help="folder of C++ sources")
    parser.add_argument("--later", default="util/**", help="its files that come second")
    parser.add_argument("--only", nargs=2, metavar=("SEED", "ARM"), help="train one arm")
    given = parser.parse_args()
    given.folder = given.folder.resolve()
    try:
        if given.only:
            seed, arm = given.only
            train(given, int(seed), arm)
            return
        _make_tokenizer(given)
        seeds = range(1, given.seeds + 1)
        with ThreadPoolExecutor(given.workers) as pool:
            for arms in (("first",), ARMS):
                jobs = [(given, seed, arm) for seed in seeds for arm in arms]
                list(pool.map(_in_a_process, jobs))
        print(report(given, seeds))
    except MegaCppError as error:
        sys.exit(f"warm_start: {error}")


def _in_a_process(job: tuple[argparse.Namespace, int, str]) -> None:
    """Train one arm in a process of its own: Megatron keeps the state of a run in its modules."""
    given, seed, arm = job
    print(f"seed {seed}: {arm}", flush=True)
    named = {"folder": given.folder, "steps": given.steps, "corpus": given.corpus}
    words = [sys.executable, __file__, "--later", given.later]
    words += [word for name, value in named.items() for word in (f"--{name}", value)]
    ended = subprocess.run(
        [*map(str, words), "--only", str(seed), arm], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        sys.exit(f"warm_start: seed {seed}, {arm} failed:\n{ended.stderr[-2000:]}")


if __name__ == "__main__":  # data loaders and checkpoint writers may start this file again
    main()
