"""Dormant units, and recycling them on one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor, nn

from megacpp_nemo.callbacks.activity import ActivityMeter
from megacpp_nemo.callbacks.mlps import Share, shares_of
from megacpp_nemo.callbacks.redo import dormant, recycle, report, scores, waiting
from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.plasticity import RedoLever
from tests.callbacks.experts import KINDS, adam, advance, batch, expert_model, measured, silence
from tests.model.building import megatron, run_model

ZERO = RedoLever(steps=(1,), threshold=0.0, decay=0.75)
EXPERT = "decoder.layers.1.mlp.experts.3"
SHARED = "decoder.layers.2.mlp.shared_experts"
DENSE = "decoder.layers.2.mlp"
SILENT = {EXPERT: [0, 5, 15], SHARED: [7]}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with megatron():
        yield


def silenced(kind: str = "gelu", **changes: Any) -> tuple[nn.Module, ActivityMeter, dict]:
    """Return a model with silent units, a meter that has seen them, and which they are."""
    model = expert_model(**KINDS[kind], **changes)
    silent = {DENSE: [1, 40]} if kind.startswith("dense") else SILENT
    meter = ActivityMeter(model, ZERO)
    for name, units in silent.items():
        silence(model, meter, name, units)
    advance(model, meter, range(2))
    return model, meter, silent


def chosen(masks: dict[str, Tensor]) -> dict[str, list[int]]:
    """Return the units of masks, of those MLPs that have any."""
    return {name: mask.nonzero()[:, 0].tolist() for name, mask in masks.items() if mask.any()}


def changes(before: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return where each parameter that changed did so."""
    return {
        name: parameter != before[name]
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def share_of(model: nn.Module, meter: ActivityMeter, name: str) -> Share:
    (share,) = (share for share in shares_of([model], meter.mlps) if share.mlp.name == name)
    return share


@pytest.mark.parametrize("kind", KINDS)
def test_scores_average_1(kind: str):
    meter = measured(expert_model(**KINDS[kind]), ZERO)
    found = scores(meter)
    assert len(found) == len(meter.mlps)
    for score in found.values():
        # The 1e-9 in the denominator against means of 1e-4 and more.
        assert float(score.mean()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_threshold_of_zero_selects_exactly_the_zero_units(kind: str):
    _, meter, silent = silenced(kind)
    assert chosen(dormant(meter, ZERO)) == silent


def test_a_unit_at_the_threshold_is_dormant():
    meter = measured(expert_model(), ZERO)
    middle = float(scores(meter)[SHARED].median())
    mask = dormant(meter, RedoLever(steps=(1,), threshold=middle))[SHARED]
    assert torch.equal(mask, scores(meter)[SHARED] <= middle)
    assert int(mask.sum()) == 8


def test_a_report_counts_dormant_units_and_changes_nothing():
    model, meter, _ = silenced()
    before = copies(model)
    action = report(meter, ZERO, step=2)
    assert (action.lever, action.cause, action.step, action.bytes) == ("redo", "report", 2, 0)
    assert action.matrices[EXPERT] == {"units": 16, "dormant": 3, "ratio": 3 / 16, "steps": 2}
    assert action.totals == {
        "mlps": 10, "unseen": 0, "units": 160, "dormant": 4, "ratio": 4 / 160, "waiting": 0,
    }  # fmt: skip
    assert not changes(before, model)


def test_an_mlp_that_has_seen_no_tokens_is_unseen_and_never_dormant():
    model = expert_model()
    model.decoder.layers[1].mlp.router.expert_bias[3] = -1e9
    meter = measured(model, ZERO)
    everything = RedoLever(steps=(1,), threshold=1e9)
    assert EXPERT not in scores(meter)
    action = report(meter, everything, step=3)
    assert action.matrices[EXPERT] == {"units": 16, "dormant": 0, "ratio": 0, "steps": 0}
    assert (action.totals["unseen"], action.totals["ratio"]) == (1, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_recycling_silent_units_leaves_the_output_as_it_is(kind: str):
    model, meter, _ = silenced(kind)
    before = run_model(model.eval(), batch(9))
    recycle(model, meter, ZERO, [adam(model)], step=2, seed=1)
    assert torch.equal(run_model(model, batch(9)), before)
    # And they are silent no more.
    advance(model.train(), meter, [3])
    assert not any(bool((score == 0).any()) for score in scores(meter).values())


def test_dormant_units_of_a_prediction_depth_are_found_and_made_new():
    moe_utils.get_moe_layer_wise_logging_tracker().clear()
    model = expert_model(mtp_num_layers=1, mtp_pattern="AE")
    meter = ActivityMeter(model, ZERO)
    silent = {"mtp.layers.0.mtp_model_layer.layers.1.mlp.shared_experts": [2, 9]}
    ((name, units),) = silent.items()
    silence(model, meter, name, units)
    for seed in range(2):
        # The depths run where there are labels.
        run_model(model, batch(seed), labels=batch(seed))
        meter.step()
    assert chosen(dormant(meter, ZERO)) == silent
    before = copies(model)
    action = recycle(model, meter, ZERO, [adam(model)], step=2, seed=1)
    assert action.matrices[name]["dormant"] == 2
    rows = changes(before, model)[f"{name}.linear_fc1.weight"]
    assert rows.all(1).nonzero().flatten().tolist() == units
    assert set(changes(before, model)) <= {f"{name}.linear_fc{i}.weight" for i in (1, 2)}
    moe_utils.get_moe_layer_wise_logging_tracker().clear()


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_only_the_rows_columns_and_moments_of_dormant_units_change(kind: str):
    model, meter, silent = silenced(kind)
    before, optimizer = copies(model), adam(model)
    moments = {p: dict(each) for p, each in optimizer.optimizer.state.items()}
    moments = {p: {k: v.clone() for k, v in each.items()} for p, each in moments.items()}
    action = recycle(model, meter, ZERO, [optimizer], step=2, seed=1)
    parts = 2 if kind == "swiglu" else 1
    expected = {}
    for name, units in silent.items():
        into, _, out = share_of(model, meter, name).tensors()
        rows = [unit + 16 * part for part in range(parts) for unit in units]
        expected[into] = torch.zeros_like(into, dtype=torch.bool)
        expected[into][rows] = True
        expected[out] = torch.zeros_like(out, dtype=torch.bool)
        expected[out][:, units] = True
        assert not out[:, units].any()
    assert {id(p) for p in expected} == {
        id(p) for name, p in model.named_parameters() if name in changes(before, model)
    }
    for name, parameter in model.named_parameters():
        where = expected.get(parameter, torch.zeros_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter != before[name], where)
        state = optimizer.optimizer.state[parameter]
        assert torch.equal(state["step"], moments[parameter]["step"])
        for moment in ("exp_avg", "exp_avg_sq"):
            kept = moments[parameter][moment].masked_fill(where, 0)
            assert torch.equal(state[moment], kept)
    assert action.bytes == 4 * sum(int(where.sum()) for where in expected.values())
    assert {name: each["dormant"] for name, each in action.matrices.items()} == {
        EXPERT: 3,
        SHARED: 1,
    }


def test_a_bias_of_a_dormant_unit_becomes_zero():
    # Of a dense MLP: without Transformer Engine Megatron cannot train experts with biases.
    model = expert_model(**KINDS["dense_gelu"], add_bias_linear=True)
    meter = ActivityMeter(model, ZERO)
    silence(model, meter, DENSE, [4])
    _, bias, _ = share_of(model, meter, DENSE).tensors()
    bias.data[4] = -100.0  # gelu of it is 0
    advance(model, meter, range(2))
    before = copies(model)
    action = recycle(model, meter, ZERO, [adam(model)], step=2, seed=1)
    assert bias[4] == 0
    where = changes(before, model)
    assert sorted(name.rsplit("linear_")[1] for name in where) == [
        "fc1.bias",
        "fc1.weight",
        "fc2.weight",
    ]
    assert action.bytes == 4 * sum(int(each.sum()) for each in where.values())


def test_new_weights_are_those_of_the_seed_the_step_and_the_unit():
    def renewed(threshold: float = 0.0, **given: int) -> dict[str, Tensor]:
        model, meter, silent = silenced("swiglu", init_method_std=0.5)
        lever = RedoLever(steps=(1,), threshold=threshold, decay=0.75)
        recycle(model, meter, lever, [adam(model)], **given)
        return {
            name: share_of(model, meter, name).tensors()[0].view(2, 16, -1)[:, units]
            for name, units in silent.items()
        }

    one = renewed(step=2, seed=1)
    torch.rand(3)
    again, others = renewed(step=2, seed=1), renewed(threshold=1.0, step=2, seed=1)
    later, elsewhere = renewed(step=3, seed=1), renewed(step=2, seed=2)
    for name, rows in one.items():
        assert torch.equal(rows, again[name])
        assert torch.equal(rows, others[name])  # whichever other units are recycled
        assert not torch.isclose(rows, later[name]).any()
        assert not torch.isclose(rows, elsewhere[name]).any()
    drawn = torch.cat([rows.detach().flatten() for rows in one.values()])
    # 256 draws: their deviation is within 4 of its own deviations, 0.5 / sqrt(2 * 256).
    assert drawn.std().item() == pytest.approx(0.5, abs=0.09)
    assert len(drawn.unique()) == len(drawn)


def test_recycling_leaves_the_random_numbers_of_the_run_alone():
    model, meter, _ = silenced()
    optimizer = adam(model)
    state = torch.get_rng_state()
    recycle(model, meter, ZERO, [optimizer], step=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_recycled_unit_is_not_judged_before_it_was_measured():
    """A decay of 0.75 remembers 4 steps."""
    model, meter, silent = silenced()
    advance(model, meter, range(4))
    recycle(model, meter, ZERO, [adam(model)], step=6, seed=1)
    for name, units in silent.items():
        silence(model, meter, name, units)
        assert scores(meter)[name][units].tolist() == [1.0] * len(units)
        assert float(scores(meter)[name].mean()) == pytest.approx(1, abs=1e-5)
    assert chosen(waiting(meter)) == silent
    assert report(meter, ZERO, step=6).totals["waiting"] == 4
    for seed in range(3):
        advance(model, meter, [seed])
        assert chosen(dormant(meter, ZERO)) == {}
    advance(model, meter, [3])
    assert chosen(dormant(meter, ZERO)) == silent
    assert chosen(waiting(meter)) == {}


def test_an_mlp_that_is_silent_as_a_whole_is_recycled_once():
    model = expert_model()
    meter = ActivityMeter(model, ZERO)
    silence(model, meter, SHARED, list(range(16)))
    advance(model, meter, range(2))
    optimizer = adam(model)
    assert recycle(model, meter, ZERO, [optimizer], step=2, seed=1).totals["dormant"] == 16
    assert recycle(model, meter, ZERO, [optimizer], step=2, seed=1).totals["dormant"] == 0
    advance(model, meter, [2])
    assert not (scores(meter)[SHARED] == 0).any()


def test_frozen_layers_are_refused():
    model, meter, _ = silenced()
    optimizer = adam(model)
    model.decoder.layers[1].mlp.requires_grad_(False)
    with pytest.raises(RuntimeRefusal, match=r"frozen(?s:.*)layers\.1\.mlp\.experts\.3"):
        recycle(model, meter, ZERO, [optimizer], step=2, seed=1)
