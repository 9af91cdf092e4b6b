"""How many parameters a model has: in all, active for a token, by family, by piece and by rank.

A token is active in every parameter but those of routed experts, of which it visits `topk` of
`num_experts`. Embeddings are the tables that are looked up and the output head: tokens,
n-grams and structure channels, whose projections are counted as the rest is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.flops import distinct
from megacpp_nemo.planner.pieces import Piece, Role, pieces
from megacpp_nemo.planner.sharding import piece_on_rank, stage_pieces
from megacpp_nemo.planner.tensors import piece_tensors

# Tables that are looked up, by their names behind their piece's prefix.
TABLES = ("word_embeddings.weight", "ngram_hash.table.weight", "structure.table.weight")


@dataclass(frozen=True)
class Count:
    """Parameters of a part of a model.

    Args:
        total: All of them.
        active: Those that one token uses.
        embeddings: How many of the total are tables that are looked up, or the output head.
    """

    total: int = 0
    active: int = 0
    embeddings: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.total + other.total,
            self.active + other.active,
            self.embeddings + other.embeddings,
        )

    @property
    def total_without_embeddings(self) -> int:
        """All parameters but tables that are looked up and the output head."""
        return self.total - self.embeddings

    @property
    def active_without_embeddings(self) -> int:
        """Those of them that one token uses."""
        return self.active - self.embeddings


@dataclass(frozen=True)
class Counts:
    """Parameters of a model.

    Args:
        whole: Of the whole model, before it is split.
        families: By family of layers, and by part outside of the layers.
        pieces: By piece, in order.
        ranks: By pipeline stage, of one of its ranks.
    """

    whole: Count
    families: Mapping[str, Count]
    pieces: tuple[tuple[Piece, Count], ...]
    ranks: tuple[int, ...]

    @property
    def most_loaded_stage(self) -> int:
        """The first stage whose ranks have the most parameters."""
        return self.ranks.index(max(self.ranks))

    @property
    def most_loaded_rank(self) -> int:
        """Parameters of a rank of that stage."""
        return max(self.ranks)


def counts(recipe: HybridRecipe) -> Counts:
    """Return the parameters of a recipe's model.

    Raises:
        RecipeError: If no rule says what parameters a part has.
    """
    every = pieces(recipe)
    costs = {(piece.role, piece.family): piece_count(recipe, piece) for piece, _ in distinct(every)}
    own = tuple((piece, costs[piece.role, piece.family]) for piece in every)
    families: dict[str, Count] = {}
    for piece, count in own:
        families[piece.group] = families.get(piece.group, Count()) + count
    return Counts(
        whole=sum(families.values(), Count()),
        families=families,
        pieces=own,
        ranks=tuple(
            rank_count(recipe, stage)
            for stage in range(recipe.parallelism.pipeline_model_parallel_size)
        ),
    )


def piece_count(recipe: HybridRecipe, piece: Piece) -> Count:
    """Return the parameters of one piece.

    Raises:
        RecipeError: If no rule says what parameters it has.
    """
    total = routed = tables = 0
    for tensor in piece_tensors(recipe, piece):
        size = prod(tensor.shape)
        total += size
        routed += size if tensor.expert is not None else 0
        tables += size if tensor.name in TABLES or piece.role is Role.HEAD else 0
    experts = recipe.model.experts
    # All experts of a layer are alike.
    active = total - routed + routed // experts.num_experts * experts.topk
    return Count(total, active, tables)


def rank_count(recipe: HybridRecipe, stage: int) -> int:
    """Return the parameters of one rank of a pipeline stage, copies included.

    Raises:
        RecipeError: If there is no such stage, or no rule says what parameters a part has.
    """
    return sum(
        count * sum(parameter.count for parameter in piece_on_rank(recipe, piece))
        for piece, count in distinct(stage_pieces(recipe, stage))
    )
