"""The parts of the input side that one model has and another may not: which, and of what shape.

They start as nothing (the last factor of each is zero), so a model may get one later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megacpp_nemo.contract.structure import structure_channels


@dataclass(frozen=True, kw_only=True)
class InputPart:
    """A part of the input embedding.

    Args:
        name: The setting that turns it on, and its module in the embedding.
        what: What it is called.
        settings: Settings that its weights depend on, besides the first one.
    """

    name: str
    what: str
    settings: tuple[str, ...]

    def owns(self, tensor: str) -> bool:
        """Whether a tensor of a model, by its name, is of this part."""
        return f"embedding.{self.name}." in tensor


MEMORY = InputPart(
    name="ngram_hash",
    what="n-gram memory",
    settings=("ngram_orders", "ngram_heads_per_order", "ngram_table_size", "ngram_dim"),
)
STRUCTURE = InputPart(
    name="structure", what="structure channels", settings=("structure_bottleneck",)
)
INPUT_PARTS = (MEMORY, STRUCTURE)
INPUT_SETTINGS = tuple(name for part in INPUT_PARTS for name in (part.name, *part.settings))


@dataclass(frozen=True, kw_only=True)
class InputChange:
    """How a model's input side differs from a checkpoint's.

    Args:
        new: Parts that the checkpoint does not have.
        lost: Parts that the model does not have.
        other: Settings of the parts of both by which they are not the same: name, the model's
            value, the checkpoint's.
    """

    new: tuple[InputPart, ...]
    lost: tuple[InputPart, ...]
    other: tuple[tuple[str, Any, Any], ...]


def compare_inputs(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> InputChange:
    """Compare the input side of a model and of a checkpoint.

    Args:
        mine: The model's settings, by the names of its configuration; one that is missing is off.
        saved: The checkpoint's.
    """
    have = {part for part in INPUT_PARTS if mine.get(part.name)}
    had = {part for part in INPUT_PARTS if saved.get(part.name)}
    other = [
        (name, mine.get(name), saved.get(name))
        for part in INPUT_PARTS
        if part in have & had
        for name in (part.name, *part.settings)
        if _meaning(name, mine.get(name)) != _meaning(name, saved.get(name))
    ]
    return InputChange(
        new=tuple(part for part in INPUT_PARTS if part in have - had),
        lost=tuple(part for part in INPUT_PARTS if part in had - have),
        other=tuple(other),
    )


def _meaning(name: str, value: Any) -> Any:
    if name == STRUCTURE.name:
        return structure_channels(value)
    return list(value) if isinstance(value, tuple) else value
