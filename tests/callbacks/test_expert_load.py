"""Loads and drops of the experts, as counted and as written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megacpp_nemo.callbacks.curves import LayerCurves
from megacpp_nemo.callbacks.expert_load import ExpertLoad
from tests.model.building import build_model, megatron, random_tokens, run_model, small_config
from tests.support.processes import in_processes


@pytest.fixture
def one_process() -> Iterator[None]:
    with megatron():
        yield


def skewed(**changes: Any) -> Any:
    """Return a model whose second layer's tokens all choose experts 1 and 2 of four."""
    model = build_model(small_config("AEE", **changes))
    model.decoder.layers[1].mlp.router.expert_bias.copy_(torch.tensor([0.0, 9.0, 9.0, 0.0]))
    return model


def step(model: Any, seed: int = 0) -> None:
    tokens = random_tokens(2, 16, seed)
    run_model(model, tokens, labels=tokens)


def test_loads_are_shares_of_the_mean_since_the_last_report(one_process):
    model = skewed()
    load = ExpertLoad(model)
    step(model)
    step(model, seed=1)
    found = load.values()
    assert found["experts/layer_2/most"] == 2.0
    assert found["experts/layer_2/least"] == found["experts/layer_2/dropped"] == 0.0
    assert 1.0 < found["experts/layer_3/most"] < 2.0
    assert (found["experts/most"], found["experts/least"]) == (2.0, 0.0)
    assert "experts/layer_1/most" not in found
    assert load.values() == {}
    load.close()
    step(model)
    assert load.values() == {}


def test_a_router_of_no_numbers_does_not_end_the_run(one_process):
    model = skewed()
    load = ExpertLoad(model)
    step(model)
    load._counts[1, :-1] = 0.0
    found = load.values()
    assert math.isnan(found["experts/layer_2/most"])
    assert found["experts/layer_2/dropped"] == 1.0


def test_the_experts_of_a_prediction_depth_are_counted_under_a_number_of_their_own(one_process):
    model = build_model(small_config("AE", mtp_num_layers=2, mtp_pattern="AE"))
    model.mtp.layers[1].mtp_model_layer.layers[1].mlp.router.expert_bias.copy_(
        torch.tensor([0.0, 9.0, 9.0, 0.0])
    )
    load = ExpertLoad(model)
    step(model)
    found = load.values()
    numbers = {key.split("/")[1] for key in found if key.count("/") == 2}
    assert numbers == {"layer_2", "layer_3", "layer_4"}
    assert found["experts/layer_4/most"] == 2.0 > found["experts/layer_3/most"]


def test_validation_and_passes_without_gradients_do_not_count(one_process):
    model = skewed()
    load = ExpertLoad(model)
    with torch.no_grad():
        step(model)
    model.eval()
    step(model)
    assert load.values() == {}


@pytest.mark.parametrize("pad", [False, True])
def test_what_a_capacity_drops_is_counted_and_padding_is_no_load(one_process, pad):
    """Two experts get all 64 assignments, and each may take 16 of them."""
    model = skewed(
        moe_expert_capacity_factor=1.0,
        moe_pad_expert_input_to_capacity=pad,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
    )
    load = ExpertLoad(model)
    step(model)
    found = load.values()
    assert found["experts/layer_2/dropped"] == 0.5
    assert found["experts/dropped"] >= 0.5
    assert found["experts/layer_2/most"] == 2.0


def of_layout(**sizes: int) -> dict[str, float]:
    with megatron(**sizes):
        tensor = sizes.get("tensor_model_parallel_size", 1)
        model = build_model(small_config("AEE", sequence_parallel=tensor > 1, **sizes), shake=False)
        for layer in model.decoder.layers:
            if hasattr(layer, "mlp") and hasattr(layer.mlp, "router"):
                bias = torch.tensor([0.3, 0.1, 0.0, -0.3]) * layer.layer_number
                layer.mlp.router.expert_bias.copy_(bias)
        load = ExpertLoad(model)
        step(model)
        return load.values()


@pytest.mark.two_process
@pytest.mark.parametrize("size", ["tensor_model_parallel_size", "expert_model_parallel_size"])
def test_ranks_report_the_loads_of_all(size):
    one, two = in_processes(of_layout_named, size, ranks=2)
    assert one == two
    assert {key for key in one if "layer" in key} == {
        f"experts/layer_{number}/{name}"
        for number in (2, 3)
        for name in ("most", "least", "dropped")
    }
    assert one["experts/layer_2/dropped"] == pytest.approx(0, abs=1e-9)
    assert one["experts/layer_2/most"] > 1


def of_layout_named(size: str) -> dict[str, float]:
    return of_layout(**{size: 2})


def test_a_models_curves_are_those_of_the_layers_it_has(one_process):
    curves = LayerCurves(skewed())
    assert curves.values() == {}
    curves.close()
    model = skewed()
    curves = LayerCurves([model])
    step(model)
    assert curves.values()["experts/layer_2/most"] == 2.0
    dense = build_model(small_config("AE", experts=False))
    curves = LayerCurves(dense)
    step(dense)
    assert curves.values() == {}
