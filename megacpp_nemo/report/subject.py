"""What a page or a picture is about: a recipe, and what became of it on a release."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.lowering.lower import Lowering, lower
from megacpp_nemo.lowering.releases import load_release
from megacpp_nemo.planner.gpus import DEFAULT_GPU, Gpu, gpu_called
from megacpp_nemo.planner.plan import Plan, plan
from megacpp_nemo.report.picture import Picture, picture_of


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A recipe on a release.

    Args:
        label: The recipe in the words that asked for it, `nam56r depth=26`.
        recipe: The recipe.
        release: The release's name.
        gpu: The GPU that it is planned for.
        lowering: Its lowering; None where the release is refused it.
        refusal: Why it is; None where it is not.
    """

    label: str
    recipe: HybridRecipe
    release: str
    gpu: Gpu
    lowering: Lowering | None
    refusal: LoweringError | None

    @functools.cached_property
    def picture(self) -> Picture:
        """Its layers as cells."""
        return picture_of(self.recipe, self.lowering)

    @functools.cached_property
    def plan(self) -> Plan:
        """What it costs in its own layout.

        Raises:
            PlanError: If FP8 is asked of a GPU without it.
            RecipeError: If no rule says what a part costs.
        """
        return plan(self.recipe, gpu=self.gpu)


def subject(label: str, recipe: HybridRecipe, release: str, gpu: str = DEFAULT_GPU) -> Subject:
    """Return a recipe on a release, lowered if the release has it.

    Args:
        label: The recipe in words.
        recipe: The recipe.
        release: A release's name, or the path of a release file.
        gpu: Name of the GPU to plan for.

    Raises:
        LoweringError: If there is no such release.
        PlanError: If there is no such GPU.
    """
    known, found = load_release(release), gpu_called(gpu)
    lowering: Lowering | None = None
    refusal: LoweringError | None = None
    try:
        lowering = lower(recipe, release=known)
    except LoweringError as error:
        refusal = error
    return Subject(
        label=label,
        recipe=recipe,
        release=known.name,
        gpu=found,
        lowering=lowering,
        refusal=refusal,
    )
