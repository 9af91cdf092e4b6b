"""Specs of layers without attention, whoever stacks them: experts, MLPs and mixers."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megacpp_nemo.contract.shapes import AuthorMambaShape, RecurrentShape
from megacpp_nemo.model.author_mamba import AuthorMambaMixer, AuthorMambaMixerSubmodules
from megacpp_nemo.model.backend import FUSED_NORM_NAMES, Backend
from megacpp_nemo.model.experts import ExpertsLayer
from megacpp_nemo.model.mamba import FusedMambaMixer, PortableMambaMixer
from megacpp_nemo.model.mamba_paths import FUSED, PORTABLE, SPLIT
from megacpp_nemo.model.mamba_split import SplitMambaMixer
from megacpp_nemo.model.norms import LocalRMSNorm
from megacpp_nemo.model.recurrent import RecurrentMixer, RecurrentMixerSubmodules

MAMBA_MIXERS = {FUSED: FusedMambaMixer, SPLIT: SplitMambaMixer, PORTABLE: PortableMambaMixer}


def experts_layer(backend: Backend, *, num_experts: int, grouped_gemm: bool) -> ModuleSpec:
    """Return a mixture-of-experts layer that enters FP8 by itself."""
    return ModuleSpec(
        module=ExpertsLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=backend.norm,
            mlp=get_moe_module_spec_for_backend(
                backend.provider, num_experts=num_experts, moe_grouped_gemm=grouped_gemm
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def mlp_layer(backend: Backend) -> ModuleSpec:
    """Return a dense MLP layer, of the configuration's `ffn_hidden_size`."""
    provider = backend.provider
    fused = provider.column_parallel_layer_norm_linear()
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=fused or provider.column_parallel_linear(),
            linear_fc2=provider.row_parallel_linear(),
        ),
    )
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=IdentityOp if fused else LocalRMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=({} if fused else dict(FUSED_NORM_NAMES["mlp.linear_fc1"])),
        ),
    )


def mamba_layer(backend: Backend, *, conv_width: int, chunk_size: int) -> ModuleSpec:
    """Return a Mamba-2 layer with these taps and tokens per chunk."""
    mixer = ModuleSpec(
        module=MAMBA_MIXERS[backend.mamba],
        params={"chunk_size": chunk_size, "d_conv": conv_width},
        submodules=MambaMixerSubmodules(**_projections(backend.provider)),
    )
    return _mixer_layer(mixer, backend.provider)


def author_mamba_layer(
    backend: Backend, shape: AuthorMambaShape, *, path: str = "auto"
) -> ModuleSpec:
    """Return a Mamba-3 layer of this shape, on a demanded path or on what can run."""
    mixer = ModuleSpec(
        module=AuthorMambaMixer,
        params={"shape": shape, "path": path},
        submodules=AuthorMambaMixerSubmodules(**_projections(backend.provider)),
    )
    return _mixer_layer(mixer, backend.provider)


def recurrent_layer(backend: Backend, shape: RecurrentShape) -> ModuleSpec:
    """Return an M2RNN layer of this shape."""
    mixer = ModuleSpec(
        module=RecurrentMixer,
        params={"shape": shape},
        submodules=RecurrentMixerSubmodules(**_projections(backend.provider)),
    )
    return _mixer_layer(mixer, backend.provider)


def _projections(provider: BackendSpecProvider) -> dict[str, Any]:
    fused = provider.column_parallel_layer_norm_linear()
    return {
        "in_proj": fused or provider.column_parallel_linear(),
        "out_proj": provider.row_parallel_linear(),
    }


def _mixer_layer(mixer: ModuleSpec, provider: BackendSpecProvider) -> ModuleSpec:
    fused = provider.fuse_layernorm_and_linear()
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=IdentityOp if fused else LocalRMSNorm,
            mixer=mixer,
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if fused else dict(FUSED_NORM_NAMES["mixer.in_proj"]),
        ),
    )
