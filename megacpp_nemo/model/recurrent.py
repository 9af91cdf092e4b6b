"""The R block: M2RNN, a non-linear RNN with a matrix-valued state (arXiv 2603.14360).

in_proj -> causal depthwise convolution and SiLU on q, k, v -> scan -> + D v -> gate and
RMSNorm -> out_proj. There is no position embedding; the state starts from zero at each
document of a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megacpp_nemo.contract.shapes import RecurrentShape
from megacpp_nemo.model.documents import document_ids_of
from megacpp_nemo.model.generation_state import enter, keep, with_tail
from megacpp_nemo.model.initial import (
    depthwise_conv,
    inverse_softplus_steps,
    parameter_device,
    split_over_tensor_ranks,
)
from megacpp_nemo.model.m2rnn import forget_gate, m2rnn_scan
from megacpp_nemo.model.norms import GatedRMSNorm
from megacpp_nemo.model.projections import convolve, in_projection, out_projection
from megacpp_nemo.model.sharded_mixer import sharded_mixer_state


@dataclass
class RecurrentMixerSubmodules:
    """Projections of an M2RNN mixer."""

    in_proj: ModuleSpec | type | None = None
    out_proj: ModuleSpec | type | None = None


class RecurrentMixer(MegatronModule):
    """M2RNN as a mixer of Megatron's `MambaLayer`, tensor-parallel over heads.

    The fused input projection holds, in order and each split over the ranks, q and k
    (`num_qk_heads * key_dim` each), v and g (`num_heads * value_dim` each) and the forget
    gate's input (`num_heads`). A single query/key head is split by its width and gathered,
    because every rank's heads read it.

    Args:
        config: Megatron configuration.
        submodules: Input and output projections.
        d_model: Width of the residual stream.
        shape: Heads and widths.
        layer_number: 1-based layer number.
        pg_collection: Megatron's process groups.
        pp_layer_offset: Layers on earlier pipeline stages; unused here.
        name: Taken for later releases' call.
    """

    def __init__(
        self,
        config: Any,
        submodules: RecurrentMixerSubmodules,
        d_model: int,
        shape: RecurrentShape,
        layer_number: int | None = None,
        pg_collection: Any = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        self.shape = shape
        self.layer_number, self.tp_group = layer_number, pg_collection.tp
        self._set_sizes(self.tp_group.size())
        ranks, values = self.tp_group.size(), shape.num_heads * shape.value_dim
        inner = sum(self.part_sizes) * ranks
        self.in_proj = in_projection(submodules.in_proj, config, d_model, inner, self.tp_group)
        self._make_state_parameters()
        self.norm = GatedRMSNorm(config, self.value_size, tp_group=self.tp_group)
        self.out_proj = out_projection(submodules.out_proj, config, values, d_model, self.tp_group)

    def _set_sizes(self, ranks: int) -> None:
        shape = self.shape
        self.key_dim, self.value_dim = shape.key_dim, shape.value_dim
        self.num_heads = shape.num_heads // ranks
        self.value_size = self.num_heads * self.value_dim
        self.qk_size = shape.num_qk_heads * self.key_dim // ranks
        self.gather_qk = shape.num_qk_heads < ranks
        self.part_names = ["q", "k", "v", "g", "f"]
        self.part_sizes = [
            self.qk_size,
            self.qk_size,
            self.value_size,
            self.value_size,
            self.num_heads,
        ]

    def _make_state_parameters(self) -> None:
        """Convolution, gate, skip and state transition, each rank drawing its own part."""
        config, device, heads = self.config, parameter_device(), self.num_heads
        dtype = config.params_dtype
        with get_cuda_rng_tracker().fork():
            channels = 2 * self.qk_size + self.value_size
            self.conv1d = depthwise_conv(channels, self.shape.conv_width, dtype)
            self.dt_bias = nn.Parameter(inverse_softplus_steps(heads, dtype))
            decay = torch.empty(heads, dtype=torch.float32, device=device).uniform_(0, 16)
            # The open end of the interval is drawn once in 2^24: keep its logarithm finite.
            self.A_log = nn.Parameter(torch.log(decay.clamp(min=1e-4)).to(dtype))
        self.D = nn.Parameter(torch.ones(heads, dtype=dtype, device=device))
        identity = torch.eye(self.value_dim, dtype=dtype, device=device)
        self.transition = nn.Parameter(identity.repeat(heads, 1, 1))
        split_over_tensor_ranks(self.dt_bias, self.A_log, self.D, self.transition)

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
        packed_seq_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix `hidden_states` `[seq, batch, hidden]` along the sequence; return it and a bias."""
        context = inference_context or inference_params
        carried = enter(context, self.layer_number)
        documents = document_ids_of(self.config, packed_seq_params)
        projected = self.in_proj(hidden_states)[0].transpose(0, 1)
        channels, gate, forget = projected.split(
            [2 * self.qk_size + self.value_size, self.value_size, self.num_heads], dim=-1
        )
        channels = with_tail(context, self.layer_number, channels, self.shape.conv_width - 1)
        channels = convolve(self.conv1d, channels, documents)[:, -gate.size(1) :]
        q, k, v = channels.split([self.qk_size, self.qk_size, self.value_size], dim=-1)
        q, k = self._shared_by_all_heads(q), self._shared_by_all_heads(k)
        values = v.unflatten(-1, (-1, self.value_dim))
        y, state = m2rnn_scan(
            q.unflatten(-1, (-1, self.key_dim)),
            k.unflatten(-1, (-1, self.key_dim)),
            values,
            forget_gate(forget, self.A_log, self.dt_bias),
            self.transition,
            document_ids=documents,
            initial_state=None if carried is None else carried["state"],
            state_gradient_clip=self.shape.state_gradient_clip,
        )
        keep(context, self.layer_number, state=state)
        y = y + values * self.D.to(values.dtype).unsqueeze(-1)
        mixed = self.norm(y.flatten(-2), gate)
        return self.out_proj(mixed.transpose(0, 1).contiguous())

    def _shared_by_all_heads(self, part: Tensor) -> Tensor:
        """Gather the one query or key head; its gradients sum over the ranks."""
        if not self.gather_qk:
            return part
        full = gather_from_tensor_model_parallel_region(part, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(full, group=self.tp_group)

    def mamba_state_shapes_per_request(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the convolution and recurrent state of one sequence."""
        channels = 2 * self.qk_size + self.value_size
        return (
            (channels, self.shape.conv_width),
            (self.num_heads, self.key_dim, self.value_dim),
        )

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the parameters as sharded tensors, the fused ones by their logical parts."""
        names, sizes = self.part_names, self.part_sizes
        fused = {"in_proj.weight": (names, sizes)}
        # The convolution is over q, k and v.
        fused |= dict.fromkeys(("conv1d.weight", "conv1d.bias"), (names[:3], sizes[:3]))
        return sharded_mixer_state(self, prefix, sharded_offsets, metadata, fused=fused)
