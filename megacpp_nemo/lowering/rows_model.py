"""Rows of the correspondence table that say what the model is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.lowering.plan import MEGATRONS_CHUNK_SIZE, MEGATRONS_CONV_WIDTH
from megacpp_nemo.lowering.roles import Role
from megacpp_nemo.lowering.row import EVERY, Condition, Row, Spelling, layers

CONFIG = "model.config"

LATENT = layers(Role.LATENT_ATTENTION, Role.SPARSE_ATTENTION)
GROUPED = layers(Role.ATTENTION)
EXPERTS = layers(Role.EXPERTS)
DENSE = layers(Role.MLP)
MAMBA = layers(Role.MAMBA)
NATIVE_DSA = Condition(
    "sparse attention layers of the release's own",
    lambda plan: plan.has(Role.SPARSE_ATTENTION) and plan.is_native(Role.SPARSE_ATTENTION),
)
OWN_DSA = Condition(
    "sparse attention layers of this package",
    lambda plan: plan.has(Role.SPARSE_ATTENTION) and not plan.is_native(Role.SPARSE_ATTENTION),
)
NATIVE_MTP = Condition("prediction depths of the release's own", lambda plan: plan.native_mtp)
OWN_MTP = Condition(
    "prediction depths of this package",
    lambda plan: bool(plan.recipe.model.mtp.num_layers) and not plan.native_mtp,
)
OWN_MAMBA = Condition(
    "Mamba-2 layers of this package",
    lambda plan: plan.has(Role.MAMBA) and not plan.is_native(Role.MAMBA),
)
STOCK_MAMBA = Condition(
    "what Megatron's mixer has; no flag changes it",
    lambda plan: plan.has(Role.MAMBA) and plan.is_native(Role.MAMBA),
)
DOCUMENTS = Condition(
    "layers with a state",
    lambda plan: any(seam.id == "documents" for seam in plan.seams),
)
NGRAM = Condition("n-gram memory", lambda plan: plan.recipe.features.ngram_hash)
STRUCTURE = Condition("structure channels", lambda plan: bool(plan.recipe.features.structure))

OFF_NGRAM = Condition("off, as in Megatron", lambda plan: not plan.recipe.features.ngram_hash)
OFF_STRUCTURE = Condition("off, as in Megatron", lambda plan: not plan.recipe.features.structure)
OFF_DOCUMENTS = Condition("off, as in Megatron", lambda plan: not plan.recipe.features.reset_state)


def _flagged(
    prefix: str, names: dict[str, tuple[str, str]], read: Condition = EVERY, **more: Any
) -> list[Row]:
    """Return rows for fields with one place in NeMo's model and one flag."""
    return [
        Row(
            field=f"{prefix}.{name}",
            nemo=(f"{CONFIG}.{place}",),
            flags=(Spelling(flag=flag, read=read),),
            **more,
        )
        for name, (place, flag) in names.items()
    ]


def _carried(
    prefix: str, place: str, spec: Condition, when: Callable[[HybridRecipe], bool], *names: str
) -> list[Row]:
    """Return rows for fields that only the name of a spec carries to Megatron."""
    return [
        Row(
            field=f"{prefix}.{name}",
            nemo=(f"{CONFIG}.{place}_{name}",),
            when=when,
            spec=spec,
            owner="spec",
        )
        for name in names
    ]


def _groups(groups: int, recipe: HybridRecipe) -> int | None:
    return None if groups == recipe.model.attention.num_heads else groups


def _chooses_dsa(recipe: HybridRecipe) -> bool:
    return recipe.features.sparse_attention


def _has_dsa(recipe: HybridRecipe) -> bool:
    return _chooses_dsa(recipe) or recipe.has(BlockFamily.SPARSE_ATTENTION)


def _has_gated_delta_net(recipe: HybridRecipe) -> bool:
    depth = recipe.model.mtp.pattern if recipe.model.mtp.num_layers else ()
    family = BlockFamily.GATED_DELTA_NET
    return recipe.has(family) or family in tuple(depth)


def _latent(recipe: HybridRecipe) -> bool:
    return recipe.features.latent_attention


PATTERN_ROWS: tuple[Row, ...] = (
    Row(
        field="pattern",
        nemo=(f"{CONFIG}.hybrid_override_pattern",),
        spell=lambda pattern, recipe: str(pattern),
        owner="pattern",
        note="translated by meaning into the release's symbols; custom layers ride on a slot",
    ),
    Row(
        field="depth",
        nemo=(f"{CONFIG}.num_layers",),
        flags=(Spelling(flag="--num-layers", until="0.16"),),
        owner="pattern",
        note="from 0.17.1 the pattern's length overrides --num-layers",
    ),
    Row(
        field="features.latent_attention",
        nemo=(f"{CONFIG}.multi_latent_attention",),
        flags=(
            Spelling(
                flag="--multi-latent-attention",
                value=lambda on, recipe: on or None,
                read=LATENT,
            ),
        ),
        owner="pattern",
    ),
    Row(
        field="features.sparse_attention",
        nemo=(f"{CONFIG}.experimental_attention_variant",),
        spell=lambda on, recipe: "dsa" if on else None,
        unspell=lambda variant: variant == "dsa",
        flags=(
            Spelling(
                flag="--experimental-attention-variant",
                value=lambda on, recipe: "dsa",
                since="0.18",
                read=NATIVE_DSA,
            ),
        ),
        owner="pattern",
    ),
    Row(
        field="model.sparse_attention.a_ranks",
        nemo=(f"{CONFIG}.dsa_a_ranks",),
        when=_chooses_dsa,
        owner="pattern",
        note="chooses which A layers take the sparse symbol",
    ),
    Row(field="features.experts", nemo=(f"{CONFIG}.experts",), owner="pattern"),
    Row(field="features.mamba", nemo=(f"{CONFIG}.mamba_lane",), owner="pattern"),
)

SHAPE_ROWS: tuple[Row, ...] = (
    *_flagged("model", {"hidden_size": ("hidden_size", "--hidden-size")}),
    *_flagged("model", {"ffn_hidden_size": ("ffn_hidden_size", "--ffn-hidden-size")}, DENSE),
    Row(
        field="model.seq_length",
        nemo=(f"{CONFIG}.seq_length", "data.seq_length"),
        flags=(
            Spelling(flag="--seq-length"),
            Spelling(flag="--max-position-embeddings"),
        ),
    ),
    *_flagged("model", {"rotary_base": ("rotary_base", "--rotary-base")}, LATENT),
    *_flagged(
        "model",
        {
            "norm_epsilon": ("layernorm_epsilon", "--norm-epsilon"),
            "init_std": ("init_method_std", "--init-method-std"),
        },
    ),
    *_flagged("model.attention", {"num_heads": ("num_attention_heads", "--num-attention-heads")}),
    *_flagged("model.attention", {"head_dim": ("kv_channels", "--kv-channels")}, GROUPED),
    Row(
        field="model.attention.num_query_groups",
        nemo=(f"{CONFIG}.num_query_groups",),
        when=lambda recipe: not _latent(recipe),
        flags=(
            Spelling(
                flag="--group-query-attention",
                value=lambda groups, recipe: _groups(groups, recipe) and True,
                read=GROUPED,
            ),
            Spelling(flag="--num-query-groups", value=_groups, read=GROUPED),
        ),
        note="latent attention has keys and values for every head",
    ),
    *_flagged(
        "model.latent",
        {
            "q_lora_rank": ("q_lora_rank", "--q-lora-rank"),
            "kv_lora_rank": ("kv_lora_rank", "--kv-lora-rank"),
            "qk_head_dim": ("qk_head_dim", "--qk-head-dim"),
            "qk_pos_emb_head_dim": ("qk_pos_emb_head_dim", "--qk-pos-emb-head-dim"),
            "v_head_dim": ("v_head_dim", "--v-head-dim"),
        },
        LATENT,
    ),
    Row(
        field="model.latent.layernorm",
        nemo=(f"{CONFIG}.qk_layernorm",),
        flags=(Spelling(flag="--qk-layernorm", value=lambda on, recipe: on or None, read=LATENT),),
        note="before 0.19 only this package's layers read it, so that they need the custom spec",
    ),
    *(
        Row(
            field=f"model.sparse_attention.{name}",
            nemo=(f"{CONFIG}.dsa_{place}",),
            when=_has_dsa,
            flags=(Spelling(flag=flag, since="0.18", read=NATIVE_DSA),),
            spec=OWN_DSA,
            owner="megatron or spec",
        )
        for name, place, flag in (
            ("indexer_num_heads", "indexer_n_heads", "--dsa-indexer-n-heads"),
            ("indexer_head_dim", "indexer_head_dim", "--dsa-indexer-head-dim"),
            ("indexer_topk", "indexer_topk", "--dsa-indexer-topk"),
            ("indexer_loss_coeff", "indexer_loss_coeff", "--dsa-indexer-loss-coeff"),
        )
    ),
)

BLOCK_ROWS: tuple[Row, ...] = (
    *_flagged(
        "model.experts",
        {
            "num_experts": ("num_moe_experts", "--num-experts"),
            "topk": ("moe_router_topk", "--moe-router-topk"),
            "ffn_hidden_size": ("moe_ffn_hidden_size", "--moe-ffn-hidden-size"),
        },
        EXPERTS,
    ),
    Row(
        field="model.experts.aux_loss_coeff",
        nemo=(f"{CONFIG}.moe_aux_loss_coeff",),
        flags=(
            Spelling(
                flag="--moe-aux-loss-coeff",
                value=lambda coefficient, recipe: (coefficient,),
                back=lambda values: values[0],
                read=EXPERTS,
            ),
        ),
    ),
    Row(
        field="model.experts.shared_expert_size",
        nemo=(f"{CONFIG}.moe_shared_expert_intermediate_size",),
        spell=lambda size, recipe: size or None,
        unspell=lambda size: size or 0,
        flags=(
            Spelling(
                flag="--moe-shared-expert-intermediate-size",
                value=lambda size, recipe: size or None,
                back=lambda size: size or 0,
                read=EXPERTS,
            ),
        ),
    ),
    Row(
        field="model.experts.activation",
        nemo=(f"{CONFIG}.gated_linear_unit",),
        built=(f"{CONFIG}.activation_func",),
        spell=lambda activation, recipe: activation == "swiglu",
        unspell=None,
        flags=(
            Spelling(
                flag="--swiglu",
                value=lambda activation, recipe: True if activation == "swiglu" else None,
                read=layers(Role.EXPERTS, Role.MLP),
            ),
            Spelling(
                flag="--squared-relu",
                value=lambda activation, recipe: True if activation == "squared_relu" else None,
                read=layers(Role.EXPERTS, Role.MLP),
            ),
        ),
        note="of dense MLPs too; gelu is Megatron's default",
    ),
    *_flagged(
        "model.mamba",
        {
            "num_heads": ("mamba_num_heads", "--mamba-num-heads"),
            "head_dim": ("mamba_head_dim", "--mamba-head-dim"),
            "state_dim": ("mamba_state_dim", "--mamba-state-dim"),
            "num_groups": ("mamba_num_groups", "--mamba-num-groups"),
        },
        MAMBA,
    ),
    Row(
        field="model.mamba.conv_width",
        nemo=(f"{CONFIG}.mamba_conv_width",),
        spec=OWN_MAMBA,
        stock=STOCK_MAMBA,
        owner="spec",
        note=f"Megatron's mixer has {MEGATRONS_CONV_WIDTH}, and no flag for it",
    ),
    Row(
        field="model.mamba.chunk_size",
        nemo=(f"{CONFIG}.mamba_chunk_size",),
        spec=OWN_MAMBA,
        stock=STOCK_MAMBA,
        owner="spec",
        note=f"Megatron's mixer has {MEGATRONS_CHUNK_SIZE}, and no flag for it",
    ),
    *_carried(
        "model.author_mamba",
        "author_mamba",
        layers(Role.AUTHOR_MAMBA),
        lambda recipe: recipe.features.mamba == "author",
        "num_heads",
        "head_dim",
        "state_dim",
        "mimo_rank",
        "chunk_size",
    ),
    *(
        Row(
            field=f"model.gated_delta_net.{name}",
            nemo=(f"{CONFIG}.{flag[2:].replace('-', '_')}",),
            when=_has_gated_delta_net,
            flags=(Spelling(flag=flag, since="0.17", read=layers(Role.GATED_DELTA_NET)),),
        )
        for name, flag in (
            ("num_key_heads", "--linear-num-key-heads"),
            ("num_value_heads", "--linear-num-value-heads"),
            ("key_head_dim", "--linear-key-head-dim"),
            ("value_head_dim", "--linear-value-head-dim"),
            ("conv_width", "--linear-conv-kernel-dim"),
        )
    ),
    *_carried(
        "model.recurrent",
        "m2rnn",
        layers(Role.RECURRENT),
        lambda recipe: True,
        "num_heads",
        "num_qk_heads",
        "key_dim",
        "value_dim",
        "conv_width",
        "state_gradient_clip",
    ),
)

INPUT_ROWS: tuple[Row, ...] = (
    Row(
        field="model.embedding.vocab_size",
        nemo=("data.vocab_size",),
        when=lambda recipe: recipe.corpus == "sources",
        owner="recipe",
        note="what the recipe is planned for; the tokenizer of existing data decides what is built",
    ),
    *_flagged(
        "model.embedding",
        {
            "make_vocab_size_divisible_by": (
                "make_vocab_size_divisible_by",
                "--make-vocab-size-divisible-by",
            )
        },
    ),
    Row(
        field="features.ngram_hash",
        nemo=(f"{CONFIG}.ngram_hash",),
        spec=NGRAM,
        stock=OFF_NGRAM,
        owner="spec",
    ),
    *_carried(
        "model.embedding.ngram",
        "ngram",
        NGRAM,
        lambda recipe: recipe.features.ngram_hash,
        "orders",
        "heads_per_order",
        "table_size",
        "dim",
    ),
    Row(
        field="features.structure",
        nemo=(f"{CONFIG}.structure",),
        spec=STRUCTURE,
        stock=OFF_STRUCTURE,
        owner="spec",
    ),
    *_carried(
        "model.embedding.structure",
        "structure",
        STRUCTURE,
        lambda recipe: bool(recipe.features.structure),
        "bottleneck",
    ),
    Row(
        field="features.reset_state",
        nemo=(f"{CONFIG}.reset_state",),
        spec=DOCUMENTS,
        stock=OFF_DOCUMENTS,
        owner="spec",
    ),
    Row(
        field="features.reset_attention_mask",
        nemo=(f"{CONFIG}.reset_attention_mask",),
        owner="recipe",
        note="--reset-attention-mask makes a mask that Transformer Engine's causal attention "
        "does not read: refused",
    ),
    Row(
        field="model.mtp.num_layers",
        nemo=(f"{CONFIG}.mtp_num_layers",),
        spell=lambda depth, recipe: depth or None,
        unspell=lambda depth: depth or 0,
        flags=(
            Spelling(
                flag="--mtp-num-layers",
                value=lambda depth, recipe: depth or None,
                since="0.17",
                read=NATIVE_MTP,
            ),
        ),
        spec=OWN_MTP,
        owner="pattern",
        note="a suffix of the pattern, /PATTERN once per depth, never a letter",
    ),
    Row(
        field="model.mtp.pattern",
        nemo=(f"{CONFIG}.mtp_pattern",),
        spell=lambda pattern, recipe: str(pattern),
        when=lambda recipe: recipe.model.mtp.num_layers > 0,
        spec=OWN_MTP,
        owner="pattern",
    ),
    Row(
        field="model.mtp.loss_scaling_factor",
        nemo=(f"{CONFIG}.mtp_loss_scaling_factor",),
        when=lambda recipe: recipe.model.mtp.num_layers > 0,
        flags=(Spelling(flag="--mtp-loss-scaling-factor", since="0.17", read=NATIVE_MTP),),
        spec=OWN_MTP,
        owner="megatron or spec",
    ),
)

MODEL_ROWS = (*PATTERN_ROWS, *SHAPE_ROWS, *BLOCK_ROWS, *INPUT_ROWS)
