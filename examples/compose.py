"""A recipe taken apart, changed in Python, and run with a NeMo-Run executor.

    python examples/compose.py --dryrun          # print the task, start nothing
    python examples/compose.py                   # one process
    python examples/compose.py --stages 2        # two pipeline stages, a process each

Three levels of change, from intent to detail: `intent` (what the model is and how it is laid out,
checked as a whole), `nemo_recipe` (NeMo's own configuration, any part of it), `executor` (where
the processes run; a `run.SlurmExecutor` takes the same recipe to a cluster).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import nemo_run as run
from lightning.pytorch.callbacks import LearningRateMonitor

from megacpp_nemo.contract import HybridRecipe, MegaCppError, recipe, with_fields
from megacpp_nemo.recipes import cpp_folder, to_nemo, use_data


def intent(stages: int, steps: int) -> HybridRecipe:
    """Return nam56r_tiny with another pattern, depth and width, over pipeline stages."""
    return with_fields(
        recipe("nam56r_tiny"),
        pattern="AEMR",  # tiled to the depth
        depth=8,
        hidden_size=64,
        experts__num_experts=8,
        seq_length=128,
        vocab_size=1024,
        pipeline_model_parallel_size=stages,
        devices_per_node=stages,
        train_steps=steps,
        eval_interval=steps,
        eval_batches=2,
    )


def nemo_recipe(given: argparse.Namespace) -> run.Partial:
    """Return the NeMo recipe, with another data part, another optimizer rate and a callback."""
    partial = to_nemo(intent(given.stages, given.steps), log_dir=given.log_dir)
    if given.sources:
        use_data(partial, cpp_folder(root=given.sources))
    partial.optim.config.lr = 2e-3
    partial.trainer.callbacks.append(run.Config(LearningRateMonitor, logging_interval="step"))
    return partial


def executor(processes: int) -> run.LocalExecutor:
    """Return processes on this machine: one as it is, several under torchrun."""
    here = Path(sys.executable).parent  # torchrun is not on the PATH of an inactive environment
    return run.LocalExecutor(
        launcher="torchrun" if processes > 1 else None,
        ntasks_per_node=processes,
        env_vars={"PATH": f"{here}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
    )


def main() -> None:
    """Read the command line and run, or print what would run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", type=int, default=1, help="pipeline stages")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--sources", help="folder of C++ sources; torch's headers if not given")
    parser.add_argument("--log-dir", default="runs/compose", help="folder of the run")
    parser.add_argument("--dryrun", action="store_true", help="print the task, start nothing")
    given = parser.parse_args()
    try:
        partial = nemo_recipe(given)
    except MegaCppError as error:
        sys.exit(f"compose: {error}")
    with run.Experiment("compose", executor=executor(given.stages)) as experiment:
        experiment.add(partial, name="train", tail_logs=True)
        if given.dryrun:
            experiment.dryrun()
            return
        experiment.run()
    if any(str(job.state) != "SUCCEEDED" for job in experiment.jobs):
        sys.exit(f"compose: the run failed; its log is in {experiment.jobs[0].executor.job_dir}")


if __name__ == "__main__":  # data loaders and checkpoint writers may start this file again
    main()
