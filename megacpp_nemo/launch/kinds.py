"""Kinds of executors: NeMo-Run's classes, and which of their options a file may set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from megacpp_nemo.launch.document import NUMBER, SWITCH, TEXT, TEXTS, VARIABLES


class Option(NamedTuple):
    """An option of an executor.

    Args:
        form: A form of `document`.
        needed: Whether a launch needs it.
        only: What it must match, each of several, as a regular expression, and that in words.
    """

    form: str
    needed: bool = False
    only: tuple[str, str] | None = None


class Kind(NamedTuple):
    """A kind of executor: one of NeMo-Run's classes.

    Args:
        what: What it starts.
        nodes: Most machines.
        processes: Most processes on each; None for any number.
        options: Its options by name.
    """

    what: str
    nodes: int | None
    processes: int | None
    options: Mapping[str, Option]


TIME = (r"(\d+-)?\d+(:\d\d){1,2}|\d+", "HH:MM:SS, D-HH:MM:SS or minutes")
# Names and sizes as Kubernetes takes them.
_NAME = r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?"
NAME = (_NAME, "a name of a-z, 0-9, - and .")
SIZE = (r"\d+(\.\d+)?(Ki|[MGTPE]i?|k)?", "a size such as 32Gi")
CLAIM = (rf"{_NAME}:/[^:]*", "CLAIM:/FOLDER")
LABEL = (r"([-.\w]+/)?[-.\w]+=[-.\w]*", "names and values of letters, digits, -, _ and .")
TOLERATION = (
    r"(?P<key>[-./\w]+)(=(?P<value>[-.\w]*))?"
    r"(:(?P<effect>NoSchedule|PreferNoSchedule|NoExecute))?"
)
KINDS = {
    "local": Kind("a process on this machine", 1, 1, {}),
    "torchrun": Kind("processes on this machine under torchrun", 1, None, {}),
    "docker": Kind(
        "a container on this machine",
        1,
        None,
        {
            "container_image": Option(TEXT, needed=True),
            "runtime": Option(TEXT),
            "shm_size": Option(TEXT, only=(r"\d+[bkmgBKMG]?", "a size such as 32g")),
            "ipc_mode": Option(TEXT),
            "network": Option(TEXT),
            "privileged": Option(SWITCH),
            "volumes": Option(TEXTS),
        },
    ),
    "slurm": Kind(
        "a job of Slurm",
        None,
        None,
        {
            "account": Option(TEXT, needed=True),
            "partition": Option(TEXT),
            "time": Option(TEXT, only=TIME),
            "job_dir": Option(TEXT, only=(r"/.*", "an absolute path")),
            "host": Option(TEXT),
            "user": Option(TEXT),
            "identity": Option(TEXT),
            "container_image": Option(TEXT),
            "container_mounts": Option(TEXTS),
            "qos": Option(TEXT),
            "constraint": Option(TEXT),
            "exclude": Option(TEXT),
            "gres": Option(TEXT),
            "mem": Option(TEXT),
            "comment": Option(TEXT),
            "job_name_prefix": Option(TEXT),
            "setup_lines": Option(TEXT),
            "cpus_per_task": Option(NUMBER),
            "exclusive": Option(SWITCH),
            "request_gpus": Option(SWITCH),
            "srun_args": Option(TEXTS),
        },
    ),
    "kubernetes": Kind(
        "a TrainJob on Kubernetes",
        None,
        None,
        {
            "container_image": Option(TEXT, needed=True),
            "workdir_pvc": Option(TEXT, needed=True, only=NAME),
            "workdir_pvc_path": Option(
                TEXT, only=(r"/(?!nemo_run/*$)[^/].*", "an absolute path other than /nemo_run")
            ),
            "namespace": Option(TEXT, only=NAME),
            "runtime_ref": Option(TEXT, only=NAME),
            "volumes": Option(TEXTS, only=CLAIM),
            "shm_size": Option(TEXT, only=SIZE),
            "cpu_requests": Option(TEXT),
            "cpu_limits": Option(TEXT),
            "memory_requests": Option(TEXT, only=SIZE),
            "memory_limits": Option(TEXT, only=SIZE),
            "labels": Option(VARIABLES, only=LABEL),
            "annotations": Option(VARIABLES),
            "pod_labels": Option(VARIABLES, only=LABEL),
            "pod_annotations": Option(VARIABLES),
            "node_selector": Option(VARIABLES, only=LABEL),
            "tolerations": Option(TEXTS, only=(TOLERATION, "KEY, KEY=VALUE or KEY:EFFECT")),
            "image_pull_secrets": Option(TEXTS, only=NAME),
            "data_mover_image": Option(TEXT),
        },
    ),
}
