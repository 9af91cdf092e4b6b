"""The buffers in which Megatron's data-parallel wrapper keeps parameters and gradients.

Each model chunk has one for its dense parameters and, under expert parallelism, one for its routed
experts', and cuts it into buckets from the last parameter to the first. For the distributed
optimizer a parameter starts at a multiple of 64 elements, and a bucket ends at a multiple of 128
and of the ranks that share it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.pieces import Piece, Role
from megacpp_nemo.planner.sharding import piece_on_rank, stage_pieces

NGRAM_TABLE = "ngram_hash.table.weight"
PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128
# Elements of a bucket, at least, where gradients are reduced while backward runs.
BUCKET_ELEMENTS, BUCKET_ELEMENTS_PER_RANK = 40_000_000, 1_000_000
_AFTER = {
    Role.EMBEDDING_COPY: 1,
    Role.DEPTH_ENTRY: 2,
    Role.DEPTH_LAYER: 2,
    Role.DEPTH_NORM: 2,
}


class Buffer(NamedTuple):
    """One buffer of a rank.

    Args:
        expert: Whether it is of routed experts.
        chunk: 0-based virtual chunk.
        elements: Elements of its parameters.
        padded: Elements of the buffer; as many without the distributed optimizer.
        buckets: Padded elements of its buckets, in the order in which they are reduced.
        ranks: Data-parallel ranks, those of context parallelism included, that share it.
    """

    expert: bool
    chunk: int
    elements: int
    padded: int
    buckets: tuple[int, ...]
    ranks: int


class PieceSizes(NamedTuple):
    """Elements of a piece's parameters on one rank, in order.

    Args:
        dense: Of those that are reduced over all data-parallel ranks.
        experts: Of routed experts' that are reduced over the expert data-parallel group.
        tables: Elements of n-gram tables among the first.
        channels: How many of the first, from the first on, are structure channels' parameters.
    """

    dense: tuple[int, ...]
    experts: tuple[int, ...]
    tables: int
    channels: int


def data_ranks(recipe: HybridRecipe, *, expert: bool) -> int:
    """Return the ranks over which a gradient is reduced: those with the same parameter."""
    parallelism = recipe.parallelism
    stages = parallelism.pipeline_model_parallel_size
    if not expert:
        return parallelism.world_size // (parallelism.tensor_model_parallel_size * stages)
    shared = parallelism.expert_model_parallel_size * parallelism.expert_tensor_size
    return parallelism.world_size // (shared * stages)


def stage_buffers(recipe: HybridRecipe, stage: int) -> tuple[Buffer, ...]:
    """Return the buffers of a rank of a pipeline stage.

    Raises:
        RecipeError: If there is no such stage, or no rule says what parameters a part has.
    """
    return buffers_of(recipe, stage, stage_pieces(recipe, stage))


def buffers_of(recipe: HybridRecipe, stage: int, held: Sequence[Piece]) -> tuple[Buffer, ...]:
    """Return the buffers of a rank of a pipeline stage that holds these pieces."""
    parallelism = recipe.parallelism
    chunks = parallelism.virtual_pipeline_model_parallel_size or 1
    # The copy of the embedding is made after the model, and before its prediction depths.
    ordered = sorted(held, key=lambda piece: _AFTER.get(piece.role, 0))
    found = []
    for chunk in range(chunks):
        own = [(p.role, piece_sizes(recipe, p)) for p in ordered if p.chunk == chunk]
        for expert in (False, True):
            sizes = [
                (size, place >= piece.channels and _stands_apart(recipe, role))
                for role, piece in own
                for place, size in enumerate(piece.experts if expert else piece.dense)
            ]
            if sizes:
                ranks = data_ranks(recipe, expert=expert)
                bucketed = parallelism.overlap_grad_reduce and stage == 0 and chunk == 0
                found.append(_buffer(recipe, tuple(sizes), expert, chunk, ranks, bucketed))
    return tuple(found)


def piece_sizes(recipe: HybridRecipe, piece: Piece) -> PieceSizes:
    """Return the elements of a piece's parameters on one rank."""
    key = _Key(recipe, piece)
    return _sizes(key)


class _Key:
    """What the sizes of a piece depend on, so that they are counted once for many layouts."""

    def __init__(self, recipe: HybridRecipe, piece: Piece) -> None:
        parallelism = recipe.parallelism
        self.recipe, self.piece = recipe, piece
        self.value = (
            piece.role,
            piece.family,
            recipe.model,
            recipe.features,
            parallelism.tensor_model_parallel_size,
            parallelism.expert_model_parallel_size,
            parallelism.expert_tensor_parallel_size,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


@functools.lru_cache(maxsize=4096)
def _sizes(key: _Key) -> PieceSizes:
    held = tuple(piece_on_rank(key.recipe, key.piece))
    # Without expert parallelism Megatron reduces experts as it does all else.
    apart = key.recipe.parallelism.expert_model_parallel_size > 1
    return PieceSizes(
        dense=tuple(p.count for p in held if not (apart and p.expert)),
        experts=tuple(p.count for p in held if apart and p.expert),
        tables=sum(parameter.count for parameter in held if parameter.name.endswith(NGRAM_TABLE)),
        channels=sum(is_channels(parameter.name) for parameter in held),
    )


def is_channels(name: str) -> bool:
    """Whether a parameter, by its name, is of the structure channels."""
    return name.startswith("embedding.structure.")


def _stands_apart(recipe: HybridRecipe, role: Role) -> bool:
    """Whether a part's parameters have a bucket each: the embedding that two stages share.

    The structure channels' are too small, and have none.
    """
    parallelism = recipe.parallelism
    return (
        role in (Role.EMBEDDING, Role.EMBEDDING_COPY)
        and parallelism.use_distributed_optimizer
        and parallelism.pipeline_model_parallel_size > 1
        and recipe.model.mtp.num_layers > 0
    )


def _buffer(
    recipe: HybridRecipe,
    sizes: tuple[tuple[int, bool], ...],
    expert: bool,
    chunk: int,
    ranks: int,
    bucketed: bool,
) -> Buffer:
    elements = sum(size for size, _ in sizes)
    distributed = recipe.parallelism.use_distributed_optimizer
    most = max(BUCKET_ELEMENTS, BUCKET_ELEMENTS_PER_RANK * ranks) if bucketed else None
    buckets = _buckets(sizes, most, ranks if distributed else None)
    return Buffer(expert, chunk, elements, sum(buckets), buckets, ranks)


def _buckets(
    sizes: tuple[tuple[int, bool], ...], most: int | None, ranks: int | None
) -> tuple[int, ...]:
    """Return the padded elements of each bucket.

    Args:
        sizes: Elements of each parameter in the model's order, and whether it stands apart.
        most: Elements from which on a bucket is closed; None for one bucket.
        ranks: Ranks that share the buffer under the distributed optimizer; None without it.
    """
    step = 1 if ranks is None else PARAMETER_ALIGNMENT
    unit = 1 if ranks is None else math.lcm(ranks, BUCKET_ALIGNMENT)
    found, filled = [], 0
    for size, apart in reversed(sizes):
        if apart and filled:
            found.append(-(-filled // unit) * unit)
            filled = 0
        filled = -(-filled // step) * step + size
        if apart or (most is not None and filled >= most):
            found.append(-(-filled // unit) * unit)
            filled = 0
    if filled:
        found.append(-(-filled // unit) * unit)
    return tuple(found)
