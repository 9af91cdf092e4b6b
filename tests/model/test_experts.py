"""The expert layer: how it routes, what it adds up, and how its bias evens the load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed.finalize_model_grads import (
    _update_router_expert_bias,
    reset_model_temporary_tensors,
)
from torch import Tensor, nn

from tests.model.building import assert_near, build_layer, build_model, megatron, small_config

TOKENS = 96


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with megatron():
        yield


def inputs(width: int = 32, seed: int = 3) -> Tensor:
    return torch.randn(TOKENS // 2, 2, width, generator=torch.Generator().manual_seed(seed))


def experts_of(**changes: Any) -> Any:
    """Return the mixture of experts of a small model, with biases that change the choice."""
    mixture = build_layer(small_config(moe_router_dtype="fp32", **changes), "moe").mlp
    draw = torch.Generator().manual_seed(5)
    bias = mixture.router.expert_bias
    bias.copy_(torch.randn(bias.shape, generator=draw) * 0.1)
    return mixture


def plain_routing(router: Any, x: Tensor) -> Tensor:
    """Return each token's weight on each expert `[tokens, experts]`, one token at a time."""
    weights = []
    for token in x.flatten(0, 1):
        scores = torch.sigmoid(token.float() @ router.weight.float().T)
        chosen = torch.topk(scores + router.expert_bias, router.topk).indices
        row = torch.zeros_like(scores)
        row[chosen] = scores[chosen] / scores[chosen].sum()
        weights.append(row)
    return torch.stack(weights)


def plain_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    return F.gelu(x @ mlp.linear_fc1.weight.T) @ mlp.linear_fc2.weight.T


def test_tokens_are_routed_by_biased_and_weighed_by_unbiased_sigmoid_scores():
    router, x = experts_of().router, inputs()
    weights, chosen = router(x)
    expected = plain_routing(router, x)
    assert_near(weights, expected, 1e-6)
    assert torch.equal(chosen, expected > 0)
    unbiased = torch.sigmoid(x.flatten(0, 1) @ router.weight.T).topk(router.topk).indices
    assert not torch.equal(chosen, torch.zeros_like(chosen).scatter(1, unbiased, True))


def test_the_layer_adds_the_chosen_experts_and_the_shared_one():
    mixture, x = experts_of(), inputs()
    flat = x.flatten(0, 1)
    expected = plain_mlp(mixture.shared_experts, flat)
    for expert, weight in zip(
        mixture.experts.local_experts, plain_routing(mixture.router, x).T, strict=True
    ):
        expected = expected + weight.unsqueeze(-1) * plain_mlp(expert, flat)
    assert_near(mixture(x)[0].flatten(0, 1), expected, 1e-5)


def test_the_router_computes_in_fp32_where_the_model_is_bf16():
    changes = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    router = experts_of(**changes).router
    x = inputs().bfloat16()
    assert router.weight.dtype is torch.bfloat16
    assert router.expert_bias.dtype is torch.float32
    assert router.gating(x).dtype is torch.float32
    expected = plain_routing(router, x)
    assert_near(router(x)[0].float(), expected, 1e-6)


def test_the_auxiliary_loss_is_experts_times_share_of_tokens_times_share_of_score():
    """The gradient it adds is that of the closed form (arXiv 2101.03961, equation 4)."""
    coefficient = 0.3
    router, x = experts_of(moe_aux_loss_coeff=coefficient).router, inputs()
    router.train()
    weights, _ = router(x)
    # The probabilities pass nothing back themselves: what is left is the auxiliary loss.
    (weights * 0).sum().backward()
    actual = router.weight.grad.clone()
    router.weight.grad = None
    scores = torch.sigmoid(x.flatten(0, 1) @ router.weight.T)
    shares = scores / scores.sum(-1, keepdim=True)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(router.topk).indices, 1.0)
    tokens, experts = scores.shape
    loss = coefficient * experts / (router.topk * tokens) * (chosen.sum(0) @ shares.mean(0))
    loss.backward()
    assert_near(actual, router.weight.grad, 1e-5)


def test_the_bias_learns_without_a_gradient_and_is_saved():
    model = build_model(small_config("AE"))
    router = model.decoder.layers[1].mlp.router
    names = {name for name, _ in model.named_parameters()}
    assert not any("expert_bias" in name for name in names)
    assert not router.expert_bias.requires_grad
    assert "decoder.layers.1.mlp.router.expert_bias" in model.state_dict()
    saved = model.sharded_state_dict()
    assert any(key.endswith("router.expert_bias") for key in saved)


def test_the_bias_evens_a_skewed_router_in_the_steps_its_rate_needs():
    """One expert scores .2 above the others; each side moves by the rate a step."""
    model = build_model(small_config("AE", moe_aux_loss_coeff=0.0), shake=False)
    config, router = model.config, model.decoder.layers[1].mlp.router
    x = inputs(seed=7)
    x[..., 0] = 1.0
    with torch.no_grad():
        router.weight.mul_(0.5)
        router.weight[:, 0] = torch.tensor([0.847, 0.0, 0.0, 0.0])  # sigmoid(.847) = .70
    most = []
    for _ in range(200):
        router(x)
        loads = router.local_tokens_per_expert
        most.append(float(loads.max() / loads.mean()))
        _update_router_expert_bias([model], config)
        reset_model_temporary_tensors(config, [model])
    assert most[0] > 1.9  # of at most 2: four experts, two a token
    steps = 0.2 / (2 * config.moe_router_bias_update_rate)
    even = next(step for step, value in enumerate(most) if value < 1.1)
    assert 0.5 * steps < even < 1.5 * steps
    assert max(most[-20:]) < 1.2
    assert router.expert_bias.argmin() == 0
