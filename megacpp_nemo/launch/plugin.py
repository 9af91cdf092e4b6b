"""The NeMo-Run plugin that writes down what a task would be on Megatron-LM's command line."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_run as run

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.launch.files import files_of, write_folder
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.policy import LaunchOptions
from megacpp_nemo.lowering.releases import DEFAULT_RELEASE

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LoweringPlugin(run.Plugin):
    """Writes the lowering of every recipe of an experiment; the tasks stay as they are.

        exp.add(nam56r(), executor=executor, plugins=[LoweringPlugin(release="0.19.0")])

    Each task has a folder of its own with `megatron.args`, `launch.env`, `seams.json` and
    `seams.md`, written whole or not at all: FOLDER/EXPERIMENT/TASK, and TASK_2, ... where a task
    of that name is there already. It is written when the task is added, on the machine that adds
    it; NeMo-Run makes the experiment's own folder only later.

    A recipe that cannot be lowered stops the experiment: `add` raises. A `run.Script` is a
    command line already, so there is nothing to lower: it is passed over, and the log says so.

    Args:
        folder: Below the run's folder (`log.explicit_log_dir`), unless it is absolute.
        release: A release of Megatron-LM, by its name or the path of its file.
        seams: `spec` or `native-only`, as `lower` takes it.
        launch: What the user decides about the launch.

    Raises:
        MegaCppError: If the folder is no path; from `setup`, if a task is no recipe of this
            package or has no lowering.
    """

    folder: str = "lowering"
    release: str = DEFAULT_RELEASE
    seams: str = "spec"
    launch: LaunchOptions | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.folder, (str, os.PathLike)):
            raise LoweringError(
                "The folder of a LoweringPlugin is a path",
                given=f"folder={self.folder!r}",
                allowed="a folder as text, below the run's unless it is absolute",
                hint="folder='lowering'",
            )

    def setup(self, task: Any, executor: Any) -> None:
        """Write the files of one task."""
        if isinstance(task, run.Script):
            logger.warning("not lowered: %s is a script, and has no recipe", task.get_name())
            return
        lowering = lower(task, release=self.release, seams=self.seams, launch=self.launch)
        files = files_of(lowering)
        base = Path(str(task.log.explicit_log_dir), self.folder)
        experiment = getattr(executor, "experiment_id", None) or self.experiment_id
        name = Path(getattr(executor, "job_dir", "")).name or lowering.name
        written = write_folder(base / experiment / name, files)
        logger.info("lowered to Megatron-LM %s: %s", lowering.release, written)
