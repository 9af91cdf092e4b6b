"""Checkpoints that survive a kill.

- `LatestCheckpoints`: keeps the last few checkpoints, each complete or marked unfinished.
- `LatestResume`: resumes from the newest complete one, whatever a killed process left behind.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nemo.lightning import AutoResume
from nemo.lightning.pytorch.callbacks import ModelCheckpoint
from nemo.utils.app_state import AppState

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.host.checkpoint_folder import (
    complete_checkpoints,
    is_complete,
    newest_checkpoint,
    step_of,
)


class LatestCheckpoints(ModelCheckpoint):
    """Keep the newest checkpoints of a run, named by step, with optimizer state.

    A checkpoint is written under its final name beside a marker that is removed when every
    rank is done, and an older one is removed only after that: a kill at any moment costs at
    most the checkpoint being written.

    Args:
        save_interval: Optimizer steps between checkpoints. One is also written at the end.
        keep: How many to keep.
    """

    def __init__(self, save_interval: int = 2_000, keep: int = 3) -> None:
        super().__init__(
            monitor="step",
            mode="max",
            save_last=False,
            save_top_k=keep,
            every_n_train_steps=save_interval,
            filename="{step}",
            save_optim_on_train_end=True,
            verbose=False,
        )
        self.save_interval, self.keep = save_interval, keep

    def _monitor_candidates(self, trainer: Any) -> dict[str, Any]:
        # NeMo logs a metric of the same name that counts from 0.
        candidates = super()._monitor_candidates(trainer)
        candidates["step"] = torch.tensor(trainer.global_step)
        return candidates

    def nemo_topk_check_previous_run(self) -> None:
        """Take up the checkpoints that earlier runs left in the folder.

        NeMo reads the step from the first "step" anywhere in the path, a parent folder's too.
        """
        found = complete_checkpoints(Path(self.dirpath))[-self.keep :]
        self.best_k_models = {str(path): torch.tensor(step_of(path)) for path in found}
        self.kth_best_model_path = str(found[0]) if found else ""
        self.best_model_path = str(found[-1]) if found else ""
        self.best_model_score = self.best_k_models.get(self.best_model_path)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write a last checkpoint if the run ended between two."""
        if not trainer.fast_dev_run and self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        super().on_train_end(trainer, pl_module)


@dataclass(kw_only=True)
class LatestResume(AutoResume):
    """Resume from the newest complete checkpoint of the run's folder, if there is one.

    Unfinished checkpoints, which a killed process leaves behind, are passed over. Arguments
    are those of NeMo's `AutoResume`.

    Raises:
        RuntimeRefusal: If `resume_from_path` is not a checkpoint.
    """

    def get_trainer_ckpt_path(self, model: Any = None) -> Path | None:
        """Return the checkpoint to resume from, or None to start anew."""
        if self.resume_from_path and not is_complete(Path(self.resume_from_path)):
            raise RuntimeRefusal(
                "There is no complete checkpoint to resume from at this path",
                given=str(self.resume_from_path),
                allowed="a folder 'step=N' written by a run, with 'weights' and 'context' in it",
                hint="runs/NAME/checkpoints/step=N",
            )
        return super().get_trainer_ckpt_path(model)

    def _find_trainer_ckpt_path(self) -> Path | None:
        folder = self.resume_from_directory or (AppState().log_dir or ".")
        if not self.resume_from_directory:
            folder = Path(folder) / "checkpoints"
        return newest_checkpoint(Path(folder))
