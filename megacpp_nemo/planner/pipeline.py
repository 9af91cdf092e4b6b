"""How evenly a pipeline is loaded, and what its bubble and its imbalance leave of the GPUs.

A stage works `m` micro-batches; until the last stage has its first, and after the first stage has
its last, the others wait. In 1F1B that bubble is `(p - 1) / m` of the working time of `p` stages,
and `(p - 1) / (m v)` with `v` interleaved chunks on each (arXiv 2104.04473). The most loaded
stage paces all others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.flops import training_flops
from megacpp_nemo.planner.pieces import Piece, Role, pieces

Load = Callable[[Piece], float]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The load of each stage, and what the schedule makes of it.

    Args:
        chunk_loads: Training operations per token of each virtual chunk, by stage.
        micro_batches: Micro-batches of an optimizer step on each data-parallel rank.
    """

    chunk_loads: tuple[tuple[float, ...], ...]
    micro_batches: int

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.chunk_loads)

    @property
    def chunks(self) -> int:
        """Virtual chunks on each stage."""
        return len(self.chunk_loads[0])

    @property
    def stage_loads(self) -> tuple[float, ...]:
        """Training operations per token of each stage."""
        return tuple(map(sum, self.chunk_loads))

    @property
    def most_loaded(self) -> int:
        """0-based stage with the most work."""
        return max(range(self.stages), key=self.stage_loads.__getitem__)

    @property
    def imbalance(self) -> float:
        """Load of the most loaded stage over the mean; 1 is even."""
        return max(self.stage_loads) * self.stages / sum(self.stage_loads)

    @property
    def bubble(self) -> float:
        """Waiting over working time of evenly loaded stages, `(p - 1) / (m v)`."""
        return (self.stages - 1) / (self.micro_batches * self.chunks)

    @property
    def bubble_share(self) -> float:
        """Share of a step that evenly loaded stages wait."""
        return self.bubble / (1 + self.bubble)

    @property
    def efficiency(self) -> float:
        """Share of a step that the mean stage works, imbalance and bubble together."""
        return 1 / (self.imbalance * (1 + self.bubble))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "stages": self.stages,
            "chunks_per_stage": self.chunks,
            "micro_batches": self.micro_batches,
            "chunk_loads_flops_per_token": [list(chunks) for chunks in self.chunk_loads],
            "stage_loads_flops_per_token": list(self.stage_loads),
            "most_loaded_stage": self.most_loaded,
            "imbalance": self.imbalance,
            "bubble_over_work": self.bubble,
            "bubble_share": self.bubble_share,
            "efficiency": self.efficiency,
        }


def pipeline(recipe: HybridRecipe, load: Load | None = None) -> Pipeline:
    """Return how a recipe's stages are loaded.

    Args:
        recipe: Its layout cuts the layers; its batch gives the micro-batches.
        load: Load of a piece; its training operations per token by default.
    """
    load = load or training_load(recipe)
    layout = recipe.parallelism
    found = [
        [0.0] * (layout.virtual_pipeline_model_parallel_size or 1)
        for _ in range(layout.pipeline_model_parallel_size)
    ]
    for piece in pieces(recipe):
        found[piece.stage][piece.chunk] += load(piece)
    return Pipeline(
        chunk_loads=tuple(map(tuple, found)),
        micro_batches=micro_batches(recipe),
    )


def micro_batches(recipe: HybridRecipe) -> int:
    """Return the micro-batches of an optimizer step on each data-parallel rank."""
    rows = recipe.batch.micro_batch_size * recipe.parallelism.data_parallel_size
    return recipe.batch.global_batch_size // rows


def training_load(recipe: HybridRecipe) -> Load:
    """Return what counts a piece's training operations per token, alike pieces once."""
    counted: dict[tuple[Role, BlockFamily | None], float] = {}

    def load(piece: Piece) -> float:
        kind = (piece.role, piece.family)
        if kind not in counted:
            counted[kind] = training_flops(recipe, piece)
        return counted[kind]

    return load


@dataclass(frozen=True, kw_only=True)
class LayerLoads:
    """What can be cut, and what lies on the first and the last stage whatever the cut.

    Args:
        before: Load of the embedding.
        layers: Load of each layer.
        behind: Load of the final norm, the head and the prediction depths.
    """

    before: float
    layers: tuple[float, ...]
    behind: float

    def of_segments(self, lengths: Sequence[int]) -> tuple[float, ...]:
        """Return the load of each segment of that many layers, with what is before and behind."""
        ends = [0, *itertools.accumulate(lengths)]
        found = [sum(self.layers[start:end]) for start, end in itertools.pairwise(ends)]
        found[0] += self.before
        found[-1] += self.behind
        return tuple(found)


def layer_loads(recipe: HybridRecipe, load: Load | None = None) -> LayerLoads:
    """Return the load of each layer, and of what is before and behind them all."""
    load = load or training_load(recipe)
    before = behind = 0.0
    layers = []
    for piece in pieces(recipe):
        if piece.role is Role.LAYER:
            layers.append(load(piece))
        elif piece.role is Role.EMBEDDING:
            before += load(piece)
        else:
            behind += load(piece)
    return LayerLoads(before=before, layers=tuple(layers), behind=behind)


def even_lengths(layers: int, chunks: int) -> tuple[int, ...]:
    """Return the lengths of `chunks` segments that differ by one layer at most."""
    ends = [layers * place // chunks for place in range(chunks + 1)]
    return tuple(end - start for start, end in itertools.pairwise(ends))
