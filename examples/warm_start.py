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
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from comparison import Curve, mean_and_spread, plot, read_curves, run_arms
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


def report(given: argparse.Namespace, seeds: range) -> str:
    """Write the numbers and the plot, and return the table."""
    curves = read_curves(given.folder, ARMS, seeds)
    lines = [f"{'':<16}{'loss':>8}{'+-':>8}{'at half':>10}"]
    for arm, runs in curves.items():
        last, spread = mean_and_spread([points[-1][1] for points in runs])
        half, _ = mean_and_spread([points[len(points) // 2][1] for points in runs])
        lines.append(f"{arm:<16}{last:>8.4f}{spread:>8.4f}{half:>10.4f}")
    (given.folder / "warm_start.json").write_text(json.dumps(curves, indent=1))
    plot(
        curves,
        given.folder / "warm_start.png",
        "optimizer step on all data",
        "validation loss, nats per token",
    )
    return "\n".join(lines)


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
        words = ["--later", given.later]
        for name in ("folder", "steps", "corpus"):
            words += [f"--{name}", getattr(given, name)]
        for arms in (("first",), ARMS):
            jobs = [(seed, arm) for seed in seeds for arm in arms]
            run_arms(__file__, words, jobs, given.workers)
        print(report(given, seeds))
    except MegaCppError as error:
        sys.exit(f"warm_start: {error}")


if __name__ == "__main__":  # data loaders and checkpoint writers may start this file again
    main()
