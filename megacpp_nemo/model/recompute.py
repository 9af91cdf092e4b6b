"""Activations that the backward pass computes again, so that they need not be kept.

Megatron 0.16 recomputes whole layers in its transformer block alone: its Mamba stack takes
`recompute_granularity="full"` and keeps everything, so the hybrid stack does it here. Parts of a
layer (`"selective"`) are recomputed by Megatron's own layers, those that have the part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.host.compat import transformer_engine_available

FULL, SELECTIVE = "full", "selective"
METHODS = ("uniform", "block")
# Where Megatron's schedule tells a layer which micro-batch it runs.
_NUMBER = "current_microbatch"


def run_layers(layers: Sequence[nn.Module], config: Any, hidden: Tensor, **given: Any) -> Tensor:
    """Run layers one after the other, keeping only what enters those that run again.

    With `recompute_method="uniform"` units of `recompute_num_layers` layers run again as one;
    with `"block"` the first `recompute_num_layers` of them, each by itself. A layer whose input
    has no gradient is not recomputed: its parameters would get none.

    Args:
        layers: Layers of a pipeline stage, or of a prediction depth.
        config: Megatron configuration.
        hidden: `[seq, batch, hidden]`.
        **given: What every layer is told, besides.

    Returns:
        The last layer's output `[seq, batch, hidden]`.
    """
    for unit, again in _units(layers, config):
        run = _unit(unit, given)
        hidden = checkpoint(run, False, hidden) if again and hidden.requires_grad else run(hidden)
    return hidden


def _units(layers: Sequence[nn.Module], config: Any) -> Iterator[tuple[Sequence[nn.Module], bool]]:
    """Yield the layers in groups, and whether a group runs again."""
    number = config.recompute_num_layers
    if config.recompute_method == "uniform":
        for start in range(0, len(layers), number):
            yield layers[start : start + number], True
        return
    for place, layer in enumerate(layers):
        yield [layer], place < number


def _unit(layers: Sequence[nn.Module], given: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return layers as a function that is of one micro-batch whenever it runs.

    By the time it runs again, a pipeline schedule may have told the layers of a later one.
    """
    own = getattr(layers[0], _NUMBER, None)

    def run(hidden: Tensor) -> Tensor:
        told = getattr(layers[0], _NUMBER, None)
        _tell(layers, own)
        for layer in layers:
            # Mamba layers know nothing of padding.
            takes = given if isinstance(layer, TransformerLayer) else _without_padding(given)
            output = layer(hidden_states=hidden, **takes)
            hidden = output[0] if isinstance(output, tuple) else output
        _tell(layers, told)
        return hidden

    return run


def run_again(layer: nn.Module) -> None:
    """Let a layer run again in the backward pass, by itself, whatever stack calls it.

    For stacks of Megatron that keep everything. The layer's class stays; a layer whose input has
    no gradient is not recomputed, as in `run_layers`.
    """
    forward = layer.forward

    def forward_again(hidden_states: Tensor, **given: Any) -> Any:
        if not (layer.training and hidden_states.requires_grad):
            return forward(hidden_states=hidden_states, **given)
        own = getattr(layer, _NUMBER, None)

        def run(hidden: Tensor) -> Any:
            told = getattr(layer, _NUMBER, None)
            _tell([layer], own)
            output = forward(hidden_states=hidden, **given)
            _tell([layer], told)
            return output

        return checkpoint(run, False, hidden_states)

    layer.forward = forward_again


def _without_padding(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "padding_mask"}


def _tell(layers: Sequence[nn.Module], number: int | None) -> None:
    if number is not None:
        for layer in layers:
            setattr(layer, _NUMBER, number)


def complete_recompute(config: Any) -> None:
    """Set what decides which whole layers run again, where it is not given: each by itself."""
    if config.recompute_granularity == FULL:
        config.recompute_method = config.recompute_method or METHODS[0]
        if config.recompute_num_layers is None:
            config.recompute_num_layers = 1


def recomputed_parts(config: Any) -> tuple[str, ...]:
    """Return the parts of layers that are recomputed, by Megatron's names."""
    if config.recompute_granularity != SELECTIVE:
        return ()
    modules = config.recompute_modules
    # Megatron's default.
    return ("core_attn",) if modules is None else tuple(modules)


def refuse_recompute(config: Any) -> None:
    """Refuse recomputation that no layer would carry out, or that would train wrongly.

    Raises:
        RuntimeRefusal: Naming the setting.
    """
    granularity = config.recompute_granularity
    if granularity not in (None, FULL, SELECTIVE):
        raise RuntimeRefusal(
            f"No recomputation is called {granularity!r}",
            given=f"recompute_granularity={granularity!r}",
            allowed=f"{FULL!r}, {SELECTIVE!r}, or None",
            hint=f"recompute_granularity={FULL!r}",
        )
    if granularity == FULL:
        _refuse_full(config)
    if granularity == SELECTIVE:
        _refuse_parts(config)


def _refuse_full(config: Any) -> None:
    method, number = config.recompute_method, config.recompute_num_layers
    if method not in METHODS or not isinstance(number, int) or number < 1:
        raise RuntimeRefusal(
            "Whole layers are recomputed by a method and a number of layers",
            given=f"recompute_method={method!r}, recompute_num_layers={number!r}",
            allowed=f"recompute_method of {' or '.join(METHODS)}, and 1 layer or more",
            hint="recompute_method='uniform', recompute_num_layers=1",
        )
    if config.fp8 and config.fp8_recipe == "delayed":
        raise RuntimeRefusal(
            "FP8's delayed scaling moves between the two passes of a recomputed layer",
            given="recompute_granularity='full', fp8_recipe='delayed'",
            allowed="an FP8 recipe without a history",
            hint="fp8_recipe='tensorwise', or recompute_granularity=None",
        )
    if config.distribute_saved_activations:
        raise RuntimeRefusal(
            "What enters a recomputed layer is not split over the tensor ranks here",
            given="distribute_saved_activations=True",
            allowed="sequence_parallel=True, under which it is split already",
            hint="distribute_saved_activations=False",
        )


def _refuse_parts(config: Any) -> None:
    wanted, readers = recomputed_parts(config), _readers(config)
    idle = [part for part in wanted if not readers.get(part)]
    if idle:
        there = [part for part, reads in readers.items() if reads]
        keep = [part for part in wanted if part not in idle]
        engine = "" if transformer_engine_available() else ", no Transformer Engine"
        raise RuntimeRefusal(
            f"No layer of the model recomputes {', '.join(idle)}",
            given=f"recompute_modules={list(wanted)}, pattern {config.hybrid_override_pattern}"
            + engine,
            allowed=", ".join(there) or "no recomputation of parts",
            hint=f"recompute_modules={keep}" if keep else "recompute_granularity='full'",
        )
    if config.recompute_num_layers is not None:
        raise RuntimeRefusal(
            "Parts are recomputed in every layer that has them, not in a number of layers",
            given=f"recompute_granularity='selective', "
            f"recompute_num_layers={config.recompute_num_layers}",
            allowed="recompute_num_layers=None",
            hint="recompute_num_layers=None, or recompute_granularity='full'",
        )


def _readers(config: Any) -> dict[str, bool]:
    """Return whether the model has a layer that recomputes each of Megatron's parts."""
    families, engine = config.families, transformer_engine_available()
    attention = BlockFamily.ATTENTION in families
    latent = config.multi_latent_attention and (
        attention or BlockFamily.SPARSE_ATTENTION in families
    )
    layers = BlockFamily.EXPERTS in families
    experts = layers and bool(config.num_moe_experts)
    return {
        "core_attn": attention,
        # Of latent attention and experts, as the norms of others are fused into projections.
        "layernorm": engine and (latent or experts),
        "mla_up_proj": latent,
        "mlp": layers and not experts,
        "moe": experts,
        "moe_act": experts and engine and config.moe_grouped_gemm,
        "shared_experts": experts and bool(config.moe_shared_expert_intermediate_size),
    }
