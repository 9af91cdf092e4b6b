"""`PlasticitySchedule`: what is done to a run in progress, when, and what came of it.

One callback runs every lever of a recipe, in one order, and keeps one record: an action is in
the run's journal, in TensorBoard, and in the next checkpoint, from which a resumed run neither
repeats nor skips one. While an action changes weights no checkpoint can be written: if it is cut
short, the last one before it is what the run returns to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.utils.app_state import AppState

from megacpp_nemo.callbacks.activity import ActivityMeter
from megacpp_nemo.callbacks.dash import dash
from megacpp_nemo.callbacks.fire import fire
from megacpp_nemo.callbacks.journal import Action, Journal, merged
from megacpp_nemo.callbacks.matrices import check_selection, hybrid_models, matrices_of
from megacpp_nemo.callbacks.optimizers import synchronized
from megacpp_nemo.callbacks.phases import Ledger, Phase
from megacpp_nemo.callbacks.redo import recycle, report
from megacpp_nemo.callbacks.shrink import shrink
from megacpp_nemo.callbacks.stp import SemanticTube
from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.plasticity import Plasticity

logger = logging.getLogger(__name__)

STATE = "plasticity"  # key in a checkpoint


class PlasticitySchedule(pl.Callback):
    """FIRE, DASH, periodic shrink, ReDo and STP in a training run of a hybrid model.

    Args:
        plasticity: Every lever, and when it acts.

    Raises:
        RecipeError: When training starts, if a lever selects nothing or a layer the model lacks.
        RuntimeRefusal: When training starts, if a step at which a lever acts is already past, or
            a phase boundary cannot be told; later, if a lever would do nothing, or harm.
    """

    def __init__(self, plasticity: Plasticity) -> None:
        self.plasticity = plasticity
        self._ledger = Ledger()
        self._resumed: Ledger | None = None
        self._meter_state: dict[str, Any] | None = None
        self._meter: ActivityMeter | None = None
        self._tube: SemanticTube | None = None
        self._journal = Journal(None)
        self._acting = ""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Put what a resumed run needs into a checkpoint, the same on every rank.

        It is filed by lever, so that a resumed run may have its levers in other schedules.

        Raises:
            RuntimeRefusal: If an action is under way, or was cut short: the weights are changed
                in part.
        """
        if self._acting:
            raise RuntimeRefusal(
                "Weights in the middle of an action are not saved",
                given=f"{self._acting} at step {trainer.global_step}, which did not end",
                allowed="a checkpoint before or after it",
                hint="resuming from the last checkpoint, which is whole",
            )
        kept = checkpoint.setdefault(STATE, {"ledger": Ledger().state_dict(), "meter": None})
        ledger = Ledger.of(kept["ledger"])
        ledger.acted.update(self._ledger.acted)
        ledger.phase = self._ledger.phase
        kept["ledger"] = ledger.state_dict()
        if self._meter:
            kept["meter"] = self._meter.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Take up what the run being resumed put into its checkpoint."""
        if STATE in checkpoint:
            self._resumed = Ledger.of(checkpoint[STATE]["ledger"])
            self._meter_state = checkpoint[STATE]["meter"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the model, check the schedule, and act at a phase boundary."""
        models = hybrid_models(list(trainer.strategy.megatron_parallel))
        self._models = models
        self._journal = Journal(_run_folder(trainer) if trainer.is_global_zero else None)
        self._refuse_twice(trainer)
        self._check_selections()
        self._ledger = self._resumed or Ledger()
        self._ledger.refuse_past(self.plasticity, trainer.global_step)
        causes = self._causes(trainer)
        self._ledger.phase = Phase.of(trainer.datamodule)
        self._attach()
        self._journal.start(
            trainer.global_step, {name: vars(self._lever(name)) for name in self.on}
        )
        for name in self.on:
            wanted = getattr(self._lever(name), "boundaries", ())
            cause = next((cause for cause in causes if cause in wanted), None)
            if cause is not None:
                self._act(trainer, name, cause)

    @property
    def on(self) -> tuple[str, ...]:
        """Names of the levers that are on, in the order in which they act."""
        return self.plasticity.on

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Tell STP which step begins."""
        if self._tube:
            self._tube.begin_step(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Take up the step's statistics, and do what is due after it."""
        step = trainer.global_step
        if self._tube:
            self._tube.end_step()
        if self._meter:
            self._meter.step()
        if trainer.log_every_n_steps and step % trainer.log_every_n_steps == 0:
            self._note_curves(trainer)
        for name in self.on:
            if self._is_due(name, step):
                self._act(trainer, name, "step")
        redo = self.plasticity.redo
        if self._meter and redo.report_interval and step % redo.report_interval == 0:
            self._record(trainer, report(self._meter, redo, step=step))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks off the model."""
        for attached in (self._tube, self._meter):
            if attached is not None:
                attached.close()
        self._tube = self._meter = None

    def _lever(self, name: str) -> Any:
        return getattr(self.plasticity, name)

    def _is_due(self, name: str, step: int) -> bool:
        lever = self._lever(name)
        if name == "shrink":
            return step % lever.interval == 0
        return step in getattr(lever, "steps", ())

    def _refuse_twice(self, trainer: Any) -> None:
        """Refuse two schedules of one lever."""
        others = [c for c in trainer.callbacks if isinstance(c, PlasticitySchedule)]
        names = [name for other in others for name in other.on]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RuntimeRefusal(
                f"{', '.join(twice)} is on in two schedules of one run",
                given=f"{len(others)} schedules, with " + ", ".join(names),
                allowed="each lever once",
                hint="one PlasticitySchedule with all levers",
            )

    def _check_selections(self) -> None:
        """Refuse selections that fit nothing."""
        for name in self.on:
            lever = self._lever(name)
            if hasattr(lever, "selection"):
                found = len(matrices_of(self._models, lever.selection))
                check_selection(self._models, lever.selection, found)

    def _causes(self, trainer: Any) -> tuple[str, ...]:
        """Return which phase boundaries lie just before this start."""
        now = Phase.of(trainer.datamodule)
        if self._resumed and self._resumed.phase:
            return now.boundaries(self._resumed.phase)
        if not trainer.ckpt_path:
            return ("data",) if trainer.strategy.restore_config else ()
        waiting = [name for name in self.on if getattr(self._lever(name), "boundaries", ())]
        if waiting:
            raise RuntimeRefusal(
                "Whether a phase begins here cannot be told: the checkpoint was written by a run "
                "without these levers",
                given=f"{', '.join(waiting)} at phase boundaries, and {trainer.ckpt_path}",
                allowed="a checkpoint of a run with them, a new run from its weights "
                "(nemo llm finetune), or steps",
                hint=f"plasticity.{waiting[0]}.boundaries=() "
                f"plasticity.{waiting[0]}.steps=({trainer.global_step + 1},)",
            )
        return ()

    def _attach(self) -> None:
        config: Any = self._models[0].config
        seed = int(getattr(config, "seed", 0))
        if "stp" in self.on:
            self._tube = SemanticTube(self._models, self.plasticity.stp, seed)
        if "redo" in self.on:
            self._meter = ActivityMeter(self._models, self.plasticity.redo)
            if self._meter_state:
                self._meter.load_state_dict(self._meter_state)

    def _act(self, trainer: Any, name: str, cause: str) -> None:
        """Run one lever, and keep what came of it."""
        began = time.monotonic()
        self._acting = name
        synchronized(trainer.strategy)
        with self._meter.paused() if self._meter else nullcontext():
            action = self._actions(trainer, cause)[name]()
        self._ledger.did(name, trainer.global_step)
        self._acting = ""
        self._record(trainer, action, time.monotonic() - began)

    def _actions(self, trainer: Any, cause: str) -> dict[str, Callable[[], Action]]:
        step, levers, optimizers = trainer.global_step, self.plasticity, trainer.optimizers
        config: Any = self._models[0].config
        told: dict[str, Any] = {"step": step, "cause": cause}
        meter: Any = self._meter
        return {
            "shrink": lambda: shrink(trainer, levers.shrink, cause=cause),
            "dash": lambda: dash(trainer, levers.dash, cause=cause),
            "fire": lambda: fire(self._models, levers.fire, optimizers, **told),
            "redo": lambda: recycle(
                self._models, meter, levers.redo, optimizers, seed=config.seed, **told
            ),
        }

    def _record(self, trainer: Any, action: Action, seconds: float | None = None) -> None:
        """Put an action of all ranks into the journal, the log and TensorBoard."""
        # ReDo's statistics, and so what it did, are known whole on every rank.
        whole = action if action.lever == "redo" else merged(action, seconds=seconds)
        self._journal.action(whole)
        words = ", ".join(f"{name} {value:.4g}" for name, value in whole.totals.items())
        if trainer.is_global_zero:
            logger.info("%s at step %d (%s): %s", whole.lever, whole.step, whole.cause, words)
        self._log(trainer, {f"{whole.lever}/{name}": v for name, v in whole.totals.items()})

    def _note_curves(self, trainer: Any) -> None:
        values: dict[str, float] = {}
        loss = trainer.callback_metrics.get("reduced_train_loss")
        if loss is not None and trainer.is_global_zero:
            values["loss"] = float(loss)
        if self._tube and self._tube.value is not None:
            values["stp_loss"] = self._tube.value
            self._log(trainer, {"stp_loss": self._tube.value})
        self._journal.curves(trainer.global_step, values)

    @staticmethod
    def _log(trainer: Any, values: dict[str, float]) -> None:
        """Write values of this step at once: Lightning's own way keeps those of some steps only."""
        for writer in trainer.loggers:
            writer.log_metrics(values, step=trainer.global_step)


def _run_folder(trainer: Any) -> Path:
    return Path(AppState().log_dir or trainer.default_root_dir)
