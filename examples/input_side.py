"""What do the structure channels and the n-gram memory add? The same small model with and without.

    python examples/input_side.py --folder runs/input_side
    python examples/input_side.py --seeds 1 --steps 60

For each seed, `nam56r_tiny` is trained on the default corpus with neither, with the structure
channels, with the n-gram memory, and with both: from the same initial weights (what is added
changes no output at first), on the same tokens in the same order. It writes a table, a plot and
the numbers, in bits per byte of the files held back for validation, which each seed chooses.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from comparison import Curve, mean_and_spread, plot, read_curves, run_arms

from megacpp_nemo.contract import MegaCppError
from megacpp_nemo.data.corpus import CorpusSpec, build_corpus

ARMS: dict[str, dict[str, Any]] = {
    "none": {"ngram_hash": False},
    "structure": {"ngram_hash": False, "structure": "all"},
    "ngram": {"ngram_hash": True},
    "both": {"ngram_hash": True, "structure": "all"},
}


def train(given: argparse.Namespace, seed: int, arm: str) -> None:
    """Train one arm of one seed."""
    import nemo_run as run
    import torch

    from megacpp_nemo.recipes import cpp_folder, nam56r_tiny, use_data

    torch.set_num_threads(1)
    folder = given.folder / f"seed_{seed}" / arm
    recipe = nam56r_tiny(
        **ARMS[arm],
        seed=seed,
        train_steps=given.steps,
        decay_steps=given.steps,
        warmup_steps=given.steps // 20,
        eval_interval=max(given.steps // 4, 1),
        eval_batches=40,
        log_dir=str(folder),
    )
    if given.corpus:
        use_data(recipe, cpp_folder(root=str(given.corpus)))
    recipe.trainer.callbacks.append(run.Config(Curve, path=str(folder / "curve.json")))
    recipe.log.tensorboard = None
    run.run(recipe, direct=True)


def report(given: argparse.Namespace, seeds: range) -> str:
    """Write the numbers and the plot, and return the table."""
    curves = read_curves(given.folder, list(ARMS), seeds)
    bits = [_bits_per_nat(given, seed) for seed in seeds]
    curves = {
        arm: [
            [(step, loss * bit) for step, loss in points]
            for points, bit in zip(runs, bits, strict=True)
        ]
        for arm, runs in curves.items()
    }
    lines = [f"{'':<12}{'bits/byte':>10}{'+-':>8}{'to none':>10}{'+-':>8}"]
    for arm, runs in curves.items():
        last = [points[-1][1] for points in runs]
        # Seed by seed: arms of one seed have the same weights at first and the same batches.
        gaps = [own - none[-1][1] for own, none in zip(last, curves["none"], strict=True)]
        (mean, spread), (gap, gap_spread) = mean_and_spread(last), mean_and_spread(gaps)
        lines.append(f"{arm:<12}{mean:>10.4f}{spread:>8.4f}{gap:>10.4f}{gap_spread:>8.4f}")
    (given.folder / "input_side.json").write_text(json.dumps(curves, indent=1))
    plot(curves, given.folder / "input_side.png", "optimizer step", "validation, bits per byte")
    return "\n".join(lines)


def _bits_per_nat(given: argparse.Namespace, seed: int) -> float:
    """Return what turns nats per token into bits per byte; a seed holds back its own files."""
    corpus = build_corpus(CorpusSpec(root=given.corpus and str(given.corpus), seed=seed))
    return 1 / math.log(2) / corpus.bytes_per_token("validation")


def main() -> None:
    """Read the command line, train every arm of every seed, and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/input_side"), help="of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of each run")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--corpus", type=Path, help="folder of C++ sources, torch's by default")
    parser.add_argument("--only", nargs=2, metavar=("SEED", "ARM"), help="train one arm")
    given = parser.parse_args()
    given.folder = given.folder.resolve()
    try:
        if given.only:
            seed, arm = given.only
            train(given, int(seed), arm)
            return
        seeds = range(1, given.seeds + 1)
        words = ["--folder", given.folder, "--steps", given.steps]
        words += ["--corpus", given.corpus] if given.corpus else []
        run_arms(__file__, words, [(seed, arm) for seed in seeds for arm in ARMS], given.workers)
        print(report(given, seeds))
    except MegaCppError as error:
        sys.exit(f"input_side: {error}")


if __name__ == "__main__":  # data loaders and checkpoint writers may start this file again
    main()
