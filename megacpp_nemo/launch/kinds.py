"""Kinds of executors: NeMo-Run's classes, and which of their options a file may set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from megacpp_nemo.launch.document import NUMBER, SWITCH, TEXT, TEXTS


class Option(NamedTuple):
    """An option of an executor.

    Args:
        form: A form of `document`.
        needed: Whether a launch needs it.
        only: What it must match, as a regular expression, and that in words.
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
}
