"""The whole plan of a recipe in its own layout: parameters, work, memory, traffic, pipeline, time.

`plan` gathers what the other modules of the planner say of one recipe. Every figure but the
predicted time is a count; `Plan.to_dict` has them all as plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.balance import segmented
from megacpp_nemo.planner.census import Census
from megacpp_nemo.planner.collectives import Volume
from megacpp_nemo.planner.communication import volumes
from megacpp_nemo.planner.costs import Cost, operations
from megacpp_nemo.planner.counts import counts
from megacpp_nemo.planner.fit import check_share, with_recompute
from megacpp_nemo.planner.gpus import DEFAULT_GPU, Gpu, gpu_called
from megacpp_nemo.planner.layouts import Allowed, Layouts
from megacpp_nemo.planner.memory import RankMemory, rank_memory
from megacpp_nemo.planner.pieces import Piece
from megacpp_nemo.planner.pipeline import Pipeline, even_lengths, pipeline
from megacpp_nemo.planner.prediction import EFFICIENCY, Prediction, StepTime
from megacpp_nemo.planner.saved import recompute_of
from megacpp_nemo.planner.sizes import sizes_of
from megacpp_nemo.planner.utilization import Utilization, mfu


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe costs in its own layout.

    Args:
        recipe: The recipe.
        gpu: The GPU it is planned for.
        recompute: What is run again in backward.
        efficiency: Share of the peak that the prediction takes arithmetic to reach.
        pieces: Every part of the model with its cost, in order.
        rank_parameters: Parameters of a rank, by pipeline stage.
        memory: What a rank holds, by pipeline stage.
        traffic: What a rank sends in a step, by pipeline stage.
        pipeline: How the stages are loaded.
        step: The predicted step.
        utilization: What a measured rate comes to; None where none is given.
    """

    recipe: HybridRecipe
    gpu: Gpu
    recompute: str
    efficiency: float
    pieces: tuple[tuple[Piece, Cost], ...]
    rank_parameters: tuple[int, ...]
    memory: tuple[RankMemory, ...]
    traffic: tuple[tuple[Volume, ...], ...]
    pipeline: Pipeline
    step: StepTime
    utilization: Utilization | None = None

    @property
    def whole(self) -> Cost:
        """The cost of the whole model."""
        return sum((cost for _, cost in self.pieces), Cost())

    @property
    def families(self) -> Mapping[str, Cost]:
        """Cost by family of layers, and by part outside of the layers."""
        found: dict[str, Cost] = {}
        for piece, cost in self.pieces:
            found[piece.group] = found.get(piece.group, Cost()) + cost
        return found

    @property
    def fullest(self) -> RankMemory:
        """What a rank of the fullest stage holds."""
        return max(self.memory, key=lambda memory: memory.total_bytes)

    @property
    def missing_bytes(self) -> int:
        """Bytes that the fullest rank lacks on the GPU; negative where they are to spare."""
        return self.fullest.total_bytes - self.gpu.memory_bytes

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.recipe.batch.global_batch_size * self.recipe.model.seq_length

    @property
    def tokens_per_second(self) -> float:
        """The predicted rate of all GPUs."""
        return self.tokens_per_step / self.step.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data with stable keys."""
        layout = self.recipe.parallelism
        return {
            "schema": 1,
            "recipe": self.recipe.name,
            "pattern": str(self.recipe.layers),
            "gpu": self.gpu.name,
            "gpus": layout.world_size,
            "recompute": self.recompute,
            "sizes": sizes_of(self.recipe)._asdict(),
            "micro_batch_size": self.recipe.batch.micro_batch_size,
            "tokens_per_step": self.tokens_per_step,
            "model": self.whole.to_dict(),
            "families": {name: cost.to_dict() for name, cost in self.families.items()},
            "pieces": [_told(piece, cost) for piece, cost in self.pieces],
            "rank_parameters": list(self.rank_parameters),
            "memory": [memory.to_dict() for memory in self.memory],
            "memory_of_gpu_bytes": self.gpu.memory_bytes,
            "missing_bytes": self.missing_bytes,
            "fits": self.missing_bytes <= 0,
            "traffic": [[volume.to_dict() for volume in stage] for stage in self.traffic],
            "pipeline": self.pipeline.to_dict(),
            "prediction": {
                "efficiency": self.efficiency,
                "seconds": self.step.to_dict(),
                "tokens_per_second": self.tokens_per_second,
            },
            "utilization": self.utilization.to_dict() if self.utilization else None,
        }


def plan(
    recipe: HybridRecipe,
    *,
    gpu: str | Gpu = DEFAULT_GPU,
    recompute: str | None = None,
    tokens_per_second: float | None = None,
    efficiency: float = EFFICIENCY,
) -> Plan:
    """Return the whole plan of a recipe in its own layout.

    Args:
        recipe: What is planned.
        gpu: Name of the GPU.
        recompute: What is run again in backward, `none`, `selective` or `full`, in place of what
            the recipe says.
        tokens_per_second: A measured rate of all GPUs, for the utilization.
        efficiency: Share of the peak that the prediction takes arithmetic to reach.

    Raises:
        PlanError: If there is no such GPU or recomputation, the rate or the share is none, or FP8
            is asked of a GPU without it.
        RecipeError: If the recipe cannot have the recomputation, or no rule says what a part
            costs.
    """
    gpu = gpu_called(gpu)
    recipe = with_recompute(recipe, recompute)
    check_share(efficiency)
    costs, counted = operations(recipe), counts(recipe)
    stages = range(recipe.parallelism.pipeline_model_parallel_size)
    return Plan(
        recipe=recipe,
        gpu=gpu,
        recompute=recipe.parallelism.recompute,
        efficiency=efficiency,
        pieces=tuple(
            (piece, replace(costs(piece), count=count, pieces=1)) for piece, count in counted.pieces
        ),
        rank_parameters=counted.ranks,
        memory=tuple(rank_memory(recipe, stage) for stage in stages),
        traffic=tuple(volumes(recipe, stage) for stage in stages),
        pipeline=pipeline(recipe, lambda piece: costs(piece).training_flops),
        step=predicted_step(recipe, gpu, efficiency=efficiency),
        utilization=(
            None if tokens_per_second is None else mfu(recipe, tokens_per_second, gpu=gpu)
        ),
    )


def predicted_step(
    recipe: HybridRecipe,
    gpu: Gpu,
    *,
    recompute: str | None = None,
    efficiency: float = EFFICIENCY,
) -> StepTime:
    """Return the predicted step of a recipe in its own layout, as `prediction` says.

    Raises:
        PlanError: If FP8 is asked of a GPU without it.
    """
    sizes, layout = sizes_of(recipe), recipe.parallelism
    if not recipe.layers.is_segmented and sizes.pp > 1:
        # As it is laid out, and not as `balance` would.
        pattern = segmented(recipe, even_lengths(len(recipe.layers), sizes.pp * sizes.vpp))
        recipe = replace(recipe, pattern=pattern)
    census = Census(Layouts(recipe, layout.num_nodes, layout.devices_per_node))
    own = Allowed(sizes, recipe.batch.micro_batch_size)
    return Prediction(census, gpu, efficiency).step(own, recompute_of(recipe, recompute))


def _told(piece: Piece, cost: Cost) -> dict[str, Any]:
    return {
        "name": piece.name,
        "family": piece.family.letter if piece.family else None,
        "stage": piece.stage,
        "chunk": piece.chunk,
        **cost.to_dict(),
    }
