"""Tensor parallelism over two processes on a CPU, started by torchrun through NeMo-Run.

    python examples/two_processes.py
    python examples/two_processes.py --dryrun

Each process holds half of every attention, Mamba, M2RNN and expert matrix. Tensor parallelism
with experts needs sequence parallelism: norms and residuals are split along the row.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import nemo_run as run

from megacpp_nemo.recipes import nam56r_tiny


def executor() -> run.LocalExecutor:
    """Return two processes on this machine under the torchrun of this Python."""
    here = Path(sys.executable).parent  # torchrun is not on the PATH of an inactive environment
    return run.LocalExecutor(
        launcher="torchrun",
        ntasks_per_node=2,
        env_vars={"PATH": f"{here}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
    )


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--log-dir", default="runs/two_processes", help="folder of the run")
    parser.add_argument("--dryrun", action="store_true", help="print the task, start nothing")
    given = parser.parse_args()
    recipe = nam56r_tiny(
        devices_per_node=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        eval_batches=2,
        train_steps=given.steps,
        log_dir=given.log_dir,
    )
    with run.Experiment("two_processes", executor=executor()) as experiment:
        experiment.add(recipe, name="train", tail_logs=True)
        if given.dryrun:
            experiment.dryrun()
            return
        experiment.run()
    if any(str(job.state) != "SUCCEEDED" for job in experiment.jobs):
        sys.exit(f"two_processes: failed; the log is in {experiment.jobs[0].executor.job_dir}")


if __name__ == "__main__":  # data loaders and checkpoint writers may start this file again
    main()
