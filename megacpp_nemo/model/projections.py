"""Projections of the mixers and of the sparse attention's indexer.

Both mixers project into one fused, column-parallel matrix, convolve some of its channels, and
project back through a row-parallel matrix, as Megatron's own Mamba mixer does. The indexer's
projections are whole on every rank.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from megacpp_nemo.model.conv import causal_conv1d
from megacpp_nemo.model.initial import parameter_device


def in_projection(
    spec: ModuleSpec | type | None, config: Any, d_model: int, width: int, tp_group: Any
) -> nn.Module:
    """Return the column-parallel projection from `d_model` to `width` over all ranks."""
    return build_module(
        spec,
        d_model,
        width,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=False,
        skip_bias_add=False,
        is_expert=False,
        tp_comm_buffer_name="fc1",
        tp_group=tp_group,
    )


def out_projection(
    spec: ModuleSpec | type | None, config: Any, width: int, d_model: int, tp_group: Any
) -> nn.Module:
    """Return the row-parallel projection from `width` over all ranks to `d_model`."""
    return build_module(
        spec,
        width,
        d_model,
        config=config,
        init_method=config.output_layer_init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=True,
        is_expert=False,
        tp_comm_buffer_name="fc2",
        tp_group=tp_group,
    )


def convolve(conv: nn.Conv1d, channels: Tensor, documents: Tensor | None) -> Tensor:
    """Return SiLU of the causal depthwise convolution of `channels` `[batch, seq, channels]`."""
    mixed = causal_conv1d(channels, conv.weight.squeeze(1), conv.bias, document_ids=documents)
    return F.silu(mixed)


class WholeLinear(nn.Module):
    """A linear layer that is whole on every rank, called as Transformer Engine's is."""

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, init_method: Any, **_: Any
    ) -> None:
        super().__init__()
        dtype = config.params_dtype
        inner = nn.Linear(
            input_size, output_size, bias=False, device=parameter_device(), dtype=dtype
        )
        self.weight = inner.weight
        init_method(self.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return the projection of `x` and no bias."""
        return F.linear(x, self.weight), None
