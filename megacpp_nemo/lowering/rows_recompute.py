"""Rows of the correspondence table that say what a backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.lowering.roles import Role
from megacpp_nemo.lowering.row import CONFIG, Condition, Row, Spelling, layers

NONE, SELECTIVE, FULL = "none", "selective", "full"
FIELD = "parallelism.recompute"
# Megatron's words for each layer by itself, and for the core of an attention layer.
METHOD, NUM_LAYERS, CORE = "uniform", 1, "core_attn"
# Before it no hybrid stack carries out the flags of full recomputation.
NATIVE_SINCE = "0.18"

CORES = layers(Role.ATTENTION, Role.LATENT_ATTENTION)
OWN = Condition(
    "every layer, which the release does not recompute itself",
    lambda plan: any(seam.id == "recompute" for seam in plan.seams),
)
NATIVE = Condition("every layer, by the release's stack", lambda plan: not OWN.holds(plan))


def _under(policy: str, value: Any) -> Callable[[str, HybridRecipe], Any]:
    """Return what spells `value` under one policy, and leaves the flag out under the others."""
    return lambda given, recipe: value if given == policy else None


def _full(flag: str, value: Any) -> Spelling:
    return Spelling(flag=flag, value=_under(FULL, value), since=NATIVE_SINCE, read=NATIVE)


def _selective(flag: str, value: Any) -> Spelling:
    return Spelling(flag=flag, value=_under(SELECTIVE, value), read=CORES)


def _told(place: str, policy: str, value: Any, *flags: Spelling) -> Row:
    """Return a row of what Megatron is told besides, under one policy."""
    return Row(
        field=FIELD,
        nemo=(f"{CONFIG}.{place}",),
        spell=lambda given, recipe: value,
        unspell=None,
        when=lambda recipe: recipe.parallelism.recompute == policy,
        flags=flags,
    )


_GRANULARITY = "--recompute-granularity"
RECOMPUTE_ROWS: tuple[Row, ...] = (
    Row(
        field=FIELD,
        nemo=(f"{CONFIG}.recompute_granularity",),
        spell=lambda policy, recipe: None if policy == NONE else policy,
        unspell=lambda granularity: granularity or NONE,
        flags=(_full(_GRANULARITY, FULL), _selective(_GRANULARITY, SELECTIVE)),
        spec=OWN,
        note="full before 0.18: the flags are taken, and the hybrid stack keeps everything; "
        "in 0.18 a prediction depth fails with them",
    ),
    _told("recompute_method", FULL, METHOD, _full("--recompute-method", METHOD)),
    _told("recompute_num_layers", FULL, NUM_LAYERS, _full("--recompute-num-layers", NUM_LAYERS)),
    _told("recompute_modules", SELECTIVE, [CORE], _selective("--recompute-modules", (CORE,))),
)
