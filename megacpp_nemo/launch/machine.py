"""Whether this machine has what starts an executor's processes."""

from __future__ import annotations

import importlib.util
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
    if executor.kind == "kubernetes":
        _check_kubectl()
        check_cluster()
    if executor.kind == "slurm" and not executor.options.get("host") and not shutil.which("sbatch"):
        raise LaunchError(
            "There is no sbatch here",
            given="no sbatch on PATH, and no host",
            allowed="a login node of a Slurm cluster, or its host to reach it over SSH",
            hint="--set host=HOST --set user=USER --set job_dir=/FOLDER, or --dryrun",
        )


def check_cluster() -> None:
    """Check that something says which Kubernetes cluster is meant; it is not asked for.

    Raises:
        LaunchError: If nothing does, or the package that asks is not installed.
    """
    if importlib.util.find_spec("kubernetes") is None:
        raise LaunchError(
            "The package kubernetes is not installed",
            given=f"no module kubernetes for {sys.executable}",
            allowed="megacpp-nemo with its extra kubernetes",
            hint="pip install 'megacpp-nemo[kubernetes]', or --dryrun",
        )
    from kubernetes import config

    try:
        config.load_kube_config()
    except Exception as error:
        try:
            config.load_incluster_config()
        except Exception:
            raise LaunchError(
                "Nothing says which Kubernetes cluster is meant",
                given=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}",
                allowed="a kubeconfig, in KUBECONFIG or ~/.kube/config, or a pod of the cluster",
                hint="KUBECONFIG=FILE before the command, or --dryrun",
            ) from None


def _check_kubectl() -> None:
    if shutil.which("kubectl") is None:
        raise LaunchError(
            "There is no kubectl here",
            given="no kubectl on PATH",
            allowed="kubectl, by which NeMo-Run copies the job's folder and reads its logs",
            hint="an installed kubectl, or --dryrun",
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
