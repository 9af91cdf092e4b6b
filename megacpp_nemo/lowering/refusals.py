"""What `lower` refuses: what nobody owns, and a command that the release would not take."""

from __future__ import annotations

from typing import Any

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.plasticity import LEVERS
from megacpp_nemo.lowering.arguments import dead_flags, parse
from megacpp_nemo.lowering.plan import Plan
from megacpp_nemo.lowering.policy import LaunchOptions
from megacpp_nemo.lowering.releases import Release

# Families that lower to one and the same layer.
UNCLEAR = {BlockFamily.ATTENTION, BlockFamily.SPARSE_ATTENTION}


def refuse_unowned(plan: Plan) -> None:
    """Refuse what neither the release nor this package's spec does there."""
    if plan.recipe.features.reset_attention_mask:
        raise LoweringError(
            "Nobody keeps attention within documents on Megatron's command line: "
            "--reset-attention-mask makes a mask that Transformer Engine's causal attention "
            "does not read",
            given="features.reset_attention_mask=True",
            allowed="False",
            hint="features.reset_attention_mask=false",
        )
    _refuse_unclear_families(plan)
    if plan.seams and not plan.release.carries_spec:
        raise LoweringError(
            f"Nobody owns these on Megatron {plan.release.name}: "
            + ", ".join(f"{seam.id} ({seam.what})" for seam in plan.seams),
            given=f"release {plan.release.name}",
            allowed="a release this package's spec supports: 0.16.1 or later",
            hint="release='0.16.1', or " + ", ".join(seam.off for seam in plan.seams),
        )


def _refuse_unclear_families(plan: Plan) -> None:
    """Refuse a lever that tells A from D: on Megatron's side both are one sparse layer."""
    families = plan.recipe.layers.layers
    if BlockFamily.SPARSE_ATTENTION not in families:
        return
    for name in LEVERS:
        lever = getattr(plan.recipe.plasticity, name)
        chosen = {BlockFamily.from_name(each) for each in getattr(lever, "families", ())}
        if lever.on and chosen & UNCLEAR:
            numbers = range(1, len(families) + 1)
            own = [n for n, family in zip(numbers, families, strict=True) if family in chosen]
            layers = [n for n in own if not lever.layers or n in lever.layers]
            raise LoweringError(
                f"plasticity.{name}.families tells A from D, and a Megatron command line does not: "
                "there a D is an A of a sparse rank",
                given=f"plasticity.{name}.families={list(lever.families)} in a pattern with D",
                allowed=f"families without A and D, or plasticity.{name}.layers",
                hint=f"plasticity.{name}.families=[], plasticity.{name}.layers={layers}",
            )


def refuse_seams(plan: Plan) -> None:
    """Refuse a recipe that the release does not own whole."""
    count = len(plan.seams)
    if count:
        raise LoweringError(
            f"{count} seam{'s are' if count > 1 else ' is'} left on Megatron {plan.release.name}:"
            + "".join(f"\n    {seam.id}: {seam.what}; {seam.reason}" for seam in plan.seams),
            given="seams='native-only'",
            allowed="a recipe that the release owns whole",
            hint="seams='spec', or " + "; ".join(seam.off for seam in plan.seams),
        )


def refuse_dead(command: tuple[str, ...], release: Release) -> None:
    """Hold a command against the release itself: every flag known, typed and read."""
    dead = dead_flags(parse(command, release), release)
    if dead:
        raise LoweringError(
            f"Megatron {release.name} would accept these and no layer would read them:\n    "
            + "\n    ".join(f"{item.flag}: {item.why}" for item in dead),
            given=" ".join(item.flag for item in dead),
            allowed="flags that a layer of this model reads",
            hint="another release; the correspondence table says where each flag holds",
        )


def refuse_other_launch(launch: Any) -> None:
    """Refuse what is no `LaunchOptions`."""
    if launch is not None and not isinstance(launch, LaunchOptions):
        raise LoweringError(
            "The launch is told by LaunchOptions",
            given=f"launch={launch!r}",
            allowed="LaunchOptions, or None",
            hint="launch=LaunchOptions(cache_dir='/cache')",
        )
