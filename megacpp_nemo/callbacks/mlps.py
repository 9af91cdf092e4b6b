"""The MLPs of expert layers: those of the whole model, and the shares of them on this rank.

A unit is one entry of an MLP's hidden activation: a row of the first linear layer, or one of its
gate and one of its up projection, and a column of the second. Units are numbered over the whole
model, the same on every rank and in every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from torch import nn

from megacpp_nemo.contract.errors import RecipeError, RuntimeRefusal
from megacpp_nemo.contract.pattern import BlockFamily, LayerPattern


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """One MLP of the whole model: a routed expert, the shared one, or a dense MLP.

    Args:
        name: `decoder.layers.1.mlp.experts.3`, `decoder.layers.1.mlp.shared_experts` or
            `decoder.layers.1.mlp`; layers and experts from 0.
        layer: Its layer, `decoder.layers.1` or, in a prediction depth,
            `mtp.layers.0.mtp_model_layer.layers.1`.
        expert: 0-based routed expert; None for a shared or dense MLP.
        units: Width of its hidden activation.
        first: Units of the MLPs before it.
        width: Width of its input and output.
    """

    name: str
    layer: str
    expert: int | None
    units: int
    first: int
    width: int

    @property
    def span(self) -> slice:
        """Its units among all."""
        return slice(self.first, self.first + self.units)


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """What this rank holds of one MLP.

    Args:
        mlp: The MLP.
        fc1: Its first linear layer; `[gate; up]` of this rank's units if gated.
        fc2: Its second.
        grouped: Its place in linear layers that serve several experts; None if it has its own.
        begin: First of its units here, from 0.
        units: Units here.
    """

    mlp: Mlp
    fc1: nn.Module
    fc2: nn.Module
    grouped: int | None
    begin: int
    units: int

    @property
    def span(self) -> slice:
        """This rank's units among all of the model's."""
        first = self.mlp.first + self.begin
        return slice(first, first + self.units)

    def tensors(self) -> tuple[nn.Parameter, nn.Parameter | None, nn.Parameter]:
        """Return the first layer's weight and bias, if it has one, and the second's weight.

        Shapes are `[units, width]`, twice as many rows if gated, as many for the bias, and
        `[width, units]`.
        """
        number = "" if self.grouped is None else str(self.grouped)
        bias = getattr(self.fc1, f"bias{number}", None)
        # Transformer Engine keeps an empty tensor where there is no bias.
        known = bias if isinstance(bias, nn.Parameter) and bias.numel() else None
        return (
            getattr(self.fc1, f"weight{number}"),
            known,
            getattr(self.fc2, f"weight{number}"),
        )


def mlps_of(config: Any, layers: Sequence[int] = ()) -> tuple[Mlp, ...]:
    """Return the MLPs of a hybrid configuration's expert layers, in order.

    Args:
        config: The configuration; nothing of the layout over processes matters.
        layers: 1-based numbers of the layers; empty for all that have MLPs, those of the
            prediction depths among them, which have no numbers.

    Raises:
        RecipeError: If one of the layers has none, or no layer has.
    """
    there = _numbers(config.layers)
    chosen = sorted(set(layers)) or there
    names = [f"decoder.layers.{number - 1}" for number in chosen]
    if not layers:
        names += _depth_layers(config)
    missing = sorted(set(chosen) - set(there))
    if missing or not names:
        kept = tuple(number for number in chosen if number in there)
        raise RecipeError(
            "A layer has no MLP whose units could be recycled",
            given=f"layers {', '.join(map(str, missing)) or '()'} of {config.layers}",
            allowed=f"layers {', '.join(map(str, there))}" if there else "a model with E layers",
            hint=f"layers={kept}" if there else "ReDo off: report_interval=0, steps=()",
        )
    found: list[Mlp] = []
    first = 0
    for layer in names:
        for ending, expert, units, width in _kinds(config):
            name = f"{layer}.{ending}"
            found.append(
                Mlp(name=name, layer=layer, expert=expert, units=units, first=first, width=width)
            )
            first += units
    return tuple(found)


def _numbers(pattern: LayerPattern) -> list[int]:
    """Return the 1-based numbers of a pattern's expert layers."""
    layers = enumerate(pattern, 1)
    return [number for number, family in layers if family is BlockFamily.EXPERTS]


def _depth_layers(config: Any) -> list[str]:
    """Return the names of the prediction depths' expert layers."""
    places = _numbers(LayerPattern.parse(config.mtp_pattern))
    return [
        f"mtp.layers.{depth}.mtp_model_layer.layers.{place - 1}"
        for depth in range(config.mtp_num_layers or 0)
        for place in places
    ]


def _kinds(config: Any) -> Iterator[tuple[str, int | None, int, int]]:
    """Yield the end of the name, expert, units and width of each MLP of an expert layer."""
    width = config.hidden_size
    if not config.num_moe_experts:
        yield "mlp", None, config.ffn_hidden_size, width
        return
    latent = config.moe_latent_size or width
    for expert in range(config.num_moe_experts):
        yield f"mlp.experts.{expert}", expert, config.moe_ffn_hidden_size, latent
    if config.moe_shared_expert_intermediate_size:
        shared = config.moe_shared_expert_intermediate_size
        yield "mlp.shared_experts", None, shared, width


def shares_of(models: Sequence[nn.Module], mlps: Sequence[Mlp]) -> list[Share]:
    """Return what this rank's pipeline stage holds of the MLPs, in their order.

    Args:
        models: Megatron's models, without wrappers.
        mlps: The MLPs of the whole model.

    Raises:
        RuntimeRefusal: If an MLP is not built of linear layers as Megatron's are.
    """
    modules: dict[str, Any] = {
        name: layer.mlp
        for model in models
        for name, layer in _layers(model)
        if hasattr(layer, "mlp")
    }
    return [
        share
        for mlp in mlps
        if mlp.layer in modules
        if (share := _share(modules[mlp.layer], mlp)) is not None
    ]


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and the layers of this stage, those of its prediction depths included."""
    for layer in model.decoder.layers:
        yield f"decoder.layers.{layer.layer_number - 1}", layer
    for depth, own in enumerate(model.mtp.layers if hasattr(model, "mtp") else ()):
        for place, layer in enumerate(own.mtp_model_layer.layers):
            yield f"mtp.layers.{depth}.mtp_model_layer.layers.{place}", layer


def _share(module: Any, mlp: Mlp) -> Share | None:
    """Return this rank's share of an MLP of a layer; None if other ranks have the expert."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    grouped = None
    if mlp.expert is not None:
        ranks = parallel_state.get_expert_tensor_parallel_world_size()
        rank = parallel_state.get_expert_tensor_parallel_rank()
        here = (
            mlp.expert - parallel_state.get_expert_model_parallel_rank() * module.num_local_experts
        )
        if not 0 <= here < module.num_local_experts:
            return None
        module = module.experts
        listed = getattr(module, "local_experts", None)
        module, grouped = (module, here) if listed is None else (listed[here], None)
    elif mlp.name.endswith("shared_experts"):
        module = module.shared_experts
    units = mlp.units // ranks
    fc1, fc2 = getattr(module, "linear_fc1", None), getattr(module, "linear_fc2", None)
    weight = getattr(fc2, "weight" if grouped is None else f"weight{grouped}", None)
    if fc1 is None or fc2 is None or weight is None or weight.size(1) != units:
        raise RuntimeRefusal(
            "An MLP is not built as ReDo knows it",
            given=f"{mlp.name} as {type(module).__name__}",
            allowed="Megatron's MLP, SharedExpertMLP, SequentialMLP or TEGroupedMLP, unwrapped",
            hint="moe_use_legacy_grouped_gemm=False, and no adapters on these layers",
        )
    return Share(mlp=mlp, fc1=fc1, fc2=fc2, grouped=grouped, begin=rank * units, units=units)
