"""The split path of the native Mamba lane: mamba-ssm's scan and causal-conv1d's convolution.

`SplitMambaMixer` is the portable mixer with these two steps on kernels. It serves where the fused
kernel does not: with another number of taps, without causal-conv1d, and where the state enters or
leaves. Kernels are imported when they are first called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megacpp_nemo.model.arguments import document_index
from megacpp_nemo.model.mamba import PortableMambaMixer
from megacpp_nemo.model.mamba_paths import kernel_convolution


class SplitMambaMixer(PortableMambaMixer):
    """Megatron's Mamba mixer with convolution, scan, norm and projection apart.

    Its arguments are `PortableMambaMixer`'s.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Packages are looked for once, not in every forward pass.
        self.kernel_convolves = kernel_convolution(self.d_conv)

    def convolve(self, channels: Tensor, documents: Tensor | None) -> Tensor:
        """Return SiLU of the causal convolution of `channels` `[batch, seq, channels]`."""
        if not self.kernel_convolves:
            return super().convolve(channels, documents)
        return conv_kernel(self.conv1d, channels, documents)

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
        """Return y and the state after the last token, as `PortableMambaMixer.scan` does."""
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        y, state = mamba_chunk_scan_combined(
            x.contiguous(),
            steps.contiguous(),
            -torch.exp(self.A_log.float()),
            b.contiguous(),
            c.contiguous(),
            chunk_size,
            D=self.D.float(),
            dt_bias=self.dt_bias.float(),
            dt_softplus=True,
            initial_states=entering,
            seq_idx=_index(documents),
            return_final_states=True,
        )
        return y, state.float()


def conv_kernel(conv: nn.Conv1d, channels: Tensor, documents: Tensor | None) -> Tensor:
    """Return what `projections.convolve` does, from causal-conv1d's kernel."""
    from causal_conv1d import causal_conv1d_fn

    # With documents the kernel wants channels to lie together: `[batch, channels, seq]` as a
    # transposed view does, and a contiguous one does not.
    mixed: Tensor = causal_conv1d_fn(
        channels.contiguous().transpose(1, 2),
        conv.weight.squeeze(1),
        conv.bias,
        seq_idx=_index(documents),
        activation="silu",
    )
    return mixed.transpose(1, 2)


def _index(documents: Tensor | None) -> Tensor | None:
    """Return the form in which the kernels take document boundaries."""
    return None if documents is None else document_index(documents).int()
