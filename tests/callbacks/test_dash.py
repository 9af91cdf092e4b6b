"""Rows shrunk by their cosine with a gradient: DASH, periodic shrink, and what they rest on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal
from tests.callbacks.runs import (
    DISTRIBUTED,
    OVERLAPPED,
    TWO,
    at_step,
    configured,
    named_parameters,
    on_ranks,
    shares,
    train_with,
    whole,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sequence_parallel": {**TWO, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {**TWO, "pipeline_model_parallel_size": 2},
    "ep2_distributed": {**DISTRIBUTED, "expert_model_parallel_size": 2},
    "dp2_overlapped": OVERLAPPED,
}
STEPS = 3


@pytest.fixture(scope="module")
def start(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the four layers, written by one process after two steps."""
    folder = tmp_path_factory.mktemp("start")
    on_ranks(lambda: train_with(configured(sources, folder, steps=2, save_interval=2)))
    return folder / "checkpoints" / "step=2"


def continued(checkpoint: Path, sources: Path, folder: Path, **changes: Any) -> Any:
    """Return the configuration of three steps from a checkpoint's weights."""
    import nemo_run as run
    from nemo.lightning import RestoreConfig

    partial = configured(sources, folder, steps=STEPS, **changes)
    partial.resume.restore_config = run.Config(RestoreConfig, path=str(checkpoint))
    return partial


def biased(partial: Any) -> Any:
    """Return the configuration with biases; Megatron's experts cannot have any here."""
    partial.model.config.add_bias_linear = True
    return partial


# One checkpoint, every layout.


def act_and_continue(
    checkpoint: Path,
    sources: Path,
    folder: Path,
    changes: dict[str, Any],
    finish: Callable[[Any], Any] = lambda partial: partial,
) -> dict[str, Any]:
    """Shrink, then DASH, before the first step; return weights, reports and losses."""
    from megacpp_nemo.callbacks.dash import dash
    from megacpp_nemo.callbacks.rehearsal import backward, undisturbed, upcoming
    from megacpp_nemo.callbacks.shrink import shrink
    from megacpp_nemo.contract.plasticity import DashLever, ShrinkLever

    seen: dict[str, Any] = {}

    def act(trainer: Any) -> None:
        seen["before"] = shares(trainer)
        with undisturbed(trainer):
            backward(trainer, upcoming(trainer, 1))
            seen["shrink"] = shrink(trainer, ShrinkLever(rate=0.5, threshold=0.0))
        seen["shrunk"] = shares(trainer)
        seen["dash"] = dash(trainer, DashLever(batches=3, floor=0.02), cause="data")
        seen["after"] = shares(trainer)

    partial = finish(continued(checkpoint, sources, folder, **changes))
    seen["losses"] = train_with(partial, at_step(0, act))["loss"]
    return seen


@pytest.fixture(scope="module")
def alone(start: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return on_ranks(act_and_continue, start, sources, tmp_path_factory.mktemp("alone"), {})[0]


def test_one_process_shrinks_and_goes_on(alone: Any) -> None:
    before, shrunk, after = (whole([alone[when]]) for when in ("before", "shrunk", "after"))
    for name, action in (("shrink", alone["shrink"]), ("dash", alone["dash"])):
        assert action.lever == name
        assert set(action.matrices) == set(before)
        assert sum(each["shrunk"] for each in action.matrices.values()) > 0
        # Nothing here is chosen so that all rows are alike.
        assert any(each["mean_factor"] != each["min_factor"] for each in action.matrices.values())
    assert alone["dash"].cause == "data"
    for name, weights in after.items():
        factors = weights.norm(dim=1) / shrunk[name].norm(dim=1)
        reported = alone["dash"].matrices[name]
        assert reported["rows"] == len(weights)
        assert reported["mean_factor"] == pytest.approx(float(factors.mean()), abs=1e-5)
        assert reported["min_factor"] == pytest.approx(float(factors.min()), abs=1e-5)


@pytest.mark.two_process
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_does_the_same(
    layout: str, alone: Any, start: Path, sources: Path, tmp_path: Path
) -> None:
    ranks = on_ranks(act_and_continue, start, sources, tmp_path, LAYOUTS[layout], ranks=2)
    for when in ("before", "shrunk", "after"):
        expected, found = whole([alone[when]]), whole([rank[when] for rank in ranks])
        assert set(found) == set(expected)
        for name, weights in expected.items():
            worst = float((found[name] - weights).abs().max())
            assert worst <= 1e-6, f"{name} {when}: {worst:.1e}"
    for lever in ("shrink", "dash"):
        reports = [rank[lever].matrices for rank in ranks]
        assert not set(reports[0]) & set(reports[1])
        merged = {**reports[0], **reports[1]}
        assert set(merged) == set(alone[lever].matrices)
        for name, expected_values in alone[lever].matrices.items():
            assert merged[name] == pytest.approx(expected_values, abs=1e-5)
        assert sum(rank[lever].bytes for rank in ranks) == alone[lever].bytes
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.two_process
def test_a_bias_split_over_tensor_ranks_is_one_vector(sources: Path, tmp_path: Path) -> None:
    first = configured(sources, tmp_path / "first", steps=2, save_interval=2, experts=False)
    on_ranks(train_with, biased(first))
    checkpoint = tmp_path / "first" / "checkpoints" / "step=2"
    alone, *ranks = (
        result
        for layout in ({}, LAYOUTS["tp2_sequence_parallel"])
        for result in on_ranks(
            act_and_continue,
            checkpoint,
            sources,
            tmp_path / f"{len(layout)}",
            {**layout, "experts": False},
            biased,
            ranks=layout.get("devices_per_node", 1),
        )
    )
    expected, found = whole([alone["after"]]), whole([rank["after"] for rank in ranks])
    split = "decoder.layers.1.mlp.linear_fc1.bias"
    assert ranks[0]["after"][split][1].shape == (1, expected[split].size(1) // 2)
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=0, atol=1e-6)
    reported = {**ranks[0]["dash"].matrices, **ranks[1]["dash"].matrices}
    for name, values in alone["dash"].matrices.items():
        assert reported[name] == pytest.approx(values, abs=1e-5)


# The rules, on gradients made for them.


def ruled(sources: Path, folder: Path, use: Callable[[Any, Any], Any]) -> Any:
    """Return what `use(trainer, parameters)` returns after one step of a model with biases."""
    seen: list[Any] = []
    partial = biased(configured(sources, folder, steps=1, experts=False))
    act = at_step(1, lambda trainer: seen.append(use(trainer, named_parameters(trainer))))
    train_with(partial, act)
    return seen[0]


PROJECTION = "decoder.layers.2.mixer.out_proj.weight"
BIASED = "decoder.layers.1.mlp.linear_fc2"


def directions(weights: Tensor) -> Tensor:
    """Return gradients with rows along, across, against the weights, at 60 degrees, and zero."""
    across = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    across -= (
        (across * weights).sum(1, keepdim=True) / weights.square().sum(1, keepdim=True) * weights
    )
    across *= weights.norm(dim=1, keepdim=True) / across.norm(dim=1, keepdim=True)
    given = torch.zeros_like(weights)
    given[0], given[1], given[2] = 3 * weights[0], 1e-3 * across[1], -1e-9 * weights[2]
    given[3] = weights[3] / 2 + across[3] * 0.75**0.5
    return given


def test_dash_shrinks_rows_by_their_direction(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megacpp_nemo.callbacks import dash as module
    from megacpp_nemo.contract.plasticity import DashLever

    def use(trainer: Any, parameters: Any) -> Any:
        weight, bias = parameters[PROJECTION], parameters[f"{BIASED}.bias"]
        weight.data[5] = 0
        bias.data.normal_(generator=torch.Generator().manual_seed(0))
        before = weight.detach().clone(), bias.detach().clone()
        states = module.OptimizerStates(trainer.optimizers)
        moments = [each.clone() for each in states.owned(weight).moments]
        averages = {p: torch.zeros(p.numel()) for p in parameters.values()}
        averages[weight] = directions(weight.data).view(-1)
        averages[weight].view_as(weight)[5] = 1.0
        # Half of its entries along the bias and half against it: the vector is across.
        turn = torch.ones_like(bias).view(2, -1)
        turn[1] *= -(bias.data.view(2, -1)[0].norm() ** 2) / bias.data.view(2, -1)[1].norm() ** 2
        averages[bias] = bias.data * turn.view(-1)
        monkeypatch.setattr(module, "averaged_descent", lambda *args: averages)
        action = module.dash(trainer, DashLever(floor=0.3))
        kept = [
            torch.equal(a, b) for a, b in zip(moments, states.owned(weight).moments, strict=True)
        ]
        return before, (weight.detach(), bias.detach()), action, kept

    (weight, bias), (weight_after, bias_after), action, kept = on_ranks(
        ruled, sources, tmp_path, use
    )[0]
    assert kept == [True, True]
    assert torch.equal(weight_after[0], weight[0])
    assert torch.equal(weight_after[1:3], weight[1:3] * 0.3)
    torch.testing.assert_close(weight_after[3], weight[3] / 2)
    assert torch.equal(weight_after[4:], weight[4:])
    assert torch.equal(bias_after, bias * 0.3)
    assert action.matrices[PROJECTION]["shrunk"] == 3
    assert action.matrices[f"{BIASED}.bias"] == pytest.approx(
        {"rows": 1, "shrunk": 1, "mean_factor": 0.3, "min_factor": 0.3}
    )
    assert sum(each["shrunk"] for each in action.matrices.values()) == 4
    assert action.bytes == 4 * (weight.numel() + bias.numel())


def test_periodic_shrink_follows_its_formula(sources: Path, tmp_path: Path) -> None:
    from megacpp_nemo.callbacks.shrink import shrink
    from megacpp_nemo.contract.plasticity import ShrinkLever

    def use(trainer: Any, parameters: Any) -> Any:
        parameters[PROJECTION].main_grad.copy_(directions(parameters[PROJECTION].data))
        before = {n: p.detach().clone() for n, p in parameters.items()}
        gradients = {n: p.main_grad.clone() for n, p in parameters.items()}
        shrink(trainer, ShrinkLever(rate=0.9, threshold=0.05, floor=0.2))
        return before, gradients, {n: p.detach() for n, p in parameters.items()}

    before, gradients, after = on_ranks(ruled, sources, tmp_path, use)[0]
    along = before[PROJECTION]
    torch.testing.assert_close(after[PROJECTION][0], along[0] * 0.2)  # 1 - 0.9 * 0.95 < floor
    assert torch.equal(after[PROJECTION][1:3], along[1:3])
    torch.testing.assert_close(after[PROJECTION][3], along[3] * (1 - 0.9 * 0.45))
    assert torch.equal(after[PROJECTION][4:], along[4:])
    for name in (f"{BIASED}.weight", f"{BIASED}.bias", "decoder.layers.3.mixer.in_proj.weight"):
        w, g = (of[name].double() for of in (before, gradients))
        if name.endswith("bias"):
            w, g = w[None], g[None]
        cosine = torch.nn.functional.cosine_similarity(w, g, dim=1, eps=1e-300)
        factor = (1 - 0.9 * (cosine - 0.05).clamp(min=0)).clamp(0.2, 1)
        torch.testing.assert_close(after[name], (w * factor[:, None]).float().view_as(after[name]))
    assert torch.equal(
        after["embedding.word_embeddings.weight"], before["embedding.word_embeddings.weight"]
    )


def test_the_average_is_that_of_a_plain_loop(sources: Path, tmp_path: Path) -> None:
    from megacpp_nemo.callbacks.dash import averaged_descent
    from megacpp_nemo.callbacks.matrices import hybrid_models, matrices_of
    from megacpp_nemo.callbacks.optimizers import OptimizerStates
    from megacpp_nemo.contract.parameters import Selection
    from megacpp_nemo.contract.plasticity import DashLever

    def act(trainer: Any) -> Any:
        models = hybrid_models(trainer.strategy.megatron_parallel)
        matrices = matrices_of(models, Selection())
        lever = DashLever(batches=3, averaging=0.4)
        found = averaged_descent(trainer, lever, matrices, OptimizerStates(trainer.optimizers))
        plain = {matrix.weight: torch.zeros_like(matrix.weight) for matrix in matrices}
        for batch in range(1, 4):  # one batch of four samples is behind us
            gradients = plain_gradients(
                trainer, models[0], list(plain), range(4 * batch, 4 * batch + 4)
            )
            for (_, average), gradient in zip(plain.items(), gradients, strict=True):
                average.mul_(1 - 0.4).add_(-gradient, alpha=0.4)
        return [(found[weight].view_as(weight), average) for weight, average in plain.items()]

    def run() -> Any:
        seen: list[Any] = []
        partial = configured(sources, tmp_path, steps=1)
        partial.model.config.moe_aux_loss_coeff = 0.0
        train_with(partial, at_step(1, lambda trainer: seen.append(act(trainer))))
        return seen[0]

    for found, plain in on_ranks(run)[0]:
        assert float((found - plain).norm()) <= 1e-5 * float(plain.norm())


def plain_gradients(trainer: Any, model: Any, weights: list[Any], samples: range) -> Any:
    """Return the gradient of the mean loss of some samples, one at a time through the model."""
    from megacpp_nemo.model.documents import DocumentBoundaries

    dataset, total = trainer.train_dataloader.dataset, 0.0
    for sample in samples:
        row = {key: value[None] for key, value in dataset[sample].items()}
        losses = model(
            row["tokens"],
            row["position_ids"],
            None,
            labels=row["labels"],
            packed_seq_params=DocumentBoundaries.from_ids(row["document_ids"]),
        )
        total = total + (losses * row["loss_mask"]).sum() / row["loss_mask"].sum() / len(samples)
    return torch.autograd.grad(total, weights)


# Refusals.


@pytest.mark.two_process
@pytest.mark.parametrize("poisoned", ["gradient", "weight"])
def test_a_value_that_is_not_finite_is_refused_on_every_rank_before_anything_is_written(
    poisoned: str, sources: Path, tmp_path: Path
) -> None:
    from megacpp_nemo.callbacks.shrink import shrink
    from megacpp_nemo.contract.plasticity import ShrinkLever

    def run() -> Any:
        seen: list[Any] = []

        def act(trainer: Any) -> None:
            parameters = named_parameters(trainer)
            if torch.distributed.get_rank() == 1:
                tensor = parameters["decoder.layers.1.mixer.out_proj.weight"]
                (tensor.main_grad if poisoned == "gradient" else tensor.data)[3, 3] = torch.nan
            before = {n: p.detach().clone() for n, p in parameters.items()}
            with pytest.raises(RuntimeRefusal) as refused:
                shrink(trainer, ShrinkLever(rate=1.0, threshold=0.0))
            unchanged = all(
                torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in parameters.items()
            )
            seen.extend([str(refused.value), unchanged])

        partial = configured(sources, tmp_path, steps=1, **LAYOUTS["pp2"])
        train_with(partial, at_step(1, act))
        return seen

    for message, unchanged in on_ranks(run, ranks=2):
        assert "decoder.layers.3.mixer.out_proj.weight" in message
        assert unchanged
