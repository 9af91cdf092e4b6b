"""Rows of the correspondence table for the levers on a run in progress.

NeMo carries them as one more callback, `PlasticitySchedule`, which stands in the trainer's list
only where a lever is on, and names only what differs from the defaults. Megatron has no flag for
any of them, and its own script runs no callbacks: the name of a spec carries a lever that is on,
whole, so that it is refused there and not left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from megacpp_nemo.contract.plasticity import Plasticity
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.lowering.row import Condition, Row

# The entry of the trainer's list of callbacks, as a path that does not depend on its place.
SCHEDULE = "trainer.callbacks.PlasticitySchedule"
# What users and papers call them; in the order of the fields.
NAMES = {
    "fire": "FIRE",
    "dash": "DASH",
    "shrink": "periodic shrink",
    "redo": "ReDo",
    "stp": "STP",
}
# Fields that turn a lever on.
SWITCHES = {
    "fire": ("steps", "boundaries"),
    "dash": ("steps", "boundaries"),
    "shrink": ("interval",),
    "redo": ("report_interval", "steps"),
    "stp": ("weight", "measure"),
}
DEFAULTS = Plasticity()
SWITCH_NOTE = "turns it on; Megatron's own script runs no callbacks, so the spec refuses it"


def lever_of(recipe: HybridRecipe, name: str) -> Any:
    """Return one lever of a recipe, on or off."""
    return getattr(recipe.plasticity, name)


def _spelled(value: Any, recipe: HybridRecipe) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _unspelled(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _rows(name: str) -> Iterator[Row]:
    """Yield the rows of a lever's fields."""
    on = Condition(NAMES[name], lambda plan: lever_of(plan.recipe, name).on)
    off = Condition("off, as in Megatron", lambda plan: not lever_of(plan.recipe, name).on)
    for item in fields(getattr(DEFAULTS, name)):
        yield Row(
            field=f"plasticity.{name}.{item.name}",
            nemo=(f"{SCHEDULE}.plasticity.{name}.{item.name}",),
            spell=_spelled,
            unspell=_unspelled,
            when=_differs(name, item.name),
            spec=on,
            stock=off if item.name in SWITCHES[name] else None,
            owner="spec",
            note=SWITCH_NOTE if item.name in SWITCHES[name] else "",
        )


def _differs(name: str, field: str) -> Any:
    """Return whether a field of a lever that is on differs from its default."""
    default = getattr(getattr(DEFAULTS, name), field)

    def when(recipe: HybridRecipe) -> bool:
        lever = lever_of(recipe, name)
        return bool(lever.on and getattr(lever, field) != default)

    return when


PLASTICITY_ROWS = tuple(row for name in NAMES for row in _rows(name))
