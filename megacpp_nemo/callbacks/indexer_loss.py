"""How far the indexers of sparse attention (DSA) are from what the heads look at.

TensorBoard gets, over the steps since the last report,

- `dsa_indexer_kl/layer_N`: KL(attention || indexer) of a layer, in nats per query, or summed over
  the layers of a prediction depth, which have one number behind the last layer's;
- `dsa_indexer_loss`: their sum times the coefficient, which is what joins the training loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megacpp_nemo.callbacks.matrices import hybrid_models
from megacpp_nemo.model.shape import sparse_shape_of
from megacpp_nemo.model.sparse_attention import SparseDotProduct

PREFIX, TOTAL = "dsa_indexer_kl/layer_", "dsa_indexer_loss"


def reduced_losses(models: Any) -> dict[str, float]:
    """Return the losses counted on all ranks since the last call, by name, and begin anew.

    Collective over all ranks. Layers of a prediction depth have numbers behind the last layer's.

    Args:
        models: The model in training: NeMo's `MegatronParallel`, wrapped or bare models.
    """
    bare = hybrid_models(models)
    config: Any = bare[0].config
    device = next(bare[0].parameters()).device
    # By number: the sum of its layers' mean losses, and of the ranks that hold them.
    counts = torch.zeros(
        config.num_layers + (config.mtp_num_layers or 0), 2, dtype=torch.float64, device=device
    )
    for core in _cores(bare):
        total, number = core.take_losses()
        if total is not None:
            counts[core.layer_number - 1, 0] += total / number
            counts[core.layer_number - 1, 1] = 1
    # Tensor ranks count the same whole loss, which leaves its mean as it is.
    torch.distributed.all_reduce(counts)
    means = {
        number: total / many
        for number, (total, many) in enumerate(counts.tolist(), start=1)
        if many
    }
    if not means:
        return {}
    weight = sparse_shape_of(config).indexer_loss_coeff
    return {
        **{f"{PREFIX}{number}": mean for number, mean in means.items()},
        TOTAL: weight * sum(means.values()),
    }


def _cores(models: list[Any]) -> Iterator[SparseDotProduct]:
    """Yield the sparse attention cores of this rank."""
    for model in models:
        for module in model.modules():
            if isinstance(module, SparseDotProduct):
                yield module
