"""Specs of attention layers, whoever stacks them: latent, sparse and grouped."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexerSubmodules,
    DSAttentionSubmodules,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megacpp_nemo.contract.shapes import SparseAttentionShape
from megacpp_nemo.model.attention import GroupedAttention, LatentAttention, LatentDotProduct
from megacpp_nemo.model.backend import FUSED_NORM_NAMES, Backend
from megacpp_nemo.model.indexer import IndexKeyNorm, LightningIndexer
from megacpp_nemo.model.norms import LocalRMSNorm
from megacpp_nemo.model.projections import WholeLinear
from megacpp_nemo.model.sparse_attention import SparseDotProduct, SparseLatentAttention

_LATENT_NORM_NAMES = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def latent_attention_layer(backend: Backend, *, layernorm: bool) -> ModuleSpec:
    """Return a multi-latent attention layer, with or without norms on its latents."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=_latent_attention(backend.provider, layernorm),
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=(
                {} if backend.transformer_engine else dict(_LATENT_NORM_NAMES)
            ),
        ),
    )


def _latent_attention(provider: BackendSpecProvider, layernorm: bool) -> ModuleSpec:
    column = provider.column_parallel_linear()
    down, up, inner_norm, core = column, column, IdentityOp, LatentDotProduct
    if provider.fuse_layernorm_and_linear():
        down, core = provider.linear(), provider.core_attention()  # type: ignore[attr-defined]
        if layernorm:
            up = provider.column_parallel_layer_norm_linear()
    elif layernorm:
        inner_norm = LocalRMSNorm
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=down,
            linear_q_up_proj=up,
            linear_kv_down_proj=down,
            linear_kv_up_proj=up,
            core_attention=core,
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=inner_norm,
            kv_layernorm=inner_norm,
        ),
    )


def sparse_attention_layer(
    backend: Backend, shape: SparseAttentionShape, *, layernorm: bool
) -> ModuleSpec:
    """Return a sparse attention layer (DSA), over multi-latent attention.

    Its indexer reads the query latent after its norm, which therefore stands alone, and has
    whole projections of its own on every rank.
    """
    norm = backend.norm if layernorm else IdentityOp
    dense = _latent_attention(backend.provider, layernorm=False)
    indexer = DSAIndexerSubmodules(
        linear_wq_b=WholeLinear,
        linear_wk=WholeLinear,
        k_norm=IndexKeyNorm,
        linear_weights_proj=WholeLinear,
    )
    core = ModuleSpec(
        module=SparseDotProduct,
        submodules=DSAttentionSubmodules(
            indexer=ModuleSpec(module=LightningIndexer, submodules=indexer)
        ),
    )
    attention = ModuleSpec(
        module=SparseLatentAttention,
        params={**dense.params, "indexer": shape},
        submodules=replace(
            dense.submodules, core_attention=core, q_layernorm=norm, kv_layernorm=norm
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(_LATENT_NORM_NAMES),
        ),
    )


def grouped_attention_layer(backend: Backend) -> ModuleSpec:
    """Return plain attention as in Megatron's hybrid models: without query and key norms."""
    provider = backend.provider
    fused = provider.column_parallel_layer_norm_linear()
    attention = ModuleSpec(
        module=GroupedAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=fused or provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else LocalRMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=(
                {} if fused else dict(FUSED_NORM_NAMES["self_attention.linear_qkv"])
            ),
        ),
    )
