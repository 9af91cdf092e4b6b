"""Which module stands for which block: the spec of NeMo's hybrid stack.

The machine's backend is probed once per model and stated in the log.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.host import compat
from megacpp_nemo.model import attention_blocks, blocks
from megacpp_nemo.model.backend import Backend
from megacpp_nemo.model.prediction import prediction_spec
from megacpp_nemo.model.shape import author_mamba_shape_of, recurrent_shape_of, sparse_shape_of
from megacpp_nemo.model.stack import HybridStack, HybridStackSubmodules

__all__ = ["Backend", "hybrid_stack_spec"]

logger = logging.getLogger(__name__)


def hybrid_stack_spec(config: Any, backend: Backend | None = None) -> ModuleSpec:
    """Return the spec of a hybrid stack for a configuration.

    Args:
        config: Hybrid model configuration.
        backend: What to build from; probed if not given.
    """
    compat.install()
    backend = backend or _probe(config)
    mamba2 = config.mamba_lane == "native" and BlockFamily.MAMBA in config.families
    logger.info("Hybrid layers are built from %s", backend if mamba2 else backend.modules)
    spec = ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=(
                attention_blocks.latent_attention_layer(backend, layernorm=config.qk_layernorm)
                if config.multi_latent_attention
                else attention_blocks.grouped_attention_layer(backend)
            ),
            sparse_attention_layer=(
                attention_blocks.sparse_attention_layer(
                    backend, sparse_shape_of(config), layernorm=config.qk_layernorm
                )
                if config.multi_latent_attention
                else IdentityOp
            ),
            moe_layer=_experts_layer(config, backend),
            mlp_layer=IdentityOp if config.experts else blocks.mlp_layer(backend),
            mamba_layer=_mamba_layer(config, backend),
            recurrent_layer=blocks.recurrent_layer(backend, recurrent_shape_of(config)),
            final_norm=backend.norm,
        ),
    )
    depths = prediction_spec(config, backend, spec.submodules)
    return replace(spec, submodules=replace(spec.submodules, mtp_block_spec=depths))


def _probe(config: Any) -> Backend:
    """Return what this machine can run; a path demanded of Mamba-3 is none of Mamba-2's."""
    demanded = config.mamba_path if config.mamba_lane == "native" else "auto"
    return Backend.probe(demanded, conv_width=config.mamba_conv_width, documents=config.reset_state)


def _mamba_layer(config: Any, backend: Backend) -> ModuleSpec:
    if config.mamba_lane == "author":
        shape = author_mamba_shape_of(config)
        return blocks.author_mamba_layer(backend, shape, path=config.mamba_path)
    return blocks.mamba_layer(
        backend, conv_width=config.mamba_conv_width, chunk_size=config.mamba_chunk_size
    )


def _experts_layer(config: Any, backend: Backend) -> ModuleSpec | type:
    if not config.num_moe_experts:
        return IdentityOp
    return blocks.experts_layer(
        backend, num_experts=config.num_moe_experts, grouped_gemm=config.moe_grouped_gemm
    )
