"""What a part of a model costs: its parameters and its operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.counts import Count
from megacpp_nemo.planner.flops import forward_flops, training_flops
from megacpp_nemo.planner.pieces import Piece


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a part of a model costs.

    Args:
        count: Its parameters.
        forward_flops: Operations of a forward pass, per token.
        training_flops: Operations of a training step, per token, without recomputation.
        pieces: Of how many pieces it is made.
    """

    count: Count = field(default_factory=Count)
    forward_flops: float = 0.0
    training_flops: float = 0.0
    pieces: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            count=self.count + other.count,
            forward_flops=self.forward_flops + other.forward_flops,
            training_flops=self.training_flops + other.training_flops,
            pieces=self.pieces + other.pieces,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "parameters": self.count.total,
            "active_parameters": self.count.active,
            "embedding_parameters": self.count.embeddings,
            "forward_flops_per_token": self.forward_flops,
            "training_flops_per_token": self.training_flops,
            "pieces": self.pieces,
        }


def operations(recipe: HybridRecipe) -> Callable[[Piece], Cost]:
    """Return what gives a piece's operations as a cost, those of alike pieces counted once."""
    known: dict[tuple[Any, Any], Cost] = {}

    def cost(piece: Piece) -> Cost:
        kind = (piece.role, piece.family)
        if kind not in known:
            known[kind] = Cost(
                forward_flops=forward_flops(recipe, piece).total,
                training_flops=training_flops(recipe, piece),
            )
        return known[kind]

    return cost
