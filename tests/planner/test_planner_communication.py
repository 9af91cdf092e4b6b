"""What the planner says that ranks send is what a step of two processes sends."""

from __future__ import annotations

from typing import Any

import pytest

from megacpp_nemo.contract import HybridRecipe, RecipeError, recipe
from megacpp_nemo.planner.collectives import Volume, ring_bytes
from megacpp_nemo.planner.communication import group_ranks, volumes
from tests.planner.kept import small
from tests.support.processes import in_processes

TWO = {"parallelism__devices_per_node": 2}
TENSOR = {
    **TWO,
    "parallelism__tensor_model_parallel_size": 2,
    "parallelism__sequence_parallel": True,
}
EXPERT = {**TWO, "parallelism__expert_model_parallel_size": 2}
PIPELINE = {**TWO, "parallelism__pipeline_model_parallel_size": 2}
INPUTS = {"features__ngram_hash": True, "features__structure": "all"}
PLAIN = {"features__latent_attention": False, "features__experts": False}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tensor, every family": ("AEMRD", TENSOR, {}),
    "tensor in bf16": ("AEMR", {**TENSOR, "precision": "bf16"}, {}),
    "tensor, Mamba-3 and grouped attention": ("AEM", {**TENSOR, **PLAIN, "mamba": "author"}, {}),
    "tensor without sequence": (
        "AER",
        {**TENSOR, **PLAIN, "parallelism__sequence_parallel": False},
        {},
    ),
    "tensor, input side": ("M", {**TENSOR, **INPUTS, "model__mtp__num_layers": 1}, {}),
    "tensor without sequence, input side": (
        "A",
        {**TENSOR, **PLAIN, **INPUTS, "parallelism__sequence_parallel": False},
        {},
    ),
    "tensor, prediction depth": ("M", {**TENSOR, "model__mtp__num_layers": 1}, {}),
    "tensor, whole experts": (
        "E",
        {**TENSOR, **EXPERT, "parallelism__expert_tensor_parallel_size": 1},
        {},
    ),
    "tensor, gathered dispatch": ("E", TENSOR, ALLGATHER),
    "expert": ("AE", EXPERT, {}),
    "expert, gathered dispatch": ("E", EXPERT, ALLGATHER),
    "data": ("AE", TWO, {}),
    "data, distributed optimizer": ("AEM", {**TWO, "use_distributed_optimizer": True}, {}),
    "expert, distributed optimizer in bf16": (
        "E",
        {**EXPERT, "use_distributed_optimizer": True, "precision": "bf16"},
        {},
    ),
    "pipeline, prediction depth": ("AE|MR", {**PIPELINE, "model__mtp__num_layers": 1}, {}),
    "pipeline, input side": ("A|M", {**PIPELINE, **INPUTS, "model__mtp__num_layers": 1}, {}),
    "pipeline, input side, distributed optimizer": (
        "A|M",
        {
            **PIPELINE,
            **INPUTS,
            "model__mtp__num_layers": 1,
            "parallelism__use_distributed_optimizer": True,
        },
        {},
    ),
    "pipeline in bf16": ("A|M", {**PIPELINE, "precision": "bf16"}, {}),
}


def planned(intent: HybridRecipe, stage: int, **choices: str) -> dict[tuple[str, str], Any]:
    """Return how many collectives, and of how many bytes, by group and operation."""
    found: dict[tuple[str, str], Any] = {}
    for volume in volumes(intent, stage, kernels="portable", **choices):
        key = volume.group, volume.operation
        count, payload = found.get(key, (0, 0))
        found[key] = count + volume.count, payload + volume.payload_bytes
    return found


@pytest.mark.two_process
@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_what_is_planned(case: str) -> None:
    from tests.planner.stepping import collectives

    pattern, changes, settings = CASES[case]
    intent = small(pattern, **changes)
    first, second = in_processes(lambda: collectives(intent, **settings), ranks=2)
    choices = {"dispatcher": "allgather"} if settings else {}
    # What is left over reduces the tokens of experts for their bias, and says nothing else.
    for other in (*first["others"], *second["others"]):
        assert other.startswith("all-reduce over TENSOR_AND_DATA_PARALLEL")
    if intent.parallelism.pipeline_model_parallel_size > 1:
        assert first["counted"] == planned(intent, 0)
        assert second["counted"] == planned(intent, 1)
        return
    # Ranks of experts send unequal shares of the tokens: their mean is what is planned.
    mean = {
        key: (count, (payload + second["counted"][key][1]) / 2)
        for key, (count, payload) in first["counted"].items()
    }
    assert mean == planned(intent, 0, **choices)


@pytest.mark.two_process
def test_ranks_tell_each_other_the_rows_of_host_tables() -> None:
    from tests.planner.stepping import collectives

    intent = small("A", **{**TWO, **INPUTS, "model__embedding__ngram__placement": "host"})
    first, second = in_processes(lambda: collectives(intent), ranks=2)
    plan = planned(intent, 0)
    assert first["counted"] == second["counted"]
    assert first["counted"].keys() == plan.keys()
    for key, (count, payload) in plan.items():
        counted, sent = first["counted"][key]
        assert counted == count
        # At most, as rows that several n-grams of a micro-batch fall on are sent once.
        few = key == ("data", "all-gather")
        assert payload / 4 < sent < payload if few else sent == payload


def test_a_ring_sends_its_share() -> None:
    assert ring_bytes("all-reduce", 1024, 8) == 2 * 7 * 128
    for operation in ("all-gather", "reduce-scatter", "all-to-all"):
        assert ring_bytes(operation, 1024, 8) == 7 * 128
    assert ring_bytes("send", 1024, 8) == 1024


def total(found: tuple[Volume, ...], group: str) -> int:
    return sum(volume.bytes_per_rank for volume in found if volume.group == group)


def test_layers_that_run_again_send_again() -> None:
    once, twice = (volumes(recipe("nam56r"), recompute=again) for again in ("none", "full"))
    forward = sum(
        volume.bytes_per_rank
        for volume in once
        if volume.group == "tensor"
        and volume.what.endswith("forward")
        and not volume.what.startswith(("embedding", "output head", "prediction"))
    )
    depths = [
        sum(v.bytes_per_rank for v in found if v.group == "tensor" and "depths" in v.what)
        for found in (once, twice)
    ]
    assert total(twice, "tensor") == total(once, "tensor") + forward + depths[1] - depths[0]
    assert depths[1] > depths[0]


def test_groups_of_one_rank_send_nothing() -> None:
    changes = {"devices_per_node": 1, "batch.global_batch_size": 4}
    assert volumes(recipe("nam56r", mode="author_dp", changes=changes)) == ()


def test_gradients_and_parameters_of_a_step() -> None:
    intent = recipe("nam56r", mode="author_dp", changes={"expert_model_parallel_size": 4})
    found = {(v.group, v.operation): v for v in volumes(intent)}
    gradients, parameters = found["data", "reduce-scatter"], found["data", "all-gather"]
    assert gradients.payload_bytes == 2 * parameters.payload_bytes
    assert (gradients.ranks, found["expert data", "reduce-scatter"].ranks) == (8, 2)
    assert gradients.to_dict()["bytes_per_rank"] == gradients.payload_bytes * 7 // 8


def test_chunks_of_interleaved_stages_send_each() -> None:
    layout = {
        "devices_per_node": 2,
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    }
    intent = recipe("nam56r", changes=layout)
    stream, micro_batches = 4 * 4096 * 3584 * 2, 16
    for stage in (0, 1):
        # Of four chunks' ends one is the model's, where nothing is sent.
        sent = total(volumes(intent, stage), "pipeline")
        assert sent == (2 + 1) * micro_batches * stream


def test_context_ranks_pass_keys_and_values_on() -> None:
    changes = {
        "context_parallel_size": 2,
        "features.sparse_attention": False,
        "micro_batch_size": 1,
    }
    found = volumes(recipe("nam52", changes=changes))
    attention = [v for v in found if v.group == "context" and v.operation == "send"]
    layers, rows, heads = 13, 64 // (8 // 4), 28
    assert group_ranks(recipe("nam52", changes=changes), "context") == 2
    each = 2048 * heads * (128 + 64) * 2
    forward = next(v for v in attention if v.what == "A attention, forward")
    assert forward.payload_bytes == layers * rows * each


def test_an_unknown_dispatcher_is_an_error() -> None:
    with pytest.raises(RecipeError, match="Unknown dispatcher"):
        volumes(recipe("nam56r"), dispatcher="deepep")
