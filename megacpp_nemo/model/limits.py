"""Settings these layers cannot run, or would train wrongly.

The contract's rules say what divides over what; these refusals belong to the layers as they
are built here, and each may go when its layer learns better.
"""

from __future__ import annotations

from typing import Any

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.host.compat import transformer_engine_available

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
    families = config.layers.counts()
    _refuse_fp8(config)
    _refuse_stage_settings(config)
    if config.multi_latent_attention and BlockFamily.ATTENTION in families:
        _refuse_latent_attention(config)
    if BlockFamily.RECURRENT in families:
        _refuse_recurrent(config)


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
