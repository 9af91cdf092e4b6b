"""The lightning indexer of DeepSeek sparse attention (DSA, DeepSeek-V3.2, section 2.1).

It scores every key for every query, I_{t,s} = sum_j w_{t,j} ReLU(q_{t,j} . k_s), and is trained
by KL(p || softmax I), p being what the attention heads look at.

- `index_scores`: the scores; `index_scores_by_head` in the memory of one head.
- `indexer_loss`: the loss and its gradients, in the same memory; `indexer_loss_reference`.
- `LightningIndexer`: Megatron's module of the parameters, with what is wrong in it put right.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexer
from torch import Tensor, nn

from megacpp_nemo.model.initial import parameter_device

try:
    from fast_hadamard_transform import hadamard_transform
except ImportError:
    hadamard_transform = None


def index_scores(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """Return the scores `[batch, seq, keys]`, in fp32 from any precision.

    Args:
        queries: `[seq, batch, heads, width]`.
        keys: `[keys, batch, width]`, shared by the heads.
        weights: `[seq, batch, heads]`.
    """
    dots = torch.einsum("sbhd,tbd->bhst", queries.float(), keys.float()).relu()
    return torch.einsum("bhst,sbh->bst", dots, weights.float())


def index_scores_by_head(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """Return `index_scores`, holding the products of one head at a time."""
    scores = None
    for query, weight in zip(queries.unbind(2), weights.unbind(2), strict=True):
        dots = torch.einsum("sbd,tbd->bst", query.float(), keys.float()).relu_()
        dots.mul_(weight.float().t().unsqueeze(-1))
        scores = dots if scores is None else scores.add_(dots)
    assert scores is not None
    return scores


def hidden_keys(length: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """Return `[batch or 1, seq, seq]`, true for later keys and for those the mask hides."""
    later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1).unsqueeze(0)
    return later if attention_mask is None else later | attention_mask.squeeze(1)


def select(scores: Tensor, hidden: Tensor, topk: int) -> Tensor:
    """Return `[batch, seq, keys]`, true for the keys that each query attends to.

    Of keys that tie for the last place, as those that every head rejects do, the first are
    chosen: the choice is the same whatever keys come later.

    Args:
        scores: `[batch, seq, keys]`; -inf for hidden keys.
        hidden: Broadcastable to it, true for keys a query must not see.
        topk: Keys of a query; one that sees fewer attends to all it sees.
    """
    last = scores.topk(min(topk, scores.size(-1)), dim=-1).values[..., -1:]
    better, ties = scores > last, (scores == last) & ~hidden
    left = topk - better.sum(-1, keepdim=True)
    return better | (ties & (ties.cumsum(-1, dtype=torch.int32) <= left))


def as_indices(chosen: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the chosen keys of each query `[batch, seq, topk]` in order, and which there are.

    Args:
        chosen: `[batch, seq, keys]`, at most `topk` of them in a row.
        topk: Keys of a query.
    """
    there = torch.arange(topk, device=chosen.device) < chosen.sum(-1, keepdim=True)
    best = torch.zeros(there.shape, dtype=torch.long, device=chosen.device)
    # Both masks are true as often in each row, and are read row by row.
    best[there] = chosen.flatten().nonzero().squeeze(1) % chosen.size(-1)
    return best, there


def indexer_loss(
    queries: Tensor, keys: Tensor, weights: Tensor, scores: Tensor, target: Tensor
) -> Tensor:
    """Return the mean over queries of KL(target || softmax scores), in nats.

    Args:
        queries: As in `index_scores`, with the next two; gradients go to these three.
        keys: Keys of the indexer.
        weights: Weights of its heads.
        scores: Their `index_scores`; -inf for keys outside the distribution.
        target: `[batch, seq, keys]`, sums to 1 over the keys; 0 wherever a score is -inf.
    """
    loss: Tensor = _IndexerLoss.apply(queries, keys, weights, scores, target)
    return loss


def indexer_loss_reference(scores: Tensor, target: Tensor) -> Tensor:
    """Return what `indexer_loss` does, differentiable by the scores."""
    ratio = target.log() - scores.log_softmax(-1)
    return (target * ratio).masked_fill(target == 0, 0).sum(-1).mean()


class _IndexerLoss(torch.autograd.Function):
    """The loss, with its gradients made in the forward pass.

    Nothing but this loss depends on the three inputs, so that their gradients are a multiple of
    these: nothing of the size of the scores is kept for the backward pass.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, queries: Tensor, keys: Tensor, weights: Tensor, scores: Tensor, target: Tensor
    ) -> Tensor:
        log_index = scores.log_softmax(-1)
        # Logarithms are subtracted before they are summed: near the end they are nearly equal.
        ratio = target.log().sub_(log_index).masked_fill_(target == 0, 0)
        loss = ratio.mul_(target).sum()
        rows = target[..., 0].numel()
        if any(ctx.needs_input_grad):
            by_scores = log_index.exp_().sub_(target).div_(rows)
            ctx.save_for_backward(*_score_gradients(queries, keys, weights, by_scores))
        return loss / rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *(gradient.to(kept.dtype) * kept for kept in ctx.saved_tensors), None, None


def _score_gradients(
    queries: Tensor, keys: Tensor, weights: Tensor, by_scores: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients by queries, keys and weights, given that by the scores."""
    by_queries, by_weights = torch.empty_like(queries), torch.empty_like(weights)
    by_keys = torch.zeros_like(keys, dtype=torch.float32)
    wide = keys.float()
    for head in range(queries.size(2)):
        query, weight = queries[:, :, head].float(), weights[:, :, head].float()
        dots = torch.einsum("sbd,tbd->bst", query, wide)
        by_weights[:, :, head] = (by_scores * dots.relu()).sum(-1).t()
        by_dots = by_scores * weight.t().unsqueeze(-1) * (dots > 0)
        by_queries[:, :, head] = torch.einsum("bst,tbd->sbd", by_dots, wide)
        by_keys += torch.einsum("bst,sbd->tbd", by_dots, query)
    return by_queries, by_keys.to(keys.dtype), by_weights


@functools.lru_cache(maxsize=8)
def _walsh_matrix(width: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, device=device)
    while matrix.size(0) < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def walsh_hadamard(x: Tensor) -> Tensor:
    """Return the orthogonal Walsh-Hadamard transform of the last dimension, a power of two.

    It spreads outliers for low-precision products and changes no dot product. The package
    fast_hadamard_transform does it on CUDA, a product with the matrix elsewhere.
    """
    scale = x.size(-1) ** -0.5
    if hadamard_transform is not None and x.is_cuda:
        rotated: Tensor = hadamard_transform(x, scale=scale)
        return rotated
    return x @ (_walsh_matrix(x.size(-1), x.device) * scale).to(x.dtype)


class IndexKeyNorm(nn.LayerNorm):
    """LayerNorm of the indexer's keys, whole on every rank as they are.

    Args:
        config: Megatron configuration; `params_dtype` is read.
        hidden_size: Width of a key.
        eps: Added to the variance.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, device=parameter_device(), dtype=config.params_dtype)


class LightningIndexer(DSAIndexer):
    """Megatron's indexer: its parameters, with the corrections of `sparse_corrections`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._rotary_config = copy.copy(config)
        # Upstream's rotation takes this to mean pairs of neighbours, as latent attention has.
        self._rotary_config.multi_latent_attention = False
        for parameter in self.parameters():
            # Every rank has the whole gradient; the mean keeps copies from drifting apart.
            parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]

    def project(
        self, x: Tensor, latent: Tensor, *, position: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and weights as `index_scores` takes them, of the whole sequence.

        Args:
            x: `[seq, batch, hidden]`, the layer's normalized input; this rank's tokens under
                sequence parallelism.
            latent: `[seq, batch, q_lora_rank]`, the query latent after its norm.
            position: Tokens before the first of these.
        """
        if self.config.sequence_parallel and self.pg_collection.tp.size() > 1:
            x = gather_from_sequence_parallel_region(x, group=self.pg_collection.tp)
            latent = gather_from_sequence_parallel_region(latent, group=self.pg_collection.tp)
        angles, scale = self.rotary_pos_emb(position + x.size(0), packed_seq=False), 1.0
        if isinstance(angles, tuple):  # yarn
            angles, scale = angles
        angles = angles[position:]
        queries = self.linear_wq_b(latent)[0].unflatten(-1, (self.index_n_heads, -1))
        keys = self.k_norm(self.linear_wk(x)[0]).unsqueeze(2)
        queries, keys = (self._apply_rope(part, angles, scale) for part in (queries, keys))
        weights = self.linear_weights_proj(x)[0].float()
        weights = weights * (self.index_n_heads**-0.5 * self.softmax_scale)
        return walsh_hadamard(queries), walsh_hadamard(keys).squeeze(2), weights

    def _apply_rope(
        self, x: Tensor, rotary_pos_emb: Tensor, mscale: float, *_: Any, **__: Any
    ) -> Tensor:
        """Return `x` `[seq, batch, heads, width]` with the first channels of each head rotated.

        Channel i is paired with the one half the rotated width further on.
        """
        rotary, rest = x.split(
            [self.qk_pos_emb_head_dim, self.index_head_dim - self.qk_pos_emb_head_dim], dim=-1
        )
        rotary = apply_rotary_pos_emb(
            rotary,
            rotary_pos_emb,
            config=self._rotary_config,
            mscale=mscale,
            cp_group=self.pg_collection.cp,
        )
        return torch.cat((rotary, rest), dim=-1)
