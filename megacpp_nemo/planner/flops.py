"""Floating-point operations of a forward pass, per token of the whole model, by piece and term.

A multiply-add is 2 operations. Matrix products, convolutions and the products of scans are
counted, from the shapes that are built; norms, activations, softmax, gates and other elementwise
work are not. Looking a row up in a table is 0. A token's share of attention is the mean over a
row of `seq_length` tokens, one document.

By default scores are counted as the causal mask leaves them, `(seq_length + 1) / 2` keys for a
token: the model's own work. `full_scores` counts what dense kernels execute: every key of a row,
every pair of a chunk. Training is 3 forward passes: the backward pass multiplies twice for each
product. What has no backward pass (`ONCE`) is counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.flops_mixers import gated_delta_net, mamba, recurrent
from megacpp_nemo.planner.layer_tensors import no_rule
from megacpp_nemo.planner.pieces import Piece, Role, pieces
from megacpp_nemo.planner.tensors import padded_vocabulary

# Terms of a training step that gradients do not pass through.
ONCE = ("attention for the indexer's loss",)
LAYERS = (Role.LAYER, Role.DEPTH_LAYER)


@dataclass(frozen=True)
class Flops:
    """Operations by what they are for, per token.

    Args:
        terms: Operations by name.
    """

    terms: Mapping[str, float]

    @property
    def total(self) -> float:
        """The sum of all terms."""
        return sum(self.terms.values())


def forward_flops(recipe: HybridRecipe, piece: Piece, *, full_scores: bool = False) -> Flops:
    """Return the operations of a piece in a forward pass of training, per token.

    A depth's own pass through the output head is counted where the depth ends.

    Args:
        recipe: What is trained.
        piece: One of its pieces.
        full_scores: Count the scores that dense kernels execute, masked ones included.

    Raises:
        RecipeError: If no rule says what the piece costs.
    """
    if piece.family is not None:
        if piece.family not in _FAMILIES:
            raise no_rule(f"{piece.family.letter} in the pattern", piece.family.name.lower())
        return Flops(_FAMILIES[piece.family](recipe, full_scores))
    if piece.role not in _OUTSIDE:
        raise no_rule(piece.name, piece.role.value)
    return Flops(_OUTSIDE[piece.role](recipe))


def training_flops(
    recipe: HybridRecipe, piece: Piece, *, full_scores: bool = False, recompute: bool = False
) -> float:
    """Return the operations of a piece in a training step, forward and backward, per token.

    Args:
        recipe: What is trained.
        piece: One of its pieces.
        full_scores: As in `forward_flops`.
        recompute: Whether layers run their forward pass again before the backward pass.
    """
    flops = forward_flops(recipe, piece, full_scores=full_scores)
    once = sum(flops.terms.get(name, 0.0) for name in ONCE)
    again = flops.total if recompute and piece.role in LAYERS else 0.0
    return 3 * (flops.total - once) + once + again


def training_flops_per_token(
    recipe: HybridRecipe, *, full_scores: bool = False, recompute: bool = False
) -> float:
    """Return the operations of a training step per token, over all pieces of the model.

    The arguments are those of `training_flops`.
    """
    return sum(
        training_flops(recipe, piece, full_scores=full_scores, recompute=recompute) * count
        for piece, count in distinct(pieces(recipe))
    )


def distinct(every: Iterable[Piece]) -> list[tuple[Piece, int]]:
    """Return one piece of each kind, with how many there are: pieces of a kind cost the same."""
    found: dict[tuple[Role, BlockFamily | None], tuple[Piece, int]] = {}
    for piece in every:
        first, count = found.get((piece.role, piece.family), (piece, 0))
        found[piece.role, piece.family] = first, count + 1
    return list(found.values())


def keys_seen(length: int, most: int | None = None) -> float:
    """Return the keys that a token sees, in the mean over a row under the causal mask.

    Args:
        length: Tokens of the row.
        most: Keys that a token sees at most; None for all up to its own.
    """
    most = length if most is None else min(most, length)
    return (most * (most + 1) / 2 + (length - most) * most) / length


def _attention(recipe: HybridRecipe, full: bool) -> dict[str, float]:
    if recipe.features.latent_attention:
        length = recipe.model.seq_length
        return _latent(recipe, length if full else keys_seen(length))
    hidden, length, shape = (
        recipe.model.hidden_size,
        recipe.model.seq_length,
        recipe.model.attention,
    )
    inner, keys = shape.num_heads * shape.head_dim, length if full else keys_seen(length)
    rows = inner + 2 * shape.num_query_groups * shape.head_dim
    return {
        "projections": 2 * hidden * (rows + inner),
        "scores": 2 * inner * keys,
        "mixed values": 2 * inner * keys,
    }


def _latent(recipe: HybridRecipe, keys: float) -> dict[str, float]:
    """Return latent attention as it is trained: keys and values are made for every head."""
    hidden, heads = recipe.model.hidden_size, recipe.model.attention.num_heads
    shape = recipe.model.latent
    width = shape.qk_head_dim + shape.qk_pos_emb_head_dim
    down = shape.q_lora_rank + shape.kv_lora_rank + shape.qk_pos_emb_head_dim
    up = shape.q_lora_rank * width + shape.kv_lora_rank * (shape.qk_head_dim + shape.v_head_dim)
    return {
        "down-projections": 2 * hidden * down,
        "up-projections": 2 * heads * up,
        "scores": 2 * heads * width * keys,
        "mixed values": 2 * heads * shape.v_head_dim * keys,
        "output projection": 2 * hidden * heads * shape.v_head_dim,
    }


def _sparse(recipe: HybridRecipe, full: bool) -> dict[str, float]:
    """Return attention to the chosen keys, the indexer's scores of all, and its loss's target.

    The Hadamard transform that spreads the indexer's outliers is a product with a matrix where
    its fast form is absent: executed, but no part of the model's work.
    """
    length, hidden = recipe.model.seq_length, recipe.model.hidden_size
    shape, latent = recipe.model.sparse_attention, recipe.model.latent
    earlier = length if full else keys_seen(length)
    chosen = length if full else keys_seen(length, shape.indexer_topk)
    heads, width = shape.indexer_num_heads, shape.indexer_head_dim
    terms = {
        **_latent(recipe, chosen),
        "indexer's projections": 2
        * (latent.q_lora_rank * heads * width + hidden * width + hidden * heads),
        "indexer's scores": 2 * heads * width * earlier,
    }
    if full:
        terms["indexer's transform"] = 2 * width * width * (heads + 1)
    if shape.indexer_loss_coeff:
        size = latent.qk_head_dim + latent.qk_pos_emb_head_dim
        terms[ONCE[0]] = 2 * recipe.model.attention.num_heads * size * earlier
    return terms


def _experts(recipe: HybridRecipe, full: bool) -> dict[str, float]:
    hidden, shape = recipe.model.hidden_size, recipe.model.experts
    matrices = 3 if shape.activation == "swiglu" else 2
    if not recipe.features.experts:
        return {"dense MLP": 2 * matrices * hidden * recipe.model.ffn_hidden_size}
    terms = {
        "router": 2 * hidden * shape.num_experts,
        "routed experts": 2 * matrices * hidden * shape.ffn_hidden_size * shape.topk,
    }
    if shape.shared_expert_size:
        terms["shared expert"] = 2 * matrices * hidden * shape.shared_expert_size
    return dict(terms)


def _embedding(recipe: HybridRecipe) -> dict[str, float]:
    return {"token lookup": 0.0, **_beside_tokens(recipe)}


def _beside_tokens(recipe: HybridRecipe) -> dict[str, float]:
    """Return what the n-gram memory and the structure channels cost wherever tokens are read."""
    hidden, embedding = recipe.model.hidden_size, recipe.model.embedding
    terms: dict[str, float] = {}
    if recipe.features.ngram_hash:
        width = len(embedding.ngram.orders) * embedding.ngram.heads_per_order * embedding.ngram.dim
        terms["n-gram projection"] = 2 * hidden * width
    if recipe.features.structure:
        terms["structure up-projection"] = 2 * hidden * embedding.structure.bottleneck
    return terms


def _head(recipe: HybridRecipe) -> dict[str, float]:
    return {"logits": 2 * recipe.model.hidden_size * padded_vocabulary(recipe)}


def _depth_entry(recipe: HybridRecipe) -> dict[str, float]:
    return {**_beside_tokens(recipe), "joining projection": 4 * recipe.model.hidden_size**2}


_FAMILIES: dict[BlockFamily, Callable[[HybridRecipe, bool], dict[str, float]]] = {
    BlockFamily.ATTENTION: _attention,
    BlockFamily.SPARSE_ATTENTION: _sparse,
    BlockFamily.EXPERTS: _experts,
    BlockFamily.GATED_DELTA_NET: gated_delta_net,
    BlockFamily.MAMBA: mamba,
    BlockFamily.RECURRENT: recurrent,
}
_OUTSIDE: dict[Role, Callable[[HybridRecipe], dict[str, float]]] = {
    Role.EMBEDDING: _embedding,
    Role.FINAL_NORM: lambda recipe: {},
    Role.HEAD: _head,
    Role.DEPTH_ENTRY: _depth_entry,
    Role.DEPTH_NORM: _head,
}
