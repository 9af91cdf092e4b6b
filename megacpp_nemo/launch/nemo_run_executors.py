"""NeMo-Run's executors, made from files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import nemo_run as run

from megacpp_nemo.launch.executors import ExecutorFile
from megacpp_nemo.launch.kubeflow import kubernetes
from megacpp_nemo.launch.plan import LaunchPlan

# Options that are arguments of NeMo-Run's class by the same name; others are read below.
_TUNNEL = ("job_dir", "host", "user", "identity")
_READ = (*_TUNNEL, "request_gpus", "srun_args")


def executor_of(plan: LaunchPlan, *, environment: bool = True) -> run.Config:
    """Return NeMo-Run's executor of a launch.

    Args:
        plan: The launch.
        environment: Whether the executor sets the environment; a script may do so itself.
    """
    layout = plan.layout
    return configured(
        plan.executor,
        nodes=layout.num_nodes,
        processes=layout.devices_per_node,
        gpus=plan.on_gpus,
        environment=plan.environment if environment else {},
    )


def configured(
    executor: ExecutorFile,
    *,
    nodes: int,
    processes: int,
    gpus: bool,
    environment: Mapping[str, str],
) -> run.Config:
    """Return NeMo-Run's executor as `run.Config`; what is not set stays NeMo-Run's default.

    Args:
        executor: The file.
        nodes: Machines.
        processes: Processes on each.
        gpus: Whether each process has a GPU.
        environment: Variables of the processes.
    """
    if executor.kind == "kubernetes":
        return kubernetes(
            executor.options, nodes=nodes, processes=processes, gpus=gpus, environment=environment
        )
    direct = {name: value for name, value in executor.options.items() if name not in _READ}
    common = {"ntasks_per_node": processes, "env_vars": dict(environment), **direct}
    if executor.kind == "local":
        return run.Config(run.LocalExecutor, **common)
    common["launcher"] = "torchrun"
    if executor.kind == "torchrun":
        return run.Config(run.LocalExecutor, **common)
    common["packager"] = run.Config(run.Packager)  # the code is installed where it runs
    if executor.kind == "docker":
        if gpus:
            common["num_gpus"] = processes
        return run.Config(run.DockerExecutor, **common)
    return _slurm(executor, common, nodes, gpus)


def base_of(executor: ExecutorFile) -> str | None:
    """Return the folder that NeMo-Run's experiments must lie in; None for its own.

    On a login node it copies nothing: what it writes must be where the nodes look for it.
    """
    far = executor.kind != "slurm" or executor.options.get("host")
    return None if far else executor.options.get("job_dir")


def _slurm(executor: ExecutorFile, common: dict[str, Any], nodes: int, gpus: bool) -> run.Config:
    options = executor.options
    # NeMo-Run writes `export NAME=VALUE` as it is given them.
    names = common["env_vars"]
    common["env_vars"] = {name: shlex.quote(value) for name, value in names.items()}
    if options.get("container_image") and names:
        common["container_env"] = sorted(names)  # else the image's own variables win
    if gpus and options.get("request_gpus", True) and not options.get("gres"):
        common["gpus_per_node"] = common["ntasks_per_node"]
    # Lines of several nodes go into one log: each begins with its node's number.
    words = [*options.get("srun_args", []), *(["--label"] if nodes > 1 else [])]
    if words:
        common["srun_args"] = words
    given = {name: options[name] for name in _TUNNEL if name in options}
    kind = run.SSHTunnel if "host" in given else run.LocalTunnel
    if kind is run.LocalTunnel:
        base = base_of(executor)
        given = {"job_dir": f"{base}/experiments" if base else ""}
    return run.Config(run.SlurmExecutor, nodes=nodes, tunnel=run.Config(kind, **given), **common)
