"""RMS normalization where Transformer Engine is absent."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from megatron.core.utils import get_pg_size
from torch import Tensor, nn

from megacpp_nemo.model.initial import parameter_device, split_over_tensor_ranks


class LocalRMSNorm(nn.Module):
    """RMSNorm over the last dimension, usable under sequence parallelism.

    Megatron's own torch wrapper refuses sequence parallelism; all that is needed is the mark
    on the weight that makes Megatron reduce its gradient over the tensor group.

    Args:
        config: Megatron configuration; `params_dtype` and `sequence_parallel` are read.
        hidden_size: Size of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device())
        self.weight = nn.Parameter(ones)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized `x`, same shape and dtype."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """RMSNorm of `x * silu(gate)`, in groups or over the whole width, split over tensor ranks.

    Args:
        config: Megatron configuration; `params_dtype` is read.
        width: This rank's part of the last dimension.
        tp_group: Tensor-parallel group.
        group_size: Elements normalized together; None for the whole width over all ranks.
        eps: Added to the mean square.
    """

    def __init__(
        self,
        config: Any,
        width: int,
        *,
        tp_group: Any,
        group_size: int | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.tp_group = eps, group_size, tp_group
        ones = torch.ones(width, dtype=config.params_dtype, device=parameter_device())
        self.weight = nn.Parameter(ones)
        split_over_tensor_ranks(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the gated and normalized `x` `[..., width]`, computed in fp32, in `x`'s dtype."""
        gated = x.float() * F.silu(gate.float())
        if self.group_size is not None:
            groups = gated.unflatten(-1, (-1, self.group_size))
            normal = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
            return (normal.flatten(-2) * self.weight.float()).to(x.dtype)
        ranks = get_pg_size(self.tp_group)
        square = gated.square().sum(-1, keepdim=True)
        if ranks > 1:
            # Every rank needs the full sum, and every rank's use of it counts in the gradient.
            square = reduce_from_tensor_model_parallel_region(square, group=self.tp_group)
            square = copy_to_tensor_model_parallel_region(square, group=self.tp_group)
        normal = gated * torch.rsqrt(square / (gated.size(-1) * ranks) + self.eps)
        return (normal * self.weight.float()).to(x.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the weight as a tensor split over the tensor ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
