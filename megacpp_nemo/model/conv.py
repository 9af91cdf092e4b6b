"""Causal depthwise convolution that respects document boundaries."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from megacpp_nemo.model.arguments import bind_shapes, compute_dtype, document_index


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Convolve every channel with its own causal filter; no activation.

    y[t] = bias + sum_j weight[width - 1 - j] * x[t - j], where a tap that would reach before
    the sequence or into an earlier document contributes zero.

    Args:
        x: Input [batch, seq, channels], any seq >= 1.
        weight: Filters [channels, width]; the last tap multiplies the current token.
        bias: [channels], or None.
        document_ids: Integers [batch, seq]; a change of value begins a new document.

    Returns:
        [batch, seq, channels] in `x.dtype`, accumulated in fp32 (fp64 for fp64 inputs).

    Raises:
        RuntimeRefusal: The shapes do not fit each other.
    """
    sizes = bind_shapes(
        x=(x, "batch seq channels"),
        weight=(weight, "channels width"),
        bias=(bias, "channels"),
        document_ids=(document_ids, "batch seq"),
    )
    seq, width = sizes["seq"], sizes["width"]
    dtype = compute_dtype(x, weight, bias)
    taps = weight.to(dtype).unbind(1)
    # Shifted multiply-adds: forward and backward together as fast on CPU as torch's depthwise
    # conv1d, and rows with and without document boundaries share every operation.
    padded = functional.pad(x.to(dtype), (0, 0, width - 1, 0))
    document = None
    if document_ids is not None:
        # No token carries index -1, so the padding belongs to no document.
        document = functional.pad(document_index(document_ids), (width - 1, 0), value=-1)
    y = x.to(dtype) * taps[-1]
    if bias is not None:
        y.add_(bias.to(dtype))
    for shift in range(1, min(width, seq)):
        window = slice(width - 1 - shift, width - 1 - shift + seq)
        tap = padded[:, window]
        if document is not None:
            foreign = document[:, window] != document[:, width - 1 :]
            tap = tap.masked_fill(foreign.unsqueeze(-1), 0.0)
        # Not addcmul: its backward takes one more pass over the activations.
        y.add_(tap * taps[-1 - shift])
    return y.to(x.dtype)
