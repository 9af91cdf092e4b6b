"""The recipes by name: one table of families and sizes, no file per model.

NAM56R is the published hybrid: `AEMEAEMEAEMR` at depth 52. `nam56r` is its 3584-wide shape
and `nam56r_4096` the later production shape.

NAM52 has no public definition that fixes its dimensions. Here it is our documented choice:
the bring-up sibling of NAM56R whose recurrent tail is replaced by a state-space block
(`AEMEAEMEAEMM`), every other setting as NAM56R's. It is the recipe with the fewest custom
seams.

Each family comes in three sizes: full; `_smoke`, all 52 layers at toy width; `_tiny`, one
tile of the pattern at small width, which trains on a CPU. The small sizes keep the block
families and the code path, and leave off what only pays at full size (DSA, multi-token
prediction, n-gram memory). STP, where it is on, begins after a tenth of their shorter runs, too.

The full size has the n-gram memory, as published. No published recipe has the structure channels:
they are off in every size until `structure='core'`, or another choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megacpp_nemo.contract.errors import lookup
from megacpp_nemo.contract.pattern import FULL_NAM52_PATTERN, FULL_NAM56R_PATTERN, LayerPattern
from megacpp_nemo.contract.plasticity import Plasticity, StpLever
from megacpp_nemo.contract.recipe import HybridRecipe, with_paths
from megacpp_nemo.contract.shapes import (
    AttentionShape,
    AuthorMambaShape,
    EmbeddingShape,
    ExpertsShape,
    LatentShape,
    MambaShape,
    ModelShape,
    MultiTokenPredictionShape,
    NgramHashShape,
    RecurrentShape,
    SparseAttentionShape,
)
from megacpp_nemo.contract.training import (
    Batch,
    Cadence,
    Features,
    OptimizerSchedule,
    Parallelism,
    ParallelismMode,
    Precision,
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its pattern and its full-size shape."""

    pattern: str
    model: ModelShape
    summary: str


@dataclass(frozen=True, kw_only=True)
class Size:
    """A size of every family: how the full recipe is changed."""

    summary: str
    shrink: Callable[[HybridRecipe], HybridRecipe]
    modes: bool


NAM56R_SHAPE = ModelShape()
# M2RNN has hidden // 80 heads: 44 at 3584. At 4096 that is 51, which no tensor-parallel size
# divides, so it is rounded up to 52.
NAM56R_4096_SHAPE = ModelShape(
    hidden_size=4096,
    ffn_hidden_size=21_504,
    attention=AttentionShape(num_heads=32, head_dim=128),
    mamba=MambaShape(num_heads=64),
    author_mamba=AuthorMambaShape(num_heads=128),
    recurrent=RecurrentShape(num_heads=52),
    mtp=MultiTokenPredictionShape(num_layers=2),
)

FAMILIES: dict[str, Family] = {
    "nam52": Family(
        pattern=FULL_NAM52_PATTERN,
        model=NAM56R_SHAPE,
        summary="NAM52, the bring-up sibling of NAM56R without recurrent layers",
    ),
    "nam56r": Family(
        pattern=FULL_NAM56R_PATTERN,
        model=NAM56R_SHAPE,
        summary="NAM56R, hidden 3584",
    ),
    "nam56r_4096": Family(
        pattern=FULL_NAM56R_PATTERN,
        model=NAM56R_4096_SHAPE,
        summary="NAM56R, hidden 4096, the later production shape",
    ),
}
FULL_DEPTH = 52


def _small(recipe: HybridRecipe, *, depth: int, model: ModelShape) -> HybridRecipe:
    return replace(
        recipe,
        depth=depth,
        model=model,
        parallelism=Parallelism(
            devices_per_node=1,
            use_distributed_optimizer=False,
            overlap_grad_reduce=False,
            overlap_param_gather=False,
        ),
        precision=Precision.FP32,
        features=replace(
            recipe.features,
            sparse_attention=False,
            ngram_hash=False,
            kernels="available",
            reset_state=True,
        ),
        corpus="sources",
    )


def _small_shape(
    hidden: int, seq_length: int, *, vocab_size: int, heads: int, experts: ExpertsShape
) -> ModelShape:
    """A narrow shape with the same blocks: heads of 16 or 32 instead of 64."""
    return ModelShape(
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        seq_length=seq_length,
        attention=AttentionShape(num_heads=heads, num_query_groups=2, head_dim=hidden // heads),
        latent=LatentShape(
            q_lora_rank=hidden // 2,
            kv_lora_rank=hidden // 4,
            qk_head_dim=hidden // heads,
            qk_pos_emb_head_dim=hidden // heads // 2,
            v_head_dim=hidden // heads,
        ),
        sparse_attention=SparseAttentionShape(
            a_ranks=(1,), indexer_num_heads=2, indexer_head_dim=16, indexer_topk=32
        ),
        experts=experts,
        mamba=MambaShape(
            num_heads=heads, head_dim=hidden // heads, state_dim=16, num_groups=2, chunk_size=64
        ),
        author_mamba=AuthorMambaShape(
            num_heads=2 * heads, head_dim=hidden // heads, state_dim=16, mimo_rank=2
        ),
        recurrent=RecurrentShape(num_heads=heads, key_dim=16, value_dim=16),
        embedding=EmbeddingShape(vocab_size=vocab_size, ngram=NgramHashShape(table_size=10_000)),
        mtp=MultiTokenPredictionShape(num_layers=0),
    )


def _tiny(recipe: HybridRecipe) -> HybridRecipe:
    experts = ExpertsShape(num_experts=4, topk=2, ffn_hidden_size=128, shared_expert_size=128)
    model = _small_shape(128, 256, vocab_size=4096, heads=4, experts=experts)
    small = _small(recipe, depth=len(recipe.pattern), model=model)
    return replace(
        small,
        batch=Batch(micro_batch_size=8, global_batch_size=8),
        schedule=OptimizerSchedule(
            lr=3e-3, min_lr=3e-4, warmup_steps=20, decay_steps=240, train_steps=240
        ),
        cadence=Cadence(eval_interval=60, eval_batches=8, save_interval=60, log_interval=5),
        plasticity=Plasticity(stp=StpLever(start_step=24)),
    )


def _smoke(recipe: HybridRecipe) -> HybridRecipe:
    experts = ExpertsShape(num_experts=4, topk=2, ffn_hidden_size=32, shared_expert_size=32)
    model = _small_shape(32, 64, vocab_size=4096, heads=2, experts=experts)
    small = _small(recipe, depth=recipe.depth, model=model)
    return replace(
        small,
        batch=Batch(micro_batch_size=2, global_batch_size=2),
        schedule=OptimizerSchedule(
            lr=1e-3, min_lr=1e-4, warmup_steps=2, decay_steps=20, train_steps=20
        ),
        cadence=Cadence(eval_interval=10, eval_batches=2, save_interval=10, log_interval=1),
        plasticity=Plasticity(stp=StpLever(start_step=2)),
    )


SIZES: dict[str, Size] = {
    "": Size(summary="full size, 52 layers", shrink=lambda recipe: recipe, modes=True),
    "_smoke": Size(summary="all 52 layers at toy width", shrink=_smoke, modes=False),
    "_tiny": Size(summary="one tile at small width, trains on a CPU", shrink=_tiny, modes=False),
}

_BY_NAME = {f"{family}{size}": (family, size) for family in FAMILIES for size in SIZES}
RECIPE_NAMES: tuple[str, ...] = tuple(_BY_NAME)


def describe(name: str) -> str:
    """Return one line on what the recipe is.

    Raises:
        RecipeError: If there is no such recipe.
    """
    family, size = _lookup(name)
    return f"{FAMILIES[family].summary}: {SIZES[size].summary}"


def recipe(
    name: str,
    *,
    mode: str | ParallelismMode = ParallelismMode.NEMO_NATIVE,
    changes: dict[str, Any] | None = None,
) -> HybridRecipe:
    """Return a recipe by name, with some of its fields changed.

    Args:
        name: One of `RECIPE_NAMES`.
        mode: Parallelism mode of a full-size recipe; the small sizes run on one process and
            take only the Mamba lane from it.
        changes: Leaf fields by dotted path or unique ending, as in `with_paths`.

    Raises:
        PatternError: If a changed pattern does not fit.
        RecipeError: If there is no such recipe, mode or field, or settings contradict.
    """
    family_name, size = _lookup(name)
    family, lane = FAMILIES[family_name], ParallelismMode.from_name(mode)
    base = HybridRecipe(
        name=f"{family_name}{size}",
        pattern=LayerPattern.parse(family.pattern),
        depth=FULL_DEPTH,
        model=family.model,
        parallelism=_mode_parallelism(lane),
        features=_mode_features(lane),
    )
    return with_paths(SIZES[size].shrink(base), changes or {})


def _lookup(name: str) -> tuple[str, str]:
    return lookup(_BY_NAME, name, what=f"No recipe is called {name!r}")


def _mode_parallelism(mode: ParallelismMode) -> Parallelism:
    if mode is ParallelismMode.NEMO_NATIVE:
        return Parallelism(tensor_model_parallel_size=2, sequence_parallel=True)
    return Parallelism()


def _mode_features(mode: ParallelismMode) -> Features:
    return Features(mamba="native" if mode is ParallelismMode.NEMO_NATIVE else "author")
