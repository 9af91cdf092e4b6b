"""What a run prints: a progress bar, and at the end what was learned and where it is.

- `RunProgress`: loss, tokens per second and step, on a terminal or in a log file.
- `RunSummary`: the validation loss in nats per token and bits per byte, from step 0 on.
"""

import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, TQDMProgressBar


class RunProgress(TQDMProgressBar):
    """One bar over the optimizer steps of a run, with loss and tokens per second.

    Args:
        refresh_rate: Steps between updates.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._began, self._begun_at = 0.0, 0
        self._shown: dict[str, int | str | float] = {}

    def on_train_start(self, *args: Any) -> None:
        """Start the clock at the first step, not at start-up."""
        super().on_train_start(*args)
        self._began, self._begun_at = time.monotonic(), self.trainer.global_step

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        """Size the bar by the run's steps, and stand where the run resumes."""
        bar = self.train_progress_bar
        bar.bar_format = "{desc} {n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}"
        bar.reset(trainer.max_steps)
        bar.set_description("step")
        bar.n = bar.initial = trainer.global_step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Show this step's loss and the mean rate since the run started."""
        bar, step = self.train_progress_bar, trainer.global_step
        if step % self.refresh_rate and step != trainer.max_steps:
            return
        metrics = trainer.callback_metrics
        shown: dict[str, int | str | float] = {}
        if (loss := metrics.get("reduced_train_loss")) is not None:
            shown["loss"] = f"{float(loss):.3f}"
        if (value := metrics.get("val_loss")) is not None:
            shown["val"] = f"{float(value):.3f}"
        shown["tokens/s"] = f"{self.tokens_per_second(trainer):,.0f}"
        bar.n, self._shown = step, shown
        bar.set_postfix(shown, refresh=True)

    def on_train_epoch_end(self, *args: Any) -> None:
        """Leave the bar as the last step drew it."""

    def tokens_per_second(self, trainer: Any) -> float:
        """Return the mean tokens per second since this process started training."""
        data = trainer.datamodule
        tokens = (trainer.global_step - self._begun_at) * data.global_batch_size * data.seq_length
        return tokens / max(time.monotonic() - self._began, 1e-9)

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """Return what the last step showed; Lightning asks again after each validation."""
        return dict(self._shown)

    def init_validation_tqdm(self) -> Any:
        """Return a bar that shows nothing: validation runs in seconds and would only flicker."""
        return Tqdm(disable=True)

    init_sanity_tqdm = init_validation_tqdm


class RunSummary(Callback):
    """Validate before the first step, and print the outcome as the run's last lines.

    Bits per byte are nats per token, over the bytes of source text per token of the
    validation files, in base 2; end-of-document tokens count as tokens without bytes.
    """

    def __init__(self) -> None:
        self.initial_loss: float | None = None
        self.final_loss: float | None = None
        self.final_step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to report from step 0."""
        return {"initial_loss": self.initial_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the first loss of the run being resumed."""
        self.initial_loss = state_dict["initial_loss"]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Validate the final weights, unless the last validation did."""
        steps = trainer.fit_loop.epoch_loop
        if self.final_step != trainer.global_step and trainer.enable_validation:
            trainer.validating = True
            # In the curves it stands at the last step, as a validation within training would.
            steps._batches_that_stepped -= 1
            steps.val_loop.run()
            steps._batches_that_stepped += 1
            trainer.training = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Remember the loss: the first one, before training, and the latest."""
        loss = trainer.callback_metrics.get("val_loss")
        if loss is None:
            return
        if trainer.sanity_checking:
            self.initial_loss = float(loss)
        else:
            self.final_loss, self.final_step = float(loss), trainer.global_step

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Print the summary once everything else has been said."""
        if stage == "fit" and trainer.is_global_zero and self.final_loss is not None:
            bytes_per_token = getattr(trainer.datamodule, "bytes_per_token_validation", None)
            print("\n" + "\n".join(self.lines(trainer, bytes_per_token)), flush=True)

    def lines(self, trainer: Any, bytes_per_token: float | None) -> list[str]:
        """Return the summary, a fact a line."""
        assert self.final_loss is not None
        lines = []
        if self.initial_loss is not None:
            change = 100 * (self.final_loss / self.initial_loss - 1)
            lines.append(
                f"validation loss {self.initial_loss:.4f} at step 0, {self.final_loss:.4f} at step "
                f"{self.final_step} ({change:+.1f}%)"
            )
        for kind, path in (
            ("checkpoints", trainer.checkpoint_callback and trainer.checkpoint_callback.dirpath),
            ("TensorBoard", trainer.logger and trainer.logger.log_dir),
        ):
            if path:
                lines.append(f"{kind} in {_relative(path)}")
        lines.append(f"validation: {self.final_loss:.4f} nats per token")
        if bytes_per_token:
            bits = self.final_loss / math.log(2) / bytes_per_token
            lines.append(f"validation: {bits:.4f} bits per byte, on files never trained on")
        return lines


def _relative(path: Any) -> str:
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
