"""A launch as a NeMo-Run experiment of one task: dry, or for good."""

from __future__ import annotations

import contextlib
import getpass
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fiddle as fdl
import nemo_run as run
from nemo_run.config import get_nemorun_home

from megacpp_nemo.launch.executors import ExecutorFile
from megacpp_nemo.launch.failures import run_failed
from megacpp_nemo.launch.machine import programs
from megacpp_nemo.launch.nemo_run_executors import base_of
from megacpp_nemo.launch.shown import command_of, scripts_of


class Dry(NamedTuple):
    """What a launch would run.

    Args:
        command: What NeMo-Run would hand over.
        scripts: Scripts it would hand over with it, by name.
        folder: Folder of the experiment, with ID for its number.
    """

    command: str
    scripts: dict[str, str]
    folder: str


def title_of(name: str) -> str:
    """Return an experiment's title, which is a folder's name, from a recipe's name."""
    return re.sub(r"[^\w.-]+", "_", name)


def dry_run(task: Any, executor: run.Config, title: str, file: ExecutorFile) -> Dry:
    """Return what a task would run under an executor. Nothing is started or left behind."""
    with tempfile.TemporaryDirectory() as base, _silent():
        with run.Experiment(
            title, executor=fdl.build(executor), id=f"{title}_ID", base_dir=base, clean_mode=True
        ) as experiment:
            experiment.add(task, name=title)
            experiment.dryrun(log=False, delete_exp_dir=False)
            (job,) = experiment.jobs
            command = command_of(job._dryrun_info.request)
            scripts = scripts_of(Path(job.executor.job_dir))
        user = getpass.getuser() if file.kind == "kubernetes" else None
        home = base_of(file) or _short(get_nemorun_home())

        def placed(text: str) -> str:
            text = text.replace(base, home).replace(get_nemorun_home(), home)
            # On a volume of Kubernetes, NeMo-Run keeps a folder for each user.
            return text.replace(f"/{user}/{title}_ID/", f"/USER/{title}_ID/") if user else text

        scripts = {name: placed(text) for name, text in scripts.items()}
        return Dry(placed(command), scripts, placed(f"{base}/experiments/{title}/{title}_ID"))


def start(
    task: Any, executor: run.Config, title: str, file: ExecutorFile, *, detach: bool = False
) -> str:
    """Run a task under an executor, its log on standard output, and wait for it.

    Args:
        task: A NeMo recipe or a script.
        executor: NeMo-Run's executor.
        title: Title of the experiment.
        file: The file it is made from.
        detach: Whether to return as soon as it is submitted.

    Returns:
        The experiment's id.

    Raises:
        RunFailed: With the last lines of the rank that failed first, if the run fails.
    """
    with (
        _own_programs(file.kind),
        run.Experiment(title, executor=fdl.build(executor), base_dir=base_of(file)) as experiment,
    ):
        experiment.add(task, name=title, tail_logs=not detach)
        _link(Path(experiment._exp_dir), title)
        experiment.run(detach=detach)
    (job,) = experiment.jobs
    if not detach and str(job.state) != "SUCCEEDED":
        raise run_failed(experiment, job)
    return str(experiment._id)


def _link(folder: Path, title: str) -> None:
    """Have `nemo experiment` find a folder that is not where it looks."""
    place = Path(get_nemorun_home(), "experiments", title, folder.name)
    if place != folder:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(folder)


@contextlib.contextmanager
def _own_programs(kind: str) -> Iterator[None]:
    """Have processes of this machine started by this Python's own programs."""
    before = os.environ.get("PATH")
    if kind in ("local", "torchrun"):
        os.environ["PATH"] = programs()
    try:
        yield
    finally:
        if before is not None:
            os.environ["PATH"] = before


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep away what NeMo-Run says about itself while it prepares, and the input that it reads."""
    before, sys.stdin = sys.stdin, io.StringIO()  # one that cannot be read would stop it
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.stdin = before


def _short(folder: str) -> str:
    home = str(Path.home())
    return folder.replace(home, "~", 1) if folder.startswith(f"{home}/") else folder
