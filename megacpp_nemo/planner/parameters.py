"""Every parameter of a recipe's model by name and shape, without building it.

Names are Megatron-Core's with local modules; a routed expert's are `experts.N.linear_fc1.weight`
however its bank is held. Shapes are of the whole model, before it is split over ranks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from megacpp_nemo.contract.errors import RecipeError
from megacpp_nemo.contract.parameters import Parameter, classify
from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.recipe import HybridRecipe

Shapes = Iterator[tuple[str, tuple[int, ...]]]


class Inventory(NamedTuple):
    """The parameters of a recipe's model.

    Args:
        parameters: Those that are known, in Megatron's order of layers.
        unknown: What else the recipe asks for, in words: nothing here builds it yet.
    """

    parameters: tuple[Parameter, ...]
    unknown: tuple[str, ...]


def inventory(recipe: HybridRecipe) -> Inventory:
    """Return the parameters of a recipe's model, and what of it has parameters not known here."""
    known = tuple(
        classify(name, shape, layers=recipe.layers, model=recipe.model, mamba=recipe.features.mamba)
        for name, shape in _shapes(recipe)
    )
    return Inventory(known, tuple(_unknown(recipe)))


def parameters(recipe: HybridRecipe) -> tuple[Parameter, ...]:
    """Return what each parameter of a model is, every one of them.

    Raises:
        RecipeError: If the recipe asks for something whose parameters are not known here.
    """
    known, unknown = inventory(recipe)
    if unknown:
        raise RecipeError(
            "Not all parameters of this model are known, because nothing here builds them",
            given=", ".join(unknown),
            allowed="latent or grouped attention, experts or dense MLPs, Mamba-2, Mamba-3, M2RNN",
            hint="features.ngram_hash=false",
        )
    return known


def _unknown(recipe: HybridRecipe) -> Iterator[str]:
    depths = recipe.model.mtp.pattern.layers * recipe.model.mtp.num_layers
    counts = Counter((*recipe.layers, *depths))
    if deltas := counts[BlockFamily.GATED_DELTA_NET]:
        yield f"{deltas} Gated DeltaNet layers"
    if recipe.features.ngram_hash:
        yield "the n-gram memory"
    if recipe.features.structure:
        yield "the structure channels"


def padded_vocabulary(recipe: HybridRecipe) -> int:
    """Return the rows of the token embedding as it is built."""
    embedding = recipe.model.embedding
    step = embedding.make_vocab_size_divisible_by * recipe.parallelism.tensor_model_parallel_size
    return -(-embedding.vocab_size // step) * step


def _shapes(recipe: HybridRecipe) -> Shapes:
    hidden, rows = recipe.model.hidden_size, padded_vocabulary(recipe)
    yield "embedding.word_embeddings.weight", (rows, hidden)
    sparse = recipe.sparse_layer_numbers
    for index, family in enumerate(recipe.layers):
        built = BlockFamily.SPARSE_ATTENTION if index + 1 in sparse else family
        for name, shape in _layer(recipe, built):
            yield f"decoder.layers.{index}.{name}", shape
    yield "decoder.final_norm.weight", (hidden,)
    yield "output_layer.weight", (rows, hidden)
    for depth in range(recipe.model.mtp.num_layers):
        for name, shape in _depth(recipe):
            yield f"mtp.layers.{depth}.{name}", shape


def _depth(recipe: HybridRecipe) -> Shapes:
    hidden = recipe.model.hidden_size
    yield "enorm.weight", (hidden,)
    yield "hnorm.weight", (hidden,)
    yield "eh_proj.weight", (hidden, 2 * hidden)
    for index, family in enumerate(recipe.model.mtp.pattern):
        for name, shape in _layer(recipe, family):
            yield f"mtp_model_layer.layers.{index}.{name}", shape
    yield "final_layernorm.weight", (hidden,)


def _layer(recipe: HybridRecipe, family: BlockFamily) -> Shapes:
    """Return the known parameters of a layer."""
    if family is BlockFamily.SPARSE_ATTENTION:
        return itertools.chain(_latent(recipe), _indexer(recipe))
    if family is BlockFamily.ATTENTION:
        return _latent(recipe) if recipe.features.latent_attention else _grouped(recipe)
    if family is BlockFamily.EXPERTS:
        return _experts(recipe) if recipe.features.experts else _dense(recipe)
    if family is BlockFamily.RECURRENT:
        return _recurrent(recipe)
    if family is BlockFamily.MAMBA:
        return _author_mamba(recipe) if recipe.features.mamba == "author" else _mamba(recipe)
    return iter(())


def _grouped(recipe: HybridRecipe) -> Shapes:
    hidden, shape = recipe.model.hidden_size, recipe.model.attention
    rows = (shape.num_heads + 2 * shape.num_query_groups) * shape.head_dim
    yield "input_layernorm.weight", (hidden,)
    yield "self_attention.linear_proj.weight", (hidden, shape.num_heads * shape.head_dim)
    yield "self_attention.linear_qkv.weight", (rows, hidden)


def _latent(recipe: HybridRecipe) -> Shapes:
    hidden, heads = recipe.model.hidden_size, recipe.model.attention.num_heads
    shape = recipe.model.latent
    position, keys = shape.qk_pos_emb_head_dim, shape.qk_head_dim
    yield "input_layernorm.weight", (hidden,)
    yield "self_attention.linear_proj.weight", (hidden, heads * shape.v_head_dim)
    yield "self_attention.linear_q_down_proj.weight", (shape.q_lora_rank, hidden)
    yield "self_attention.linear_q_up_proj.weight", (heads * (keys + position), shape.q_lora_rank)
    yield "self_attention.linear_kv_down_proj.weight", (shape.kv_lora_rank + position, hidden)
    rows = heads * (keys + shape.v_head_dim)
    yield "self_attention.linear_kv_up_proj.weight", (rows, shape.kv_lora_rank)
    if shape.layernorm:
        yield "self_attention.q_layernorm.weight", (shape.q_lora_rank,)
        yield "self_attention.kv_layernorm.weight", (shape.kv_lora_rank,)


def _indexer(recipe: HybridRecipe) -> Shapes:
    hidden, shape = recipe.model.hidden_size, recipe.model.sparse_attention
    prefix, width = "self_attention.core_attention.indexer", shape.indexer_head_dim
    rows = shape.indexer_num_heads * width
    yield f"{prefix}.linear_wq_b.weight", (rows, recipe.model.latent.q_lora_rank)
    yield f"{prefix}.linear_wk.weight", (width, hidden)
    yield f"{prefix}.k_norm.weight", (width,)
    yield f"{prefix}.k_norm.bias", (width,)
    yield f"{prefix}.linear_weights_proj.weight", (shape.indexer_num_heads, hidden)


def _experts(recipe: HybridRecipe) -> Shapes:
    hidden, shape = recipe.model.hidden_size, recipe.model.experts
    yield "pre_mlp_layernorm.weight", (hidden,)
    yield "mlp.router.weight", (shape.num_experts, hidden)
    for expert in range(shape.num_experts):
        yield from _mlp(recipe, f"mlp.experts.local_experts.{expert}", shape.ffn_hidden_size)
    if shape.shared_expert_size:
        yield from _mlp(recipe, "mlp.shared_experts", shape.shared_expert_size)


def _dense(recipe: HybridRecipe) -> Shapes:
    yield "pre_mlp_layernorm.weight", (recipe.model.hidden_size,)
    yield from _mlp(recipe, "mlp", recipe.model.ffn_hidden_size)


def _mlp(recipe: HybridRecipe, prefix: str, width: int) -> Shapes:
    hidden = recipe.model.hidden_size
    gated = recipe.model.experts.activation == "swiglu"
    yield f"{prefix}.linear_fc1.weight", (2 * width if gated else width, hidden)
    yield f"{prefix}.linear_fc2.weight", (hidden, width)


def _mamba(recipe: HybridRecipe) -> Shapes:
    hidden, shape = recipe.model.hidden_size, recipe.model.mamba
    inner, state = shape.num_heads * shape.head_dim, shape.num_groups * shape.state_dim
    channels = inner + 2 * state
    for name in ("dt_bias", "A_log", "D"):
        yield f"mixer.{name}", (shape.num_heads,)
    yield "mixer.in_proj.weight", (inner + channels + shape.num_heads, hidden)
    yield "mixer.conv1d.weight", (channels, 1, shape.conv_width)
    yield "mixer.conv1d.bias", (channels,)
    yield "mixer.norm.weight", (inner,)
    yield "mixer.out_proj.weight", (hidden, inner)
    yield "norm.weight", (hidden,)


def _author_mamba(recipe: HybridRecipe) -> Shapes:
    hidden, shape = recipe.model.hidden_size, recipe.model.author_mamba
    heads, rank, state = shape.num_heads, shape.mimo_rank, shape.state_dim
    inner = heads * shape.head_dim
    for name in ("dt_bias", "D"):
        yield f"mixer.{name}", (heads,)
    for name in ("B_bias", "C_bias"):
        yield f"mixer.{name}", (heads, rank, state)
    for name in ("mimo_x", "mimo_z", "mimo_o") if rank > 1 else ():
        yield f"mixer.{name}", (heads, rank, shape.head_dim)
    rows = 2 * inner + 2 * rank * state + 3 * heads + shape.num_angles
    yield "mixer.in_proj.weight", (rows, hidden)
    yield "mixer.B_norm.weight", (state,)
    yield "mixer.C_norm.weight", (state,)
    yield "mixer.out_proj.weight", (hidden, inner)
    yield "norm.weight", (hidden,)


def _recurrent(recipe: HybridRecipe) -> Shapes:
    hidden, shape = recipe.model.hidden_size, recipe.model.recurrent
    keys, values = shape.num_qk_heads * shape.key_dim, shape.num_heads * shape.value_dim
    for name in ("dt_bias", "A_log", "D"):
        yield f"mixer.{name}", (shape.num_heads,)
    yield "mixer.transition", (shape.num_heads, shape.value_dim, shape.value_dim)
    yield "mixer.in_proj.weight", (2 * keys + 2 * values + shape.num_heads, hidden)
    yield "mixer.conv1d.weight", (2 * keys + values, 1, shape.conv_width)
    yield "mixer.conv1d.bias", (2 * keys + values,)
    yield "mixer.norm.weight", (values,)
    yield "mixer.out_proj.weight", (hidden, values)
    yield "norm.weight", (hidden,)
