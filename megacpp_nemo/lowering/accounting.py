"""Who carries each leaf of a NeMo recipe, and what is refused because nobody does.

`places` says what a recipe's NeMo form holds; `claimed` holds a configuration against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from megacpp_nemo.contract.errors import LoweringError, nearest
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.contract.training import Precision
from megacpp_nemo.lowering.leaves import ABSENT, Leaves, name_of, plain, shown
from megacpp_nemo.lowering.nodes import HOST_CALLBACKS
from megacpp_nemo.lowering.table import CONFIG, ROWS, TABLE, Row

# Claimants that are no recipe field.
POLICY, HOST, FIXED, DEFAULT = "policy", "host", "fixed", "default"
# How data reaches a run, and not what it is.
POLICY_LEAVES = ("data.num_workers", "data.cache_dir")
# Counts of what only NeMo does: how far it lays the data out, and its first validation.
HOST_LEAVES = ("data.num_train_samples", "trainer.num_sanity_val_steps")
# Which sources are tokenized: as unknown to Megatron as the corpus itself.
CORPUS_LEAVES = ("data.root", "data.exclude", "data.validation_fraction")
ACTIVATION = f"{CONFIG}.activation_func"
MTP_LAYERS = f"{CONFIG}.mtp_num_layers"  # both 0 and None turn it off
PLUGINS = "trainer.plugins"


class Place(NamedTuple):
    """Who carries a leaf, and what it holds then; an object of torch stands by its name."""

    claimant: str
    value: Any


class _Named(str):
    """Name of an object that this storey does not import, equal to any object of that name."""

    def __eq__(self, other: object) -> bool:
        return not isinstance(other, str) and str(other) == str(self)

    __hash__ = str.__hash__

    def __repr__(self) -> str:
        return str(self)


def places(recipe: HybridRecipe) -> dict[str, Place]:
    """Return every place of a recipe's settings in its NeMo form."""
    found = {
        path: Place(_claimant(row), plain(row.spell(row.value(recipe), recipe)))
        for row in TABLE
        if row.when(recipe)
        for path in row.nemo
        if path not in HOST_LEAVES
    }
    return found | {path: Place("precision", value) for path, value in _objects(recipe).items()}


def _objects(recipe: HybridRecipe) -> dict[str, Any]:
    """Return what the recipe's precision decides besides the table's places."""
    full = recipe.precision is Precision.FP32
    dtype = _Named("torch.float32" if full else "torch.bfloat16")
    of_model = [f"{CONFIG}.params_dtype", f"{CONFIG}.pipeline_dtype"]
    others = ["optim.config.params_dtype", "trainer.strategy.pipeline_dtype"]
    objects: dict[str, Any] = dict.fromkeys([*of_model, *others], dtype)
    if not full:
        objects |= {
            "trainer.plugins.precision": "bf16-mixed",
            "trainer.plugins.params_dtype": dtype,
            "trainer.plugins.pipeline_dtype": dtype,
            "trainer.plugins.autocast_enabled": False,
            "trainer.plugins.grad_reduce_in_fp32": True,
        }
    if recipe.precision is Precision.FP8_EXPERTS:
        objects |= {"trainer.plugins.fp8": "hybrid", "trainer.plugins.fp8_recipe": "tensorwise"}
    return objects


def _claimant(row: Row) -> str:
    return row.field or (HOST if row.owner == HOST else FIXED)


class _Problem(NamedTuple):
    """One leaf that says what the command line could not."""

    what: str
    given: str
    allowed: str
    hint: str


def claimed(recipe: HybridRecipe, leaves: Leaves) -> dict[str, str]:
    """Return the claimant of every set leaf by path.

    Raises:
        LoweringError: Naming every leaf that has none, or is not what its claimant says.
    """
    known = places(recipe)
    found: dict[str, str] = {}
    problems: list[_Problem] = []
    for path in sorted(leaves.values):
        claimant = _beside(path, leaves, known)
        if claimant is not None:
            found[path] = claimant
        else:
            problems.append(_problem(path, leaves, known))
    problems.extend(_missing(known, leaves))
    if problems:
        raise LoweringError(
            "The NeMo recipe says what Megatron's command line could not:\n    "
            + "\n    ".join(problem.what for problem in problems),
            given=", ".join(problem.given for problem in problems),
            allowed=", ".join(problem.allowed for problem in problems),
            hint=", ".join(problem.hint for problem in problems),
        )
    return found


def _beside(path: str, leaves: Leaves, known: Mapping[str, Place]) -> str | None:
    """Return who carries a leaf, or None."""
    value = leaves.values[path]
    if path in known:
        place = known[path]
        off = path == MTP_LAYERS and place.value is None and value == 0
        return place.claimant if off or _same(place.value, value) else None
    if path in POLICY_LEAVES:
        return POLICY
    if path == ACTIVATION:
        return "model.experts.activation"
    if path in CORPUS_LEAVES:
        return "corpus"
    if path in HOST_LEAVES:
        return HOST if type(value) is int or leaves.is_default(path) else None
    owner = path.rpartition(".")[0]
    shows = name_of(leaves.nodes.get(owner)) in HOST_CALLBACKS
    if shows or (path == "trainer.callbacks" and not value):
        return HOST
    return DEFAULT if leaves.is_default(path) else None


def _same(expected: Any, value: Any) -> bool:
    try:
        return bool(expected == value)
    except Exception:  # an object with a comparison of its own, such as an array
        return False


def _problem(path: str, leaves: Leaves, known: Mapping[str, Place]) -> _Problem:
    here = leaves.place(path)
    given, without = f"{here}={shown(leaves.values[path])}", f"without {here}"
    if path in known:
        place = known[path]
        said = "every recipe" if place.claimant in (FIXED, HOST) else place.claimant
        expected = f"{here}={place.value!r}"
        return _Problem(f"{here} is not what {said} says", given, expected, expected)
    if path in HOST_LEAVES:
        return _Problem(f"{here} is no whole number", given, "a whole number", without)
    asleep = next((row.field for row in ROWS if path in row.nemo), None)
    if asleep:
        what = f"{here} is read by nothing in this model ({asleep})"
        return _Problem(what, given, f"{here} unset", without)
    parent, _, name = path.rpartition(".")
    close = nearest(name, [other.rpartition(".")[2] for other in known if other.startswith(parent)])
    hint = without + (f", or {here.rpartition('.')[0]}.{close}" if close else "")
    return _Problem(f"{here} has no place in a recipe", given, f"{here} unset", hint)


def _missing(known: Mapping[str, Place], leaves: Leaves) -> Iterator[_Problem]:
    """Yield every place that is not set and that NeMo would fill otherwise."""
    bare = PLUGINS not in leaves.nodes and any(path.startswith(PLUGINS) for path in known)
    if bare:
        yield _Problem(
            f"{PLUGINS} is missing, which the precision needs",
            f"no {PLUGINS}",
            "MegatronMixedPrecision as the recipe makes it",
            "precision='fp32' as an argument of the recipe",
        )
    for path, (_, value) in sorted(known.items()):
        taken = leaves.default(path)
        if path in leaves.values or _same(value, taken) or (bare and path.startswith(PLUGINS)):
            continue
        told = "" if taken is ABSENT else f": NeMo takes {shown(taken)}"
        expected = f"{path}={value!r}"
        yield _Problem(f"{path} is not set{told}", f"no {path}", expected, expected)
