"""A NeMo recipe read back: every set leaf has one claimant, or is refused.

The recipe's fields are taken from their places in the configuration; then the recipe says what
every place should hold (`accounting`), and whatever holds something else, or is no place at all, is
refused with its path.

A leaf that holds what NeMo takes without it is as good as unset and is never refused; an unset
leaf counts as what NeMo takes. What only NeMo does, and Megatron's command line has no word
for, is left to the host: progress bars, sanity validation, how far the data is laid out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megacpp_nemo.contract.errors import LoweringError, MegaCppError
from megacpp_nemo.contract.recipe import HybridRecipe, with_paths
from megacpp_nemo.contract.training import Precision
from megacpp_nemo.lowering.accounting import ACTIVATION, HOST_LEAVES, claimed
from megacpp_nemo.lowering.leaves import ABSENT, Leaves, read_leaves, shown
from megacpp_nemo.lowering.nodes import check_nodes, corpus_of
from megacpp_nemo.lowering.policy import LaunchOptions
from megacpp_nemo.lowering.schedules import with_one_schedule
from megacpp_nemo.lowering.table import CONFIG, ROWS, Row

ACTIVATIONS = {"gelu": "gelu", "squared_relu": "squared_relu", "silu": "swiglu"}


def read_nemo(
    partial: Any, launch: LaunchOptions | None = None
) -> tuple[HybridRecipe, LaunchOptions]:
    """Return the recipe and the launch options that a NeMo recipe holds.

    Args:
        partial: A `nemo_run.Partial` made by a recipe of this package, after any overrides.
        launch: Options to start from; the recipe's own leaves win.

    Raises:
        LoweringError: If a leaf or a class has no place, or two leaves contradict each other.
        RecipeError, PatternError: If the settings do not make a recipe.
    """
    leaves = _leaves(partial)
    recipe = _recipe(leaves)
    claimed(recipe, leaves)
    return recipe, _launch(launch or LaunchOptions(), leaves)


def account(partial: Any) -> dict[str, str]:
    """Return who carries each set leaf of a NeMo recipe to Megatron's command line, by path.

    A claimant is a recipe field's path, or `fixed` (every recipe sets it so), `policy` (the
    launch), `host` (NeMo alone does it) or `default` (as good as unset).

    Raises:
        LoweringError: If a leaf or a class has no place, or two leaves contradict each other.
        RecipeError, PatternError: If the settings do not make a recipe.
    """
    leaves = _leaves(partial)
    claims = claimed(_recipe(leaves), leaves)
    return {leaves.place(path): claimant for path, claimant in claims.items()}


def _leaves(partial: Any) -> Leaves:
    """Return the leaves of a recipe, its data paths in one form and its levers in one place."""
    leaves = read_leaves(partial)
    if "" not in leaves.nodes:
        raise LoweringError(
            "Only recipes can be lowered",
            given=f"{type(partial).__name__}: {shown(partial)}",
            allowed="a HybridRecipe, or a nemo_run.Partial made by a recipe of this package",
            hint="megacpp_nemo.contract.recipe('nam56r'), or megacpp_nemo.recipes.nam56r()",
        )
    check_nodes(leaves)
    if "data.paths" in leaves.values:
        leaves.values["data.paths"] = _prefixes(leaves.values["data.paths"])
    return with_one_schedule(leaves)


def _prefixes(paths: Any) -> tuple[str, ...] | None:
    """Return data paths as `--data-path` lists them, or None for none."""
    if isinstance(paths, dict):
        raise LoweringError(
            "Data paths by split have no place in a recipe",
            given=f"data.paths={shown(paths)}",
            allowed="PREFIX, [PREFIX, ...] or [WEIGHT, PREFIX, ...], shared out by data.split",
            hint="data.paths=PREFIX data.split='900,50,50'",
        )
    if paths is None or paths in ("", ()):
        return None
    listed = paths if isinstance(paths, tuple) else (paths,)
    for item in listed:
        if isinstance(item, bool) or not isinstance(item, (str, int, float)):
            raise LoweringError(
                "A data path is text",
                given=f"data.paths={shown(paths)}",
                allowed="PREFIX, [PREFIX, ...] or [WEIGHT, PREFIX, ...]",
                hint="data.paths=/data/cpp_text_document",
            )
    return tuple(str(item).strip() for item in listed)


def _recipe(leaves: Leaves) -> HybridRecipe:
    _refuse_disagreement(leaves)
    changes = {
        **_fields(leaves),
        "corpus": corpus_of(leaves),
        "model.experts.activation": _activation(leaves),
        "precision": _precision(leaves),
    }
    recipe = _made(changes, leaves)
    unset = _unset_fields(recipe, leaves)
    return _named(_made(changes | unset, leaves) if unset else recipe)


def _refuse_disagreement(leaves: Leaves) -> None:
    """Refuse two places of one setting that hold different values."""
    for row in ROWS:
        own = [path for path in row.nemo if path not in HOST_LEAVES]
        held = {path: value for path in own if (value := leaves.effective(path)) is not ABSENT}
        if len({repr(value) for value in held.values()}) > 1:
            raise LoweringError(
                f"The NeMo recipe says {row.field} more than once, and not alike",
                given=", ".join(f"{path}={shown(value)}" for path, value in held.items()),
                allowed="the same value at " + " and ".join(held),
                hint=f"each of them, or the recipe's own argument {_argument(row)}",
            )


def _fields(leaves: Leaves) -> dict[str, Any]:
    """Return the recipe fields that one set leaf tells."""
    return {
        row.field: _unspelled(row, path, leaves.values[path])
        for row in ROWS
        if row.unspell is not None
        for path in row.nemo[:1]
        if path in leaves.values
    }


def _unset_fields(recipe: HybridRecipe, leaves: Leaves) -> dict[str, Any]:
    """Return the fields whose place is not set, as NeMo would take them."""
    return {
        row.field: _unspelled(row, path, default)
        for row in ROWS
        if row.unspell is not None and row.when(recipe)
        for path in row.nemo[:1]
        if path not in leaves.values and (default := leaves.default(path)) is not ABSENT
    }


def _unspelled(row: Row, path: str, value: Any) -> Any:
    if row.unspell is None:
        return value
    try:
        return row.unspell(value)
    except (AttributeError, TypeError, ValueError):
        raise LoweringError(
            f"{path} cannot be read as {row.field}",
            given=f"{path}={shown(value)}",
            allowed="what a recipe puts there",
            hint=f"the recipe's own argument {row.field.replace('.', '__')}",
        ) from None


def _argument(row: Row) -> str:
    return row.field.rpartition(".")[2]


def _activation(leaves: Leaves) -> str:
    function = leaves.effective(ACTIVATION)
    name = getattr(function, "__name__", "")
    if name not in ACTIVATIONS:
        raise LoweringError(
            "The experts' activation has no counterpart in a recipe",
            given=f"{ACTIVATION}={shown(function)}",
            allowed=f"{', '.join(ACTIVATIONS)}, the functions of torch and Megatron",
            hint=f"{ACTIVATION}=torch.nn.functional.gelu",
        )
    return ACTIVATIONS[name]


def _precision(leaves: Leaves) -> Precision:
    fp8 = leaves.values.get("trainer.plugins.fp8")
    if isinstance(fp8, str) and fp8 == "hybrid":
        return Precision.FP8_EXPERTS
    return Precision.BF16 if leaves.effective(f"{CONFIG}.bf16") is True else Precision.FP32


def _made(changes: dict[str, Any], leaves: Leaves) -> HybridRecipe:
    """Return the recipe of these fields; an error names the leaves that it is about."""
    try:
        return with_paths(HybridRecipe(), changes)
    except MegaCppError as error:
        text = f"{error.given} "
        named = [
            f"{path}={shown(leaves.values[path])}"
            for row in ROWS
            for path in row.nemo[:1]
            if path in leaves.values and f"{_argument(row)}={changes.get(row.field)!r}" in text
        ]
        raise type(error)(
            f"The NeMo recipe's settings do not make a recipe: {error.what}",
            given=error.given if "plasticity." in text else ", ".join(named) or error.given,
            allowed=error.allowed,
            hint=f"{error.hint}, as an argument of the recipe",
        ) from None


def _named(recipe: HybridRecipe) -> HybridRecipe:
    """Return the recipe under the name of its folder, the only name that NeMo's form has."""
    folder = recipe.files.run_dir or ""
    name = folder.rstrip("/").rpartition("/")[2]
    named = replace(recipe, name=name) if name.strip() else recipe
    if folder == f"runs/{name}":
        return replace(named, files=replace(recipe.files, run_dir=None))
    return named


def _launch(launch: LaunchOptions, leaves: Leaves) -> LaunchOptions:
    """Return the launch options with what the recipe's own leaves say."""
    options: dict[str, Any] = {}
    if "data.num_workers" in leaves.values:
        options["data_workers"] = leaves.values["data.num_workers"]
    if leaves.values.get("data.cache_dir") is not None:
        options["cache_dir"] = leaves.values["data.cache_dir"]
    return replace(launch, **options)
