"""The whole plan says what its parts say, as plain data too, and quickly."""

from __future__ import annotations

import json
import time

import pytest

from megacpp_nemo.contract import RECIPE_NAMES, HybridRecipe, RecipeError, recipe, with_paths
from megacpp_nemo.planner.activations import saved_bytes
from megacpp_nemo.planner.communication import volumes
from megacpp_nemo.planner.counts import counts
from megacpp_nemo.planner.flops import training_flops_per_token
from megacpp_nemo.planner.gpus import PlanError, gpu_called
from megacpp_nemo.planner.memory import most_loaded, rank_memory
from megacpp_nemo.planner.pieces import pieces
from megacpp_nemo.planner.pipeline import pipeline
from megacpp_nemo.planner.plan import plan, predicted_step
from megacpp_nemo.planner.sizes import sizes_of
from megacpp_nemo.planner.utilization import mfu

KEYS = {
    "schema",
    "recipe",
    "pattern",
    "gpu",
    "gpus",
    "recompute",
    "sizes",
    "micro_batch_size",
    "tokens_per_step",
    "model",
    "families",
    "pieces",
    "rank_parameters",
    "memory",
    "memory_of_gpu_bytes",
    "missing_bytes",
    "fits",
    "traffic",
    "pipeline",
    "prediction",
    "utilization",
}


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_recipe_plans_and_its_parts_add_up(name: str) -> None:
    intent = recipe(name)
    found = plan(intent)
    assert found.whole.count == counts(intent).whole
    assert found.whole.training_flops == pytest.approx(training_flops_per_token(intent))
    assert sum(c.count.total for c in found.families.values()) == found.whole.count.total
    assert sum(c.pieces for c in found.families.values()) == len(found.pieces)
    assert found.rank_parameters == counts(intent).ranks
    assert found.memory == (rank_memory(intent),)
    assert found.traffic == (volumes(intent),)
    assert found.tokens_per_second > 0


def test_the_recipe_says_what_runs_again_unless_it_is_told() -> None:
    plain = recipe("nam56r", changes={"pipeline_model_parallel_size": 2})
    again = with_paths(plain, {"parallelism.recompute": "full"})
    assert plan(again) == plan(plain, recompute="full")
    assert plan(again, recompute="none") == plan(plain)
    assert plan(again).recompute == "full"
    for count in (rank_memory, volumes, most_loaded, kept):
        assert count(again) == count(plain, recompute="full") != count(plain)
    gpu = gpu_called("h200")
    assert predicted_step(again, gpu) == predicted_step(plain, gpu, recompute="full")
    with pytest.raises(RecipeError, match="does not work with DSA"):
        plan(plain, recompute="selective")


def kept(laid: HybridRecipe, **policy: str) -> dict[str, int]:
    """Return what the first attention layer keeps."""
    return dict(saved_bytes(laid, pieces(laid)[1], **policy))


def test_a_plan_is_plain_data_with_stable_keys() -> None:
    laid = recipe("nam56r", changes={"pipeline_model_parallel_size": 2})
    data = plan(laid, gpu="h100", recompute="full", tokens_per_second=5e4).to_dict()
    assert set(data) == KEYS
    assert json.loads(json.dumps(data)) == data
    assert data["sizes"] == sizes_of(laid)._asdict()
    assert data["pattern"] == str(laid.layers)
    assert [entry["total_bytes"] for entry in data["memory"]] == [
        rank_memory(laid, stage, recompute="full").total_bytes for stage in range(2)
    ]
    assert data["pipeline"] == json.loads(json.dumps(pipeline(laid).to_dict()))
    assert data["utilization"]["mfu"] == mfu(laid, 5e4, gpu="h100").share
    assert len(data["pieces"]) == 52 + 3 + 4
    assert {"name", "family", "stage", "parameters"} <= set(data["pieces"][0])


def test_what_does_not_fit_says_by_how_much() -> None:
    large = recipe("nam56r", mode="author_dp", changes={"micro_batch_size": 8})
    found = plan(large, gpu="a100")
    assert found.missing_bytes == rank_memory(large).total_bytes - found.gpu.memory_bytes > 0
    assert plan(large, gpu="a100", recompute="full").to_dict()["fits"] is True


def test_the_fullest_stage_is_told() -> None:
    laid = recipe("nam56r", changes={"pipeline_model_parallel_size": 4})
    found = plan(laid)
    assert found.fullest == max(found.memory, key=lambda memory: memory.total_bytes)
    assert [memory.stage for memory in found.memory] == [0, 1, 2, 3]


def test_the_predicted_step_is_of_the_layout_as_it_is_cut() -> None:
    even = recipe("nam56r", changes={"pipeline_model_parallel_size": 4})
    segments = [str(part) for part in even.layers.split(4)]
    cut = recipe(
        "nam56r", changes={"pattern": "|".join(segments)} | {"pipeline_model_parallel_size": 4}
    )
    gpu = plan(even).gpu
    assert predicted_step(even, gpu) == predicted_step(cut, gpu)
    loads = pipeline(even)
    step = predicted_step(even, gpu, efficiency=0.5)
    work = loads.micro_batches * 4 * 4096 * max(loads.stage_loads) / (2 * 0.5 * gpu.bf16_flops)
    assert step.compute == pytest.approx(work, rel=1e-6)
    assert predicted_step(even, gpu, efficiency=0.25).compute == pytest.approx(2 * step.compute)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h201"}, "'h200'"),
        ({"recompute": "some"}, "Unknown recomputation"),
        ({"tokens_per_second": 0}, "above 0"),
        ({"efficiency": 0.0}, "a share of the GPU's peak"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(recipe("nam56r"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["nam56r", "nam56r_4096", "nam52"])
def test_a_plan_takes_less_than_fifty_milliseconds(name: str) -> None:
    intent, taken = recipe(name), []
    for _ in range(5):
        began = time.process_time()
        plan(intent).to_dict()
        taken.append(time.process_time() - began)
    assert min(taken) < 0.05
