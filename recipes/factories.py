"""The recipes and their parts as NeMo-Run factories, one per row of the family table.

    nemo llm pretrain --factory nam56r_tiny
    nemo llm pretrain --factory "nam56r(num_nodes=2)" trainer.max_steps=7
    nemo llm finetune --factory "nam56r_tiny(checkpoint='runs/nam56r_tiny/checkpoints/step=240')"
    nemo llm pretrain --factory nam56r_tiny model="nam56r_tiny_model(depth=24)"

The same names are functions here: `nam56r_tiny(depth=24)` returns the `run.Partial`. A recipe
takes every field of `HybridRecipe` by name, or by its path with `__` for `.`:
`nam56r_tiny(hidden_size=256, mamba__num_heads=8)`.
"""

# NeMo-Run reads these annotations to parse its command line: it resolves neither annotations
# kept as text nor `X | Y`. The type of `changes` is left open, so that a wrong value meets the
# recipe's own rule and its message.
# ruff: noqa: UP045

import textwrap
from collections.abc import Callable
from typing import Any, Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo import lightning as nl
from nemo.collections import llm

from megacpp_nemo.contract import RECIPE_NAMES, HybridRecipe, RecipeError, describe, recipe
from megacpp_nemo.recipes.build import to_nemo
from megacpp_nemo.recipes.finetune import to_finetune

# What NeMo's own recipes call these fields.
NEMO_NAMES = {
    "num_layers": "depth",
    "num_gpus_per_node": "parallelism.devices_per_node",
    "max_steps": "schedule.train_steps",
    "mtp_num_layers": "model.mtp.num_layers",
}

# NeMo's command line finds a part by the base class that `llm.pretrain` names.
PARTS: dict[str, type] = {
    "model": pl.LightningModule,
    "data": pl.LightningDataModule,
    "trainer": nl.Trainer,
    "optim": nl.OptimizerModule,
}

# Lines short enough for the column of `nemo llm pretrain --help --docs`.
START = """
    checkpoint: Folder 'step=N' of a run.
    tokenizer_dir: Tokenizer; the one in the
        checkpoint if not given.
    fresh_indexers: Sparse attention from a
        dense checkpoint, which has no
        indexers.
    drop_inputs: Leave out the checkpoint's
        n-gram memory and structure channels
        if the recipe has none."""
WHAT = """
    mode: nemo_native (TP 2, Megatron's
        Mamba) or author_dp (data parallel,
        Mamba-3).
    **changes: Any field of HybridRecipe:
        pattern, depth, hidden_size,
        tensor_model_parallel_size,
        precision, train_steps, ..."""
WHERE = """
    log_dir: Folder of the run."""


def changed(name: str, mode: str, changes: dict[str, Any]) -> HybridRecipe:
    """Return a recipe by name with fields changed, each under its own name or NeMo's.

    Raises:
        PatternError: If a changed pattern does not fit.
        RecipeError: If a field or mode does not exist, or settings contradict each other.
    """
    renamed: dict[str, Any] = {}
    for name_given, value in changes.items():
        path = NEMO_NAMES.get(name_given, name_given.replace("__", "."))
        if path in renamed:
            raise RecipeError(
                f"{path} is changed twice",
                given=", ".join(f"{key}={changes[key]!r}" for key in changes),
                allowed="each field once, under one of its names",
                hint=f"only {path}",
            )
        renamed[path] = value
    return recipe(name, mode=mode, changes=renamed)


def _pretrain(name: str) -> Callable[..., run.Partial]:
    def factory(
        mode: str = "nemo_native", log_dir: Optional[str] = None, **changes: Any
    ) -> run.Partial:
        return to_nemo(changed(name, mode, changes), log_dir=log_dir)

    return _named(factory, name, f"{describe(name)}.", WHAT + WHERE)


def _finetune(name: str) -> Callable[..., run.Partial]:
    def factory(
        checkpoint: Optional[str] = None,
        tokenizer_dir: Optional[str] = None,
        mode: str = "nemo_native",
        log_dir: Optional[str] = None,
        fresh_indexers: bool = False,
        drop_inputs: bool = False,
        **changes: Any,
    ) -> run.Partial:
        return to_finetune(
            changed(name, mode, changes),
            checkpoint=checkpoint,
            tokenizer_dir=tokenizer_dir,
            log_dir=log_dir,
            fresh_indexers=fresh_indexers,
            drop_inputs=drop_inputs,
        )

    what = f"{describe(name)}; from the weights and the tokenizer of a checkpoint."
    return _named(factory, f"{name}_finetune", what, START + WHAT + WHERE)


def _part(name: str, part: str) -> Callable[..., run.Config]:
    def factory(mode: str = "nemo_native", **changes: Any) -> run.Config:
        return getattr(to_nemo(changed(name, mode, changes)), part)

    return _named(factory, f"{name}_{part}", f"The {part} of {name}.", WHAT)


def _named(factory: Callable[..., Any], name: str, what: str, arguments: str) -> Callable[..., Any]:
    factory.__name__ = factory.__qualname__ = name
    # NeMo-Run shows this beside the name, in a column that cuts long lines off.
    factory.__doc__ = textwrap.fill(what, width=42) + "\n\nArgs:" + arguments
    return factory


def _register() -> dict[str, Callable[..., Any]]:
    functions: dict[str, Callable[..., Any]] = {}
    for name in RECIPE_NAMES:
        functions[name] = run.cli.factory(_pretrain(name), target=llm.pretrain, name=name)
        functions[f"{name}_finetune"] = run.cli.factory(
            _finetune(name), target=llm.finetune, name=name
        )
        for part, base in PARTS.items():
            full = f"{name}_{part}"
            functions[full] = run.cli.factory(_part(name, part), target=base, name=full)
    return functions


FACTORIES = _register()
