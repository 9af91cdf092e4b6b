"""Weights changed between two steps, under every way in which Megatron keeps optimizer state."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal
from tests.callbacks.runs import (
    DISTRIBUTED,
    OVERLAPPED,
    at_step,
    configured,
    named_parameters,
    on_ranks,
    train_with,
)

# The whole of one parameter, some rows of a second, and some columns of a third.
WHOLE = "decoder.layers.2.mixer.out_proj.weight"
ROWS = "decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight"
COLUMNS = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight"
SCALED = "decoder.layers.3.mixer.in_proj.weight"
STEP = 2

WRAPPERS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32", "use_distributed_optimizer": False},
    "bf16": {"precision": "bf16", "use_distributed_optimizer": False},
    "fp32_distributed": {"precision": "fp32", **DISTRIBUTED},
    "fp32_overlapped": {"precision": "fp32", **OVERLAPPED},
    "bf16_distributed": {"precision": "bf16", **DISTRIBUTED},
    "bf16_overlapped": {"precision": "bf16", **OVERLAPPED},
    "bf16_experts_apart": {"precision": "bf16", **DISTRIBUTED, "expert_model_parallel_size": 2},
}
OPTIMIZERS = {
    "fp32": "FP32Optimizer",
    "bf16": "Float16OptimizerWithFloat16Params",
}


def snapshot(trainer: Any) -> dict[str, dict[str, Any]]:
    """Return a copy of what this rank knows of each parameter."""
    from megacpp_nemo.callbacks.optimizers import OptimizerStates

    states = OptimizerStates(trainer.optimizers)
    copies = {}
    for name, parameter in named_parameters(trainer).items():
        owned = states.owned(parameter)
        optimizer, _ = states._holders[parameter]
        copies[name] = {
            "range": (owned.begin, owned.end),
            "weights": parameter.detach().clone(),
            "own": parameter.detach().view(-1)[owned.begin : owned.end].clone(),
            "master": owned.master.clone(),
            "moments": [moment.clone() for moment in owned.moments],
            "gradient": parameter.main_grad.view(-1)[owned.begin : owned.end].float().clone(),
            "steps": {int(each["step"]) for each in optimizer.optimizer.state.values()},
            "groups": [
                {key: group[key] for key in ("lr", "weight_decay", "betas", "eps")}
                for group in optimizer.optimizer.param_groups
                if any(held.data_ptr() == owned.master.data_ptr() for held in group["params"])
            ],
        }
    return copies


def changed_here(name: str, parameter: Tensor) -> Tensor:
    """Return where a parameter is changed, `[out, in]`."""
    where = torch.zeros(parameter.shape, dtype=torch.bool)
    where[slice(None) if name == WHOLE else [0, 3] if name == ROWS else []] = True
    if name == COLUMNS:
        where[:, [1, 4]] = True
    if name == SCALED:
        where[2:5] = True
    return where


def run(sources: Path, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Change weights after a step; return what was known before, after, and a step later."""
    from megacpp_nemo.callbacks.optimizers import OptimizerStates, synchronized

    seen: dict[str, Any] = {"changes": changes}

    def act(trainer: Any) -> None:
        seen["stale"] = {n: p.detach().clone() for n, p in named_parameters(trainer).items()}
        synchronized(trainer.strategy)
        seen["before"] = snapshot(trainer)
        states, parameters = OptimizerStates(trainer.optimizers), named_parameters(trainer)
        seen["optimizers"] = {type(held[0]).__name__ for held in states._holders.values()}
        for name in (WHOLE, ROWS, COLUMNS):
            if name not in parameters:
                continue
            where = changed_here(name, parameters[name])
            parameters[name].data[where] = 0.25
            where = None if name == WHOLE else where[:, :1] if name == ROWS else where[:1]
            states.follow(parameters[name], where, reset=True)
        factors = torch.ones(parameters[SCALED].size(0), 1)
        factors[2:5] = torch.tensor([[0.5], [0.999], [0.3]])
        states.scale(parameters[SCALED], factors)
        synchronized(trainer.strategy)
        seen["after"] = snapshot(trainer)

    def look(trainer: Any) -> None:
        synchronized(trainer.strategy)
        seen["later"] = snapshot(trainer)

    partial = configured(sources, folder, steps=STEP + 1, **changes)
    train_with(partial, at_step(STEP, act), at_step(STEP + 1, look))
    return seen


@pytest.fixture(scope="module", params=WRAPPERS)
def ranks(
    request: pytest.FixtureRequest, sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """What each rank of a run saw, under one way to keep optimizer state."""
    changes = WRAPPERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    seen = on_ranks(run, sources, folder, changes, ranks=changes.get("devices_per_node", 1))
    wanted = OPTIMIZERS.get(request.param, "DistributedOptimizer")
    assert all(rank["optimizers"] == {wanted} for rank in seen)
    return seen


def parameters_of(rank: dict[str, Any]) -> Any:
    """Yield name, what was known before, after and later, and where the owned run changed."""
    for name, before in rank["before"].items():
        where = changed_here(name, before["weights"]).view(-1)[slice(*before["range"])]
        yield name, before, rank["after"][name], rank["later"][name], where


def test_what_is_touched_has_the_new_weights_and_no_moments(ranks: Any) -> None:
    touched = 0
    for rank in ranks:
        for name, _, after, _, where in parameters_of(rank):
            if name == SCALED:
                continue
            touched += int(where.sum())
            assert torch.equal(
                after["master"][where], torch.full_like(after["master"], 0.25)[where]
            )
            assert torch.equal(after["own"][where].float(), after["master"][where])
            assert all(not moment[where].any() for moment in after["moments"])
    assert touched > 0


def test_what_is_scaled_keeps_its_moments_and_its_masters_precision(ranks: Any) -> None:
    factors = torch.ones(ranks[0]["before"][SCALED]["weights"].shape)
    factors[2:5] = torch.tensor([[0.5], [0.999], [0.3]])
    for rank in ranks:
        before, after = rank["before"][SCALED], rank["after"][SCALED]
        own = factors.view(-1)[slice(*before["range"])]
        assert torch.equal(after["master"], before["master"] * own)
        assert torch.equal(after["own"], after["master"].to(after["own"].dtype))
        for old, new in zip(before["moments"], after["moments"], strict=True):
            assert torch.equal(old, new)


def test_what_is_not_touched_is_bit_for_bit_as_before(ranks: Any) -> None:
    for rank in ranks:
        for name, before, after, _, where in parameters_of(rank):
            whole = ~changed_here(name, before["weights"])
            assert torch.equal(before["weights"][whole], after["weights"][whole])
            assert torch.equal(before["master"][~where], after["master"][~where])
            assert len(after["moments"]) == (2 if after["master"].numel() else 0)
            for old, new in zip(before["moments"], after["moments"], strict=True):
                assert torch.equal(old[~where], new[~where])


def test_the_next_step_is_adams_from_there(ranks: Any) -> None:
    for rank in ranks:
        for name, _, after, later, _ in parameters_of(rank):
            assert later["steps"] == {STEP + 1}, name
            if not after["master"].numel():
                continue
            assert after["steps"] == {STEP}
            # The rate of the step taken after `after`, which the schedule had set by then.
            (group,) = after["groups"]
            expected = adam(after["master"], after["moments"], later["gradient"], STEP + 1, group)
            torch.testing.assert_close(later["master"], expected, rtol=1e-6, atol=1e-7)
            assert torch.equal(later["own"], later["master"].to(later["own"].dtype))


def adam(
    weights: Tensor, moments: list[Tensor], gradient: Tensor, step: int, group: dict[str, Any]
) -> Tensor:
    """Return the weights after one step of Adam with decoupled decay, by its equations."""
    first, second = group["betas"]
    mean = first * moments[0] + (1 - first) * gradient
    square = second * moments[1] + (1 - second) * gradient**2
    mean, square = mean / (1 - first**step), square / (1 - second**step)
    decayed = weights * (1 - group["lr"] * group["weight_decay"])
    return decayed - group["lr"] * mean / (square.sqrt() + group["eps"])


def test_every_copy_of_a_weight_agrees_once_gathered(ranks: Any) -> None:
    apart = ranks[0]["changes"].get("expert_model_parallel_size", 1) > 1
    for when in ("before", "after", "later"):
        for name in ranks[0][when]:
            if apart and ".local_experts." in name:
                continue
            copies = [rank[when][name]["weights"] for rank in ranks]
            assert all(torch.equal(copies[0], copy) for copy in copies), (when, name)


def test_only_an_overlapped_gather_leaves_old_weights_after_a_step(ranks: Any) -> None:
    stale = [
        name
        for rank in ranks
        for name, weights in rank["stale"].items()
        if not torch.equal(weights, rank["before"][name]["weights"])
    ]
    assert bool(stale) == ranks[0]["changes"].get("overlap_param_gather", False)


def test_slices_of_the_optimizer_end_within_rows(ranks: Any) -> None:
    within = [
        name
        for rank in ranks
        for name, known in rank["before"].items()
        if any(end % known["weights"][0].numel() for end in known["range"])
    ]
    changes = ranks[0]["changes"]
    apart = "expert_model_parallel_size" in changes  # where they fall between rows
    assert bool(within) == (changes["use_distributed_optimizer"] and not apart)


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"use_precision_aware_optimizer": True}, "use_precision_aware_optimizer=False"),
        ({"optimizer_cpu_offload": True}, "optimizer_cpu_offload=False"),
        ({}, "Megatron's Adam"),
    ],
)
def test_an_optimizer_that_keeps_its_state_otherwise_is_refused(
    config: dict[str, Any], hint: str
) -> None:
    from megacpp_nemo.callbacks.optimizers import OptimizerStates

    other = SimpleNamespace(config=SimpleNamespace(**config))
    with pytest.raises(RuntimeRefusal, match=hint):
        OptimizerStates([SimpleNamespace(mcore_optimizer=other)])
