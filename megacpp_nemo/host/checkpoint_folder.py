"""Where a run's checkpoints lie, from the names of its folders alone.

A run's folder has `checkpoints/step=N`, each with `weights/` and `context/`. Nothing heavy is
imported, so that a wrong path is told at once.
"""

from __future__ import annotations

import re
from pathlib import Path

from megacpp_nemo.contract.errors import RuntimeRefusal

_NAME = re.compile(r"step=\d+")
# NeMo keeps such a file beside a checkpoint while it is being written.
UNFINISHED = "-unfinished"
FOLDER = "checkpoints"


def find_checkpoint(run: str | Path, step: int | None = None) -> Path:
    """Return the folder `step=N` of a run.

    Args:
        run: A run's folder, its `checkpoints`, one `step=N` of them, or the `weights` in that.
        step: Which checkpoint; the newest if not given.

    Raises:
        RuntimeRefusal: If there is no such folder, no complete checkpoint in it, or none of
            that step.
    """
    try:
        path = Path(run).expanduser().resolve()
        there = path.is_dir()
    except (OSError, RuntimeError, ValueError):
        there = False
    if not there:
        raise RuntimeRefusal(
            "There is no such run",
            given=str(run),
            allowed="the folder of a run, or one of its checkpoints",
            hint="runs/nam56r_tiny, once a run has written it",
        )
    path = path.parent if path.name == "weights" else path
    if _is_checkpoint(path):
        found = [path]
    else:
        found = complete_checkpoints(path) or complete_checkpoints(path / FOLDER)
    if not found:
        raise _none_in(path, str(run))
    chosen = [folder for folder in found if step is None or folder.name == f"step={step}"]
    if not chosen:
        steps = [folder.name.partition("=")[2] for folder in found]
        raise RuntimeRefusal(
            f"This run has no checkpoint of step {step}",
            given=f"step {step} of {run}",
            allowed=f"step {', '.join(steps)}",
            hint=f"--step {steps[-1]}",
        )
    return chosen[-1]


def _none_in(path: Path, run: str) -> RuntimeRefusal:
    inner = sorted(below for below in path.glob("*") if newest_checkpoint(below / FOLDER))
    if inner:
        return RuntimeRefusal(
            "This folder holds runs, and is none itself",
            given=run,
            allowed=f"one of its runs: {', '.join(below.name for below in inner[:8])}",
            hint=f"{run.rstrip('/')}/{inner[0].name}",
        )
    return RuntimeRefusal(
        "This run has no complete checkpoint",
        given=run,
        allowed="a folder with checkpoints/step=N, and 'weights' and 'context' in it",
        hint="a run that has written one; the last one is written at its end",
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint of the highest step in a folder, or None."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, the lowest step first."""
    found = [path for path in folder.glob("step=*") if _NAME.fullmatch(path.name)]
    return sorted(filter(is_complete, found), key=step_of)


def step_of(path: Path) -> int:
    """Return the optimizer step in a checkpoint folder's name."""
    return int(path.name.partition("=")[2])


def is_complete(path: Path) -> bool:
    """Return whether a checkpoint folder was written to its end."""
    if path.name == "weights":
        path = path.parent
    weights = path / "weights" if (path / "weights").is_dir() else path
    return (weights / "metadata.json").is_file() and not Path(f"{path}{UNFINISHED}").exists()


def _is_checkpoint(path: Path) -> bool:
    return (path / "weights").is_dir() and is_complete(path)
