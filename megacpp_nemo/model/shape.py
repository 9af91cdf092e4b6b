"""The contract's view of a Megatron configuration.

Overrides on NeMo's command line change Megatron's fields; reading them back as the contract's
shapes lets the same rules check them, with the same messages.
"""

from __future__ import annotations

import math
from typing import Any

from megacpp_nemo.contract.shapes import (
    AttentionShape,
    AuthorMambaShape,
    EmbeddingShape,
    ExpertsShape,
    LatentShape,
    MambaShape,
    ModelShape,
    MultiTokenPredictionShape,
    NgramHashShape,
    RecurrentShape,
    SparseAttentionShape,
    StructureShape,
)
from megacpp_nemo.contract.training import Features, Parallelism


def shape_of(config: Any) -> tuple[ModelShape, Features]:
    """Return the shapes and features that a hybrid configuration describes.

    Raises:
        RecipeError: If a size is not usable.
    """
    model = ModelShape(
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size or 4 * config.hidden_size,
        seq_length=config.seq_length,
        attention=AttentionShape(
            num_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups or config.num_attention_heads,
            head_dim=config.kv_channels or config.hidden_size // config.num_attention_heads,
        ),
        latent=_latent(config),
        sparse_attention=sparse_shape_of(config),
        experts=_experts(config),
        mamba=MambaShape(
            num_heads=config.mamba_num_heads or 2 * config.hidden_size // config.mamba_head_dim,
            head_dim=config.mamba_head_dim,
            state_dim=config.mamba_state_dim,
            num_groups=config.mamba_num_groups,
            conv_width=config.mamba_conv_width,
            chunk_size=config.mamba_chunk_size,
        ),
        author_mamba=author_mamba_shape_of(config),
        recurrent=recurrent_shape_of(config),
        mtp=MultiTokenPredictionShape(
            num_layers=config.mtp_num_layers or 0,
            pattern=config.mtp_pattern,
            loss_scaling_factor=config.mtp_loss_scaling_factor,
        ),
        embedding=EmbeddingShape(
            ngram=NgramHashShape(
                orders=config.ngram_orders,
                heads_per_order=config.ngram_heads_per_order,
                table_size=config.ngram_table_size,
                dim=config.ngram_dim,
                placement=config.ngram_placement,
            ),
            structure=StructureShape(bottleneck=config.structure_bottleneck),
        ),
    )
    features = Features(
        latent_attention=config.multi_latent_attention,
        experts=config.experts,
        sparse_attention=bool(config.dsa_a_ranks),
        mamba=config.mamba_lane,
        ngram_hash=config.ngram_hash,
        structure=config.structure,
        kernels="required" if config.required_packages else "available",
        reset_state=config.reset_state,
        reset_attention_mask=config.reset_attention_mask,
    )
    return model, features


def parallelism_of(config: Any, *, world_size: int | None = None) -> Parallelism:
    """Return the layout of a hybrid configuration over `world_size` processes.

    Args:
        config: Hybrid model configuration.
        world_size: Number of processes; the fewest that the sizes allow if not given.

    Raises:
        RecipeError: If the parallel sizes do not fit each other or the processes.
    """
    return Parallelism(
        num_nodes=1,
        devices_per_node=world_size or _fewest_processes(config),
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        sequence_parallel=config.sequence_parallel,
        use_distributed_optimizer=False,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
    )


def recurrent_shape_of(config: Any) -> RecurrentShape:
    """Return the shape of a hybrid configuration's R layers.

    Raises:
        RecipeError: If a size is not usable.
    """
    return RecurrentShape(
        num_heads=config.m2rnn_num_heads,
        num_qk_heads=config.m2rnn_num_qk_heads,
        key_dim=config.m2rnn_key_dim,
        value_dim=config.m2rnn_value_dim,
        conv_width=config.m2rnn_conv_width,
        state_gradient_clip=config.m2rnn_state_gradient_clip,
    )


def sparse_shape_of(config: Any) -> SparseAttentionShape:
    """Return the shape of a hybrid configuration's sparse attention, and its ranks.

    Raises:
        RecipeError: If a size is not usable.
    """
    return SparseAttentionShape(
        a_ranks=config.dsa_a_ranks,
        indexer_num_heads=config.dsa_indexer_n_heads,
        indexer_head_dim=config.dsa_indexer_head_dim,
        indexer_topk=config.dsa_indexer_topk,
        indexer_loss_coeff=config.dsa_indexer_loss_coeff,
    )


def author_mamba_shape_of(config: Any) -> AuthorMambaShape:
    """Return the shape of a hybrid configuration's M layers on the authored lane.

    Raises:
        RecipeError: If a size is not usable.
    """
    return AuthorMambaShape(
        num_heads=config.author_mamba_num_heads,
        head_dim=config.author_mamba_head_dim,
        state_dim=config.author_mamba_state_dim,
        mimo_rank=config.author_mamba_mimo_rank,
        chunk_size=config.author_mamba_chunk_size,
    )


def _fewest_processes(config: Any) -> int:
    tensor = config.tensor_model_parallel_size
    experts = config.expert_model_parallel_size * (config.expert_tensor_parallel_size or tensor)
    stages = config.pipeline_model_parallel_size
    return stages * math.lcm(tensor * config.context_parallel_size, experts)


def _latent(config: Any) -> LatentShape:
    if not config.multi_latent_attention:
        return LatentShape()
    return LatentShape(
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_head_dim=config.qk_head_dim,
        qk_pos_emb_head_dim=config.qk_pos_emb_head_dim,
        v_head_dim=config.v_head_dim,
        layernorm=config.qk_layernorm,
    )


def _experts(config: Any) -> ExpertsShape:
    # Dense MLPs have the experts' activation; only whether it is gated decides shapes.
    activation = "swiglu" if config.gated_linear_unit else "gelu"
    if not config.num_moe_experts:
        return ExpertsShape(activation=activation)
    return ExpertsShape(
        num_experts=config.num_moe_experts,
        topk=config.moe_router_topk,
        ffn_hidden_size=config.moe_ffn_hidden_size or config.ffn_hidden_size,
        shared_expert_size=config.moe_shared_expert_intermediate_size or 0,
        activation=activation,
    )
