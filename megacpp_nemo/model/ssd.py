"""Mamba-2 state space duality (arXiv 2405.21060): the recurrence and its chunked form.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

`ssd_sequential` is the equation, one token at a time. `ssd_chunked` is the same map as matrix
products: inside a chunk tokens attend to each other through the decay between them, and only
one state per chunk travels on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megacpp_nemo.model.arguments import (
    bind_shapes,
    check_chunk_size,
    check_shared,
    compute_dtype,
    document_index,
)


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
        y, final_state = _by_chunks(
            x.to(dtype), dt.to(dtype), A, B.to(dtype), C.to(dtype), document, state, chunk_size
        )
        if D is not None:
            y = y + D.to(dtype)[:, None] * x.to(dtype)
    return y.to(x.dtype), final_state


def _by_chunks(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    document: Tensor | None,
    state: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Return y without the skip [batch, seq, heads, head_dim], and the final state.

    Below, b = batch, c = chunk, g = group, r = head in the group, l = token of the chunk.
    """
    (batch, seq, heads, head_dim), (groups, width) = x.shape, B.shape[2:]
    shared, chunk_size = heads // groups, min(chunk_size, seq)
    chunks = -(-seq // chunk_size)
    pad = chunks * chunk_size - seq
    # [b, c, g, l, ...]; tokens of one chunk are adjacent rows of a matrix.
    drive = torch.unflatten(_split(x * dt.unsqueeze(-1), pad, chunks), 3, (groups, shared))
    drive = drive.transpose(2, 3)
    B, C = (_split(t, pad, chunks).transpose(2, 3) for t in (B, C))
    total, barrier, inward, outward, across = _decays(dt, A, document, pad, chunks, x.dtype)
    scores = _DecayedScores.apply(  # type: ignore[no-untyped-call]
        (C @ B.mT).unsqueeze(3), torch.unflatten(total, 2, (groups, shared)), barrier.unsqueeze(2)
    )
    y = (scores @ drive.transpose(3, 4)).transpose(3, 4)  # [b, c, g, l, r, head_dim]
    outward = torch.unflatten(outward, 2, (groups, shared)).transpose(3, 4).unsqueeze(-1)
    added = (drive * outward).flatten(4).mT @ B  # [b, c, g, r * head_dim, state]
    added = added.reshape(batch, chunks, heads, head_dim, width)
    carried = []
    for added_here, across_here in zip(added.unbind(1), across.unbind(1), strict=True):
        carried.append(state)
        state = added_here + across_here[..., None, None] * state
    entering = torch.stack(carried, dim=1).view(batch, chunks, groups, shared * head_dim, width)
    read = torch.unflatten(C @ entering.mT, 4, (shared, head_dim))
    inward = torch.unflatten(inward, 2, (groups, shared)).transpose(3, 4).unsqueeze(-1)
    y = (y + read * inward).transpose(2, 3)
    return y.reshape(batch, chunks * chunk_size, heads, head_dim)[:, :seq], state


def _decays(
    dt: Tensor, A: Tensor, document: Tensor | None, pad: int, chunks: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return how a state decays on its way, with barriers where a document begins.

    total [b, c, heads, l] (fp64): log2 of the decay from the start of the chunk to token l;
    barrier [b or 1, c or 1, 1, l, l]: 0 where token s (column) reaches token l (row), else -inf;
    inward [b, c, heads, l]: survival from the state entering the chunk to token l;
    outward [b, c, heads, l]: survival from token l to the end of the chunk;
    across [b, c, heads]: survival from the state entering the chunk to its end.
    """
    # Differences of running sums lose the small steps that follow large ones (-50 a token), so
    # the sums are fp64; and exp2, which torch vectorises far better than exp, wants log2.
    log_decay = dt.double() * (A.double() * math.log2(math.e))
    total = _split(log_decay, pad, chunks).cumsum(2).transpose(2, 3)
    end, length = total[..., -1:], total.shape[-1]
    reaches = torch.ones(1, 1, 1, length, length, dtype=torch.bool, device=dt.device).tril()
    if document is None:
        inward, outward, across = total, end - total, end
    else:
        token = torch.arange(chunks * length, device=dt.device).clamp_max(document.shape[1] - 1)
        document = torch.unflatten(document[:, token], 1, (chunks, length)).unsqueeze(2)
        last = document[..., -1:]
        before = torch.cat((document[:, :1, :, :1], last[:, :-1]), dim=1)
        reaches = reaches & (document.unsqueeze(-1) == document.unsqueeze(-2))
        inward = total + _barrier(document == before, dtype)
        outward = (end - total) + _barrier(document == last, dtype)
        across = end + _barrier(last == before, dtype)
    inward, outward, across = (log2.to(dtype).exp2() for log2 in (inward, outward, across))
    return total, _barrier(reaches, dtype), inward, outward, across.squeeze(-1)


def _barrier(reaches: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the exponent to add so that nothing survives where `reaches` is false.

    It is added before the exponential: above the diagonal the gaps are large and positive, and
    an infinity masked afterwards would come back as 0 * inf in the backward pass.
    """
    return torch.zeros_like(reaches, dtype=dtype).masked_fill_(~reaches, -torch.inf)


class _DecayedScores(torch.autograd.Function):
    """scores[l, s] * 2 ** (total[l] - total[s] + barrier[l, s]), the largest array of the method.

    Its gradient is written out because the result is its own derivative by the exponent, which
    saves most of the passes over this array that autograd would take.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, total: Tensor, barrier: Tensor) -> Tensor:
        gap = total.unsqueeze(-1) - total.unsqueeze(-2)
        survival = gap.to(scores.dtype).add_(barrier).exp2_()
        decayed = scores * survival
        ctx.save_for_backward(survival, decayed)
        return decayed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        survival, decayed = ctx.saved_tensors
        by_exponent = grad * decayed
        # Every entry enters both sums and cancels; rounded to fp32 first, it would not.
        by_total = by_exponent.sum(-1, dtype=torch.float64)
        by_total.sub_(by_exponent.sum(-2, dtype=torch.float64))
        by_scores = torch.mul(grad, survival, out=by_exponent).sum(3, keepdim=True)
        return by_scores, by_total.mul_(math.log(2.0)), None


def _split(t: Tensor, pad: int, chunks: int) -> Tensor:
    """Cut [batch, seq, ...] into [batch, chunks, tokens, ...], padded with zeros at the end."""
    padded = functional.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) if pad else t
    return torch.unflatten(padded, 1, (chunks, -1))


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
