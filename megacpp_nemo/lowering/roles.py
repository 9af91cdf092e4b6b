"""What a layer is asked to be, once its recipe's features are taken into account.

A pattern's family says little: an `A` may be plain, multi-latent or sparse attention. A role
says all that decides which module is built; releases own roles, not letters.
"""

from __future__ import annotations

import enum

from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.recipe import HybridRecipe


class Role(enum.Enum):
    """A layer's role. The value is its letter in the name of a spec (`spec_name`)."""

    ATTENTION = "a"
    LATENT_ATTENTION = "l"
    SPARSE_ATTENTION = "d"
    EXPERTS = "e"
    MLP = "f"
    MAMBA = "m"
    AUTHOR_MAMBA = "n"
    GATED_DELTA_NET = "g"
    RECURRENT = "r"

    @property
    def words(self) -> str:
        """The role in words, as reports print it."""
        return _WORDS[self]


_WORDS = {
    Role.ATTENTION: "grouped attention",
    Role.LATENT_ATTENTION: "multi-latent attention",
    Role.SPARSE_ATTENTION: "sparse attention (DSA)",
    Role.EXPERTS: "mixture of experts",
    Role.MLP: "dense MLP",
    Role.MAMBA: "Mamba-2",
    Role.AUTHOR_MAMBA: "Mamba-3",
    Role.GATED_DELTA_NET: "Gated DeltaNet",
    Role.RECURRENT: "M2RNN",
}


def layer_roles(recipe: HybridRecipe) -> tuple[Role, ...]:
    """Return the role of every layer of the main pattern, in order."""
    sparse = set(recipe.sparse_layer_numbers)
    return tuple(
        Role.SPARSE_ATTENTION if number in sparse else role_of(family, recipe)
        for number, family in enumerate(recipe.layers, start=1)
    )


def prediction_roles(recipe: HybridRecipe) -> tuple[Role, ...]:
    """Return the roles of one multi-token prediction depth; empty when it is off."""
    if not recipe.model.mtp.num_layers:
        return ()
    return tuple(role_of(family, recipe) for family in recipe.model.mtp.pattern)


def role_of(family: BlockFamily, recipe: HybridRecipe) -> Role:
    """Return the role that layers of `family` have unless their A-rank makes them sparse."""
    features = recipe.features
    if family is BlockFamily.ATTENTION:
        return Role.LATENT_ATTENTION if features.latent_attention else Role.ATTENTION
    if family is BlockFamily.EXPERTS:
        return Role.EXPERTS if features.experts else Role.MLP
    if family is BlockFamily.MAMBA:
        return Role.AUTHOR_MAMBA if features.mamba == "author" else Role.MAMBA
    return {
        BlockFamily.SPARSE_ATTENTION: Role.SPARSE_ATTENTION,
        BlockFamily.GATED_DELTA_NET: Role.GATED_DELTA_NET,
        BlockFamily.RECURRENT: Role.RECURRENT,
    }[family]
