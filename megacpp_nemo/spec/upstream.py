"""Where the installed Megatron-Core keeps its hybrid stack, and how it numbers its layers.

All that differs between releases is probed here, by what is there and never by a version.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.host import compat
from megacpp_nemo.lowering.roles import Role

# The newest first: later releases keep the old place as an alias.
STOCK_SPECS = (
    ("megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"),
    ("megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"),
)
MODELS = (
    ("megatron.core.models.hybrid.hybrid_model", "HybridModel"),
    ("megatron.core.models.mamba", "MambaModel"),
)
# The slot of a release's stack that builds each role by itself, where the release has it.
SLOT_OF_ROLE = {
    Role.ATTENTION: "attention_layer",
    Role.LATENT_ATTENTION: "mla_layer",
    Role.SPARSE_ATTENTION: "dsa_layer",
    Role.EXPERTS: "moe_layer",
    Role.MLP: "mlp_layer",
    Role.MAMBA: "mamba_layer",
    Role.GATED_DELTA_NET: "gdn_layer",
}
# Said by the stack to its own layers only; a layer that does not take one does without.
_PLACE = ("add_layer_offset", "is_mtp_layer", "name", "pp_layer_offset", "residual_in_fp32")
# The adapters of the NeMo recipe that are about Megatron-Core alone.
_ADAPTERS = ("latent-attention-mock", "router-gemm")


def adapt() -> None:
    """Apply the adapters that a machine without Transformer Engine needs."""
    for adapter in compat.ADAPTERS:
        if adapter.name in _ADAPTERS and adapter.needed():
            adapter.apply()
    _type_inference_layers()


def _type_inference_layers() -> None:
    """Let a prediction depth ask whether its projection is one made for inference.

    Some releases ask it of every model, and without Transformer Engine the classes that they
    compare with are mocks, which `isinstance` refuses.
    """
    place = "megatron.core.tensor_parallel.inference_layers"
    if not _exists(place):
        return
    module = importlib.import_module(place)
    for name in ("InferenceColumnParallelLinear", "InferenceLayerNormColumnParallelLinear"):
        if not isinstance(getattr(module, name, type), type):
            setattr(module, name, type(name, (), {}))


def stock_stack_spec() -> ModuleSpec:
    """Return the release's own stack spec."""
    spec: ModuleSpec = _first(STOCK_SPECS)
    return spec


def model_class() -> type:
    """Return the release's hybrid model."""
    model: type = _first(MODELS)
    return model


def _first(places: tuple[tuple[str, str], ...]) -> Any:
    for module, name in places:
        if _exists(module):
            return getattr(importlib.import_module(module), name)
    raise RuntimeRefusal(
        "The installed Megatron-Core has no hybrid model",
        given="none of " + ", ".join(module for module, _ in places),
        allowed="Megatron-Core 0.16.1 or later",
        hint="another release of Megatron-LM",
    )


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def slots_of(submodules: Any) -> tuple[str, ...]:
    """Return the names of the layer slots of a stack's submodules."""
    return tuple(item.name for item in fields(submodules) if item.name.endswith("_layer"))


def global_number(config: Any, layer_number: int, arguments: Mapping[str, Any]) -> int:
    """Return a layer's 1-based number in the whole model, from what its stack said.

    Through 0.16 Transformer layers get their number within the pipeline stage and add the
    offset themselves, while Mamba layers get the global one, and the offset to know it by.
    """
    if "pp_layer_offset" in arguments or not arguments.get("add_layer_offset", True):
        return layer_number
    return layer_number + _stage_offset(config, arguments)


def layer_arguments(
    module: type, config: Any, number: int, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a layer class that stands in another's slot.

    Args:
        module: The layer's class.
        config: Its configuration.
        number: Its 1-based number in the whole model.
        arguments: What the stack gave to the slot.
    """
    taken = inspect.signature(module.__init__).parameters  # type: ignore[misc]
    own = {name: value for name, value in arguments.items() if name in taken or name not in _PLACE}
    if not issubclass(module, TransformerLayer):
        return {**own, "layer_number": number}
    if "add_layer_offset" in taken:
        return {**own, "layer_number": number, "add_layer_offset": False}
    return {**own, "layer_number": number - _stage_offset(config, arguments)}


def _stage_offset(config: Any, arguments: Mapping[str, Any]) -> int:
    offset: int = get_transformer_layer_offset(config, pp_rank=arguments["pg_collection"].pp.rank())
    return offset
