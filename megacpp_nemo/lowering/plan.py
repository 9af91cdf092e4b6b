"""The plan: who owns each layer of a recipe on a release, and how its pattern is written.

Roles are matched to a release's symbols by meaning. A role that the release has no symbol for
is a custom seam and rides on the slot of the nearest one that is called the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.contract.pattern import LayerPattern
from megacpp_nemo.contract.plasticity_rules import acted_layers
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.contract.training import Precision
from megacpp_nemo.lowering.ownership import (
    MEANING,
    refuse_prediction,
    refuse_unowned,
    seam_of,
    slot_of,
    version_of,
)
from megacpp_nemo.lowering.releases import Release
from megacpp_nemo.lowering.roles import Role, layer_roles, prediction_roles
from megacpp_nemo.lowering.seams import SEAMS, Seam
from megacpp_nemo.lowering.spec_name import NamedLayer, SpecName

NATIVE = "native"


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """One layer as it is lowered.

    Args:
        number: 1-based number in the main pattern, or in a prediction depth.
        role: What it is.
        symbol: The release's symbol in the pattern.
        owner: `native`, or the id of the seam.
        stage: 0-based pipeline segment.
    """

    number: int
    role: Role
    symbol: str
    owner: str
    stage: int = 0

    @property
    def native(self) -> bool:
        """Whether the release builds it from its own spec."""
        return self.owner == NATIVE


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe's layers on a release.

    Args:
        recipe: What is lowered.
        release: Where to.
        layers: The main pattern.
        prediction: One multi-token prediction depth; empty when it is off or not native.
        pattern: The pattern as the release writes it.
        uneven_stages: Layers of the first and the last stage, where the release has no
            separator and the stages are not even.
    """

    recipe: HybridRecipe
    release: Release
    layers: tuple[PlannedLayer, ...]
    prediction: tuple[PlannedLayer, ...]
    pattern: str
    uneven_stages: tuple[int | None, int | None]

    def has(self, *roles: Role) -> bool:
        """Whether any layer, of the main pattern or of a prediction depth, has a role."""
        return any(layer.role in roles for layer in self.every_layer)

    @property
    def every_layer(self) -> tuple[PlannedLayer, ...]:
        """Layers of the main pattern and of one prediction depth."""
        return (*self.layers, *self.prediction)

    @property
    def native_mtp(self) -> bool:
        """Whether the release builds the recipe's multi-token prediction."""
        return bool(self.recipe.model.mtp.num_layers and self.release.mtp_separator)

    def is_native(self, role: Role) -> bool:
        """Whether every layer of a role is the release's own."""
        return all(layer.native for layer in self.every_layer if layer.role is role)

    @property
    def seams(self) -> tuple[Seam, ...]:
        """Every seam of the recipe on this release, in the order of `SEAMS`."""
        found = {seam.id: seam for seam in (*_layer_seams(self), *_other_seams(self))}
        return tuple(found[name] for name in SEAMS if name in found)

    def spec_name(self, settings: dict[str, object]) -> SpecName:
        """Return the name of the spec that carries the seams."""
        named = [
            tuple(NamedLayer(layer.role, not layer.native) for layer in part)
            for part in (self.layers, self.prediction)
        ]
        return SpecName(layers=named[0], mtp=named[1], settings=settings)


def make_plan(recipe: HybridRecipe, release: Release) -> Plan:
    """Return the plan of a recipe on a release.

    Raises:
        LoweringError: If a layer has no owner there, or the stages cannot be written.
    """
    roles = layer_roles(recipe)
    prediction = prediction_roles(recipe) if release.mtp_separator else ()
    refuse_unowned(release, {*roles, *prediction})
    refuse_prediction(recipe, release, prediction)
    sparse = Role.SPARSE_ATTENTION in roles
    stages = _stages(recipe)
    numbered = zip(roles, _stage_numbers(stages), strict=True)
    layers = tuple(
        _planned(recipe, release, role, number, stage, sparse=sparse)
        for number, (role, stage) in enumerate(numbered, start=1)
    )
    predicted = tuple(
        _planned(recipe, release, role, number, len(stages) - 1, sparse=False)
        for number, role in enumerate(prediction, start=1)
    )
    main = _main_pattern(layers, len(stages), release)
    suffix = "".join(layer.symbol for layer in predicted)
    depths = recipe.model.mtp.num_layers if predicted else 0
    return Plan(
        recipe=recipe,
        release=release,
        layers=layers,
        prediction=predicted,
        pattern=main + (f"{release.mtp_separator}{suffix}" * depths),
        uneven_stages=_uneven(recipe, release, stages),
    )


def _planned(
    recipe: HybridRecipe, release: Release, role: Role, number: int, stage: int, *, sparse: bool
) -> PlannedLayer:
    seam = seam_of(recipe, release, role)
    if seam is None:
        symbol = release.symbols[MEANING[role]]
        return PlannedLayer(number=number, role=role, symbol=symbol, owner=NATIVE, stage=stage)
    slot = slot_of(release, role, sparse=sparse)
    return PlannedLayer(number=number, role=role, symbol=slot, owner=seam, stage=stage)


def _stages(recipe: HybridRecipe) -> tuple[LayerPattern, ...]:
    parallelism = recipe.parallelism
    chunks = parallelism.virtual_pipeline_model_parallel_size or 1
    return recipe.layers.split(parallelism.pipeline_model_parallel_size * chunks)


def _stage_numbers(stages: tuple[LayerPattern, ...]) -> Iterator[int]:
    for number, stage in enumerate(stages):
        yield from [number] * len(stage)


def _main_pattern(layers: tuple[PlannedLayer, ...], stages: int, release: Release) -> str:
    parts = [
        "".join(layer.symbol for layer in layers if layer.stage == stage) for stage in range(stages)
    ]
    return (release.stage_separator or "").join(parts)


def _uneven(
    recipe: HybridRecipe, release: Release, stages: tuple[LayerPattern, ...]
) -> tuple[int | None, int | None]:
    """Return the first and last stage's layers where only counts can say them."""
    chunks = recipe.parallelism.virtual_pipeline_model_parallel_size
    if release.stage_separator:
        return None, None
    if chunks:
        raise LoweringError(
            f"Megatron {release.name} has no virtual pipeline stages for hybrid models",
            given=f"virtual_pipeline_model_parallel_size={chunks} on release {release.name}",
            allowed="releases whose pattern takes '|': 0.17.1 and later",
            hint="parallelism.virtual_pipeline_model_parallel_size=null",
        )
    sizes = [len(stage) for stage in stages]
    if len(set(sizes)) == 1:
        return None, None
    middle = set(sizes[1:-1])
    if len(middle) > 1:
        raise LoweringError(
            f"Megatron {release.name} cannot be told these pipeline stages",
            given=f"stages of {sizes} layers on release {release.name}",
            allowed="stages alike but for the first and the last, or a release whose pattern "
            "takes '|'",
            hint="release='0.17.1' or later, or even stages",
        )
    return sizes[0], sizes[-1]


def _layer_seams(plan: Plan) -> Iterator[Seam]:
    for name in dict.fromkeys(layer.owner for layer in plan.every_layer if not layer.native):
        own = [layer for layer in plan.layers if layer.owner == name]
        symbols = {layer.symbol for layer in plan.every_layer if layer.owner == name}
        yield SEAMS[name].at((layer.number for layer in own), "".join(sorted(symbols)))


def _other_seams(plan: Plan) -> Iterator[Seam]:
    recipe, features = plan.recipe, plan.recipe.features
    others = [layer.number for layer in plan.layers if layer.role is not Role.EXPERTS]
    if recipe.precision is Precision.FP8_EXPERTS and others:
        yield SEAMS["fp8-experts"].at(others)
    if recipe.parallelism.recompute == "full" and not _recomputes(plan):
        yield SEAMS["recompute"].at(layer.number for layer in plan.layers)
    if recipe.model.mtp.num_layers and not plan.native_mtp:
        yield SEAMS["mtp"]
    if features.ngram_hash:
        yield SEAMS["ngram-hash"]
    if features.structure:
        yield SEAMS["structure"]
    stateful = (Role.MAMBA, Role.AUTHOR_MAMBA, Role.GATED_DELTA_NET, Role.RECURRENT)
    if features.reset_state and plan.has(*stateful):
        yield SEAMS["documents"].at(x.number for x in plan.layers if x.role in stateful)
    for name in recipe.plasticity.on:
        yield SEAMS[name].at(acted_layers(recipe.plasticity, name, recipe.layers, features))


def _recomputes(plan: Plan) -> bool:
    """Whether the release's own flags make every layer run again.

    Through 0.17 its hybrid stack keeps everything, and 0.18's prediction layer hands its own
    recomputation an argument that it does not take.
    """
    return version_of(plan.release.package_version) >= ((0, 19) if plan.native_mtp else (0, 18))
