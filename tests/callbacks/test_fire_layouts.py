"""FIRE makes the same weights however a model is laid over processes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megacpp_nemo.callbacks.fire import fire
from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.plasticity import FireLever
from tests.callbacks.experts import GATED
from tests.model.building import build_model, megatron, small_config
from tests.model.test_sharding import load, read_whole, save
from tests.support.processes import in_process, in_processes

pytestmark = pytest.mark.two_process

# Attention and experts with other fused matrices than the default's.
PLAIN: dict[str, Any] = {"multi_latent_attention": False, "num_query_groups": 2, **GATED}
KINDS: dict[str, dict[str, Any]] = {"latent": {}, "plain": PLAIN}

TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": TENSOR,
    "pipeline": {"pipeline_model_parallel_size": 2},
    "tensor_expert": {
        **TENSOR,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "expert": {"expert_model_parallel_size": 2},
    "data": {},
}


def run_layout(
    folder: Path, layout: dict[str, Any], start: Path | None, changes: dict[str, Any]
) -> dict[str, Any]:
    """Project a model, or this rank's part of it, and save the weights; return the report."""
    sizes = {name: size for name, size in layout.items() if name != "sequence_parallel"}
    with megatron(**sizes):
        model = build_model(small_config("AEMR", **layout, **changes))
        if start is None:
            save(model, folder / "start")
        else:
            load(model, start)
        action = fire(model, FireLever(steps=(1,)))
        save(model, folder / "weights")
        weights = [weight.detach().numpy().tobytes() for weight in model.parameters()]
        return {"matrices": dict(action.matrices), "bytes": action.bytes, "weights": weights}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What one process makes of a model: a folder with weights before and after, the report."""

    @functools.cache
    def run(kind: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(kind)
        return folder, in_process(run_layout, folder, {}, None, KINDS[kind])

    return run


@pytest.mark.parametrize(
    ("kind", "layout"),
    [*(("latent", layout) for layout in LAYOUTS), ("plain", "tensor"), ("plain", "tensor_expert")],
)
def test_two_ranks_make_of_a_model_what_one_does(alone, kind, layout, tmp_path):
    folder, expected = alone(kind)
    results = in_processes(
        run_layout, tmp_path, LAYOUTS[layout], folder / "start", KINDS[kind], ranks=2
    )
    ours, whole = read_whole(tmp_path / "weights", folder / "weights")
    assert ours.keys() == whole.keys()
    for key, tensor in whole.items():
        numpy.testing.assert_allclose(ours[key], tensor, rtol=0, atol=1e-6 * abs(tensor).max())
    reports = [result["matrices"] for result in results]
    assert sorted(name for own in reports for name in own) == sorted(expected["matrices"])
    for name, values in {**reports[0], **reports[1]}.items():
        # Before rounding to fp32, what is left of DfI is what it is on one rank.
        assert values == pytest.approx(expected["matrices"][name], rel=1e-4, abs=1e-10), name
    assert sum(result["bytes"] for result in results) == expected["bytes"]
    if layout == "data":
        assert results[0]["weights"] == results[1]["weights"]


def test_a_weight_that_is_not_finite_on_one_rank_is_refused_on_all_before_any_writes():
    def run() -> tuple[str, bool]:
        with megatron(tensor_model_parallel_size=2):
            model = build_model(small_config("MR", tensor_model_parallel_size=2))
            if torch.distributed.get_rank():
                model.get_parameter("decoder.layers.1.mixer.out_proj.weight").data[0] = math.nan
            weights = list(model.parameters())
            before = [weight.detach().nan_to_num() for weight in weights]
            with pytest.raises(RuntimeRefusal) as refusal:
                fire(model, FireLever(steps=(1,)))
            pairs = zip(weights, before, strict=True)
            return str(refusal.value), all(torch.equal(w.nan_to_num(), b) for w, b in pairs)

    (first, kept), (second, kept_too) = in_processes(run, ranks=2)
    assert "decoder.layers.1.mixer.out_proj.weight" in first
    assert first == second
    assert kept
    assert kept_too
