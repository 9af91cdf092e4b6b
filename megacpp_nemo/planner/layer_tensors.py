"""The parameters of a layer of each block family: name, shape, and what splits it over ranks.

Names are Megatron-Core's with local modules; a routed expert's are `experts.N.linear_fc1.weight`
however its bank is held. Transformer Engine keeps the two down-projections of latent attention
whole on every tensor rank, which the local modules split.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from megacpp_nemo.contract.errors import RecipeError
from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.recipe import HybridRecipe

ROWS, COLUMNS = 0, 1


class PieceTensor(NamedTuple):
    """One parameter of a piece.

    Args:
        name: Name behind the piece's prefix.
        shape: Whole shape, before it is split over ranks; `[out, in]` for a matrix.
        split: The dimension that tensor ranks share; None if each has it whole.
        expert: 0-based routed expert that it belongs to; the expert-tensor ranks split it then.
        host: Whether it lies in host memory, and no device holds or trains it.
    """

    name: str
    shape: tuple[int, ...]
    split: int | None = None
    expert: int | None = None
    host: bool = False


Tensors = Iterator[PieceTensor]


def layer_tensors(recipe: HybridRecipe, family: BlockFamily) -> Tensors:
    """Yield the parameters of a layer of a family, D for one that DSA takes.

    Raises:
        RecipeError: If no rule says what parameters such layers have.
    """
    if family not in _FAMILIES:
        raise no_rule(f"{family.letter} in the pattern", family.name.lower())
    return _FAMILIES[family](recipe)


def no_rule(given: str, what: str) -> RecipeError:
    """Return the refusal of something whose parameters or work nothing here states."""
    return RecipeError(
        f"No rule says what this costs: {what}",
        given=given,
        allowed=", ".join(f"{family.letter} ({family.name.lower()})" for family in _FAMILIES),
        hint="a rule for it in megacpp_nemo.planner",
    )


def _attention(recipe: HybridRecipe) -> Tensors:
    return _latent(recipe) if recipe.features.latent_attention else _grouped(recipe)


def _grouped(recipe: HybridRecipe) -> Tensors:
    hidden, shape = recipe.model.hidden_size, recipe.model.attention
    rows = (shape.num_heads + 2 * shape.num_query_groups) * shape.head_dim
    inner = shape.num_heads * shape.head_dim
    yield PieceTensor("input_layernorm.weight", (hidden,))
    yield PieceTensor("self_attention.linear_proj.weight", (hidden, inner), COLUMNS)
    yield PieceTensor("self_attention.linear_qkv.weight", (rows, hidden), ROWS)


def _latent(recipe: HybridRecipe) -> Tensors:
    hidden, heads = recipe.model.hidden_size, recipe.model.attention.num_heads
    shape, own = recipe.model.latent, "self_attention"
    queries, latents = shape.q_lora_rank, shape.kv_lora_rank
    position, keys, values = shape.qk_pos_emb_head_dim, shape.qk_head_dim, shape.v_head_dim
    yield PieceTensor("input_layernorm.weight", (hidden,))
    yield PieceTensor(f"{own}.linear_proj.weight", (hidden, heads * values), COLUMNS)
    yield PieceTensor(f"{own}.linear_q_down_proj.weight", (queries, hidden), ROWS)
    yield PieceTensor(f"{own}.linear_q_up_proj.weight", (heads * (keys + position), queries), ROWS)
    yield PieceTensor(f"{own}.linear_kv_down_proj.weight", (latents + position, hidden), ROWS)
    yield PieceTensor(f"{own}.linear_kv_up_proj.weight", (heads * (keys + values), latents), ROWS)
    if shape.layernorm:
        yield PieceTensor(f"{own}.q_layernorm.weight", (queries,))
        yield PieceTensor(f"{own}.kv_layernorm.weight", (latents,))


def _sparse(recipe: HybridRecipe) -> Tensors:
    # The core, which has the indexer, is made before the projections.
    norm, *attention = _latent(recipe)
    return itertools.chain((norm,), _indexer(recipe), attention)


def _indexer(recipe: HybridRecipe) -> Tensors:
    hidden, shape = recipe.model.hidden_size, recipe.model.sparse_attention
    prefix, width = "self_attention.core_attention.indexer", shape.indexer_head_dim
    rows = shape.indexer_num_heads * width
    yield PieceTensor(f"{prefix}.linear_wq_b.weight", (rows, recipe.model.latent.q_lora_rank))
    yield PieceTensor(f"{prefix}.linear_wk.weight", (width, hidden))
    yield PieceTensor(f"{prefix}.k_norm.weight", (width,))
    yield PieceTensor(f"{prefix}.k_norm.bias", (width,))
    yield PieceTensor(f"{prefix}.linear_weights_proj.weight", (shape.indexer_num_heads, hidden))


def _experts(recipe: HybridRecipe) -> Tensors:
    hidden, shape = recipe.model.hidden_size, recipe.model.experts
    yield PieceTensor("pre_mlp_layernorm.weight", (hidden,))
    if not recipe.features.experts:
        yield from _mlp(recipe, "mlp", recipe.model.ffn_hidden_size)
        return
    yield PieceTensor("mlp.router.weight", (shape.num_experts, hidden))
    for expert in range(shape.num_experts):
        yield from _mlp(recipe, f"mlp.experts.{expert}", shape.ffn_hidden_size, expert)
    if shape.shared_expert_size:
        yield from _mlp(recipe, "mlp.shared_experts", shape.shared_expert_size)


def _mlp(recipe: HybridRecipe, prefix: str, width: int, expert: int | None = None) -> Tensors:
    hidden = recipe.model.hidden_size
    rows = 2 * width if recipe.model.experts.activation == "swiglu" else width
    yield PieceTensor(f"{prefix}.linear_fc1.weight", (rows, hidden), ROWS, expert)
    yield PieceTensor(f"{prefix}.linear_fc2.weight", (hidden, width), COLUMNS, expert)


def _mamba(recipe: HybridRecipe) -> Tensors:
    if recipe.features.mamba == "author":
        yield from _author_mamba(recipe)
        return
    hidden, shape = recipe.model.hidden_size, recipe.model.mamba
    inner, state = shape.num_heads * shape.head_dim, shape.num_groups * shape.state_dim
    channels = inner + 2 * state
    for name in ("dt_bias", "A_log", "D"):
        yield PieceTensor(f"mixer.{name}", (shape.num_heads,), ROWS)
    yield PieceTensor("mixer.in_proj.weight", (inner + channels + shape.num_heads, hidden), ROWS)
    yield PieceTensor("mixer.conv1d.weight", (channels, 1, shape.conv_width), ROWS)
    yield PieceTensor("mixer.conv1d.bias", (channels,), ROWS)
    yield PieceTensor("mixer.norm.weight", (inner,), ROWS)
    yield PieceTensor("mixer.out_proj.weight", (hidden, inner), COLUMNS)
    yield PieceTensor("norm.weight", (hidden,))


def _author_mamba(recipe: HybridRecipe) -> Tensors:
    hidden, shape = recipe.model.hidden_size, recipe.model.author_mamba
    heads, rank, state = shape.num_heads, shape.mimo_rank, shape.state_dim
    inner = heads * shape.head_dim
    for name in ("dt_bias", "D"):
        yield PieceTensor(f"mixer.{name}", (heads,), ROWS)
    for name in ("B_bias", "C_bias"):
        yield PieceTensor(f"mixer.{name}", (heads, rank, state), ROWS)
    for name in ("mimo_x", "mimo_z", "mimo_o") if rank > 1 else ():
        yield PieceTensor(f"mixer.{name}", (heads, rank, shape.head_dim), ROWS)
    rows = 2 * inner + 2 * rank * state + 3 * heads + shape.num_angles
    yield PieceTensor("mixer.in_proj.weight", (rows, hidden), ROWS)
    yield PieceTensor("mixer.B_norm.weight", (state,))
    yield PieceTensor("mixer.C_norm.weight", (state,))
    yield PieceTensor("mixer.out_proj.weight", (hidden, inner), COLUMNS)
    yield PieceTensor("norm.weight", (hidden,))


def _recurrent(recipe: HybridRecipe) -> Tensors:
    hidden, shape = recipe.model.hidden_size, recipe.model.recurrent
    keys, values = shape.num_qk_heads * shape.key_dim, shape.num_heads * shape.value_dim
    for name in ("dt_bias", "A_log", "D"):
        yield PieceTensor(f"mixer.{name}", (shape.num_heads,), ROWS)
    transition = (shape.num_heads, shape.value_dim, shape.value_dim)
    rows = 2 * keys + 2 * values + shape.num_heads
    yield PieceTensor("mixer.transition", transition, ROWS)
    yield PieceTensor("mixer.in_proj.weight", (rows, hidden), ROWS)
    yield PieceTensor("mixer.conv1d.weight", (2 * keys + values, 1, shape.conv_width), ROWS)
    yield PieceTensor("mixer.conv1d.bias", (2 * keys + values,), ROWS)
    yield PieceTensor("mixer.norm.weight", (values,), ROWS)
    yield PieceTensor("mixer.out_proj.weight", (hidden, values), COLUMNS)
    yield PieceTensor("norm.weight", (hidden,))


def _gated_delta_net(recipe: HybridRecipe) -> Tensors:
    """Yield the parameters of Megatron's GatedDeltaNet, which has no biases."""
    hidden, shape, own = recipe.model.hidden_size, recipe.model.gated_delta_net, "self_attention"
    keys = shape.num_key_heads * shape.key_head_dim
    values = shape.num_value_heads * shape.value_head_dim
    rows = 2 * keys + 2 * values + 2 * shape.num_value_heads
    yield PieceTensor("input_layernorm.weight", (hidden,))
    for name in ("dt_bias", "A_log"):
        yield PieceTensor(f"{own}.{name}", (shape.num_value_heads,), ROWS)
    yield PieceTensor(f"{own}.in_proj.weight", (rows, hidden), ROWS)
    yield PieceTensor(f"{own}.conv1d.weight", (2 * keys + values, 1, shape.conv_width), ROWS)
    yield PieceTensor(f"{own}.out_norm.weight", (shape.value_head_dim,))
    yield PieceTensor(f"{own}.out_proj.weight", (hidden, values), COLUMNS)


_FAMILIES: dict[BlockFamily, Callable[[HybridRecipe], Tensors]] = {
    BlockFamily.ATTENTION: _attention,
    BlockFamily.SPARSE_ATTENTION: _sparse,
    BlockFamily.EXPERTS: _experts,
    BlockFamily.GATED_DELTA_NET: _gated_delta_net,
    BlockFamily.MAMBA: _mamba,
    BlockFamily.RECURRENT: _recurrent,
}
