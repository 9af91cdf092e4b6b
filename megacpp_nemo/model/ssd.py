"""Mamba-2 state space duality (arXiv 2405.21060): the recurrence and its chunked form.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

`ssd_sequential` is the equation, one token at a time. `ssd_chunked` is the same map as matrix
products: inside a chunk tokens attend to each other through the decay between them, and only
one state per chunk travels on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megacpp_nemo.model.arguments import (
    bind_shapes,
    check_chunk_size,
    check_shared,
    compute_dtype,
    document_index,
)
from megacpp_nemo.model.ssd_chunks import scan_chunks


def ssd_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token: the reference for `ssd_chunked`.

    Args:
        x: Input [batch, seq, heads, head_dim].
        dt: Step sizes [batch, seq, heads], already positive (after softplus).
        A: Decay rates [heads], negative.
        B: Input projections [batch, seq, groups, state]; heads must be a multiple of groups,
            and head h reads group h // (heads // groups).
        C: Output projections, shaped like B.
        D: Skip weights [heads], or None for no skip.
        document_ids: Integers [batch, seq]; where the value changes the state restarts from zero.
        initial_state: State before the first token [batch, heads, head_dim, state]; default zero.

    Returns:
        y [batch, seq, heads, head_dim] in `x.dtype`, and the state after the last token
        [batch, heads, head_dim, state] in fp32. fp64 inputs are computed in fp64.

    Raises:
        RuntimeRefusal: The shapes do not fit each other.
    """
    sizes = _check(x, dt, A, B, C, D, document_ids, initial_state)
    dtype, heads_per_group = compute_dtype(x, dt, A, B, C), sizes["heads"] // sizes["groups"]
    inputs, steps = x.to(dtype), dt.to(dtype)
    decay = (steps * A.to(dtype)).exp()
    B, C = (t.to(dtype).repeat_interleave(heads_per_group, dim=2) for t in (B, C))
    state = _initial(initial_state, inputs, sizes)
    document = None if document_ids is None else document_index(document_ids)
    outputs = []
    for t in range(sizes["seq"]):
        if document is not None and t > 0:
            starts = document[:, t] != document[:, t - 1]
            state = state.masked_fill(starts[:, None, None, None], 0.0)
        drive = (steps[:, t, :, None] * inputs[:, t])[..., None] * B[:, t, :, None, :]
        state = decay[:, t, :, None, None] * state + drive
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * inputs
    return y.to(x.dtype), state


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Compute `ssd_sequential` by chunks of `chunk_size` tokens, without a loop over tokens.

    Arguments, results and errors are those of `ssd_sequential`. The sequence may have any
    length: it is padded with dt = 0, which leaves the state as it is.
    """
    sizes = _check(x, dt, A, B, C, D, document_ids, initial_state, chunk_size)
    with torch.autocast(x.device.type, enabled=False):
        dtype = compute_dtype(x, dt, A, B, C)
        state = _initial(initial_state, x.to(dtype), sizes)
        document = None if document_ids is None else document_index(document_ids)
        drive, log_decay = x.to(dtype) * dt.to(dtype).unsqueeze(-1), dt.double() * A.double()
        y, final_state = scan_chunks(
            drive, log_decay, B.to(dtype), C.to(dtype), document, state, chunk_size
        )
        if D is not None:
            y = y + D.to(dtype)[:, None] * x.to(dtype)
    return y.to(x.dtype), final_state


def _initial(state: Tensor | None, x: Tensor, sizes: dict[str, int]) -> Tensor:
    shape = [sizes[name] for name in ("batch", "heads", "head_dim", "state")]
    return x.new_zeros(shape) if state is None else state.to(x.dtype)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int = 1,
) -> dict[str, int]:
    sizes = bind_shapes(
        x=(x, "batch seq heads head_dim"),
        dt=(dt, "batch seq heads"),
        A=(A, "heads"),
        B=(B, "batch seq groups state"),
        C=(C, "batch seq groups state"),
        D=(D, "heads"),
        document_ids=(document_ids, "batch seq"),
        initial_state=(initial_state, "batch heads head_dim state"),
    )
    check_shared(sizes, "heads", "groups")
    check_chunk_size(chunk_size)
    return sizes
