"""Rules that cross the parts of a recipe.

- `check_model`: pattern against shapes and features.
- `check_layout`: shapes and pattern against the parallel sizes (in `layout`).
- `check_batch`: batch against the parallel sizes.
- `check_plasticity`: levers against the pattern and the length of the run (in
  `plasticity_rules`).

The runtime calls the same functions on the values it is about to build, so an override on
NeMo's command line meets the same rules as a recipe written in Python. Blocks that the pattern
does not have are not checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megacpp_nemo.contract.errors import RecipeError
from megacpp_nemo.contract.layout import check_layout, nearest_multiple
from megacpp_nemo.contract.pattern import BlockFamily, LayerPattern
from megacpp_nemo.contract.plasticity_rules import check_plasticity
from megacpp_nemo.contract.shapes import ModelShape
from megacpp_nemo.contract.training import Batch, Features, Parallelism, Precision

if TYPE_CHECKING:
    from megacpp_nemo.contract.recipe import HybridRecipe

__all__ = ["check_batch", "check_layout", "check_model", "check_plasticity", "check_recipe"]


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
    check_plasticity(
        recipe.plasticity,
        layers,
        recipe.features,
        context_parallel_size=recipe.parallelism.context_parallel_size,
        train_steps=recipe.schedule.train_steps,
    )
    if recipe.files.data_path and recipe.corpus != "indexed":
        raise RecipeError(
            "Indexed files are read only by a recipe whose corpus is indexed",
            given=f"corpus={recipe.corpus!r}, files.data_path={recipe.files.data_path}",
            allowed="files.data_path only with corpus='indexed'",
            hint="corpus='indexed'",
        )
    has_experts = recipe.has(BlockFamily.EXPERTS) and recipe.features.experts
    if recipe.precision is Precision.FP8_EXPERTS and not has_experts:
        raise RecipeError(
            "FP8 is for expert layers only, and the model has none",
            given=f"precision='fp8_experts' with pattern {recipe.pattern}, "
            f"features.experts={recipe.features.experts}",
            allowed="fp8_experts with a pattern that contains E, and features.experts on",
            hint="precision='bf16'",
        )


def check_model(layers: LayerPattern, model: ModelShape, features: Features) -> None:
    """Check the pattern against the shapes and features.

    Raises:
        RecipeError: If a DSA rank has no attention layer, a D layer no latent attention, the
            query groups do not divide the heads of plain attention, or multi-token prediction
            is deeper than a row.
    """
    if model.mtp.num_layers >= model.seq_length:
        raise RecipeError(
            "Multi-token prediction is deeper than the sequence: the deepest has no target left",
            given=f"mtp.num_layers={model.mtp.num_layers}, seq_length={model.seq_length}",
            allowed=f"mtp.num_layers from 0 to {model.seq_length - 1}",
            hint="mtp.num_layers=1" if model.seq_length > 1 else "mtp.num_layers=0",
        )
    ranks, count = model.sparse_attention.a_ranks, len(layers.a_ranks())
    if features.sparse_attention and ranks and ranks[-1] >= count:
        inside = tuple(rank for rank in ranks if rank < count)
        raise RecipeError(
            f"DSA A-rank {ranks[-1]} has no attention layer: this pattern has {count} of them",
            given=f"a_ranks={ranks} with {count} attention layers",
            allowed=f"ranks from 0 to {count - 1}" if count else "no ranks",
            hint=f"a_ranks={inside}" if inside else "sparse_attention=False",
        )
    if features.latent_attention:
        return
    families, attention = layers.counts(), model.attention
    if BlockFamily.SPARSE_ATTENTION in families:
        raise RecipeError(
            "DSA, the pattern's D, is built on multi-latent attention",
            given=f"latent_attention=False, {families[BlockFamily.SPARSE_ATTENTION]} D layers",
            allowed="D only with latent_attention",
            hint="latent_attention=True",
        )
    if BlockFamily.ATTENTION in families and attention.num_heads % attention.num_query_groups:
        raise RecipeError(
            "Query groups must divide the attention heads",
            given=f"num_heads={attention.num_heads}, num_query_groups={attention.num_query_groups}",
            allowed="attention.num_heads divisible by num_query_groups",
            hint=f"num_query_groups={attention.num_heads}",
        )


def check_batch(batch: Batch, parallelism: Parallelism) -> None:
    """Check that a global batch is a whole number of micro-batches on every data rank.

    Interleaved pipeline stages take their micro-batches in groups of the pipeline size.

    Raises:
        RecipeError: If it is not.
    """
    ranks = parallelism.data_parallel_size
    interleaved = parallelism.virtual_pipeline_model_parallel_size is not None
    group = parallelism.pipeline_model_parallel_size if interleaved else 1
    rows = batch.micro_batch_size * ranks * group
    if batch.global_batch_size % rows:
        raise RecipeError(
            "The global batch must be a whole number of "
            + ("pipeline-size groups of " if interleaved else "")
            + "micro-batches on every data-parallel rank",
            given=f"global_batch_size={batch.global_batch_size}, "
            f"micro_batch_size={batch.micro_batch_size}, {ranks} data-parallel ranks"
            + (f", groups of {group}" if interleaved else ""),
            allowed=f"multiples of {rows}",
            hint=f"global_batch_size={nearest_multiple(batch.global_batch_size, rows)}",
        )
