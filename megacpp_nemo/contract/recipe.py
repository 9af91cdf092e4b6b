"""`HybridRecipe`: one model and one way to run it, checked as a whole.

A recipe is plain data. Everything else (the NeMo configuration, the lowered command line,
the size plan) is derived from it. Constructing one runs every rule that crosses its parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Annotated, Any

from megacpp_nemo.contract.checks import Checked, Depth, Kind, Text, kinds_of, one_of
from megacpp_nemo.contract.errors import RecipeError, nearest
from megacpp_nemo.contract.pattern import FULL_NAM56R_PATTERN, BlockFamily, LayerPattern
from megacpp_nemo.contract.plasticity import Plasticity
from megacpp_nemo.contract.rules import check_recipe
from megacpp_nemo.contract.shapes import ModelShape
from megacpp_nemo.contract.training import (
    Batch,
    Cadence,
    Features,
    Files,
    OptimizerSchedule,
    Parallelism,
    Precision,
)

CORPUS_CHOICES = ("indexed", "sources")


@dataclass(frozen=True, kw_only=True)
class HybridRecipe(Checked):
    """Structured intent for one hybrid language model and its training run.

    Args:
        name: The recipe's name, as on NeMo's command line.
        pattern: Block families, tiled to `depth`; text such as `AEMEAEMEAEMR` is parsed.
        depth: Number of layers.
        corpus: `indexed` for existing Megatron indexed files and their tokenizer, `sources` for a
            folder of C++ that is tokenized on the spot.
        model: Widths, heads and counts.
        parallelism: How the model is laid over processes.
        precision: Arithmetic; text such as `bf16` is looked up.
        batch: Rows per step.
        schedule: Optimizer and learning rate.
        cadence: What happens how often.
        files: Where the run reads and writes.
        features: What the model is made of beyond its pattern.
        plasticity: Levers on the run in progress, all off by default.

    Raises:
        PatternError: If the pattern cannot be read or does not fit `depth`.
        RecipeError: If a field has a value it cannot take, or the parts contradict each other.
    """

    name: Text = "nam56r"
    pattern: LayerPattern = field(
        default_factory=lambda: LayerPattern.parse(FULL_NAM56R_PATTERN),
    )
    depth: Depth = 52
    corpus: Annotated[str, one_of(*CORPUS_CHOICES)] = "indexed"
    model: ModelShape = field(default_factory=ModelShape)
    parallelism: Parallelism = field(default_factory=Parallelism)
    precision: Precision = Precision.BF16
    batch: Batch = field(default_factory=Batch)
    schedule: OptimizerSchedule = field(default_factory=OptimizerSchedule)
    cadence: Cadence = field(default_factory=Cadence)
    files: Files = field(default_factory=Files)
    features: Features = field(default_factory=Features)
    plasticity: Plasticity = field(default_factory=Plasticity)

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, LayerPattern):
            object.__setattr__(self, "pattern", LayerPattern.parse(self.pattern))
        object.__setattr__(self, "precision", Precision.from_name(self.precision))
        super().__post_init__()
        check_recipe(self)

    @property
    def layers(self) -> LayerPattern:
        """The pattern laid out to `depth`."""
        return self.pattern.tile(self.depth)

    @property
    def run_dir(self) -> str:
        """Folder for checkpoints and curves."""
        return self.files.run_dir or f"runs/{self.name}"

    @property
    def sparse_layer_numbers(self) -> tuple[int, ...]:
        """1-based numbers of the A layers that use DSA; empty when it is off.

        Layers written `D` are always sparse and are not listed here.
        """
        if not self.features.sparse_attention:
            return ()
        ranks = self.layers.a_ranks()
        return tuple(ranks[rank] for rank in self.model.sparse_attention.a_ranks)

    def has(self, family: BlockFamily) -> bool:
        """Whether any layer is of `family`."""
        return family in self.layers.layers


def field_paths(owner: Any = HybridRecipe) -> dict[str, Any]:
    """Return every leaf field of a recipe as dotted path to default value.

    `{"depth": 52, "model.hidden_size": 3584, "model.mamba.num_heads": 56, ...}`
    """
    instance = owner() if isinstance(owner, type) else owner
    leaves: dict[str, Any] = {}
    for item in dataclasses.fields(instance):
        value = getattr(instance, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, LayerPattern):
            leaves.update({f"{item.name}.{k}": v for k, v in field_paths(value).items()})
        else:
            leaves[item.name] = value
    return leaves


def kind_of(path: str) -> Kind:
    """Return the kind of the leaf field at a dotted path: its type, and whether it may be None."""
    kind = Kind(HybridRecipe)
    for name in path.split("."):
        kind = kinds_of(kind.type)[name]
    return kind


def with_fields(recipe: HybridRecipe, **changes: Any) -> HybridRecipe:
    """Return the recipe with some leaf fields changed, checked as a whole.

    A field is named by its dotted path with `__` for `.` (`model__mamba__num_heads=64`), or by
    the shortest ending of the path that no other field shares (`hidden_size=2048`).

    Raises:
        RecipeError: If a name fits no field or several, or the result contradicts itself.
    """
    return with_paths(recipe, {name.replace("__", "."): value for name, value in changes.items()})


def with_paths(recipe: HybridRecipe, changes: dict[str, Any]) -> HybridRecipe:
    """Return the recipe with leaf fields changed by dotted path, or by a path's unique ending.

    All changes are made before the result is checked, so that settings that only fit together
    can be changed together.

    Raises:
        RecipeError: If a name fits no field or several, two names mean the same field, or the
            result contradicts itself.
    """
    leaves = field_paths(recipe)
    paths: dict[str, str] = {}
    for name in changes:
        path = resolve_field(name, leaves)
        if path in paths:
            raise RecipeError(
                f"{path} is changed twice",
                given=f"{paths[path]}={changes[paths[path]]!r}, {name}={changes[name]!r}",
                allowed="each field once",
                hint=f"only {path}",
            )
        paths[path] = name
    changed: HybridRecipe = _replaced(recipe, {path: changes[paths[path]] for path in paths})
    return changed


def resolve_field(name: str, leaves: dict[str, Any] | None = None) -> str:
    """Return the dotted path that `name` stands for: itself, or the one path that ends in it.

    Raises:
        RecipeError: If no field, or more than one, is meant.
    """
    leaves = field_paths() if leaves is None else leaves
    if name in leaves:
        return name
    fits = [path for path in leaves if path.endswith(f".{name}")]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise RecipeError(
            f"Several recipe fields are called {name!r}",
            given=repr(name),
            allowed=", ".join(fits),
            hint=repr(fits[0]),
        )
    close = _closest_paths(str(name), leaves)
    alike = nearest(_ending(str(name)), map(_ending, close))
    fits = [path for path in close if f".{name}." in f".{path}" or _ending(path) == alike]
    raise RecipeError(
        f"No recipe field is called {name!r}",
        given=repr(name),
        allowed=f"{', '.join(close)}, ... ({len(leaves)} in all: "
        "megacpp_nemo.contract.field_paths())",
        hint=repr(fits[0]) if fits else "one of the fields above",
    )


def _ending(path: str) -> str:
    return path.rpartition(".")[2]


def _closest_paths(name: str, leaves: Iterable[str], count: int = 12) -> list[str]:
    """Return the paths most like `name`: those below it first, then by spelling."""

    def likeness(path: str) -> tuple[bool, float, float]:
        below = f".{name}." in f".{path}"
        ending = SequenceMatcher(None, _ending(name).lower(), _ending(path)).ratio()
        return below, ending, SequenceMatcher(None, name.lower(), path).ratio()

    return sorted(leaves, key=likeness, reverse=True)[:count]


def _replaced(owner: Any, changes: dict[str, Any]) -> Any:
    here: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = value
        else:
            here[head] = value
    for head, inner in below.items():
        here[head] = _replaced(getattr(owner, head), inner)
    return dataclasses.replace(owner, **here)
