"""The running mean of each unit's activity."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megacpp_nemo.callbacks.activity import ActivityMeter
from megacpp_nemo.callbacks.mlps import mlps_of, shares_of
from megacpp_nemo.contract.errors import RecipeError, RuntimeRefusal
from megacpp_nemo.contract.plasticity import RedoLever
from tests.callbacks.experts import KINDS, advance, batch, expert_model, measured
from tests.model.building import assert_near, megatron, run_model, small_config

LEVER = RedoLever(report_interval=1, decay=0.7)
EXPERT = "decoder.layers.1.mlp.experts.3"


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with megatron():
        yield


def of(meter: ActivityMeter, name: str) -> tuple[Tensor, Tensor]:
    """Return the means and ages of an MLP's units."""
    (mlp,) = (mlp for mlp in meter.mlps if mlp.name == name)
    return meter.means[mlp.span], meter.ages[mlp.span]


def starve(model: nn.Module, name: str = EXPERT) -> None:
    """Let no token choose a routed expert."""
    layer, expert = int(name.split(".")[2]), int(name.split(".")[-1])
    model.decoder.layers[layer].mlp.router.expert_bias[expert] = -1e9


def test_mlps_have_their_names_in_the_whole_model():
    names = [mlp.name for mlp in mlps_of(small_config("AEE"), layers=(3,))]
    assert names == [
        *(f"decoder.layers.2.mlp.experts.{expert}" for expert in range(4)),
        "decoder.layers.2.mlp.shared_experts",
    ]
    (dense,) = mlps_of(small_config("AE", experts=False))
    assert (dense.name, dense.units) == ("decoder.layers.1.mlp", 64)


def test_mlps_of_prediction_depths_come_last_and_only_if_no_layer_is_chosen():
    depths = {"mtp_num_layers": 2, "mtp_pattern": "EAE", "experts": False}
    names = [mlp.name for mlp in mlps_of(small_config("AE", **depths))]
    assert names == [
        "decoder.layers.1.mlp",
        "mtp.layers.0.mtp_model_layer.layers.0.mlp",
        "mtp.layers.0.mtp_model_layer.layers.2.mlp",
        "mtp.layers.1.mtp_model_layer.layers.0.mlp",
        "mtp.layers.1.mtp_model_layer.layers.2.mlp",
    ]
    assert [mlp.name for mlp in mlps_of(small_config("AE", **depths), layers=(2,))] == names[:1]
    assert [mlp.name for mlp in mlps_of(small_config("AM", **depths))] == names[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_means_are_those_of_a_plain_loop(kind: str):
    """Over three steps of two micro-batches, an expert of which has no tokens on the second."""
    model = expert_model(**KINDS[kind])
    routed = model.config.num_moe_experts
    meter = ActivityMeter(model, LEVER)
    seen: dict[str, list[Tensor]] = defaultdict(list)
    for share in shares_of([model], meter.mlps):
        keep = seen[share.mlp.name]
        share.fc2.register_forward_pre_hook(lambda _, args, keep=keep: keep.append(args[0]))
    means: dict[str, Any] = {name: [] for name in seen}
    for step in range(3):
        if routed and step == 1:
            starve(model)
        for micro in range(2):
            run_model(model, batch(10 * step + micro))
        meter.step()
        for name, inputs in seen.items():
            tokens = torch.cat([h.detach().flatten(0, -2) for h in inputs]).double()
            if len(tokens):
                means[name].append(tokens.abs().mean(0))
            inputs.clear()
    for name, values in means.items():
        weights = [LEVER.decay**age for age in reversed(range(len(values)))]
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert_near(of(meter, name)[0], expected, 1e-6)
        assert of(meter, name)[1].tolist() == [len(values)] * len(expected)
    if routed:
        assert len(means[EXPERT]) == 1


def test_an_expert_without_tokens_stays_unmeasured():
    model = expert_model()
    starve(model)
    meter = measured(model, LEVER)
    assert not of(meter, EXPERT)[1].any()
    assert of(meter, "decoder.layers.1.mlp.shared_experts")[1].all()


def test_validation_and_paused_passes_do_not_count():
    model = expert_model()
    meter, alone = ActivityMeter(model, LEVER), ActivityMeter(model, LEVER)
    with alone.paused():
        model.eval()
        run_model(model, batch(1))
        model.train()
        with torch.no_grad():
            run_model(model, batch(2))
        with meter.paused():
            run_model(model, batch(3))
    run_model(model, batch(4))
    meter.step()
    alone.step()
    assert torch.equal(meter.means, alone.means)


@pytest.mark.parametrize("module", ["moe", "shared_experts", None])
def test_recomputed_activations_count_once(module: str | None):
    plain = expert_model()
    how = {"recompute_granularity": "selective", "recompute_modules": [module]}
    recomputing = expert_model(**how if module else {"recompute_granularity": "full"})
    meters, passes = [], []
    for model in (plain, recomputing):
        meters.append(meter := ActivityMeter(model, LEVER))
        passes.append(calls := [])
        shared = model.decoder.layers[1].mlp.shared_experts.linear_fc2
        shared.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        for seed in (1, 2):
            run_model(model, batch(seed), labels=batch(seed)).sum().backward()
        tokens = list(meter._tokens)
        meter.step()
    assert [len(calls) for calls in passes] == [2, 4]
    # Two micro-batches of 32 tokens reach the shared expert.
    assert tokens[4] == 64
    assert torch.equal(meters[0].means, meters[1].means)


def test_a_closed_meter_leaves_no_hook():
    model = expert_model()
    meter = ActivityMeter(model, LEVER)
    assert any(module._forward_pre_hooks for module in model.modules())
    meter.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_and_not_taken_in(value: float):
    model = expert_model()
    meter = measured(model, LEVER)
    before = meter.state_dict()
    shared = model.decoder.layers[2].mlp.shared_experts
    hook = shared.linear_fc2.register_forward_pre_hook(
        lambda _, args: (args[0] * value,), prepend=True
    )
    run_model(model, batch(5))
    with pytest.raises(RuntimeRefusal, match=r"not finite(?s:.*)layers\.2\.mlp\.shared_experts"):
        meter.step()
    assert torch.equal(meter.means, before["means"])
    hook.remove()
    advance(model, meter, [6])
    assert torch.isfinite(meter.means).all()


def test_a_step_whose_tokens_passed_by_is_refused():
    with pytest.raises(RuntimeRefusal, match="No token reached"):
        ActivityMeter(expert_model(), LEVER).step()


def test_a_resumed_meter_goes_on_as_if_uninterrupted():
    model = expert_model()
    unbroken = measured(model, LEVER, steps=2)
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    file.seek(0)
    resumed = ActivityMeter(model, LEVER)
    resumed.load_state_dict(torch.load(file))
    for seed in (2, 3):
        run_model(model, batch(seed))
        for meter in (unbroken, resumed):
            meter.step()
    for name in ("means", "ages", "steps"):
        assert torch.equal(getattr(unbroken, name), getattr(resumed, name))


def test_a_meter_of_fewer_layers_takes_over_theirs():
    model = expert_model()
    state = measured(model, LEVER).state_dict()
    fewer = ActivityMeter(model, RedoLever(layers=(3,)))
    fewer.load_state_dict(state)
    assert torch.equal(fewer.means, state["means"][-len(fewer.means) :])
    more = ActivityMeter(model, LEVER)
    more.load_state_dict(fewer.state_dict())
    assert not more.ages[: -len(fewer.means)].any()
    assert torch.equal(more.ages[-len(fewer.means) :], fewer.ages)


def test_a_measure_of_other_widths_is_refused():
    state = measured(expert_model(), LEVER).state_dict()
    with pytest.raises(RuntimeRefusal, match="16 units of"):
        ActivityMeter(expert_model(moe_ffn_hidden_size=8), LEVER).load_state_dict(state)


def test_a_layer_without_an_mlp_is_refused():
    with pytest.raises(RecipeError, match=r"layers 1, 9 of(?s:.*)layers 2, 3(?s:.*)layers=\(3,\)"):
        mlps_of(small_config("AEE"), layers=(9, 3, 1))
    with pytest.raises(RecipeError, match="a model with E layers"):
        mlps_of(small_config("AM"))


class GroupedLinear(nn.Module):
    """Linear layers of several experts, as Transformer Engine groups them."""

    def __init__(self, linears: list[Any]) -> None:
        super().__init__()
        for number, linear in enumerate(linears):
            self.register_parameter(f"weight{number}", linear.weight)

    def forward(self, tokens: Tensor, splits: list[int]) -> tuple[Tensor, None]:
        parts = tokens.split(splits)
        weights = [getattr(self, f"weight{number}") for number in range(len(parts))]
        return torch.cat([t @ w.T for t, w in zip(parts, weights, strict=True)]), None


class Grouped(nn.Module):
    """Routed experts as in TEGroupedMLP's forward pass, without Transformer Engine."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.activation = experts.config.activation_func
        for name in ("linear_fc1", "linear_fc2"):
            linears = [getattr(expert, name) for expert in experts.local_experts]
            setattr(self, name, GroupedLinear(linears))

    def forward(self, tokens: Tensor, counts: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        splits = counts.tolist()
        hidden = self.activation(self.linear_fc1(tokens, splits)[0]) * probs.unsqueeze(-1)
        return self.linear_fc2(hidden, splits)


def test_grouped_experts_measure_as_sequential_ones():
    model, grouped = expert_model(), expert_model()
    for layer in grouped.decoder.layers[1:]:
        layer.mlp.experts = Grouped(layer.mlp.experts)
    meters = [measured(each, LEVER) for each in (model, grouped)]
    assert_near(meters[1].means, meters[0].means, 1e-6)
    assert torch.equal(meters[1].ages, meters[0].ages)
    pairs = [shares_of([each], meters[0].mlps) for each in (model, grouped)]
    for one, other in zip(*pairs, strict=True):
        for mine, its in zip(one.tensors(), other.tensors(), strict=True):
            assert mine is its is None or torch.equal(mine, its)


def test_experts_in_one_bank_are_refused():
    model = expert_model()
    model.decoder.layers[1].mlp.experts = nn.Identity()
    with pytest.raises(RuntimeRefusal, match="moe_use_legacy_grouped_gemm=False"):
        ActivityMeter(model, LEVER)
