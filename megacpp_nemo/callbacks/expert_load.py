"""How evenly the routers of a run load their experts, and what they drop, layer by layer.

TensorBoard gets, for each expert layer and over the steps since the last report,

- `experts/layer_N/most`: tokens of the busiest expert over the mean of all, 1 if even;
- `experts/layer_N/least`: tokens of the idlest expert over that mean;
- `experts/layer_N/dropped`: share of assignments beyond the experts' capacity, where there is one;

and `experts/most`, `experts/least` and `experts/dropped`, the extremes over the layers. The layers
of a prediction depth are taken together, under a number behind the last layer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megacpp_nemo.callbacks.matrices import hybrid_models


class ExpertLoad:
    """Counts where the routers of a model send tokens while it trains.

    Validation does not count; where activations are recomputed, the pass with gradients counts.

    Args:
        models: The model in training: NeMo's `MegatronParallel`, wrapped or bare models.
    """

    def __init__(self, models: Any) -> None:
        bare = hybrid_models(models)
        config: Any = bare[0].config
        self._topk, experts = config.moe_router_topk, config.num_moe_experts or 0
        self._padded = config.moe_pad_expert_input_to_capacity
        # By layer: tokens of each expert; then the tokens that came.
        device = next(bare[0].parameters()).device
        rows = config.num_layers + (config.mtp_num_layers or 0)
        self._counts = torch.zeros(rows, experts + 1, dtype=torch.float64, device=device)
        self._hooks = [
            router.register_forward_hook(self._hook(number - 1))
            for number, router in _routers(bare)
        ]

    def close(self) -> None:
        """Count no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def values(self) -> dict[str, float]:
        """Return what was counted on all ranks since the last call, and begin anew.

        Collective over all ranks. Layers without tokens are left out.
        """
        counts = self._counts.clone()
        self._counts.zero_()
        # Ranks that see the same tokens weigh alike in every layer, so only ratios are right.
        torch.distributed.all_reduce(counts)
        found: dict[str, float] = {}
        for number, row in enumerate(counts.tolist(), start=1):
            *loads, tokens = row
            if not tokens:
                continue
            name, mean = f"experts/layer_{number}", sum(loads) / len(loads)
            # Where nothing was sent anywhere, a diverged router's scores are no numbers.
            found[f"{name}/most"] = max(loads) / mean if mean else math.nan
            found[f"{name}/least"] = min(loads) / mean if mean else math.nan
            found[f"{name}/dropped"] = 1 - sum(loads) / (tokens * self._topk)
        for name, pick in (("most", max), ("least", min), ("dropped", max)):
            layers = [value for key, value in found.items() if key.endswith(f"/{name}")]
            if layers:
                found[f"experts/{name}"] = pick(layers)
        return found

    def _hook(self, row: int) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor]], None]:
        def count(router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            if not (router.training and torch.is_grad_enabled()):
                return
            probabilities, chosen = output
            sent = chosen.bool()
            if self._padded:
                # Padding to capacity chooses tokens that no expert was asked to take.
                sent = sent & (probabilities.detach() > 0)
            self._counts[row, :-1] += sent.sum(0)
            self._counts[row, -1] += len(chosen)

        return count


def _routers(models: list[Any]) -> Iterator[tuple[int, TopKRouter]]:
    """Yield the routers of this rank's layers, with their 1-based layer numbers."""
    for model in models:
        depths = model.mtp.layers if hasattr(model, "mtp") else ()
        inner = (depth.mtp_model_layer.layers for depth in depths)
        for layer in chain(model.decoder.layers, *inner):
            for module in layer.modules():
                if isinstance(module, TopKRouter):
                    yield layer.layer_number, module
