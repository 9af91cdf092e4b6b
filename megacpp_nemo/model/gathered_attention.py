"""Attention over chosen keys, in two ways that agree.

- `attend_masked`: over all keys, with a mask; cheap to set up, quadratic in the sequence.
- `attend_gathered`: over the latents of the chosen keys, which all heads share: with q = W_q x
  and k = W_k c, the score q . k is (W_k^T q) . c, and the mixed value is W_v applied to the mixed
  latents (multi-latent attention, arXiv 2405.04434). Linear in the sequence.

`gathering_pays` chooses by what `benchmarks/sparse_attention.py` measured.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Gathered wins from this many times the chosen keys on; measured on a CPU, in fp32.
TIMES_TOPK = 16
BLOCK_TOKENS = 256


def gathering_pays(length: int, topk: int, device: torch.device) -> bool:
    """Whether `attend_gathered` is the faster way; on CUDA nobody has measured it."""
    return device.type == "cpu" and length >= TIMES_TOPK * topk


def attend_masked(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Return the mixed values `[seq, batch, heads, value width]`.

    Args:
        query: `[seq, batch, heads, width]`.
        key: `[keys, batch, heads, width]`.
        value: `[keys, batch, heads, value width]`.
        chosen: `[batch, seq, keys]`, true for the keys of a query.
        scale: Factor of the scores.
        dropout: Share of the attention that is dropped.
    """
    width = value.size(-1)
    # Fused kernels want values as wide as keys, and are worth the zeros.
    value = functional.pad(value, (0, max(0, key.size(-1) - width)))
    mixed = functional.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=chosen.unsqueeze(1),
        dropout_p=dropout,
        scale=scale,
    )
    return mixed[..., :width].permute(2, 0, 1, 3)


def attend_gathered(
    query: Tensor,
    latent: Tensor,
    rotary: Tensor,
    up: Tensor,
    best: Tensor,
    seen: Tensor,
    scale: float,
) -> Tensor:
    """Return the mixed values `[seq, batch, heads, value width]`.

    Args:
        query: `[seq, batch, heads, width]`, its last channels rotated.
        latent: `[keys, batch, rank]`, of keys and values.
        rotary: `[keys, batch, rotated]`, rotated channels of the keys.
        up: `[heads * (width - rotated + value width), rank]`, the projection of the latents.
        best: `[batch, seq, topk]`, the keys of each query.
        seen: As `best`, false where the query has fewer keys.
        scale: Factor of the scores.
    """
    rank, rotated = latent.size(-1), rotary.size(-1)
    content = query.size(-1) - rotated
    per_head = up.unflatten(0, (query.size(2), -1))
    to_keys, to_values = per_head.split([content, per_head.size(1) - content], dim=1)
    absorbed = torch.einsum("sbhc,hcr->bshr", query[..., :content], to_keys)
    queries = torch.cat((absorbed, query[..., content:].transpose(0, 1)), dim=-1)
    keys = torch.cat((latent, rotary), dim=-1).transpose(0, 1)
    blocks = []
    for begin in range(0, query.size(0), BLOCK_TOKENS):
        rows = slice(begin, begin + BLOCK_TOKENS)
        # Gathered keys are many times the keys: made again for the backward pass, not kept.
        blocks.append(
            checkpoint(
                _attend_block,
                queries[:, rows],
                keys,
                best[:, rows],
                seen[:, rows],
                rank,
                scale,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return torch.einsum("bshr,hvr->sbhv", torch.cat(blocks, dim=1), to_values)


def _attend_block(
    queries: Tensor, keys: Tensor, best: Tensor, seen: Tensor, rank: int, scale: float
) -> Tensor:
    """Return the mixed latents `[batch, rows, heads, rank]` of some rows."""
    batch, length = keys.shape[:2]
    first = torch.arange(batch, device=best.device).mul_(length).view(-1, 1, 1)
    own = functional.embedding(best + first, keys.flatten(0, 1))  # [batch, rows, topk, width]
    logits = (queries @ own.transpose(-1, -2)).float() * scale
    weights = logits.masked_fill(~seen.unsqueeze(2), float("-inf")).softmax(-1)
    return weights.to(own.dtype) @ own[..., :rank]
