"""Megatron's configuration of a model, from the flags that describe it.

Megatron-LM's own translation is not in its package, so this is a table. A flag that is neither
of the run nor has a place in the configuration is an error: nothing goes unread.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.lowering.arguments import Arguments
from megacpp_nemo.lowering.releases import Release

# Flags of the run, not of the model: how it is laid out, fed, trained, saved and watched.
RUN_FLAGS = frozenset(
    {
        "--adam-beta1",
        "--adam-beta2",
        "--adam-eps",
        "--bf16",
        "--ckpt-format",
        "--clip-grad",
        "--context-parallel-size",
        "--data-path",
        "--decoder-first-pipeline-num-layers",
        "--decoder-last-pipeline-num-layers",
        "--eval-interval",
        "--eval-iters",
        "--expert-model-parallel-size",
        "--expert-tensor-parallel-size",
        "--fp8-format",
        "--fp8-recipe",
        "--global-batch-size",
        "--is-hybrid-model",
        "--load",
        "--log-interval",
        "--lr",
        "--lr-decay-iters",
        "--lr-decay-style",
        "--lr-warmup-iters",
        "--micro-batch-size",
        "--min-lr",
        "--num-layers-per-virtual-pipeline-stage",
        "--num-virtual-stages-per-pipeline-rank",
        "--optimizer",
        "--overlap-grad-reduce",
        "--overlap-param-gather",
        "--pipeline-model-parallel-size",
        "--save",
        "--save-interval",
        "--seed",
        "--seq-length",
        "--sequence-parallel",
        "--split",
        "--tensor-model-parallel-size",
        "--tensorboard-dir",
        "--tokenizer-model",
        "--tokenizer-type",
        "--train-iters",
        "--use-distributed-optimizer",
        "--weight-decay",
    }
)
# Flags that the entry script gives to the model's class, and flags that choose its spec.
MODEL_FLAGS = {
    "--max-position-embeddings": "max_sequence_length",
    "--position-embedding-type": "position_embedding_type",
    "--hybrid-override-pattern": "hybrid_override_pattern",
    "--hybrid-layer-pattern": "hybrid_layer_pattern",
}
OTHER_FLAGS = (
    "--group-query-attention",
    "--make-vocab-size-divisible-by",
    "--multi-latent-attention",
    "--num-layers",
    "--spec",
    "--squared-relu",
    "--swiglu",
    "--untie-embeddings-and-output-weights",
)
# Fields whose name is not the flag's.
FIELD_OF = {"--norm-epsilon": "layernorm_epsilon", "--num-experts": "num_moe_experts"}


def configuration(arguments: Arguments, release: Release, num_layers: int) -> TransformerConfig:
    """Return Megatron's configuration of the model that an argument vector describes.

    Raises:
        LoweringError: If a flag is neither of the run nor has a place in the configuration.
    """
    latent = bool(arguments.get("--multi-latent-attention"))
    kind = MLATransformerConfig if latent else TransformerConfig
    known = {item.name for item in fields(kind)}
    settings: dict[str, Any] = {"num_layers": num_layers}
    unread = []
    for flag, value in arguments.items():
        name = FIELD_OF.get(flag, release.flags[flag].dest)
        if flag in RUN_FLAGS or flag in MODEL_FLAGS or flag in OTHER_FLAGS:
            continue
        if name in known:
            settings[name] = _single(value)
        else:
            unread.append(flag)
    if unread:
        raise LoweringError(
            "Flags of the lowering have no place in the model's configuration",
            given=", ".join(unread),
            allowed="flags of the run, or fields of " + kind.__name__,
            hint="a line for each in megacpp_nemo.model.flags",
        )
    return kind(**settings, **_derived(arguments))


def _single(value: Any) -> Any:
    """Return the only element of a list, as Megatron's own translation does."""
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def _derived(arguments: Arguments) -> dict[str, Any]:
    """Return the fields that several flags, or none, decide; off a GPU nothing is fused."""
    derived: dict[str, Any] = {
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "perform_initialization": True,
    }
    if "--swiglu" in arguments:
        derived.update(gated_linear_unit=True, activation_func=F.silu)
    if "--squared-relu" in arguments:
        derived.update(activation_func=squared_relu)
    if "--multi-latent-attention" in arguments:
        derived.update(multi_latent_attention=True)
    if "--bf16" in arguments:
        derived.update(bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)
    return derived
