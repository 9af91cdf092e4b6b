"""Rules of a layout: which blocks work with, and divide over, which parallel sizes.

Blocks that the pattern does not have are not checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from megacpp_nemo.contract.errors import RecipeError
from megacpp_nemo.contract.parallelism import Parallelism
from megacpp_nemo.contract.pattern import BlockFamily, LayerPattern
from megacpp_nemo.contract.shapes import ModelShape
from megacpp_nemo.contract.training import Features

TENSOR = "tensor_model_parallel_size"
CONTEXT = "context_parallel_size"
EXPERT = "expert_model_parallel_size"
EXPERT_TENSOR = "expert_tensor_parallel_size"


def check_layout(
    layers: LayerPattern, model: ModelShape, features: Features, parallelism: Parallelism
) -> None:
    """Check that every block works with, and divides over, the parallel sizes.

    Raises:
        PatternError: If the layers do not divide over the pipeline stages.
        RecipeError: If segments, heads, groups, experts or tokens do not divide, or a block of
            the pattern does not work with a kind of parallelism.
    """
    _check_stages(layers, parallelism)
    _check_kinds(layers, model, features, parallelism)
    if parallelism.recompute == "selective":
        _check_cores(_families(layers, model), model, features)
    _check_sequence(model.seq_length, parallelism)
    parts = list(_parts(layers, model, features, parallelism))
    for part in parts:
        if part.size % part.over:
            fits = math.gcd(part.over, *(p.size for p in parts if p.field == part.field))
            hint = f"{part.field}={fits}"
            if part.field == TENSOR and fits == 1:
                hint += ", sequence_parallel=False"
            raise RecipeError(
                f"{part.name} does not divide over {part.field}",
                given=f"{part.name}={part.size}, {part.field}={part.over}",
                allowed=f"{part.name} in multiples of {part.over}",
                hint=f"{hint}, or another {part.name}",
            )


def nearest_multiple(value: int, unit: int) -> int:
    """Return the positive multiple of `unit` that is closest to `value`."""
    return max(1, (value + unit // 2) // unit) * unit


def _check_stages(layers: LayerPattern, parallelism: Parallelism) -> None:
    stages = parallelism.pipeline_model_parallel_size
    chunks = parallelism.virtual_pipeline_model_parallel_size or 1
    segments = len(layers.segments)
    if layers.is_segmented and segments != stages * chunks:
        interleaved = stages > 1 and segments % stages == 0
        pipeline, virtual = (stages, segments // stages) if interleaved else (segments, 1)
        raise RecipeError(
            "The pattern's '|' boundaries and the pipeline sizes disagree",
            given=f"{segments} segments for {stages} stages x {chunks} chunks",
            allowed=f"{stages * chunks} segments, or no '|'",
            hint=f"pipeline_model_parallel_size={pipeline}, "
            f"virtual_pipeline_model_parallel_size={virtual if virtual > 1 else None}",
        )
    layers.split(stages * chunks)


def _check_kinds(
    layers: LayerPattern, model: ModelShape, features: Features, parallelism: Parallelism
) -> None:
    families = _families(layers, model)
    experts = families.get(BlockFamily.EXPERTS, 0) if features.experts else 0
    tensor, context = parallelism.tensor_model_parallel_size, parallelism.context_parallel_size
    if experts and tensor > 1 and not parallelism.sequence_parallel:
        raise RecipeError(
            "Tensor parallelism with experts needs sequence parallelism in Megatron",
            given=f"tensor_model_parallel_size={tensor}, sequence_parallel=False, "
            f"expert layers: {experts}",
            allowed="sequence_parallel=True",
            hint="sequence_parallel=True",
        )
    if not experts and parallelism.expert_model_parallel_size > 1:
        raise RecipeError(
            "Expert parallelism needs expert layers, and the model has none",
            given=f"expert_model_parallel_size={parallelism.expert_model_parallel_size}",
            allowed="1, or a pattern that contains E, with features.experts on",
            hint="expert_model_parallel_size=1",
        )
    expert_tensor = parallelism.expert_tensor_size
    if experts and expert_tensor != tensor and parallelism.expert_model_parallel_size == 1:
        # Megatron reduces such experts' gradients over the ranks of other weights before 0.19.
        raise RecipeError(
            "Experts that are split otherwise than the other weights need expert parallelism: "
            "Megatron does not sum their gradients over the tensor ranks without it",
            given=f"expert_tensor_parallel_size={expert_tensor}, "
            f"tensor_model_parallel_size={tensor}, expert_model_parallel_size=1",
            allowed="expert_model_parallel_size above 1, or the tensor size for experts too",
            hint="expert_tensor_parallel_size=None",
        )
    stages = parallelism.pipeline_model_parallel_size
    if stages > 1 and features.ngram_hash and model.embedding.ngram.placement == "host":
        raise RecipeError(
            "N-gram tables in host memory are trained on a single pipeline stage",
            given=f"embedding.ngram.placement='host', pipeline_model_parallel_size={stages}",
            allowed="pipeline_model_parallel_size=1, or placement='device'",
            hint="embedding.ngram.placement='device'",
        )
    chosen = features.sparse_attention and model.sparse_attention.a_ranks
    if context > 1 and (chosen or BlockFamily.SPARSE_ATTENTION in families):
        raise RecipeError(
            "Megatron's DSA does not work with context parallelism",
            given=f"context_parallel_size={context} with DSA layers",
            allowed="context_parallel_size=1, or no DSA layers",
            hint="context_parallel_size=1",
        )


def _check_cores(families: dict[BlockFamily, int], model: ModelShape, features: Features) -> None:
    """Check that attention has cores to compute again, and none that an indexer reads."""
    chosen = features.sparse_attention and model.sparse_attention.a_ranks
    if chosen or BlockFamily.SPARSE_ATTENTION in families:
        raise RecipeError(
            "Selective recomputation does not work with DSA: a recomputed core has lost what the "
            "indexer reads",
            given="recompute='selective' with DSA layers",
            allowed="recompute of none or full, or no DSA layers",
            hint="recompute='full'",
        )
    if BlockFamily.ATTENTION not in families:
        raise RecipeError(
            "Selective recomputation is of the cores of attention layers, and the model has none",
            given="recompute='selective' with a pattern without A",
            allowed="recompute of none or full, or a pattern that contains A",
            hint="recompute='full'",
        )


def _families(layers: LayerPattern, model: ModelShape) -> dict[BlockFamily, int]:
    """Return the layers of each family, those of the prediction depths included."""
    found = layers.counts()
    for family, count in model.mtp.pattern.counts().items():
        if model.mtp.num_layers:
            found[family] = found.get(family, 0) + count * model.mtp.num_layers
    return found


def _check_sequence(seq_length: int, parallelism: Parallelism) -> None:
    tensor, context = parallelism.tensor_model_parallel_size, parallelism.context_parallel_size
    # Megatron gives each context rank two pieces, one early and one late, to even out the
    # causal mask; each rank's share is then scattered over the tensor group.
    pieces = math.lcm(
        2 * context if context > 1 else 1,
        context * tensor if parallelism.sequence_parallel else 1,
    )
    if seq_length % pieces:
        raise RecipeError(
            "A row does not divide into 2 pieces per context rank, or over the tensor ranks "
            "that share it under sequence parallelism",
            given=f"seq_length={seq_length}, context_parallel_size={context}, "
            f"tensor_model_parallel_size={tensor}, "
            f"sequence_parallel={parallelism.sequence_parallel}",
            allowed=f"seq_length in multiples of {pieces}",
            hint=f"seq_length={nearest_multiple(seq_length, pieces)}",
        )


class _Part(NamedTuple):
    """A size that must divide over a parallel size."""

    name: str
    size: int
    field: str
    over: int


def _parts(
    layers: LayerPattern, model: ModelShape, features: Features, parallelism: Parallelism
) -> Iterator[_Part]:
    families = _families(layers, model)
    tensor = parallelism.tensor_model_parallel_size
    if BlockFamily.ATTENTION in families or BlockFamily.SPARSE_ATTENTION in families:
        yield _Part("attention.num_heads", model.attention.num_heads, TENSOR, tensor)
        if features.latent_attention:
            # Without Transformer Engine the down-projections are split over the tensor group.
            latent = model.latent
            width = latent.kv_lora_rank + latent.qk_pos_emb_head_dim
            yield _Part("latent.q_lora_rank", latent.q_lora_rank, TENSOR, tensor)
            yield _Part("latent.kv_lora_rank + qk_pos_emb_head_dim", width, TENSOR, tensor)
        else:
            groups = model.attention.num_query_groups
            yield _Part("attention.num_query_groups", groups, TENSOR, tensor)
    if BlockFamily.MAMBA in families and features.mamba == "author":
        author = model.author_mamba
        yield _Part("author_mamba.num_heads", author.num_heads, TENSOR, tensor)
        # What all heads share is split by its width: B and C, and the angles.
        yield _Part("author_mamba.state_dim / 4", author.num_angles, TENSOR, tensor)
    elif BlockFamily.MAMBA in families:
        yield from _mamba_parts(model, parallelism)
    if BlockFamily.RECURRENT in families:
        keys = model.recurrent.num_qk_heads * model.recurrent.key_dim
        yield _Part("recurrent.num_heads", model.recurrent.num_heads, TENSOR, tensor)
        yield _Part("recurrent.num_qk_heads x key_dim", keys, TENSOR, tensor)
    if BlockFamily.GATED_DELTA_NET in families:
        gated = model.gated_delta_net
        yield _Part("gated_delta_net.num_key_heads", gated.num_key_heads, TENSOR, tensor)
        yield _Part("gated_delta_net.num_value_heads", gated.num_value_heads, TENSOR, tensor)
    if BlockFamily.EXPERTS in families and features.experts:
        yield from _experts_parts(model, parallelism)
    elif BlockFamily.EXPERTS in families:
        yield _Part("ffn_hidden_size", model.ffn_hidden_size, TENSOR, tensor)
    if features.ngram_hash:
        # Every rank holds a part of every row, whatever the primes are.
        yield _Part("embedding.ngram.dim", model.embedding.ngram.dim, TENSOR, tensor)


def _mamba_parts(model: ModelShape, parallelism: Parallelism) -> Iterator[_Part]:
    tensor, context = parallelism.tensor_model_parallel_size, parallelism.context_parallel_size
    heads, groups = model.mamba.num_heads, model.mamba.num_groups
    yield _Part("mamba.num_heads", heads, TENSOR, tensor)
    yield _Part("mamba.num_groups", groups, TENSOR, tensor)
    heads, groups = heads // tensor, max(1, groups // tensor)
    yield _Part("mamba.num_heads per tensor rank", heads, CONTEXT, context)
    if context % groups:  # a context size in multiples of the groups replicates them
        yield _Part("mamba.num_groups per tensor rank", groups, CONTEXT, context)


def _experts_parts(model: ModelShape, parallelism: Parallelism) -> Iterator[_Part]:
    experts = model.experts
    split = TENSOR if parallelism.expert_tensor_parallel_size is None else EXPERT_TENSOR
    yield _Part(
        "experts.num_experts", experts.num_experts, EXPERT, parallelism.expert_model_parallel_size
    )
    yield _Part(
        "experts.ffn_hidden_size", experts.ffn_hidden_size, split, parallelism.expert_tensor_size
    )
    yield _Part(
        "experts.shared_expert_size",
        experts.shared_expert_size,
        TENSOR,
        parallelism.tensor_model_parallel_size,
    )
