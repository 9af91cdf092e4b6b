"""The native Mamba lane: Megatron's Mamba-2 mixer, fused where its kernels exist.

- `FusedMambaMixer`: Megatron's own mixer; document boundaries reach its kernels.
- `PortableMambaMixer`: the same mixer in plain torch, where the kernels are absent.

Between them stands `mamba_split.SplitMambaMixer`; `mamba_paths` chooses. All have the same
parameters under the same names, so a checkpoint moves between them. Mamba-2 is arXiv 2405.21060.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megacpp_nemo.model.documents import DocumentBoundaries, document_ids_of
from megacpp_nemo.model.generation_state import enter, keep, with_tail
from megacpp_nemo.model.initial import (
    depthwise_conv,
    inverse_softplus_steps,
    parameter_device,
    split_over_tensor_ranks,
)
from megacpp_nemo.model.norms import GatedRMSNorm
from megacpp_nemo.model.projections import convolve, in_projection, out_projection
from megacpp_nemo.model.ssd import ssd_chunked


class FusedMambaMixer(MambaMixer):
    """Megatron's Mamba mixer, told where documents begin in rows of shape `[batch, seq]`."""

    def _create_packed_seq_idx(self, packed_seq_params: Any, total_tokens: int) -> Tensor | None:
        if isinstance(packed_seq_params, DocumentBoundaries):
            return packed_seq_params.sequence_index() if self.config.reset_state else None
        return super()._create_packed_seq_idx(packed_seq_params, total_tokens)


class PortableMambaMixer(MambaMixer):
    """Megatron's Mamba mixer in plain torch: chunked SSD instead of the fused kernels.

    Tensor-parallel over heads and groups, under sequence parallelism too: the input
    projection is column-parallel, the output projection row-parallel.

    Args:
        config: Megatron configuration with the `mamba_*` sizes.
        submodules: Input and output projections.
        d_model: Width of the residual stream.
        d_conv: Taps of the causal convolution.
        chunk_size: Tokens per chunk of the scan.
        layer_number: 1-based layer number.
        pg_collection: Megatron's process groups.
        pp_layer_offset: Layers on earlier pipeline stages; unused here.
        name: Taken for later releases' call.
    """

    def __init__(
        self,
        config: Any,
        submodules: MambaMixerSubmodules,
        d_model: int,
        d_conv: int = 4,
        chunk_size: int = 128,
        layer_number: int | None = None,
        pg_collection: Any = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        # Upstream's constructor insists on its kernels, so only its ancestors' is called.
        MegatronModule.__init__(self, config)
        self.layer_number, self.chunk_size, self.d_conv = layer_number, chunk_size, d_conv
        self.pg_collection, self.tp_group = pg_collection, pg_collection.tp
        self._set_sizes(d_model, self.tp_group.size())
        inner = 2 * self.d_inner + 2 * self.ngroups * self.d_state + self.nheads
        self.in_proj = in_projection(submodules.in_proj, config, d_model, inner, self.tp_group)
        self._make_state_parameters()
        self.norm = GatedRMSNorm(
            config,
            self.d_inner_local_tp,
            tp_group=self.tp_group,
            group_size=self.d_inner_local_tp // self.ngroups_local_tp,
        )
        self.out_proj = out_projection(
            submodules.out_proj, config, self.d_inner, d_model, self.tp_group
        )

    def _set_sizes(self, d_model: int, ranks: int) -> None:
        config = self.config
        self.d_model = d_model
        self.headdim, self.d_state = config.mamba_head_dim, config.mamba_state_dim
        self.nheads = config.mamba_num_heads or 2 * d_model // self.headdim
        self.ngroups = config.mamba_num_groups
        self.d_inner = self.nheads * self.headdim
        self.nheads_local_tp = self.nheads // ranks
        self.ngroups_local_tp = self.ngroups // ranks
        self.d_inner_local_tp = self.d_inner // ranks
        self.bc_local = self.ngroups_local_tp * self.d_state

    def _make_state_parameters(self) -> None:
        """Convolution, decay, step bias and skip, each rank drawing its own part."""
        heads, device = self.nheads_local_tp, parameter_device()
        dtype = self.config.params_dtype
        with get_cuda_rng_tracker().fork():
            self.conv1d = depthwise_conv(
                self.d_inner_local_tp + 2 * self.bc_local, self.d_conv, dtype
            )
            self.dt_bias = nn.Parameter(inverse_softplus_steps(heads, dtype))
            decay = torch.empty(heads, dtype=torch.float32, device=device).uniform_(1, 16)
            self.A_log = nn.Parameter(torch.log(decay))
        self.D = nn.Parameter(torch.ones(heads, device=device))
        split_over_tensor_ranks(self.dt_bias, self.A_log, self.D)

    def train(self, mode: bool = True) -> PortableMambaMixer:
        """Switch between training and evaluation.

        Later releases refresh a cache for step-by-step generation here; this mixer has none.
        """
        nn.Module.train(self, mode)
        return self

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
        gate, channels, steps = projected.split(
            [
                self.d_inner_local_tp,
                self.d_inner_local_tp + 2 * self.bc_local,
                self.nheads_local_tp,
            ],
            dim=-1,
        )
        seq = gate.size(1)
        channels = with_tail(context, self.layer_number, channels, self.d_conv - 1)
        channels = self.convolve(channels, documents)[:, -seq:]
        x, b, c = channels.split([self.d_inner_local_tp, self.bc_local, self.bc_local], dim=-1)
        y, state = self.scan(
            x.unflatten(-1, (-1, self.headdim)),
            steps,
            b.unflatten(-1, (-1, self.d_state)),
            c.unflatten(-1, (-1, self.d_state)),
            documents=documents,
            entering=None if carried is None else carried["state"],
            # A chunk is padded to its size, which one token need not pay for.
            chunk_size=self.chunk_size if context is None else min(self.chunk_size, seq),
        )
        keep(context, self.layer_number, state=state)
        mixed = self.norm(y.flatten(-2), gate)
        return self.out_proj(mixed.transpose(0, 1).contiguous())

    def convolve(self, channels: Tensor, documents: Tensor | None) -> Tensor:
        """Return SiLU of the causal convolution of `channels` `[batch, seq, channels]`."""
        return convolve(self.conv1d, channels, documents)

    def scan(
        self,
        x: Tensor,
        steps: Tensor,
        b: Tensor,
        c: Tensor,
        *,
        documents: Tensor | None,
        entering: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        """Return y and the state after the last token, with this layer's decay, bias and skip.

        Args:
            x: Inputs [batch, seq, heads, head_dim].
            steps: Step sizes before bias and softplus [batch, seq, heads].
            b: Input projections [batch, seq, groups, state].
            c: Output projections, shaped like `b`.
            documents: Ids [batch, seq] that change where the state starts anew.
            entering: State before the first token [batch, heads, head_dim, state].
            chunk_size: Tokens per chunk.
        """
        return ssd_chunked(
            x,
            F.softplus(steps.float() + self.dt_bias.float()),
            -torch.exp(self.A_log.float()),
            b,
            c,
            D=self.D.float(),
            chunk_size=chunk_size,
            document_ids=documents,
            initial_state=entering,
        )
