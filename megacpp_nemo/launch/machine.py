"""Whether this machine has what starts an executor's processes."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from megacpp_nemo.launch.errors import LaunchError
from megacpp_nemo.launch.executors import ExecutorFile

DETACHING = ("slurm",)


def check_machine(executor: ExecutorFile, *, detach: bool = False) -> None:
    """Check that this machine has what starts the executor's processes.

    Raises:
        LaunchError: If it has not, or the executor's processes end with this one.
    """
    if detach and executor.kind not in DETACHING:
        raise LaunchError(
            f"The processes of the executor {executor.name} end with this command",
            given="--detach",
            allowed=f"--detach with an executor of kind {', '.join(DETACHING)}",
            hint="no --detach",
        )
    if executor.kind == "torchrun" and shutil.which("torchrun", path=programs()) is None:
        raise LaunchError(
            "There is no torchrun",
            given=f"neither beside {sys.executable} nor on PATH",
            allowed="the environment that torch is installed in",
            hint="an active environment, or its own megacpp",
        )
    if executor.kind == "docker":
        _check_docker()
    if executor.kind == "slurm" and not executor.options.get("host") and not shutil.which("sbatch"):
        raise LaunchError(
            "There is no sbatch here",
            given="no sbatch on PATH, and no host",
            allowed="a login node of a Slurm cluster, or its host to reach it over SSH",
            hint="--set host=HOST --set user=USER --set job_dir=/FOLDER, or --dryrun",
        )


def _check_docker() -> None:
    given = "no docker on PATH"
    if shutil.which("docker"):
        from nemo_run.core.execution.docker import get_client

        try:
            get_client().ping()
            return
        except Exception as error:
            given = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
    raise LaunchError(
        "Docker does not answer here",
        given=given,
        allowed="a machine with Docker, its daemon running, for this user",
        hint="docker info, or --dryrun",
    )


def programs() -> str:
    """Return PATH, with this Python's own programs first: an environment may be inactive."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
