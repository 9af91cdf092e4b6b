"""The parts of a model that lie whole on one pipeline stage, in the order a token meets them.

Every size and cost of a plan is counted for a piece, and then summed by family, stage and rank.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.recipe import HybridRecipe


class Role(str, enum.Enum):
    """What a piece does."""

    EMBEDDING = "embedding"
    EMBEDDING_COPY = "copy of the embedding"
    LAYER = "layer"
    FINAL_NORM = "final norm"
    HEAD = "output head"
    DEPTH_ENTRY = "prediction depth's entry"
    DEPTH_LAYER = "prediction depth's layer"
    DEPTH_NORM = "prediction depth's norm and logits"


GROUPS = {
    BlockFamily.ATTENTION: "A attention",
    BlockFamily.SPARSE_ATTENTION: "A attention, sparse",
    BlockFamily.EXPERTS: "E experts",
    BlockFamily.GATED_DELTA_NET: "G Gated DeltaNet",
    BlockFamily.MAMBA: "M Mamba",
    BlockFamily.RECURRENT: "R M2RNN",
}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One part of a model.

    Args:
        role: What it does.
        name: Its name for people: `layer 12`, `depth 1, layer 2`, `output head`.
        prefix: What the names of its parameters begin with, `decoder.layers.11.`.
        family: Block family as it is built, D for an A layer that DSA takes; None outside layers.
        number: 1-based layer number; in the main pattern, or in its prediction depth.
        depth: 1-based prediction depth; None outside them.
        stage: 0-based pipeline stage.
        chunk: 0-based virtual chunk on its stage.
    """

    role: Role
    name: str
    prefix: str
    family: BlockFamily | None = None
    number: int | None = None
    depth: int | None = None
    stage: int = 0
    chunk: int = 0

    @property
    def group(self) -> str:
        """What it is summed with: its family of layers, or its part outside of the layers."""
        if self.depth is not None:
            return "prediction depths"
        return self.role.value if self.family is None else GROUPS[self.family]


def pieces(recipe: HybridRecipe) -> tuple[Piece, ...]:
    """Return the parts of a recipe's model: embedding, layers, norm, head, prediction depths."""
    return tuple(_pieces(recipe))


def _pieces(recipe: HybridRecipe) -> Iterator[Piece]:
    parallelism = recipe.parallelism
    stages = parallelism.pipeline_model_parallel_size
    chunks = parallelism.virtual_pipeline_model_parallel_size or 1
    yield Piece(role=Role.EMBEDDING, name="embedding", prefix="embedding.")
    sparse, number = recipe.sparse_layer_numbers, 0
    for place, segment in enumerate(recipe.layers.split(stages * chunks)):
        # Chunks go round the stages: the first of every stage, then the second of every stage.
        chunk, stage = divmod(place, stages)
        for family in segment:
            number += 1
            yield Piece(
                role=Role.LAYER,
                name=f"layer {number}",
                prefix=f"decoder.layers.{number - 1}.",
                family=BlockFamily.SPARSE_ATTENTION if number in sparse else family,
                number=number,
                stage=stage,
                chunk=chunk,
            )
    last, end = stages - 1, chunks - 1
    names = ((Role.FINAL_NORM, "decoder.final_norm."), (Role.HEAD, "output_layer."))
    for role, prefix in names:
        yield Piece(role=role, name=role.value, prefix=prefix, stage=last, chunk=end)
    for depth in range(1, recipe.model.mtp.num_layers + 1):
        yield from _depth(recipe, depth, last, end)


def _depth(recipe: HybridRecipe, depth: int, stage: int, chunk: int) -> Iterator[Piece]:
    prefix = f"mtp.layers.{depth - 1}."

    def part(
        role: Role,
        what: str,
        ending: str = "",
        family: BlockFamily | None = None,
        number: int | None = None,
    ) -> Piece:
        return Piece(
            role=role,
            name=f"depth {depth}, {what}",
            prefix=prefix + ending,
            family=family,
            number=number,
            depth=depth,
            stage=stage,
            chunk=chunk,
        )

    yield part(Role.DEPTH_ENTRY, "entry")
    for number, family in enumerate(recipe.model.mtp.pattern, 1):
        ending = f"mtp_model_layer.layers.{number - 1}."
        yield part(Role.DEPTH_LAYER, f"layer {number}", ending, family, number)
    yield part(Role.DEPTH_NORM, "norm", "final_layernorm.")
