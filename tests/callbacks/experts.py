"""Models whose expert layers are measured: small ones in this process, and those of runs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megacpp_nemo.callbacks.activity import ActivityMeter
from megacpp_nemo.callbacks.mlps import shares_of
from megacpp_nemo.contract.plasticity import RedoLever
from tests.callbacks.runs import at_step
from tests.model.building import build_model, random_tokens, run_model, small_config

GATED: dict[str, Any] = {"gated_linear_unit": True, "activation_func": F.silu}
KINDS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "swiglu": GATED,
    "dense_gelu": {"experts": False},
    "dense_swiglu": {"experts": False, **GATED},
}

# Of runs: a unit is judged by what three steps measured.
RECYCLED = 3
LEVER = RedoLever(steps=(RECYCLED,), threshold=0.7, decay=0.9)


def expert_model(**changes: Any) -> nn.Module:
    """Return a model of an attention layer and two expert layers, in training mode."""
    return build_model(small_config("AEE", **changes)).train()


def batch(seed: int) -> Tensor:
    """Return tokens `[2, 16]`."""
    return random_tokens(2, 16, seed)


def measured(model: nn.Module, lever: RedoLever, steps: int = 3) -> ActivityMeter:
    """Return a meter that has seen a batch on each of some steps."""
    meter = ActivityMeter(model, lever)
    advance(model, meter, range(steps))
    return meter


def advance(model: nn.Module, meter: ActivityMeter, seeds: Any) -> None:
    """Show the meter one batch a step."""
    for seed in seeds:
        run_model(model, batch(seed))
        meter.step()


@torch.no_grad()
def silence(model: nn.Module, meter: ActivityMeter, name: str, units: list[int]) -> None:
    """Make units of an MLP exactly 0: of a gated one, its gates alone."""
    (share,) = (s for s in shares_of([model], meter.mlps) if s.mlp.name == name)
    into, bias, _ = share.tensors()
    into[units] = 0
    if bias is not None:
        bias[units] = 0


def adam(model: nn.Module) -> FP32Optimizer:
    """Return Megatron's Adam in fp32, with moments from a step that left the weights alone."""
    inner = torch.optim.Adam(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    inner.step()
    inner.zero_grad()
    return FP32Optimizer(inner, OptimizerConfig(), lambda optimizer, config: None)


def metered(act: Any) -> list[Any]:
    """Return callbacks that measure each step, and call `act(trainer, meter)` after one."""
    import lightning.pytorch as pl

    class Meter(pl.Callback):
        def on_train_start(self, trainer: Any, *args: Any) -> None:
            self.meter = ActivityMeter(trainer.strategy.megatron_parallel, LEVER)

        def on_train_batch_end(self, *args: Any) -> None:
            self.meter.step()

    meter = Meter()
    return [meter, at_step(RECYCLED, lambda trainer: act(trainer, meter.meter))]
