"""Stage boundaries that even out the work of a pipeline, exactly.

`balance` cuts the layers into `pp x vpp` segments so that the most loaded is as light as can be. A
segment's load is that of its layers, and its share of what its stage has beside layers: the
embedding on the first stage, the output head and the prediction depths on the last, spread over
the stage's chunks. With one chunk a stage, that is the stage's whole load. With several, a
stage's load is the sum of its segments', so the most loaded stage has at most `vpp` times the
heaviest segment. That bound is what is made smallest: a segment's load depends on its own two
ends, which is what dynamic programming needs; the sums over every stage's chunks would all have to
be carried along. The most loaded stage is thus within the bound, and not always the lightest.
Among the cuts with the same heaviest segment, the one with the least sum of squares is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megacpp_nemo.contract.pattern import LayerPattern
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.gpus import PlanError
from megacpp_nemo.planner.pipeline import LayerLoads, Load, even_lengths, layer_loads


@dataclass(frozen=True, kw_only=True)
class Balance:
    """A cut of the layers, beside the even one.

    Args:
        pattern: The layers with `|` at each boundary.
        even_pattern: The layers cut into lengths that differ by one at most.
        stages: Pipeline stages.
        chunks: Virtual chunks on each stage.
        loads: Training operations per token of each segment, in the order of the layers; what
            the first and the last hold beside layers included.
        even_loads: The same of the even cut.
    """

    pattern: str
    even_pattern: str
    stages: int
    chunks: int
    loads: tuple[float, ...]
    even_loads: tuple[float, ...]

    @property
    def stage_loads(self) -> tuple[float, ...]:
        """Load of each stage: its chunks, one of each round."""
        return _by_stage(self.loads, self.stages)

    @property
    def even_stage_loads(self) -> tuple[float, ...]:
        """Load of each stage of the even cut."""
        return _by_stage(self.even_loads, self.stages)

    @property
    def factor(self) -> float:
        """The even cut's most loaded stage over this one's; above 1 is better."""
        return max(self.even_stage_loads) / max(self.stage_loads)

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of a recipe that take this cut."""
        return {
            "pattern": self.pattern,
            "parallelism.pipeline_model_parallel_size": self.stages,
            "parallelism.virtual_pipeline_model_parallel_size": (
                self.chunks if self.chunks > 1 else None
            ),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the cut and its figures as plain data."""
        return {
            "pattern": self.pattern,
            "even_pattern": self.even_pattern,
            "stages": self.stages,
            "chunks_per_stage": self.chunks,
            "segment_loads_flops_per_token": list(self.loads),
            "stage_loads_flops_per_token": list(self.stage_loads),
            "even_segment_loads_flops_per_token": list(self.even_loads),
            "even_stage_loads_flops_per_token": list(self.even_stage_loads),
            "factor": self.factor,
            "changes": self.changes,
        }


def best_lengths(loads: Sequence[float], extras: Sequence[float]) -> tuple[int, ...]:
    """Return the lengths of the segments whose heaviest is lightest, none of them empty.

    Args:
        loads: Load of each layer, 0 or more.
        extras: What each segment has beside its layers; as many as there are segments.
    """
    sums, bound = [0.0, *itertools.accumulate(loads)], _bound(loads, extras)
    last, chunks = len(loads), len(extras)
    costs, starts = [0.0] + [math.inf] * last, []
    for segment, extra in enumerate(extras):
        row, cut = [math.inf] * (last + 1), [0] * (last + 1)
        for end in range(segment + 1, last - (chunks - segment) + 2):
            for start in range(end - 1, segment - 1, -1):
                load = sums[end] - sums[start] + extra
                if load > bound:
                    break
                cost = costs[start] + load * load
                if cost < row[end]:
                    row[end], cut[end] = cost, start
        costs = row
        starts.append(cut)
    ends = [last]
    for cut in reversed(starts):
        ends.append(cut[ends[-1]])
    return tuple(end - start for end, start in itertools.pairwise(ends))[::-1]


def _bound(loads: Sequence[float], extras: Sequence[float]) -> float:
    """Return the smallest load that the heaviest segment of any cut has."""
    sums, layers = [0.0, *itertools.accumulate(loads)], len(loads)
    bounds = [0.0] + [math.inf] * layers
    for segment, extra in enumerate(extras):
        row = [math.inf] * (layers + 1)
        for end in range(segment + 1, layers + 1):
            best = math.inf
            for start in range(end - 1, segment - 1, -1):
                load = sums[end] - sums[start] + extra
                if load >= best:
                    break
                best = min(best, max(load, bounds[start]))
            row[end] = best
        bounds = row
    return bounds[layers]


def balance(recipe: HybridRecipe, pp: int, vpp: int = 1, *, load: Load | None = None) -> Balance:
    """Return the stage boundaries whose heaviest segment is lightest.

    Boundaries that the recipe has are left out of account.

    Args:
        recipe: What is cut; its layout does not matter.
        pp: Pipeline stages.
        vpp: Virtual chunks on each stage, 1 for none.
        load: Load of a piece; its training operations per token by default. Milliseconds that
            were measured serve as well.

    Raises:
        PlanError: If there are more segments than layers, or chunks without stages.
    """
    layers = len(recipe.layers)
    check_segments(layers, pp, vpp)
    loads = layer_loads(recipe, load)
    lengths = balanced_lengths(loads, pp, vpp)
    even = even_lengths(layers, pp * vpp)
    return Balance(
        pattern=str(segmented(recipe, lengths)),
        even_pattern=str(segmented(recipe, even)),
        stages=pp,
        chunks=vpp,
        loads=loads.of_segments(lengths),
        even_loads=loads.of_segments(even),
    )


def balanced_lengths(loads: LayerLoads, pp: int, vpp: int) -> tuple[int, ...]:
    """Return the lengths of the segments of the balanced cut."""
    extras = [0.0] * (pp * vpp)
    for chunk in range(vpp):
        extras[chunk * pp] += loads.before / vpp
        extras[chunk * pp + pp - 1] += loads.behind / vpp
    return best_lengths(loads.layers, extras)


def check_segments(layers: int, pp: int, vpp: int) -> None:
    """Check that every segment of a pipeline can have a layer.

    Raises:
        PlanError: If one cannot, or there are chunks of a single stage.
    """
    for name, value in (("pp", pp), ("vpp", vpp)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PlanError(
                "Stages and chunks are counted in whole numbers",
                given=f"{name}={value!r}",
                allowed="1 or more",
                hint=f"{name}=1",
            )
    if pp == 1 and vpp > 1:
        raise PlanError(
            "Virtual chunks need more than one pipeline stage",
            given=f"pp={pp}, vpp={vpp}",
            allowed="vpp above 1 only with pp above 1",
            hint="pp=2",
        )
    if pp * vpp > layers:
        raise PlanError(
            "There are more pipeline segments than layers, so one would be empty",
            given=f"pp={pp} x vpp={vpp} = {pp * vpp} segments for {layers} layers",
            allowed=f"at most {layers} segments",
            hint=f"pp={layers}" if pp > layers else f"vpp={layers // pp}",
        )


def segmented(recipe: HybridRecipe, lengths: Sequence[int]) -> LayerPattern:
    """Return a recipe's layers in segments of that many."""
    layers, ends = recipe.layers.layers, [0, *itertools.accumulate(lengths)]
    return LayerPattern(tuple(layers[start:end] for start, end in itertools.pairwise(ends)))


def _by_stage(loads: Sequence[float], stages: int) -> tuple[float, ...]:
    return tuple(sum(loads[stage::stages]) for stage in range(stages))
