"""Rules that cross the parts of a recipe.

- `check_model`: pattern against shapes and features.
- `check_layout`: shapes and pattern against the parallel sizes.
- `check_batch`: batch against the parallel sizes.

The runtime calls the same functions on the values it is about to build, so an override on
NeMo's command line meets the same rules as a recipe written in Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megacpp_nemo.contract.errors import RecipeError
from megacpp_nemo.contract.pattern import BlockFamily, LayerPattern
from megacpp_nemo.contract.shapes import ModelShape
from megacpp_nemo.contract.training import Batch, Features, Parallelism, Precision

if TYPE_CHECKING:
    from megacpp_nemo.contract.recipe import HybridRecipe


def check_recipe(recipe: HybridRecipe) -> None:
    """Check every cross-cutting rule of a recipe.

    Raises:
        PatternError: If the pattern does not fit the depth or the stages.
        RecipeError: If settings contradict each other.
    """
    layers = recipe.layers
    check_model(layers, recipe.model, recipe.features)
    check_layout(layers, recipe.model, recipe.features, recipe.parallelism)
    check_batch(recipe.batch, recipe.parallelism)
    if recipe.precision is Precision.FP8_EXPERTS and BlockFamily.EXPERTS not in layers.layers:
        raise RecipeError(
            "FP8 is for expert layers only, and the pattern has none",
            given=f"precision=fp8_experts with pattern {recipe.pattern}",
            allowed="fp8_experts with a pattern that contains E",
            hint="precision='bf16'",
        )


def check_model(layers: LayerPattern, model: ModelShape, features: Features) -> None:
    """Check the pattern against the features.

    Raises:
        RecipeError: If a DSA rank has no attention layer, or every layer is of a family whose
            shape cannot exist.
    """
    if features.sparse_attention:
        count = len(layers.a_ranks())
        outside = [rank for rank in model.sparse_attention.a_ranks if rank >= count]
        if outside:
            raise RecipeError(
                f"DSA A-rank {outside[0]} has no attention layer: this pattern has {count} of them",
                given=f"a_ranks={model.sparse_attention.a_ranks} with {count} attention layers",
                allowed=f"ranks from 0 to {count - 1}" if count else "no ranks",
                hint="sparse_attention=False, or fewer ranks",
            )


def check_layout(
    layers: LayerPattern, model: ModelShape, features: Features, parallelism: Parallelism
) -> None:
    """Check that every block divides over the parallel sizes.

    Raises:
        PatternError: If the layers or segments do not divide over the pipeline stages.
        RecipeError: If heads, groups, experts or tokens do not divide.
    """
    _check_stages(layers, parallelism)
    families = layers.counts()
    tensor = parallelism.tensor_model_parallel_size
    rows: list[tuple[str, int, str, int]] = []
    if BlockFamily.ATTENTION in families or BlockFamily.SPARSE_ATTENTION in families:
        rows += _attention_rows(model, features, tensor)
    if BlockFamily.MAMBA in families:
        rows += _mamba_rows(model, features, tensor)
    if BlockFamily.RECURRENT in families:
        keys = model.recurrent.num_qk_heads * model.recurrent.key_dim
        rows += [
            ("recurrent.num_heads", model.recurrent.num_heads, "tensor", tensor),
            ("recurrent.num_qk_heads x key_dim", keys, "tensor", tensor),
        ]
    if BlockFamily.EXPERTS in families:
        rows += _experts_rows(model, parallelism)
    if parallelism.sequence_parallel:
        rows.append(("seq_length", model.seq_length, "tensor", tensor))
    rows.append(
        ("seq_length", model.seq_length, "context", parallelism.context_parallel_size),
    )
    for name, size, kind, parts in rows:
        _require_divisible(name, size, kind, parts)
    _check_experts_sequence(families, parallelism)


def check_batch(batch: Batch, parallelism: Parallelism) -> None:
    """Check that a global batch is a whole number of micro-batches on every data rank.

    Raises:
        RecipeError: If it is not.
    """
    rows = batch.micro_batch_size * parallelism.data_parallel_size
    if batch.global_batch_size % rows:
        raise RecipeError(
            "The global batch must be a whole number of micro-batches on every data-parallel rank",
            given=f"global_batch_size={batch.global_batch_size}, "
            f"micro_batch_size={batch.micro_batch_size}, "
            f"{parallelism.data_parallel_size} data-parallel ranks",
            allowed=f"multiples of {rows}",
            hint=f"global_batch_size={max(1, round(batch.global_batch_size / rows)) * rows}",
        )


def _check_stages(layers: LayerPattern, parallelism: Parallelism) -> None:
    stages = parallelism.pipeline_model_parallel_size
    chunks = parallelism.virtual_pipeline_model_parallel_size or 1
    if chunks > 1 and stages == 1:
        raise RecipeError(
            "Virtual pipeline stages need more than one pipeline stage",
            given=f"virtual_pipeline_model_parallel_size={chunks}, pipeline 1",
            allowed="pipeline_model_parallel_size above 1, or no virtual stages",
            hint="virtual_pipeline_model_parallel_size=None",
        )
    segments = layers.split(stages * chunks)
    if len(segments) != stages * chunks:
        raise RecipeError(
            "The pattern's '|' boundaries and the pipeline sizes disagree",
            given=f"{len(segments)} segments for {stages} stages x {chunks} chunks",
            allowed=f"{stages * chunks} segments, or no '|'",
            hint=f"virtual_pipeline_model_parallel_size={len(segments) // stages}"
            if stages > 1
            else f"pipeline_model_parallel_size={len(segments)}",
        )


def _attention_rows(
    model: ModelShape, features: Features, tensor: int
) -> list[tuple[str, int, str, int]]:
    rows = [("attention.num_heads", model.attention.num_heads, "tensor", tensor)]
    if features.latent_attention:
        # Without Transformer Engine the down-projections are split over the tensor group.
        width = model.latent.kv_lora_rank + model.latent.qk_pos_emb_head_dim
        rows.append(("latent.q_lora_rank", model.latent.q_lora_rank, "tensor", tensor))
        rows.append(("latent.kv_lora_rank + qk_pos_emb_head_dim", width, "tensor", tensor))
        return rows
    groups = model.attention.num_query_groups
    rows.append(("attention.num_query_groups", groups, "tensor", tensor))
    if model.attention.num_heads % groups:
        raise RecipeError(
            "Query groups must divide the attention heads",
            given=f"num_heads={model.attention.num_heads}, num_query_groups={groups}",
            allowed="num_heads divisible by num_query_groups",
            hint=f"num_query_groups={model.attention.num_heads}",
        )
    return rows


def _mamba_rows(
    model: ModelShape, features: Features, tensor: int
) -> list[tuple[str, int, str, int]]:
    if features.mamba == "author":
        return [("author_mamba.num_heads", model.author_mamba.num_heads, "tensor", tensor)]
    return [
        ("mamba.num_heads", model.mamba.num_heads, "tensor", tensor),
        ("mamba.num_groups", model.mamba.num_groups, "tensor", tensor),
    ]


def _experts_rows(model: ModelShape, parallelism: Parallelism) -> list[tuple[str, int, str, int]]:
    experts, tensor = model.experts, parallelism.tensor_model_parallel_size
    return [
        (
            "experts.num_experts",
            experts.num_experts,
            "expert",
            parallelism.expert_model_parallel_size,
        ),
        (
            "experts.ffn_hidden_size",
            experts.ffn_hidden_size,
            "expert-tensor",
            parallelism.expert_tensor_size,
        ),
        ("experts.shared_expert_size", experts.shared_expert_size, "tensor", tensor),
    ]


def _check_experts_sequence(families: dict[BlockFamily, int], parallelism: Parallelism) -> None:
    tensor = parallelism.tensor_model_parallel_size
    if BlockFamily.EXPERTS in families and tensor > 1 and not parallelism.sequence_parallel:
        raise RecipeError(
            "Tensor parallelism with experts needs sequence parallelism in Megatron",
            given=f"tensor_model_parallel_size={tensor}, sequence_parallel=False, "
            f"{families[BlockFamily.EXPERTS]} expert layers",
            allowed="sequence_parallel=True",
            hint="sequence_parallel=True",
        )


def _require_divisible(name: str, size: int, kind: str, parts: int) -> None:
    if size % parts:
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        raise RecipeError(
            f"{name} does not divide over the {kind}-parallel size",
            given=f"{name}={size}, {kind} parallel size {parts}",
            allowed=f"a {kind}-parallel size among {divisors}"
            if len(divisors) < 20
            else f"a {kind}-parallel size that divides {size}",
            hint=f"a multiple of {parts} for {name}, or another {kind}-parallel size",
        )
