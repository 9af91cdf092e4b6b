"""Which module stands for which block: the spec of NeMo's hybrid stack.

The machine's backend is probed once per model and stated in the log.
"""

from __future__ import annotations

import logging
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from megacpp_nemo.host import compat
from megacpp_nemo.model import blocks
from megacpp_nemo.model.blocks import MAMBA_PATHS, Backend
from megacpp_nemo.model.shape import recurrent_shape_of
from megacpp_nemo.model.stack import HybridStack, HybridStackSubmodules

__all__ = ["MAMBA_PATHS", "Backend", "hybrid_stack_spec"]

logger = logging.getLogger(__name__)


def hybrid_stack_spec(config: Any, backend: Backend | None = None) -> ModuleSpec:
    """Return the spec of a hybrid stack for a configuration.

    Args:
        config: Hybrid model configuration.
        backend: What to build from; probed if not given.
    """
    compat.install()
    backend = backend or Backend.probe(config.mamba_path)
    logger.info("Hybrid layers are built from %s", backend)
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=(
                blocks.latent_attention_layer(backend, layernorm=config.qk_layernorm)
                if config.multi_latent_attention
                else blocks.grouped_attention_layer(backend)
            ),
            moe_layer=_experts_layer(config, backend),
            mlp_layer=IdentityOp if config.experts else blocks.mlp_layer(backend),
            mamba_layer=blocks.mamba_layer(
                backend, conv_width=config.mamba_conv_width, chunk_size=config.mamba_chunk_size
            ),
            recurrent_layer=blocks.recurrent_layer(backend, recurrent_shape_of(config)),
            final_norm=backend.norm,
        ),
    )


def _experts_layer(config: Any, backend: Backend) -> ModuleSpec | type:
    if not config.num_moe_experts:
        return IdentityOp
    return blocks.experts_layer(
        backend, num_experts=config.num_moe_experts, grouped_gemm=config.moe_grouped_gemm
    )
