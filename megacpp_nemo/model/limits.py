"""Settings these layers cannot run, or would train wrongly.

The contract's rules say what divides over what; these refusals belong to the layers as they
are built here, and each may go when its layer learns better.
"""

from __future__ import annotations

from typing import Any

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.shapes import SparseAttentionShape
from megacpp_nemo.host.compat import transformer_engine_available
from megacpp_nemo.model.host_optimizer import refuse_host_tables
from megacpp_nemo.model.recompute import recomputed_parts, refuse_recompute
from megacpp_nemo.model.shape import sparse_shape_of

# What is wrong, what was given, and what is allowed.
_Reason = tuple[str, str, str]

STAGE_SETTINGS = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def refuse_settings(config: Any) -> None:
    """Refuse a hybrid configuration that its layers cannot honour.

    Raises:
        RuntimeRefusal: Naming the setting.
    """
    families = config.families
    _refuse_fp8(config)
    _refuse_stage_settings(config)
    sparse = BlockFamily.SPARSE_ATTENTION in families
    if config.multi_latent_attention and (sparse or BlockFamily.ATTENTION in families):
        _refuse_latent_attention(config)
    if sparse or config.dsa_a_ranks:
        refuse_indexer(config, sparse_shape_of(config))
    if BlockFamily.RECURRENT in families:
        _refuse_recurrent(config)
    if config.mtp_num_layers:
        _refuse_prediction(config)
    refuse_host_tables(config)
    refuse_recompute(config)


def _refuse_fp8(config: Any) -> None:
    if config.fp8 and not transformer_engine_available():
        raise RuntimeRefusal(
            "FP8 needs Transformer Engine, which is not installed",
            given=f"fp8={config.fp8!r}",
            allowed="fp8=None on this machine",
            hint="precision='bf16', or install transformer-engine",
        )


def _refuse_stage_settings(config: Any) -> None:
    given = [name for name in STAGE_SETTINGS if getattr(config, name, None)]
    if given:
        raise RuntimeRefusal(
            "The layer pattern decides where pipeline stages begin, not Megatron's settings",
            given=", ".join(f"{name}={getattr(config, name)}" for name in given),
            allowed="'|' in the pattern at each stage boundary",
            hint=", ".join(f"{name}={_off(config, name)}" for name in given),
        )


def _off(config: Any, name: str) -> object:
    return False if isinstance(getattr(config, name), bool) else None


def _refuse_prediction(config: Any) -> None:
    # The last stage's copy of the token embedding is kept equal to the first one's; a table of
    # positions next to it would not be.
    if config.position_embedding_type == "learned_absolute":
        raise RuntimeRefusal(
            "Multi-token prediction shares the token embedding only, not learned positions",
            given=f"position_embedding_type='learned_absolute', "
            f"mtp_num_layers={config.mtp_num_layers}",
            allowed="position_embedding_type='none' or 'rope'",
            hint="position_embedding_type='none', or mtp_num_layers=0",
        )


def _refuse_latent_attention(config: Any) -> None:
    # Upstream then sums the gradient of the query norm once too often, and never sums that of
    # the rotary keys, which the heads of all ranks share.
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        raise RuntimeRefusal(
            "Megatron's latent attention has wrong gradients under tensor parallelism without "
            "sequence parallelism",
            given=f"tensor_model_parallel_size={config.tensor_model_parallel_size}, "
            "sequence_parallel=False",
            allowed="sequence_parallel=True, or tensor_model_parallel_size=1",
            hint="sequence_parallel=True",
        )


def _refuse_recurrent(config: Any) -> None:
    # One query/key head is split by its width and gathered; several are split whole, so that
    # each rank holds those its own heads read.
    ranks, shared = config.tensor_model_parallel_size, config.m2rnn_num_qk_heads
    if shared > 1 and shared % ranks:
        raise RuntimeRefusal(
            "Several M2RNN query/key heads are split whole over the tensor-parallel ranks",
            given=f"m2rnn_num_qk_heads={shared}, tensor_model_parallel_size={ranks}",
            allowed=f"m2rnn_num_qk_heads of 1, or in multiples of {ranks}",
            hint="m2rnn_num_qk_heads=1",
        )


def refuse_indexer(config: Any, indexer: SparseAttentionShape) -> None:
    """Refuse settings under which sparse attention (DSA) cannot run, or would not learn.

    Args:
        config: Megatron configuration.
        indexer: Shape of the indexer.

    Raises:
        RuntimeRefusal: Naming every such setting and what it may be.
    """
    wrong = [reason for reason in _indexer_reasons(config, indexer) if reason is not None]
    if wrong:
        raise RuntimeRefusal(
            "Sparse attention (DSA) cannot run with these settings:\n    "
            + "\n    ".join(what for what, _, _ in wrong),
            given=", ".join(given for _, given, _ in wrong),
            allowed=", ".join(hint for _, _, hint in wrong),
            hint=", ".join(hint for _, _, hint in wrong) + "; or no sparse attention",
        )


def _indexer_reasons(config: Any, indexer: SparseAttentionShape) -> list[_Reason | None]:
    width, rotated = indexer.indexer_head_dim, config.qk_pos_emb_head_dim
    power = 1 << max(width, rotated).bit_length() - 1
    power = power if power >= max(width, rotated) else 2 * power
    reasons: list[tuple[Any, str, str, str]] = [
        (
            config.context_parallel_size > 1,
            "the indexer scores whole sequences, which context parallelism splits",
            f"context_parallel_size={config.context_parallel_size}",
            "context_parallel_size=1",
        ),
        (
            config.apply_rope_fusion,
            "fused rotation knows latent attention's pairs of channels only",
            "apply_rope_fusion=True",
            "apply_rope_fusion=False",
        ),
        (
            width & (width - 1) or width < rotated,
            "an indexer head is a power of two, for its Hadamard transform, and holds the "
            f"{rotated} rotated channels",
            f"dsa_indexer_head_dim={width}",
            f"dsa_indexer_head_dim={power}",
        ),
        (
            "core_attn" in recomputed_parts(config),
            "a recomputed attention core has lost what the indexer reads",
            "recompute_modules with core_attn",
            "recompute_granularity=None, or recompute_modules without core_attn",
        ),
        (
            config.calculate_per_token_loss and indexer.indexer_loss_coeff,
            "the indexer's loss is a mean over queries, and gradients are divided by tokens",
            "calculate_per_token_loss=True",
            "calculate_per_token_loss=False",
        ),
    ]
    return [(what, given, hint) if asked else None for asked, what, given, hint in reasons]
