"""Which module stands for which block: Megatron specs for a hybrid stack.

Transformer Engine's modules are used where it is installed and Megatron's local ones where
it is not; the fused Mamba mixer where its kernels are and the portable one where they are
not. The choice is probed once per model and stated in the log. Checkpoints use the names of
the fused modules either way, so they move between machines.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.host import compat
from megacpp_nemo.host.preflight import missing_packages
from megacpp_nemo.model.attention import GroupedAttention, LatentAttention, LatentDotProduct
from megacpp_nemo.model.mamba import FusedMambaMixer, PortableMambaMixer
from megacpp_nemo.model.norms import LocalRMSNorm
from megacpp_nemo.model.recurrent import RecurrentMixer, RecurrentMixerSubmodules
from megacpp_nemo.model.stack import ExpertsLayer, HybridStack, HybridStackSubmodules

logger = logging.getLogger(__name__)

MAMBA_KERNELS = ("mamba_ssm", "causal_conv1d")
MAMBA_PATHS = ("auto", "fused", "portable")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What the specs are built from.

    Args:
        transformer_engine: Use Transformer Engine's modules.
        fused_mamba: Use Megatron's Mamba mixer with its kernels.
    """

    transformer_engine: bool
    fused_mamba: bool

    @classmethod
    def probe(cls, mamba_path: str = "auto") -> Backend:
        """Return what this machine can run, with `mamba_path` demanded if not `auto`.

        Raises:
            RuntimeRefusal: If the fused path is demanded where it cannot run.
        """
        missing = missing_packages(MAMBA_KERNELS)
        if not torch.cuda.is_available():
            missing.append("a CUDA device")
        if mamba_path == "fused" and missing:
            raise RuntimeRefusal(
                "The fused Mamba path cannot run on this machine",
                given=f"mamba_path='fused' without {', '.join(missing)}",
                allowed="mamba_path='auto' or 'portable'",
                hint="mamba_path='auto', or the 'gpu' extra on a CUDA machine",
            )
        return cls(
            transformer_engine=compat.transformer_engine_available(),
            fused_mamba=mamba_path != "portable" and not missing,
        )

    def __str__(self) -> str:
        attention = "Transformer Engine" if self.transformer_engine else "local"
        mamba = "fused" if self.fused_mamba else "portable"
        return f"{attention} modules, {mamba} Mamba mixer"


def hybrid_stack_spec(config: Any, backend: Backend | None = None) -> ModuleSpec:
    """Return the spec of a hybrid stack for a configuration.

    Args:
        config: Hybrid model configuration.
        backend: What to build from; probed if not given.
    """
    compat.install()
    backend = backend or Backend.probe(config.mamba_path)
    logger.info("Hybrid layers are built from %s", backend)
    provider = TESpecProvider() if backend.transformer_engine else LocalSpecProvider()
    norm = provider.layer_norm() if backend.transformer_engine else LocalRMSNorm
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=_attention_layer(config, provider, norm),
            moe_layer=_experts_layer(config, provider, norm),
            mamba_layer=_mamba_layer(config, provider, backend),
            recurrent_layer=_recurrent_layer(provider),
            final_norm=norm,
        ),
    )


def _attention_layer(config: Any, provider: BackendSpecProvider, norm: type) -> ModuleSpec:
    fused, latent = provider.fuse_layernorm_and_linear(), config.multi_latent_attention
    names: dict[str, str] = {}
    if latent and not fused:
        names = {
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        }
    elif not fused:
        names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            # Plain attention with Transformer Engine has its norm inside the projection.
            input_layernorm=norm if latent or not fused else IdentityOp,
            self_attention=(
                _latent_attention(config, provider) if latent else _grouped_attention(provider)
            ),
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )


def _latent_attention(config: Any, provider: BackendSpecProvider) -> ModuleSpec:
    column = provider.column_parallel_linear()
    down, up, inner_norm, core = column, column, IdentityOp, LatentDotProduct
    if provider.fuse_layernorm_and_linear():
        down, core = provider.linear(), provider.core_attention()  # type: ignore[attr-defined]
        if config.qk_layernorm:
            up = provider.column_parallel_layer_norm_linear()
    elif config.qk_layernorm:
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


def _grouped_attention(provider: BackendSpecProvider) -> ModuleSpec:
    """Return plain attention as in Megatron's hybrid models: without query and key norms."""
    fused = provider.column_parallel_layer_norm_linear()
    return ModuleSpec(
        module=GroupedAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=fused or provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
        ),
    )


def _experts_layer(config: Any, provider: BackendSpecProvider, norm: type) -> ModuleSpec | type:
    if not config.num_moe_experts:
        return IdentityOp
    return ModuleSpec(
        module=ExpertsLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norm,
            mlp=get_moe_module_spec_for_backend(
                provider,
                num_experts=config.num_moe_experts,
                moe_grouped_gemm=config.moe_grouped_gemm,
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mamba_layer(config: Any, provider: BackendSpecProvider, backend: Backend) -> ModuleSpec:
    mixer = ModuleSpec(
        module=FusedMambaMixer if backend.fused_mamba else PortableMambaMixer,
        params={
            "chunk_size": config.mamba_chunk_size,
            "d_conv": config.mamba_conv_width,
        },
        submodules=MambaMixerSubmodules(**_projections(provider)),
    )
    return _mixer_layer(mixer, provider)


def _recurrent_layer(provider: BackendSpecProvider) -> ModuleSpec:
    submodules = RecurrentMixerSubmodules(**_projections(provider))
    return _mixer_layer(ModuleSpec(module=RecurrentMixer, submodules=submodules), provider)


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
            sharded_state_dict_keys_map={} if fused else {"norm.": "mixer.in_proj.layer_norm_"},
        ),
    )
