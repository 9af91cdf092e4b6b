"""The release's stock spec on a machine that lacks what it is made of.

Without Transformer Engine the stock spec names modules that do not exist, and without the
Mamba kernels its mixer refuses to be built. Each such module is replaced by one with the same
parameters in plain torch, so that one name of a spec builds everywhere; the rest stays the
release's. `STAND_INS` says what stands for what.
"""

from __future__ import annotations

import functools
from dataclasses import fields, is_dataclass, replace
from typing import Any

from megatron.core.extensions import transformer_engine as engine
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megacpp_nemo.model.attention import LatentDotProduct
from megacpp_nemo.model.backend import FUSED_NORM_NAMES, Backend
from megacpp_nemo.model.blocks import MAMBA_MIXERS
from megacpp_nemo.model.mamba_paths import FUSED, PORTABLE, SPLIT
from megacpp_nemo.model.norms import LocalRMSNorm
from megacpp_nemo.model.projections import WholeLinear

# Class here -> class of the release that it stands for.
STAND_INS: dict[type, type] = {MAMBA_MIXERS[path]: MambaMixer for path in (SPLIT, PORTABLE)}
# Where a layer's own norm stands when its first projection does not hold one.
_NORM_OF_SLOT = {
    "attention_layer": ("input_layernorm", "self_attention.linear_qkv"),
    "gdn_layer": ("input_layernorm", "self_attention.in_proj"),
    "mlp_layer": ("pre_mlp_layernorm", "mlp.linear_fc1"),
    "mamba_layer": ("norm", "mixer.in_proj"),
}
_ANY_EXPERTS = 8  # Megatron's spec of experts asks whether there are any, not how many.


def localized(submodules: Any, backend: Backend) -> Any:
    """Return a stack's submodules with a stand-in for each module this machine lacks."""
    missing: dict[int, Any] = {}
    if not backend.transformer_engine:
        missing = {id(getattr(engine, name)): stand_in for name, stand_in in _LOCAL.items()}
    changed: dict[str, Any] = {}
    for item in fields(submodules):
        value = getattr(submodules, item.name)
        if not backend.transformer_engine and item.name == "moe_layer":
            value = _local_experts(value)
        local = _local(value, missing, "", backend)
        if not backend.transformer_engine and item.name in _NORM_OF_SLOT:
            local = _with_norm(local, *_NORM_OF_SLOT[item.name])
        changed[item.name] = local
    return replace(submodules, **changed)


_LOCAL: dict[str, Any] = {
    "TEColumnParallelLinear": ColumnParallelLinear,
    "TELayerNormColumnParallelLinear": ColumnParallelLinear,
    "TERowParallelLinear": RowParallelLinear,
    "TELinear": ColumnParallelLinear,
    "TENorm": LocalRMSNorm,
    "TEDotProductAttention": DotProductAttention,
}
# Other stand-ins where these submodules ask: latent attention's values have another width, and
# an indexer's projections and norm are whole and of its own.
_LOCAL_WITHIN: dict[str, dict[Any, Any]] = {
    "MLASelfAttentionSubmodules": {DotProductAttention: LatentDotProduct},
    "DSAIndexerSubmodules": {ColumnParallelLinear: WholeLinear, LocalRMSNorm: WrappedTorchNorm},
}


def _local(value: Any, missing: dict[int, Any], within: str, backend: Backend) -> Any:
    """Return part of a spec with its missing modules replaced."""
    if id(value) in missing:
        stand_in = missing[id(value)]
        return _LOCAL_WITHIN.get(within, {}).get(stand_in, stand_in)
    if value is MambaMixer and backend.mamba != FUSED:
        return MAMBA_MIXERS[backend.mamba]
    if isinstance(value, functools.partial):
        words = {k: _local(v, missing, within, backend) for k, v in value.keywords.items()}
        return functools.partial(value.func, *value.args, **words)
    if isinstance(value, list):
        return [_local(item, missing, within, backend) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        inside = within if isinstance(value, ModuleSpec) else type(value).__name__
        changed = {
            item.name: _local(getattr(value, item.name), missing, inside, backend)
            for item in fields(value)
        }
        return replace(value, **changed)
    return value


def _local_experts(layer: ModuleSpec) -> ModuleSpec:
    mlp = get_moe_module_spec_for_backend(
        LocalSpecProvider(), num_experts=_ANY_EXPERTS, moe_grouped_gemm=False
    )
    return replace(layer, submodules=replace(layer.submodules, mlp=mlp))


def _with_norm(layer: Any, place: str, projection: str) -> Any:
    if not isinstance(layer, ModuleSpec):
        return layer
    norm = {place: LocalRMSNorm, "sharded_state_dict_keys_map": dict(FUSED_NORM_NAMES[projection])}
    return replace(layer, submodules=replace(layer.submodules, **norm))
