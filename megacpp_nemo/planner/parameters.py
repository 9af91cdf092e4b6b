"""Every parameter of a recipe's model by name and whole shape, without building it."""

from __future__ import annotations

from megacpp_nemo.contract.parameters import Parameter, classify
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.pieces import pieces
from megacpp_nemo.planner.tensors import padded_vocabulary, piece_tensors

__all__ = ["padded_vocabulary", "parameters"]


def parameters(recipe: HybridRecipe) -> tuple[Parameter, ...]:
    """Return what each parameter of a model is, in Megatron's order, before it is split over ranks.

    Raises:
        RecipeError: If no rule says what parameters a part of the model has.
    """
    return tuple(
        classify(
            # As a rank that has every expert names it.
            piece.prefix + tensor.name.replace("mlp.experts.", "mlp.experts.local_experts."),
            tensor.shape,
            layers=recipe.layers,
            model=recipe.model,
            mamba=recipe.features.mamba,
        )
        for piece in pieces(recipe)
        for tensor in piece_tensors(recipe, piece)
    )
