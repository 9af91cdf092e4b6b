"""Weights changed outside the optimizer, and the optimizer told of it.

Megatron keeps fp32 masters and Adam's moments in four ways: as the parameters themselves, beside
them, or as slices over data-parallel ranks, aliased or not.

- `OptimizerStates`: what this rank owns of a parameter, brought in line with new weights, or
  multiplied with them
- `synchronized`: every rank's copy of the weights brought in line with their owners'
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor, nn

from megacpp_nemo.contract.errors import RuntimeRefusal

MOMENTS = ("exp_avg", "exp_avg_sq")
KNOWN = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)
# Settings under which masters or moments are kept elsewhere, or as something else.
UNKNOWN_SETTINGS = ("use_precision_aware_optimizer", "optimizer_cpu_offload")


class Owned(NamedTuple):
    """What this rank's optimizer holds of one parameter: a run of its elements.

    Args:
        begin: First element of the flattened parameter that it owns.
        end: One past the last; `begin` if other ranks own all of it.
        master: `[end - begin]` master weights, a view; of the parameter where there are none.
        moments: `[end - begin]` views of Adam's moments; empty before the first step.
        group: Ranks that own the rest; None if this rank owns all of it.
    """

    begin: int
    end: int
    master: Tensor
    moments: tuple[Tensor, ...]
    group: Any = None

    def rows(self, width: int) -> tuple[int, int]:
        """Return the half-open range of rows of `width` elements that it has a part of."""
        return self.begin // width, -(-self.end // width)

    def cut(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Return the owned run `[end - begin]` of `values`, which broadcast to `shape`."""
        width = shape.numel() // shape[0]
        first, last = self.rows(width)
        run = values.expand(shape)[first:last].reshape(-1)
        return run[self.begin - first * width : self.end - first * width]


class OptimizerStates:
    """The optimizer states of a model's parameters.

    Args:
        optimizers: Megatron's optimizers, or wrappers that hold one as `mcore_optimizer`.

    Raises:
        RuntimeRefusal: If an optimizer keeps its masters in a way that is not known here, or a
            weight is stored in FP8.
    """

    def __init__(self, optimizers: Iterable[Any]) -> None:
        # The optimizer of each parameter and its master; None where it may be on other ranks.
        self._holders: dict[nn.Parameter, tuple[Any, Tensor | None]] = {}
        for optimizer in (inner for outer in optimizers for inner in _inner(outer)):
            self._holders.update(_held(optimizer))
        if any(map(is_float8tensor, self._holders)):
            raise RuntimeRefusal(
                "Weights stored in FP8 cannot be rewritten in part",
                given="FP8 parameters",
                allowed="FP8 arithmetic on bf16 weights",
                hint="fp8_param_gather=False",
            )

    def owned(self, parameter: nn.Parameter) -> Owned:
        """Return what this rank holds of a trained parameter."""
        optimizer, master = self._holders[parameter]
        if master is not None:
            moments = _moments(optimizer, master)
            return Owned(0, parameter.numel(), master.data.view(-1), moments)
        group = optimizer.data_parallel_group
        if parameter not in optimizer.model_param_group_index_map:
            return Owned(0, 0, parameter.data.new_empty(0, dtype=torch.float32), (), group)
        at, order = optimizer.model_param_group_index_map[parameter]
        master = optimizer.optimizer.param_groups[at]["params"][order]
        held = optimizer._get_model_param_range_map(parameter)["param"]
        moments = _moments(optimizer, master)
        return Owned(held.start, held.end, master.data.view(-1), moments, group)

    @torch.no_grad()
    def follow(self, parameter: nn.Parameter, where: Tensor | None, *, reset: bool) -> None:
        """Bring masters, and if asked moments, in line with a parameter's new weights.

        Everything where the weights did not change is left bit for bit as it was. The new
        weights must be on every rank that owns a part of the parameter.

        Args:
            parameter: The parameter, its new weights already written.
            where: Truths that broadcast to its shape, true where it changed; None for all.
            reset: Set the moments there to zero.
        """
        owned = self.owned(parameter)
        everywhere = torch.ones((), dtype=torch.bool, device=parameter.device)
        changed = owned.cut(everywhere if where is None else where, parameter.shape)
        weights = parameter.data.view(-1)[owned.begin : owned.end]
        owned.master.copy_(torch.where(changed, weights.to(owned.master.dtype), owned.master))
        for moment in owned.moments if reset else ():
            moment.masked_fill_(changed, 0)

    @torch.no_grad()
    def scale(self, parameter: nn.Parameter, factors: Tensor) -> None:
        """Multiply the masters of a parameter, and its weights with them; keep the moments.

        It is the master that is multiplied: a factor of 0.999 is lost in the rounding of a bf16
        weight. Only what this rank owns is written; `synchronized` brings it to the others.

        Args:
            parameter: The parameter.
            factors: They broadcast to its shape; where 1, nothing changes by a bit.
        """
        owned = self.owned(parameter)
        factors = owned.cut(factors, parameter.shape)
        weights = parameter.data.view(-1)[owned.begin : owned.end]
        owned.master.mul_(factors)
        weights.copy_(torch.where(factors == 1, weights, owned.master.to(weights.dtype)))


def synchronized(strategy: Any) -> None:
    """Bring every rank's weights in line with their owners'; collective over data parallelism.

    After a step with `overlap_param_gather` a rank has new weights only of what its optimizer
    owns, until the next forward pass gathers the rest.

    Args:
        strategy: NeMo's strategy, its model and optimizer set up.
    """
    if strategy.ddp_config.use_distributed_optimizer:
        strategy.megatron_parallel.force_param_sync()


def _inner(optimizer: Any) -> Iterator[Any]:
    """Yield Megatron's own optimizers inside wrappers."""
    optimizer = getattr(optimizer, "mcore_optimizer", optimizer)
    if isinstance(optimizer, ChainedOptimizer):
        for inner in optimizer.chained_optimizers:
            yield from _inner(inner)
        return
    settings = [name for name in UNKNOWN_SETTINGS if getattr(optimizer.config, name, False)]
    if getattr(getattr(optimizer, "ddp_config", None), "use_megatron_fsdp", False):
        settings.append("use_megatron_fsdp")
    if not isinstance(optimizer, KNOWN) or settings:
        raise RuntimeRefusal(
            "The master weights of this optimizer cannot be rewritten",
            given=", ".join([type(optimizer).__name__, *(f"{name}=True" for name in settings)]),
            allowed=", ".join(kind.__name__ for kind in KNOWN),
            hint=", ".join(f"{name}=False" for name in settings) or "Megatron's Adam",
        )
    if optimizer.optimizer is not None:  # None where this stage has no such parameters
        yield optimizer


def _held(optimizer: Any) -> Iterator[tuple[nn.Parameter, tuple[Any, Tensor | None]]]:
    """Yield each parameter of an optimizer, and who holds its master."""
    if isinstance(optimizer, DistributedOptimizer):
        for buffer in optimizer.buffers:
            for parameter in buffer.params:
                yield parameter, (optimizer, None)
    elif isinstance(optimizer, FP32Optimizer):
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, (optimizer, parameter)
    else:
        halves, masters = optimizer.float16_groups, optimizer.fp32_from_float16_groups
        wholes = optimizer.fp32_from_fp32_groups
        for models, own in zip(halves + wholes, masters + wholes, strict=True):
            for parameter, master in zip(models, own, strict=True):
                yield parameter, (optimizer, master)


def _moments(optimizer: Any, master: Tensor) -> tuple[Tensor, ...]:
    state = optimizer.optimizer.state.get(master, {})
    return tuple(state[name].view(-1) for name in MOMENTS if name in state)
