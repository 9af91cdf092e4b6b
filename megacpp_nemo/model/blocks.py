"""Specs of single layers, whoever stacks them: NeMo's recipe or Megatron's own entry script.

Transformer Engine's modules are used where it is installed and Megatron's local ones where
it is not; the fused Mamba mixer where its kernels are and the portable one where they are
not. Checkpoints use the names of the fused modules either way, so they move between machines.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexerSubmodules,
    DSAttentionSubmodules,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megacpp_nemo.contract.shapes import (
    AuthorMambaShape,
    RecurrentShape,
    SparseAttentionShape,
)
from megacpp_nemo.host import compat
from megacpp_nemo.model.attention import GroupedAttention, LatentAttention, LatentDotProduct
from megacpp_nemo.model.author_mamba import AuthorMambaMixer, AuthorMambaMixerSubmodules
from megacpp_nemo.model.experts import ExpertsLayer
from megacpp_nemo.model.indexer import IndexKeyNorm, LightningIndexer
from megacpp_nemo.model.mamba import FusedMambaMixer, PortableMambaMixer
from megacpp_nemo.model.mamba_paths import FUSED, PORTABLE, SPLIT, choose_path
from megacpp_nemo.model.mamba_split import SplitMambaMixer
from megacpp_nemo.model.norms import LocalRMSNorm
from megacpp_nemo.model.projections import WholeLinear
from megacpp_nemo.model.recurrent import RecurrentMixer, RecurrentMixerSubmodules
from megacpp_nemo.model.sparse_attention import SparseDotProduct, SparseLatentAttention

MAMBA_MIXERS = {FUSED: FusedMambaMixer, SPLIT: SplitMambaMixer, PORTABLE: PortableMambaMixer}
# Where a fused projection keeps the norm in front of it, in checkpoints.
FUSED_NORM_NAMES = {
    "self_attention.linear_qkv": {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    "self_attention.in_proj": {"input_layernorm.": "self_attention.in_proj.layer_norm_"},
    "mlp.linear_fc1": {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    "mixer.in_proj": {"norm.": "mixer.in_proj.layer_norm_"},
}
_LATENT_NORM_NAMES = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What the specs are built from.

    Args:
        transformer_engine: Use Transformer Engine's modules.
        mamba: How Mamba-2 layers run: `fused`, `split` or `portable` (`mamba_paths`).
        reason: Why Mamba-2 layers run so.
    """

    transformer_engine: bool
    mamba: str
    reason: str = field(default="", compare=False)

    @classmethod
    def probe(
        cls, mamba_path: str = "auto", *, conv_width: int = 4, documents: bool = False
    ) -> Backend:
        """Return what this machine can run; the arguments are `choose_path`'s.

        Raises:
            RuntimeRefusal: If a Mamba path is demanded where it cannot run.
        """
        path = choose_path(mamba_path, conv_width=conv_width, documents=documents)
        engine = compat.transformer_engine_available()
        return cls(transformer_engine=engine, mamba=path.name, reason=path.reason)

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.modules}, {self.mamba} Mamba mixer{why}"

    @property
    def modules(self) -> str:
        """Whose modules stand outside of the mixers, in words."""
        return f"{'Transformer Engine' if self.transformer_engine else 'local'} modules"

    @property
    def provider(self) -> BackendSpecProvider:
        """Megatron's provider of linear layers and attention cores."""
        return TESpecProvider() if self.transformer_engine else LocalSpecProvider()

    @property
    def norm(self) -> type:
        """The norm that stands alone."""
        return self.provider.layer_norm() if self.transformer_engine else LocalRMSNorm


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
