"""What would run, as text: sbatch's file, torchrun's line, Docker's command, a manifest."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megacpp_nemo.launch.kubeflow import KubernetesExecutor, manifest_of

# Drawn anew by every launch.
_RENDEZVOUS = re.compile(r"(--rdzv-id)(\s+)\d+")
ROOM = 96


def command_of(request: Any) -> str:
    """Return what NeMo-Run would hand over, from the request of its dry run.

    Args:
        request: Of its local, Docker, Slurm or Kubeflow scheduler.
    """
    if isinstance(getattr(request, "executor", None), KubernetesExecutor):
        return str(yaml.safe_dump(manifest_of(request), sort_keys=False))
    if hasattr(request, "materialize"):
        text = request.materialize().rstrip() + "\n"
    elif hasattr(request, "containers"):
        text = "".join(_docker(container, request) for container in request.containers)
    else:
        replicas = [replica for role in request.role_params.values() for replica in role]
        text = "".join(f"{folded(replica.args)}\n" for replica in replicas)
    return _RENDEZVOUS.sub(r"\1\2N", text)


def scripts_of(folder: Path) -> dict[str, str]:
    """Return the scripts that NeMo-Run wrote for a task, by name."""
    paths = [*sorted(folder.glob("scripts/*.sh")), *folder.glob("launch.sh")]
    return {path.name: _RENDEZVOUS.sub(r"\1\2N", path.read_text("utf-8")) for path in paths}


def folded(words: Sequence[str]) -> str:
    """Return a command on lines that fit, each option with its value."""
    groups: list[list[str]] = []
    for word in words:
        if not groups or word.startswith("-"):
            groups.append([])
        groups[-1].append(word)
    lines = [""]
    for group in (" ".join(shlex.quote(word) for word in group) for group in groups):
        if lines[-1] and len(lines[-1]) + 1 + len(group) > ROOM:
            lines.append(" ")
        lines[-1] = f"{lines[-1]} {group}" if lines[-1] else group
    return " \\\n".join(lines)


def _docker(container: Any, request: Any) -> str:
    """Return `docker run` for what NeMo-Run asks of Docker's own interface."""
    executor = container.executor
    words = ["docker", "run", "--rm", "--name", container.name, "--network", executor.network]
    for option, value in (
        ("--runtime", executor.runtime),
        ("--shm-size", executor.shm_size),
        ("--ipc", executor.ipc_mode),
        ("--gpus", executor.num_gpus),
    ):
        words += [option, str(value)] if value else []
    words += ["--privileged"] if executor.privileged else []
    for name, value in sorted({**executor.env_vars, **container.extra_env}.items()):
        words += ["--env", f"{name}={value}"]
    for volume in (*executor.volumes, f"{request.executor.job_dir}:/nemo_run"):
        words += ["--volume", volume]
    words += ["--workdir", "/nemo_run/code", executor.container_image]
    return f"{folded(words)} \\\n  {folded(container.command)}\n"
