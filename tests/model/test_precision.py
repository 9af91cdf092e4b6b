"""The model in bf16 beside the same weights in fp32."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.module import Float16Module

from tests.model.building import (
    boundaries_of,
    build_model,
    random_tokens,
    run_model,
    small_config,
)

pytestmark = pytest.mark.usefixtures("one_process")

HALF = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True}
LENGTHS = [5, 1, 10], [16]


def losses_and_gradients(model, module):
    tokens, labels = random_tokens(2, 16), random_tokens(2, 16, seed=1)
    losses = run_model(model, tokens, boundaries_of(*LENGTHS), labels)
    losses.mean().backward()
    return losses.detach(), {name: p.grad.float() for name, p in module.named_parameters()}


# E alone is compared by its loss: a token whose two best experts nearly tie goes elsewhere.
@pytest.mark.parametrize(("pattern", "smooth"), [("AMR", True), ("AEMR", False)])
def test_bf16_is_close_to_fp32(pattern, smooth):
    full = build_model(small_config(pattern))
    config = small_config(pattern, **HALF)
    inner = build_model(config)
    inner.load_state_dict(full.state_dict())
    half = Float16Module(config, inner)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}

    expected, expected_grads = losses_and_gradients(full, full)
    found, grads = losses_and_gradients(half, inner)
    assert torch.isfinite(found).all()
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    # bf16 has 8 bits; four layers and a softmax over 64 tokens lose a few of them.
    torch.testing.assert_close(found.float().mean(), expected.mean(), rtol=2e-2, atol=0)
    if smooth:
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)
        for name, grad in grads.items():
            reference = expected_grads[name]
            alike = torch.cosine_similarity(grad.flatten(), reference.flatten(), dim=0)
            assert alike > 0.98, name
