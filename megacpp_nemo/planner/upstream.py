"""Megatron-LM's own count of a hybrid's operations, for published figures that rest on it.

It is not the model's work: it takes Mamba's inner width as twice the hidden size whatever the
heads are, and latent attention as attention with full projections; it knows neither routers, nor
prediction depths beyond their passes through the head, nor M2RNN. A rate in TFLOP/s that was
computed with it compares with nothing but itself.
"""

from __future__ import annotations

from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.tensors import padded_vocabulary


def upstream_training_flops(
    recipe: HybridRecipe, *, recurrent_as_mamba: bool = False
) -> dict[str, float]:
    """Return what Megatron-LM from 0.17 on counts for a training step, per token, by family.

    Args:
        recipe: What is trained; every A layer is taken to be spelled as plain attention.
        recurrent_as_mamba: Whether R layers are spelled as Mamba layers that a custom spec
            replaces, so that they are counted as such.
    """
    layers, model = recipe.layers.counts(), recipe.model
    hidden, experts, mamba = model.hidden_size, model.experts, model.mamba
    heads = model.attention.num_heads * model.attention.head_dim
    inner, groups = 2 * hidden, mamba.num_groups * mamba.state_dim
    mixers = layers.get(BlockFamily.MAMBA, 0)
    if recurrent_as_mamba:
        mixers += layers.get(BlockFamily.RECURRENT, 0)
    attention = 8 * hidden * heads + 2 * model.seq_length * heads
    routed = 4 * hidden * (experts.topk * experts.ffn_hidden_size + experts.shared_expert_size)
    mixer = (
        2 * hidden * (2 * inner + 2 * groups + mamba.num_heads)
        + 7 * inner * mamba.state_dim
        + 2 * inner * hidden
    )
    passes = 1 + model.mtp.num_layers
    return {
        "attention": 3.0 * layers.get(BlockFamily.ATTENTION, 0) * attention,
        "experts": 3.0 * layers.get(BlockFamily.EXPERTS, 0) * routed,
        "Mamba": 3.0 * mixers * mixer,
        "output head": 3.0 * passes * 2 * hidden * padded_vocabulary(recipe),
    }
