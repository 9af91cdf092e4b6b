"""Levers on a run in progress, as callbacks for any recipe: FIRE, DASH, shrink, ReDo and STP.

    nemo llm pretrain --factory "nam56r_tiny(plasticity__fire__steps=[100])"
    nemo llm pretrain --factory nam56r_tiny trainer.callbacks+="[fire(steps=[100])]"

Both say the same: the first as a field of the recipe, the second beside it. In Python it is
`recipe.trainer.callbacks.append(fire(steps=[100]))`.

`+=` takes a list, once. `trainer.callbacks="[fire(steps=[100])]"` replaces the recipe's callbacks:
the run then has no `RunProgress` and no `RunSummary`, so it shows no loss and ends without a word
on what it learned.

Each factory takes the fields of its lever in `megacpp_nemo.contract.plasticity`, where they are
explained; what is not given keeps its default.
"""

# NeMo-Run reads these annotations to parse its command line. The types are left open, so that a
# wrong value meets the lever's own rule and its message.

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import nemo_run as run

from megacpp_nemo.contract import LayerPattern, RecipeError
from megacpp_nemo.contract.errors import lookup
from megacpp_nemo.contract.plasticity import Plasticity
from megacpp_nemo.contract.rules import check_plasticity
from megacpp_nemo.contract.training import Features
from megacpp_nemo.lowering.leaves import read_leaves
from megacpp_nemo.lowering.row import CONFIG
from megacpp_nemo.lowering.rows_plasticity import PLASTICITY_ROWS
from megacpp_nemo.lowering.schedules import with_one_schedule
from megacpp_nemo.model.config import HybridConfig
from megacpp_nemo.recipes.build import schedule_of

# What turns a lever on, for one who forgot.
EXAMPLES = {
    "fire": "steps=[100]",
    "dash": "steps=[100]",
    "shrink": "interval=100",
    "redo": "steps=[100]",
    "stp": "weight=0.02",
}


def _lever(name: str) -> Callable[..., run.Config]:
    """Return the registered factory of a lever."""
    kind: Any = _kind(name)
    names = {item.name: item.name for item in dataclasses.fields(kind)}

    def factory(**settings: Any) -> run.Config:
        for given in settings:
            lookup(names, given, what=f"{name} has no setting {given!r}")
        if not kind(**settings).on:
            raise RecipeError(
                f"{name} would never act",
                given=f"{name}({', '.join(f'{key}={settings[key]!r}' for key in settings)})",
                allowed="a setting that turns it on",
                hint=f"{name}({EXAMPLES[name]})",
            )
        return schedule_of([name], **settings)

    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = f"{inspect.getdoc(kind)}\n\nReturns the callback of this lever alone."
    factory.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=Any
            )
            for item in dataclasses.fields(kind)
        ],
        return_annotation=run.Config,
    )
    return run.cli.factory(factory, target=pl.Callback, name=name)


def check_levers(recipe: run.Partial) -> None:
    """Check the levers among a NeMo recipe's callbacks as a recipe's own.

    A recipe whose model is no configuration, or whose length is no number, is not checked.

    Raises:
        LoweringError: If two callbacks set the same lever.
        RecipeError: If a lever names what the model lacks, selects nothing, or comes too late.
    """
    leaves = with_one_schedule(read_leaves(recipe))
    levers: dict[str, dict[str, Any]] = {}
    for row in PLASTICITY_ROWS:
        if row.nemo[0] in leaves.values and row.unspell:
            _, name, field = row.field.split(".")
            levers.setdefault(name, {})[field] = row.unspell(leaves.values[row.nemo[0]])
    train_steps = leaves.effective("trainer.max_steps")
    if leaves.nodes.get("model.config") is not HybridConfig or not isinstance(train_steps, int):
        return
    pattern = LayerPattern.parse(leaves.effective(f"{CONFIG}.hybrid_override_pattern"))
    check_plasticity(
        Plasticity(**{name: _kind(name)(**settings) for name, settings in levers.items()}),
        pattern.tile(leaves.effective(f"{CONFIG}.num_layers")),
        Features(experts=leaves.effective(f"{CONFIG}.experts")),
        context_parallel_size=leaves.effective("trainer.strategy.context_parallel_size"),
        train_steps=train_steps,
    )


def _kind(name: str) -> type:
    return type(getattr(Plasticity(), name))


fire = _lever("fire")
dash = _lever("dash")
shrink = _lever("shrink")
redo = _lever("redo")
stp = _lever("stp")
LEVER_FACTORIES = {factory.__name__: factory for factory in (fire, dash, shrink, redo, stp)}
