"""NeMo's Megatron strategy, on the machine at hand.

Where there is no CUDA device it installs the CPU runtime for the length of the run; on every
machine it checks the layout before groups are made and the optimizer after it is restored.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from nemo.lightning import megatron_init
from nemo.lightning.pytorch.strategies import MegatronStrategy

from megacpp_nemo.host import compat
from megacpp_nemo.host.card import write_card
from megacpp_nemo.host.console import announce, quiet_terminal
from megacpp_nemo.host.cpu import CUDA_FUSIONS, RUNTIME
from megacpp_nemo.host.preflight import (
    check_optimizer_steps,
    refuse_layout,
    refuse_other_optimizers,
    refuse_resume,
    refuse_unbuilt,
)
from megacpp_nemo.host.warm_start import warm_start
from megacpp_nemo.model.prediction import reduced_losses
from megacpp_nemo.model.tied import with_copies

logger = logging.getLogger(__name__)


class HybridStrategy(MegatronStrategy):
    """`MegatronStrategy` for hybrid models, on GPUs or on a CPU.

    Takes the arguments of NeMo's class.

    Raises:
        RecipeError: If the model does not divide over the parallel sizes.
        RuntimeRefusal: If the run would be silently wrong; see `host.preflight`.
    """

    def connect(self, model: Any) -> None:
        """Attach the model, after making its configuration fit the machine."""
        compat.install()
        quiet_terminal()
        announce()
        if not torch.cuda.is_available():
            _without_cuda_fusions(model.config)
        super().connect(model)
        refuse_unbuilt(model.config)

    def setup_environment(self) -> None:
        """Start the process group; on a machine without CUDA, the CPU runtime first."""
        if RUNTIME.install():
            logger.info("no CUDA device: CUDA calls run on the CPU")
            self.async_save = False  # the CPU runtime saves in this process
        logger.info("adapters in force: %s", ", ".join(compat.install()) or "none")
        super().setup_environment()

    def setup_distributed(self) -> None:
        """Check the layout against the processes, make the parallel groups and seed them."""
        config = getattr(self.lightning_module, "config", None)
        if config is not None and self.cluster_environment is not None:
            refuse_layout(config, world_size=self.cluster_environment.world_size())
        super().setup_distributed()
        # NeMo seeds with a constant of its own.
        if (seed := getattr(config, "seed", None)) is not None:
            megatron_init._set_random_seed(seed)

    def setup(self, trainer: Any) -> None:
        """Build the model and the optimizer, refusing a resume that would diverge."""
        refuse_resume(
            resuming=bool(trainer.ckpt_path) and self.ckpt_load_optimizer,
            distributed_optimizer=bool(
                self.ddp_config and self.ddp_config.use_distributed_optimizer
            ),
            on_cpu=RUNTIME.installed,
        )
        super().setup(trainer)

    def load_checkpoint(
        self, checkpoint_path: Any, selective_restore: bool = False
    ) -> dict[str, Any]:
        """Load a checkpoint; its optimizer's step counts are checked when training starts.

        Raises:
            RuntimeRefusal: If its model is another on the input side; see `host.warm_start`.
        """
        asked_for = self.restore_config if selective_restore else None
        config = self.lightning_module.config
        with warm_start(self.megatron_parallel, config, checkpoint_path, asked_for) as fresh:
            checkpoint = super().load_checkpoint(checkpoint_path, selective_restore)
        if selective_restore:
            checkpoint["state_dict"].update(fresh)
        elif checkpoint.get("optimizer") and self.should_restore_optimizer_states():
            self._restored_step = checkpoint.get("global_step")
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Any, selective_restore: bool = False) -> None:
        """Load the optimizer's state.

        Raises:
            RuntimeRefusal: If it was saved under another number of optimizers, which Megatron
                makes by the layout of the experts.
        """
        parts = checkpoint.get("optimizer") or []
        if self.should_restore_optimizer_states(selective_restore=selective_restore):
            refuse_other_optimizers(self.optimizers, parts, self.expert_model_parallel_size)
        super().load_optimizer_state_dict(checkpoint, selective_restore=selective_restore)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step, and log each multi-token prediction depth's loss: `mtp_1_loss`, ..."""
        output = super().training_step(*args, **kwargs)
        if getattr(self.lightning_module.config, "mtp_num_layers", None):
            for depth, loss in enumerate(reduced_losses(self.model[0]), 1):
                self.lightning_module.log(f"mtp_{depth}_loss", loss, batch_size=1)
        return output

    def on_train_start(self) -> None:
        """Check the restored optimizer before its first step, and say what run this is."""
        super().on_train_start()
        config = self.lightning_module.config
        # NeMo's optimizer has set its own by now.
        config.finalize_model_grads_func = with_copies(config.finalize_model_grads_func)
        if self.is_global_zero:
            write_card(self.trainer, config)
        expected = getattr(self, "_restored_step", None)
        if expected is not None:
            for optimizer in self.optimizers:
                check_optimizer_steps(
                    getattr(optimizer, "mcore_optimizer", optimizer), expected=expected
                )
            self._restored_step = None

    def teardown(self) -> None:
        """Tear the run down and put CUDA's names back."""
        try:
            super().teardown()
        finally:
            RUNTIME.uninstall()


def _without_cuda_fusions(config: Any) -> None:
    for name in CUDA_FUSIONS:
        if getattr(config, name, False):
            setattr(config, name, False)
