"""Semantic tube prediction in plain tensors (STP, arXiv 2602.22617).

- `row_uniforms`: random numbers of one row of one step, whoever computes it
- `draw_triples`: positions s < r < t, each three within one document of a packed row
- `tube_loss`: how far the states at r to t turn from where those at s to r pointed
- `tube_loss_sequential`: the same, triple by triple
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

# Chords shorter than this have no direction: their gradient would be its inverse.
SHORTEST = 1e-6
LEAST_TOKENS = 3


class Triples(NamedTuple):
    """Positions drawn for a batch of rows.

    Args:
        positions: `[batch, spans, 3]` int64, ascending along the last dimension.
        valid: `[batch]`, false where a row has no document of three tokens; positions are 0 there.
    """

    positions: Tensor
    valid: Tensor


def row_uniforms(seed: int, step: int, row: int, spans: int) -> Tensor:
    """Return `[spans, 3]` uniform numbers in [0, 1), float64, on the CPU.

    A function of its arguments alone; the global generators are not touched.

    Args:
        seed: Seed of the run.
        step: Optimizer steps taken.
        row: Place of the row in the global batch.
        spans: Triples that are drawn from them.
    """
    key = hashlib.blake2b(f"{seed} {step} {row}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    return torch.rand(spans, 3, generator=generator, dtype=torch.float64)


def draw_triples(document_ids: Tensor | None, seq: int, uniforms: Tensor) -> Triples:
    """Return positions drawn uniformly over the tokens of documents of at least three tokens.

    A token is drawn among those of all such documents in the row, then two more of its document.
    Nothing waits for a device.

    Args:
        document_ids: `[batch, seq]` integers that change where a document begins; None if each
            row is one document.
        seq: Tokens per row.
        uniforms: `[batch, spans, 3]` in [0, 1), on the device of the result.
    """
    batch = uniforms.size(0)
    if document_ids is None:
        document_ids = torch.zeros(batch, seq, dtype=torch.int64, device=uniforms.device)
    first, length = _documents(document_ids)
    # The number of tokens to choose from up to each position, so that the k-th is searched for.
    rank = (length >= LEAST_TOKENS).cumsum(1)
    total = rank[:, -1:]
    anchor = torch.searchsorted(rank, _choice(uniforms[..., 0], total) + 1).clamp(max=seq - 1)
    begin, count = first.gather(1, anchor), length.gather(1, anchor)
    a = anchor - begin
    b = _choice(uniforms[..., 1], count - 1)
    b = b + (b >= a)
    c = _choice(uniforms[..., 2], count - 2)
    c = c + (c >= torch.minimum(a, b))
    c = c + (c >= torch.maximum(a, b))
    positions = begin.unsqueeze(-1) + torch.stack([a, b, c], -1).sort(-1).values
    valid = total.squeeze(1) > 0
    return Triples(positions.where(valid[:, None, None], 0), valid)


def tube_loss(s: Tensor, r: Tensor, t: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the mean of `1 - cos(t - r, r - s)` over triples: fp32, from 0 to 2.

    States that do not move between two of the positions count as neither straight nor turned,
    1, and get no gradient. Without triples the mean is 0.

    Args:
        s: States at the first positions, `[..., hidden]`; any float type.
        r: States at the middle positions.
        t: States at the last positions.
        valid: Truths that broadcast to `[...]`; where false a triple adds 0 to the mean.
    """
    ahead, behind = t.float() - r.float(), r.float() - s.float()
    ahead_2, behind_2 = ahead.square().sum(-1), behind.square().sum(-1)
    moves = torch.minimum(ahead_2, behind_2) > SHORTEST**2
    # Replaced before the root, not after it: the gradient of what `where` drops must be finite.
    scale = ahead_2.where(moves, 1).rsqrt() * behind_2.where(moves, 1).rsqrt()
    cosine = ((ahead * behind).sum(-1) * scale).where(moves, 0)
    distance = (1 - cosine).clamp(0, 2)
    if valid is not None:
        distance = distance.where(valid, 0)
    return distance.sum() / max(1, distance.numel())


def tube_loss_sequential(s: Tensor, r: Tensor, t: Tensor) -> float:
    """Return `tube_loss` of `[triples, hidden]` by the equation, triple by triple.

    The reference for `tube_loss`; in fp64, and without gradients.
    """
    total = 0.0
    for begin, middle, end in zip(s.tolist(), r.tolist(), t.tolist(), strict=True):
        ahead = [x - y for x, y in zip(end, middle, strict=True)]
        behind = [x - y for x, y in zip(middle, begin, strict=True)]
        lengths = math.hypot(*ahead), math.hypot(*behind)
        dot = sum(x * y for x, y in zip(ahead, behind, strict=True))
        total += 1 - (dot / math.prod(lengths) if min(lengths) > SHORTEST else 0)
    return total / max(1, len(s))


def _documents(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first position and the length of each token's document, `[batch, seq]`."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    places = torch.arange(ids.size(1), device=ids.device).expand(ids.shape)
    first = places.where(begins, 0).cummax(1).values
    index = begins.cumsum(1) - 1
    lengths = torch.zeros_like(index).scatter_add_(1, index, torch.ones_like(index))
    return first, lengths.gather(1, index)


def _choice(uniform: Tensor, count: Tensor) -> Tensor:
    """Return integers from 0 to `count - 1`; 0 where there is none to choose."""
    return (uniform * count).long().minimum(count - 1).clamp(min=0)
