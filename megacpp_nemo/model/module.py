"""The model as NeMo sees it: its Mamba model over a hybrid stack."""

# NeMo-Run reads these annotations to parse its command line: it resolves neither annotations
# kept as text nor `X | Y`.
# ruff: noqa: UP045

from collections.abc import Callable
from typing import Annotated, Any, Optional

from nemo.collections.llm.gpt.model.ssm import MambaModel
from nemo.collections.llm.utils import Config
from nemo.lightning import OptimizerModule
from torch import Tensor, nn

from megacpp_nemo.callbacks.curves import LayerCurves
from megacpp_nemo.host import compat
from megacpp_nemo.host.preflight import require_packages
from megacpp_nemo.model.config import HybridConfig


class HybridModel(MambaModel):
    """NeMo's Mamba model over a stack of attention, Mamba, expert and recurrent layers.

    What its layers report of themselves (`callbacks.curves`) goes to the run's loggers.

    Args:
        config: The model's configuration.
        optim: Optimizer and schedule.
        tokenizer: Tokenizer; NeMo takes the data module's if not given.
        model_transform: NeMo's hook to change the model after it is built.

    Raises:
        RuntimeRefusal: If a package the configuration requires is not installed.
    """

    def __init__(
        self,
        config: Annotated[Optional[HybridConfig], Config[HybridConfig]] = None,
        optim: Optional[OptimizerModule] = None,
        tokenizer: Any = None,
        model_transform: Optional[Callable[[nn.Module], nn.Module]] = None,
    ) -> None:
        compat.install()
        config = config or HybridConfig()
        require_packages(config)
        super().__init__(config, optim=optim, tokenizer=tokenizer, model_transform=model_transform)
        self._curves: Optional[LayerCurves] = None

    def forward(
        self,
        *args: Any,
        loss_mask: Optional[Tensor] = None,
        structure: Optional[dict[str, Tensor]] = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the model.

        Args:
            *args: Megatron's.
            loss_mask: `[batch, seq]`, for multi-token prediction alone.
            structure: Ids `[batch, seq]` of the structure channels by name.
            **kwargs: Megatron's.
        """
        if not self.config.has_own_model:
            return super().forward(*args, **kwargs)
        ours = {"loss_mask": loss_mask, "structure": structure}
        return self.module(*args, **ours, **{"attention_mask": None, **kwargs})

    def on_train_start(self) -> None:
        """Begin to count what the layers report."""
        self._curves = LayerCurves(self.trainer.strategy.megatron_parallel)

    def on_train_batch_end(self, *args: Any) -> None:
        """Write what the layers report, as often as the trainer logs."""
        trainer = self.trainer
        every = trainer.log_every_n_steps
        if self._curves and every and trainer.global_step % every == 0:
            values = self._curves.values()
            for writer in trainer.loggers:
                writer.log_metrics(values, step=trainer.global_step)

    def on_train_end(self) -> None:
        """Count no more."""
        if self._curves:
            self._curves.close()
        self._curves = None
