"""The learning rate over a run."""

from typing import Any

from nemo.lightning.pytorch.optim import LRSchedulerModule


class CosineSchedule(LRSchedulerModule):
    """Linear warm-up from 0, then a cosine from the peak to `min_lr`.

    NeMo's own schedule takes its length from the trainer's `max_steps`, so that a run stopped
    early and one run in full see different rates. This one is fixed by the recipe, like
    Megatron's `--lr-decay-iters`: a run that is stopped and extended is the longer run.

    Args:
        warmup_steps: Steps from 0 to the peak rate.
        decay_steps: Step at which `min_lr` is reached; it is kept from there on.
        min_lr: Rate at the end.
    """

    def __init__(
        self, warmup_steps: int = 2_000, decay_steps: int = 100_000, min_lr: float = 3e-5
    ) -> None:
        super().__init__()
        self.warmup_steps, self.decay_steps, self.min_lr = warmup_steps, decay_steps, min_lr

    def scheduler(self, model: Any, optimizers: Any) -> Any:
        """Return Lightning's description of the schedule."""
        from nemo.core.optim.lr_scheduler import CosineAnnealing

        schedule = CosineAnnealing(
            optimizers,
            max_steps=self.decay_steps,
            warmup_steps=self.warmup_steps,
            constant_steps=0,
            min_lr=self.min_lr,
        )
        return {
            "optimizer": optimizers,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1},
            "monitor": "val_loss",
        }
