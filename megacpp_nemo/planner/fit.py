"""Which layouts of a recipe fit a number of GPUs, best predicted first, and why the others do not.

A layout fits if a rank of its fullest stage stays within the GPU's memory less a reserve for what
is not counted: the CUDA context, buffers of collectives, workspaces and fragmentation. Each layout
is taken with the least recomputation that fits: more of it only costs time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megacpp_nemo.contract.errors import RecipeError, lookup
from megacpp_nemo.contract.parallelism import RECOMPUTE
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.census import Census, memory_bytes
from megacpp_nemo.planner.gpus import DEFAULT_GPU, GIB, Gpu, PlanError, gpu_called
from megacpp_nemo.planner.layouts import Allowed, Layouts, Refused
from megacpp_nemo.planner.prediction import EFFICIENCY, Prediction
from megacpp_nemo.planner.reasons import Candidate, Reason, TooLarge, grouped
from megacpp_nemo.planner.sizes import nodes_of

RESERVE_GIB = 6.0
RECOMPUTE_FIELD = "parallelism.recompute"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The layouts of a recipe over a number of GPUs.

    Args:
        recipe: The recipe.
        gpu: The GPU.
        nodes: Nodes.
        devices: GPUs of each.
        efficiency: Share of the peak that arithmetic is taken to reach.
        reserve_gib: Memory that is kept free.
        candidates: What fits, best predicted first.
        too_large: What does not, the least lack first.
        refused: What the contract refuses.
        layouts: Makes recipes of layouts.
    """

    recipe: HybridRecipe
    gpu: Gpu
    nodes: int
    devices: int
    efficiency: float
    reserve_gib: float
    candidates: tuple[Candidate, ...]
    too_large: tuple[TooLarge, ...]
    refused: tuple[Refused, ...]
    layouts: Layouts

    @property
    def count(self) -> int:
        """Number of GPUs."""
        return self.nodes * self.devices

    @property
    def room_bytes(self) -> int:
        """Bytes that a rank may hold."""
        return int((self.gpu.memory_gib - self.reserve_gib) * GIB)

    def tokens_per_second(self, candidate: Candidate) -> float:
        """Return the predicted tokens per second of all GPUs."""
        tokens = self.recipe.batch.global_batch_size * self.recipe.model.seq_length
        return tokens / candidate.time.seconds

    def changes(self, found: Candidate) -> dict[str, Any]:
        """Return the fields of the recipe that a candidate sets."""
        return {**self.layouts.changes(found.layout), RECOMPUTE_FIELD: found.recompute}

    def reasons(self) -> tuple[Reason, ...]:
        """Return why layouts are out, those with the same reason together, most of them first."""
        fitting = [found.layout.sizes for found in self.candidates]
        return grouped(fitting, self.too_large, self.refused, self.room_bytes)

    def to_dict(self, *, every: bool = False) -> dict[str, Any]:
        """Return the result as plain data.

        Args:
            every: Also list every layout that is out by itself.
        """
        data: dict[str, Any] = {
            "schema": 1,
            "recipe": self.recipe.name,
            "gpu": self.gpu.name,
            "count": self.count,
            "nodes": self.nodes,
            "memory_gib": self.gpu.memory_gib,
            "reserve_gib": self.reserve_gib,
            "efficiency": self.efficiency,
            "fits": [self._fitting(candidate) for candidate in self.candidates],
            "out": [vars(reason) for reason in self.reasons()],
        }
        if every:
            data["out_each"] = [
                {**_named(item.layout), "missing_bytes": item.missing_bytes, "why": "memory"}
                for item in self.too_large
            ] + [
                {
                    **refused.sizes._asdict(),
                    "micro_batch_size": refused.micro_batch_size,
                    "missing_bytes": None,
                    "why": refused.error.what,
                }
                for refused in self.refused
            ]
        return data

    def _fitting(self, candidate: Candidate) -> dict[str, Any]:
        return {
            **_named(candidate.layout),
            "recompute": candidate.recompute,
            "memory_bytes": candidate.memory_bytes,
            "fullest_stage": candidate.stage,
            "predicted_seconds": candidate.time.to_dict(),
            "predicted_tokens_per_second": self.tokens_per_second(candidate),
            "changes": self.changes(candidate),
        }


def fit(
    recipe: HybridRecipe,
    gpu: str | Gpu = DEFAULT_GPU,
    count: int = 8,
    *,
    lane: str | None = None,
    recompute: str | None = None,
    efficiency: float = EFFICIENCY,
    reserve_gib: float = RESERVE_GIB,
) -> Fit:
    """Return the layouts of a recipe over GPUs: what fits, and why the rest does not.

    The recipe's global batch, its optimizer and, where its pattern has them, its stage boundaries
    are kept.

    Args:
        recipe: What is to be trained; its own layout and recomputation do not matter.
        gpu: Name of the GPU.
        count: Number of GPUs: of one node, or whole nodes.
        lane: `nemo` for what a NeMo run of this package builds, which has neither virtual stages
            nor context parallelism; None for all that the contract allows.
        recompute: Only this recomputation; None for the least that fits, of those that the
            contract allows.
        efficiency: Share of the peak that arithmetic is taken to reach.
        reserve_gib: Memory that is kept free on every GPU.

    Raises:
        PlanError: If there is no such GPU, number of GPUs or recomputation, a share is none, or
            FP8 is asked of a GPU without it.
        RecipeError: If the recipe cannot have the recomputation.
    """
    gpu = gpu_called(gpu)
    nodes, devices = nodes_of(count, gpu)
    policies = _policies(recipe, recompute)
    check_share(efficiency)
    _check_reserve(reserve_gib, gpu)
    layouts = Layouts(recipe, nodes, devices, lane)
    census = Census(layouts)
    predicted = Prediction(census, gpu, efficiency)
    room = int((gpu.memory_gib - reserve_gib) * GIB)
    candidates, too_large, refused = [], [], []
    for layout in layouts:
        if isinstance(layout, Refused):
            refused.append(layout)
            continue
        for policy in policies:
            stages = memory_bytes(census, layout, policy)
            most = max(stages)
            if most <= room:
                step = predicted.step(layout, policy)
                candidates.append(Candidate(layout, policy, most, stages.index(most), step))
                break
        else:
            too_large.append(TooLarge(layout, most - room))
    candidates.sort(key=_rank)
    too_large.sort(key=lambda found: found.missing_bytes)
    return Fit(
        recipe=recipe,
        gpu=gpu,
        nodes=nodes,
        devices=devices,
        efficiency=efficiency,
        reserve_gib=reserve_gib,
        candidates=tuple(candidates),
        too_large=tuple(too_large),
        refused=tuple(refused),
        layouts=layouts,
    )


def with_recompute(recipe: HybridRecipe, recompute: str | None) -> HybridRecipe:
    """Return a recipe with another recomputation, if one is given.

    Raises:
        PlanError: If there is none of that name.
        RecipeError: If the recipe cannot have it.
    """
    if recompute is None:
        return recipe
    known = {name: name for name in RECOMPUTE}
    what = "Unknown recomputation"
    lookup(known, recompute, what=what, field="recompute", error=PlanError)
    return replace(recipe, parallelism=replace(recipe.parallelism, recompute=recompute))


def _policies(recipe: HybridRecipe, recompute: str | None) -> Sequence[str]:
    """Return the one that is given, or all that the recipe can have, the least first."""
    if recompute is not None:
        return (with_recompute(recipe, recompute).parallelism.recompute,)
    allowed = []
    for policy in RECOMPUTE:
        with contextlib.suppress(RecipeError):
            allowed.append(with_recompute(recipe, policy).parallelism.recompute)
    return allowed


def check_share(efficiency: float) -> None:
    """Check that an efficiency is a share of the peak.

    Raises:
        PlanError: If it is not.
    """
    if not (math.isfinite(efficiency) and 0 < efficiency <= 1):
        raise PlanError(
            "The efficiency is a share of the GPU's peak",
            given=f"efficiency={efficiency!r}",
            allowed="above 0, at most 1",
            hint=f"efficiency={EFFICIENCY}",
        )


def _check_reserve(reserve_gib: float, gpu: Gpu) -> None:
    if not (math.isfinite(reserve_gib) and 0 <= reserve_gib < gpu.memory_gib):
        raise PlanError(
            "The reserve is a part of the GPU's memory",
            given=f"reserve_gib={reserve_gib!r} of {gpu.memory_gib} GiB",
            allowed=f"0 to below {gpu.memory_gib}",
            hint=f"reserve_gib={RESERVE_GIB}",
        )


def _rank(found: Candidate) -> tuple[float, int, int]:
    """Return what puts the best first: of equal times the larger micro-batch, then less memory."""
    seconds = float(f"{found.time.seconds:.6g}")
    return seconds, -found.layout.micro_batch_size, found.memory_bytes


def _named(layout: Allowed) -> dict[str, Any]:
    return {**layout.sizes._asdict(), "micro_batch_size": layout.micro_batch_size}
