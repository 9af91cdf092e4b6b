"""NeMo-Run's executor of Kubeflow's trainer on Kubernetes, and what a file says of it.

NeMo-Run 0.11.1 asks for a cluster as soon as the executor is made, and names a task's
configuration by its path on the machine that submits it. Here a cluster is asked for when one is
needed, and the configuration is named where a pod finds it, as for NeMo-Run's other containers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import nemo_run as run
from nemo_run.run.torchx_backend.schedulers.api import EXECUTOR_MAPPING

from megacpp_nemo.launch.kinds import TOLERATION
from megacpp_nemo.launch.machine import check_cluster

# NeMo-Run's own, /nemo_run, is where it makes a link that a mounted folder would be in the way of.
WORKDIR_PATH = "/workspace"
WORKDIR, SHARED_MEMORY = "workdir", "shared-memory"
# Options that are arguments of NeMo-Run's class by another name or in another form.
_READ = ("container_image", "volumes", "shm_size", "node_selector", "tolerations")


class KubernetesExecutor(run.KubeflowExecutor):  # type: ignore[misc]
    """A TrainJob, made without a cluster; its clients are loaded when the first one is used."""

    NEEDED = ("image", "workdir_pvc")

    def __post_init__(self) -> None:
        self._kube_clients_loaded_at = -math.inf

    def _load_kube_clients(self) -> None:
        check_cluster()
        super()._load_kube_clients()

    def package_configs(self, *cfgs: tuple[str, str]) -> list[str]:
        """Write configurations into the job's folder; return where a pod finds each."""
        super().package_configs(*cfgs)
        return [f"{self.code_dir}/configs/{name}" for name, _ in cfgs]


# NeMo-Run looks executors up by their very class.
EXECUTOR_MAPPING[KubernetesExecutor] = EXECUTOR_MAPPING[run.KubeflowExecutor]
run.Experiment._PARALLEL_SUPPORTED_EXECUTORS += (KubernetesExecutor,)


def kubernetes(
    options: Mapping[str, Any],
    *,
    nodes: int,
    processes: int,
    gpus: bool,
    environment: Mapping[str, str],
) -> run.Config:
    """Return NeMo-Run's executor of an executor's file.

    Args:
        options: The file's, by name.
        nodes: Pods.
        processes: Processes in each.
        gpus: Whether each process has a GPU.
        environment: Variables of the pods.
    """
    given = {name: value for name, value in options.items() if name not in _READ}
    folder = given.setdefault("workdir_pvc_path", WORKDIR_PATH)
    if image := options.get("container_image"):
        given["image"] = image
    if gpus:
        given["gpus_per_node"] = processes
    if selector := options.get("node_selector"):
        given["pod_spec_overrides"] = {"nodeSelector": selector}
    if tolerations := options.get("tolerations"):
        given["tolerations"] = [_toleration(text) for text in tolerations]
    given |= _volumes(options, folder)
    return run.Config(
        KubernetesExecutor,
        num_nodes=nodes,
        nprocs_per_node=processes,
        launcher="torchrun",
        packager=run.Config(run.Packager),  # the code is installed where it runs
        # Of `env_vars` NeMo-Run would write unquoted lines of a shell script too.
        env_list=[
            {"name": name, "value": value.replace("$(", "$$(")}
            for name, value in environment.items()
        ],
        **given,
    )


def manifest_of(request: Any) -> dict[str, Any]:
    """Return the TrainJob that NeMo-Run would submit; its name ends with ID for a drawn number.

    Args:
        request: Of a dry run.
    """
    name = request.executor._trainjob_name(request.name)
    body: dict[str, Any] = request.executor.get_job_body(
        f"{name.rpartition('-')[0]}-ID", request.cmd
    )
    return body


def _volumes(options: Mapping[str, Any], workdir: str) -> dict[str, Any]:
    """Return volumes and where they are mounted: the work folder's, the user's, shared memory.

    NeMo-Run would add the work folder's only while it submits.
    """
    claims: dict[str, str] = {}
    mounts: list[dict[str, str]] = []
    if pvc := options.get("workdir_pvc"):
        claims[pvc] = WORKDIR
        mounts.append({"name": WORKDIR, "mountPath": workdir})
    for text in options.get("volumes", []):
        claim, _, folder = text.partition(":")
        name = claims.setdefault(claim, f"volume-{len(claims)}")  # one, at however many folders
        mounts.append({"name": name, "mountPath": folder})
    volumes: list[dict[str, Any]] = [
        {"name": name, "persistentVolumeClaim": {"claimName": claim}}
        for claim, name in claims.items()
    ]
    if size := options.get("shm_size"):
        memory = {"medium": "Memory", "sizeLimit": size}
        volumes.append({"name": SHARED_MEMORY, "emptyDir": memory})
        mounts.append({"name": SHARED_MEMORY, "mountPath": "/dev/shm"})
    return {"volumes": volumes, "volume_mounts": mounts}


def _toleration(text: str) -> dict[str, str]:
    found = re.fullmatch(TOLERATION, text)
    given = {name: value for name, value in found.groupdict().items() if value} if found else {}
    return {**given, "operator": "Equal" if "value" in given else "Exists"}
