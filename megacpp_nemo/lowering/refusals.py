"""What `lower` refuses: what nobody owns, and a command that the release would not take."""

from __future__ import annotations

from typing import Any

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.lowering.arguments import dead_flags, parse
from megacpp_nemo.lowering.plan import Plan
from megacpp_nemo.lowering.policy import LaunchOptions
from megacpp_nemo.lowering.releases import Release


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
    if plan.seams and not plan.release.carries_spec:
        raise LoweringError(
            f"Nobody owns these on Megatron {plan.release.name}: "
            + ", ".join(f"{seam.id} ({seam.what})" for seam in plan.seams),
            given=f"release {plan.release.name}",
            allowed="a release this package's spec supports: 0.16.1 or later",
            hint="release='0.16.1', or " + ", ".join(seam.off for seam in plan.seams),
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
