"""Planned bytes of weights, gradients and optimizer are those that a run allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megacpp_nemo.contract import HybridRecipe, RecipeError, recipe
from megacpp_nemo.planner.buffers import BUCKET_ELEMENTS, stage_buffers
from megacpp_nemo.planner.memory import most_loaded, rank_memory
from tests.planner.kept import small
from tests.support.processes import in_processes

TWO = {"parallelism__devices_per_node": 2}
TENSOR = {
    **TWO,
    "parallelism__tensor_model_parallel_size": 2,
    "parallelism__sequence_parallel": True,
}
EXPERT = {**TWO, "parallelism__expert_model_parallel_size": 2}
PIPELINE = {**TWO, "parallelism__pipeline_model_parallel_size": 2, "model__mtp__num_layers": 1}
INPUTS = {"features__ngram_hash": True, "features__structure": "all"}
SPLIT = {"parallelism__use_distributed_optimizer": True}
BF16 = {"precision": "bf16"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one process": ("AEMR", {}),
    "one process in bf16": ("AEMRD", BF16),
    "one process, distributed optimizer": ("MR", {**SPLIT, **BF16}),
    "two data ranks": ("AEM", {**TWO, **BF16}),
    "distributed optimizer": ("AEMR", {**TWO, **SPLIT}),
    "distributed optimizer in bf16": ("AEMR", {**TWO, **SPLIT, **BF16}),
    "tensor": ("AEMR", {**TENSOR, **SPLIT, **BF16}),
    "expert": ("AE", {**EXPERT, **BF16}),
    "expert, distributed optimizer": ("AE", {**EXPERT, **SPLIT, **BF16}),
    "pipeline, copied embedding": ("AE|MR", {**PIPELINE, **SPLIT, **BF16}),
    "pipeline, copied input side": ("A|M", {**PIPELINE, **INPUTS, **SPLIT, **BF16}),
}


def allocated(intent: HybridRecipe) -> dict[str, int]:
    """Return the bytes of each storage that a rank has after a step, counted once each."""
    from tests.planner.stepping import step, wrapped

    def size(tensors: Any, seen: set[int]) -> int:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    with wrapped(intent) as (model, optimizer):
        step(intent, model, optimizer)
        buffers = (*model.buffers, *model.expert_parallel_buffers)
        seen: set[int] = set()
        weights = size(model.module.parameters(), seen)
        gradients = size((buffer.grad_data for buffer in buffers), seen)
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        inner = [part.optimizer for part in parts if part.optimizer is not None]
        masters = size(
            (p for o in inner for group in o.param_groups for p in group["params"]), seen
        )
        states = (value for o in inner for state in o.state.values() for value in state.values())
        # Adam's count of steps is a number.
        moments = size((v for v in states if torch.is_tensor(v) and v.dim()), seen)
        return {
            "weights": weights,
            "gradients": gradients,
            "optimizer": masters + moments,
            "padded": sum(buffer.numel for buffer in buffers),
            "unpadded": sum(p.numel() for p in model.parameters()),
        }


@pytest.mark.two_process
@pytest.mark.parametrize("case", CASES)
def test_a_rank_allocates_what_is_planned(case: str) -> None:
    pattern, changes = CASES[case]
    intent = small(pattern, **changes)
    ranks = intent.parallelism.world_size
    found = in_processes(lambda: allocated(intent), ranks=ranks)
    stages = intent.parallelism.pipeline_model_parallel_size
    for rank, real in enumerate(found):
        stage = rank * stages // ranks
        plan = rank_memory(intent, stage)
        assert real["weights"] == plan.weights_bytes
        assert real["gradients"] == plan.gradients_bytes
        # Padding has no state, and lies in one rank's part or another's.
        padding = (real["padded"] - real["unpadded"]) * (12 if intent.precision == "bf16" else 8)
        assert 0 <= plan.optimizer_bytes - real["optimizer"] <= padding
    if not intent.parallelism.use_distributed_optimizer:
        assert all(real["padded"] == real["unpadded"] for real in found)


FULL: dict[str, tuple[str, dict[str, Any]]] = {
    "nam56r": ("nam56r", {}),
    "nam56r_4096, two stages": (
        "nam56r_4096",
        {"pipeline_model_parallel_size": 2, "num_nodes": 2},
    ),
    "nam56r with structure channels, two stages": (
        "nam56r",
        {"features.structure": "all", "pipeline_model_parallel_size": 2},
    ),
    "nam56r, experts split": ("nam56r", {"parallelism.expert_model_parallel_size": 4}),
    "nam52, three data ranks": (
        "nam52",
        {"devices_per_node": 6, "global_batch_size": 12},
    ),
}


@pytest.mark.parametrize("case", FULL)
def test_buffers_and_buckets_are_those_of_megatrons_wrapper(case: str) -> None:
    """The wrapper of every stage of a full-size model, on the meta device."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.utils import get_model_config

    from tests.planner.building import build_stage, rank_of

    name, changes = FULL[case]
    intent = recipe(name, changes=changes)

    def built(stage: int) -> list[tuple[bool, int, tuple[int, ...], int]]:
        with rank_of(intent, stage):
            model = build_stage(intent)
            config = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=True,
                overlap_param_gather=True,
            )
            wrapper = DistributedDataParallel(get_model_config(model), config, model)
            return [
                (expert, part.numel, tuple(b.grad_data.numel() for b in part.buckets), ranks)
                for expert, parts in (
                    (False, wrapper.buffers),
                    (True, wrapper.expert_parallel_buffers),
                )
                for part in parts
                for ranks in [part.data_parallel_world_size]
            ]

    for stage in range(intent.parallelism.pipeline_model_parallel_size):
        (real,) = in_processes(lambda stage=stage: built(stage), ranks=1)
        planned = [(b.expert, b.padded, b.buckets, b.ranks) for b in stage_buffers(intent, stage)]
        assert planned == real
        assert all(sum(buckets) == padded for _, padded, buckets, _ in real)


def test_buckets_are_cut_on_the_first_stage_only() -> None:
    layout = {"pipeline_model_parallel_size": 2}
    first, last = (stage_buffers(recipe("nam56r", changes=layout), stage) for stage in (0, 1))
    assert all(len(buffer.buckets) > 1 for buffer in first)
    # The depth, three parts of the copy of the embedding that it reads, and all else.
    assert [len(buffer.buckets) for buffer in last] == [5]
    assert all(bucket >= BUCKET_ELEMENTS for bucket in first[0].buckets[:-4])


def test_the_parts_add_up() -> None:
    intent = recipe("nam56r")
    plan = rank_memory(intent)
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    assert plan.total_bytes == sum(getattr(plan, f"{part}_bytes") for part in parts)
    assert plan.to_dict()["total_bytes"] == plan.total_bytes
    # bf16 weights, fp32 gradients; fp32 masters and two moments over 4 data-parallel ranks.
    assert plan.gradients_bytes == 2 * plan.weights_bytes
    assert plan.optimizer_bytes == 12 * plan.weights_bytes // 2 // 4
    # Each of 2 tensor ranks has half of every row of 16 tables.
    rows = sum(intent.model.embedding.ngram.table_sizes)
    assert plan.tables_bytes == rows * 16 // 2 * 2
    off = rank_memory(recipe("nam56r", changes={"features.ngram_hash": False}))
    assert off.tables_bytes == 0
    assert plan.weights_bytes - off.weights_bytes > plan.tables_bytes


def test_tables_in_host_memory_leave_the_device() -> None:
    placed = {"features.ngram_hash": True, "model.embedding.ngram.placement": "host"}
    off = rank_memory(recipe("nam56r", changes={"features.ngram_hash": False}))
    device, host = (rank_memory(recipe("nam56r", changes=change)) for change in ({}, placed))
    rows = sum(recipe("nam56r").model.embedding.ngram.table_sizes)
    assert (device.host_bytes, host.tables_bytes) == (0, 0)
    # Each of 2 tensor ranks: fp32 weight, gradient and two moments of half of every row.
    assert host.host_bytes == 4 * 4 * rows * 16 // 2
    # The projection stays, and the gradients of the rows of 4 micro-batches of 4 x 4096 tokens.
    projection = 256 // 2 * 3584
    touched = 4 * (4 * 4096) * 16 * 16 // 2 * 2
    assert host.gradients_bytes - off.gradients_bytes == 4 * projection + touched
    assert host.total_bytes < device.total_bytes


def test_recomputation_and_kernels_change_activations_alone() -> None:
    intent = recipe("nam56r")
    plans = [rank_memory(intent, recompute=again) for again in ("none", "selective", "full")]
    kept = [plan.activations_bytes for plan in plans]
    assert kept == sorted(kept, reverse=True)
    assert kept[2] < kept[0] / 4
    assert len({plan.total_bytes - plan.activations_bytes for plan in plans}) == 1
    assert rank_memory(intent, kernels="portable").activations_bytes > kept[0]


def test_the_most_loaded_stage_is_found() -> None:
    intent = recipe("nam56r", changes={"pipeline_model_parallel_size": 4, "micro_batch_size": 1})
    plans = [rank_memory(intent, stage) for stage in range(4)]
    assert most_loaded(intent) == max(plans, key=lambda plan: plan.total_bytes)
    assert [plan.logits_bytes > 0 for plan in plans] == [False, False, False, True]
    with pytest.raises(RecipeError, match="no such pipeline stage"):
        rank_memory(intent, 4)
