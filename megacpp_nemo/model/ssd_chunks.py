"""State space duality by chunks (arXiv 2405.21060), for any drive and decay.

Inside a chunk tokens attend to each other through the decay between them, and only one state per
chunk travels on. `ssd_chunked` and `mamba3_chunked` bring their recurrences into this form.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def scan_chunks(
    drive: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    document: Tensor | None,
    state: Tensor,
    chunk_size: int,
    step: int = 1,
) -> tuple[Tensor, Tensor]:
    """Sum what every token adds to the state over all later ones, by chunks.

    Args:
        drive: What each token adds, without B [batch, seq, heads, head_dim], in fp32 or fp64.
        log_decay: Logarithm of the decay from the token before [batch, seq, heads], fp64.
        B: Input projections [batch, seq, groups, state], of `drive`'s dtype.
        C: Output projections, shaped like B.
        document: Running numbers of the documents [batch, seq], or None.
        state: State before the first token [batch, heads, head_dim, state].
        chunk_size: Tokens per chunk, a multiple of `step`.
        step: Adjacent tokens that are one moment: they see each other, whatever their order.

    Returns:
        y without a skip [batch, seq, heads, head_dim], and the final state.
    """
    # Below, b = batch, c = chunk, g = group, r = head in the group, l = token of the chunk.
    (batch, seq, heads, head_dim), (groups, width) = drive.shape, B.shape[2:]
    shared, chunk_size = heads // groups, min(chunk_size, seq)
    chunks = -(-seq // chunk_size)
    pad = chunks * chunk_size - seq
    # [b, c, g, l, ...]; tokens of one chunk are adjacent rows of a matrix.
    drive = torch.unflatten(_split(drive, pad, chunks), 3, (groups, shared))
    drive = drive.transpose(2, 3)
    B, C = (_split(t, pad, chunks).transpose(2, 3) for t in (B, C))
    total, barrier, inward, outward, across = _decays(
        log_decay, document, pad, chunks, step, B.dtype
    )
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
    log_decay: Tensor,
    document: Tensor | None,
    pad: int,
    chunks: int,
    step: int,
    dtype: torch.dtype,
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
    log2_decay = log_decay * math.log2(math.e)
    total = _split(log2_decay, pad, chunks).cumsum(2).transpose(2, 3)
    end, length = total[..., -1:], total.shape[-1]
    moment = torch.arange(length, device=total.device) // step
    reaches = (moment.unsqueeze(1) >= moment)[None, None, None]
    if document is None:
        inward, outward, across = total, end - total, end
    else:
        token = torch.arange(chunks * length, device=total.device).clamp_max(document.shape[1] - 1)
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
