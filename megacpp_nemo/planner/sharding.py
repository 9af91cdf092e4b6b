"""The parameters of one rank: what tensor, expert and pipeline parallelism leave of a model.

All ranks of a pipeline stage hold as much as the first of its tensor and expert groups, whose
parameters these are: the first experts, the first rows. Data, context and sequence parallelism
split no parameters. N-gram tables in host memory are on no device, and left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megacpp_nemo.contract.errors import RecipeError
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.pieces import Piece, Role, pieces
from megacpp_nemo.planner.tensors import piece_tensors


@dataclass(frozen=True, slots=True)
class RankParameter:
    """One parameter as a rank holds it.

    Args:
        name: Name in the whole model.
        piece: The piece that it belongs to.
        shape: Its shape on this rank.
        whole_shape: Its shape before it is split over tensor ranks.
        expert: Whether it is a routed expert's: its gradient is reduced over the expert
            data-parallel group.
    """

    name: str
    piece: Piece
    shape: tuple[int, ...]
    whole_shape: tuple[int, ...]
    expert: bool = False

    @property
    def count(self) -> int:
        """Elements on this rank."""
        return prod(self.shape)

    @property
    def whole_count(self) -> int:
        """Elements before it is split."""
        return prod(self.whole_shape)


def rank_parameters(recipe: HybridRecipe, stage: int) -> tuple[RankParameter, ...]:
    """Return the parameters of a rank of a pipeline stage, those of all its virtual chunks.

    On the last of several stages, prediction depths keep a copy of the embedding, which comes
    first.

    Args:
        recipe: What is trained.
        stage: 0-based pipeline stage.

    Raises:
        RecipeError: If there is no such stage, or no rule says what parameters a part has.
    """
    return tuple(
        parameter
        for piece in stage_pieces(recipe, stage)
        for parameter in piece_on_rank(recipe, piece)
    )


def stage_pieces(recipe: HybridRecipe, stage: int) -> tuple[Piece, ...]:
    """Return what a pipeline stage holds: its pieces, and before them the copy, if it has one.

    Raises:
        RecipeError: If there is no such stage.
    """
    stages = recipe.parallelism.pipeline_model_parallel_size
    if not 0 <= stage < stages:
        raise RecipeError(
            "There is no such pipeline stage",
            given=f"stage {stage} of {stages}",
            allowed=f"0 to {stages - 1}",
            hint=f"stage {stages - 1}",
        )
    copy = embedding_copy(recipe)
    held = (*((copy,) if copy else ()), *pieces(recipe))
    return tuple(piece for piece in held if piece.stage == stage)


def embedding_copy(recipe: HybridRecipe) -> Piece | None:
    """Return the embedding that prediction depths keep on the last of several stages.

    It is no piece of the model: what is summed over `pieces` counts the embedding once.
    """
    stages = recipe.parallelism.pipeline_model_parallel_size
    if stages == 1 or not recipe.model.mtp.num_layers:
        return None
    chunks = recipe.parallelism.virtual_pipeline_model_parallel_size or 1
    return Piece(
        role=Role.EMBEDDING_COPY,
        name=Role.EMBEDDING_COPY.value,
        prefix="embedding.",
        stage=stages - 1,
        chunk=chunks - 1,
    )


def piece_on_rank(recipe: HybridRecipe, piece: Piece) -> Iterator[RankParameter]:
    """Yield what a rank holds of a piece on its device.

    Raises:
        RecipeError: If no rule says what parameters the piece has.
    """
    parallelism = recipe.parallelism
    experts = recipe.model.experts.num_experts // parallelism.expert_model_parallel_size
    for tensor in piece_tensors(recipe, piece):
        routed = tensor.expert is not None
        ranks = parallelism.expert_tensor_size if routed else parallelism.tensor_model_parallel_size
        if not tensor.host and (tensor.expert is None or tensor.expert < experts):
            yield RankParameter(
                piece.prefix + tensor.name,
                piece,
                _part(tensor.shape, tensor.split, ranks),
                tensor.shape,
                routed,
            )


def _part(shape: tuple[int, ...], split: int | None, ranks: int) -> tuple[int, ...]:
    if split is None or ranks == 1:
        return shape
    return (*shape[:split], shape[split] // ranks, *shape[split + 1 :])
