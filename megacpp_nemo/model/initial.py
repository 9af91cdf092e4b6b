"""Initial parameters shared by the mixers, and their tensor-parallel marks."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn

STEP_MIN, STEP_MAX, STEP_FLOOR = 1e-3, 1e-1, 1e-4
# Rows of a table drawn at once: what is drawn beyond this rank's columns is thrown away.
TABLE_BLOCK = 1 << 18


def parameter_device() -> torch.device | None:
    """Return the device new parameters live on: the CUDA device, or torch's default.

    The default is the CPU, or the meta device inside `torch.device("meta")`.
    """
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def split_over_tensor_ranks(*parameters: nn.Parameter) -> None:
    """Mark parameters as split along dimension 0 over the tensor-parallel ranks."""
    for parameter in parameters:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.partition_dim = 0  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]


def depthwise_conv(channels: int, width: int, dtype: torch.dtype) -> nn.Conv1d:
    """Return a depthwise convolution's weight `[channels, 1, width]` and bias, split over ranks.

    The module only holds the parameters, under the names of Megatron's Mamba mixer, whose
    initial distribution is torch's own.
    """
    conv = nn.Conv1d(
        channels, channels, width, groups=channels, device=parameter_device(), dtype=dtype
    )
    assert conv.bias is not None
    split_over_tensor_ranks(conv.weight, conv.bias)  # type: ignore[arg-type]
    return conv


def inverse_softplus_steps(count: int, dtype: torch.dtype) -> Tensor:
    """Return `[count]` biases whose softplus is log-uniform in [1e-3, 1e-1], at least 1e-4."""
    uniform = torch.rand(count, dtype=torch.float32, device=parameter_device())
    low, high = math.log(STEP_MIN), math.log(STEP_MAX)
    steps = torch.exp(uniform * (high - low) + low).clamp(min=STEP_FLOOR)
    return (steps + torch.log(-torch.expm1(-steps))).to(dtype)


def normal_rows(
    weight: Tensor, width: int, first: int, *, std: float, seed: int, name: str
) -> None:
    """Fill a part of a table with normal values.

    The table has a generator of its own, of the CPU: it is the same whatever splits it and
    wherever it lies, and what is drawn for the rest of the model is the same with and without it.

    Args:
        weight: `[rows, part]`, columns `first` to `first + part` of the table.
        width: Columns of the whole table.
        first: First column of the part.
        std: Standard deviation of the values.
        seed: The model's.
        name: Of the table, which tells its draw from those of others.
    """
    if weight.is_meta:
        return
    draw = torch.Generator("cpu").manual_seed(seed ^ zlib.crc32(name.encode()))
    with torch.no_grad():
        for rows in weight.split(TABLE_BLOCK):
            whole = torch.randn(len(rows), width, generator=draw, device="cpu")
            rows.copy_(whole[:, first : first + weight.size(1)] * std)
