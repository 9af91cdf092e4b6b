"""Rows of the correspondence table that say what the model is, its blocks' own sizes apart."""

from __future__ import annotations

from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.lowering.readers import (
    A_OR_D_WRITTEN,
    ANY_PATH,
    CHOSEN_RANKS,
    DEMANDED_PATH,
    DENSE,
    DEPTHS,
    DOCUMENTS,
    E_WRITTEN,
    GROUPED,
    LATENT,
    M_WRITTEN,
    NATIVE_DSA,
    NATIVE_MTP,
    NGRAM,
    OFF_DOCUMENTS,
    OFF_NGRAM,
    OFF_STRUCTURE,
    OWN_DSA,
    OWN_MTP,
    RANKS,
    STRUCTURE,
)
from megacpp_nemo.lowering.row import CONFIG, Row, Spelling, flagged, spec_carried


def _groups(groups: int, recipe: HybridRecipe) -> int | None:
    return None if groups == recipe.model.attention.num_heads else groups


def _chooses_dsa(recipe: HybridRecipe) -> bool:
    return recipe.features.sparse_attention


def _has_dsa(recipe: HybridRecipe) -> bool:
    return _chooses_dsa(recipe) or recipe.has(BlockFamily.SPARSE_ATTENTION)


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
        decides=A_OR_D_WRITTEN,
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
        decides=RANKS,
    ),
    Row(
        field="model.sparse_attention.a_ranks",
        nemo=(f"{CONFIG}.dsa_a_ranks",),
        when=_chooses_dsa,
        owner="pattern",
        decides=CHOSEN_RANKS,
        note="chooses which A layers take the sparse symbol",
    ),
    Row(field="features.experts", nemo=(f"{CONFIG}.experts",), owner="pattern", decides=E_WRITTEN),
    Row(field="features.mamba", nemo=(f"{CONFIG}.mamba_lane",), owner="pattern", decides=M_WRITTEN),
    Row(
        field="features.mamba_path",
        nemo=(f"{CONFIG}.mamba_path",),
        spec=DEMANDED_PATH,
        stock=ANY_PATH,
        owner="spec",
        note="Megatron's own mixer is the fused path",
    ),
)

SHAPE_ROWS: tuple[Row, ...] = (
    *flagged("model", {"hidden_size": ("hidden_size", "--hidden-size")}),
    *flagged("model", {"ffn_hidden_size": ("ffn_hidden_size", "--ffn-hidden-size")}, DENSE),
    Row(
        field="model.seq_length",
        nemo=(f"{CONFIG}.seq_length", "data.seq_length"),
        flags=(
            Spelling(flag="--seq-length"),
            Spelling(flag="--max-position-embeddings"),
        ),
    ),
    *flagged("model", {"rotary_base": ("rotary_base", "--rotary-base")}, LATENT),
    *flagged(
        "model",
        {
            "norm_epsilon": ("layernorm_epsilon", "--norm-epsilon"),
            "init_std": ("init_method_std", "--init-method-std"),
        },
    ),
    *flagged("model.attention", {"num_heads": ("num_attention_heads", "--num-attention-heads")}),
    *flagged("model.attention", {"head_dim": ("kv_channels", "--kv-channels")}, GROUPED),
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
    *flagged(
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

INPUT_ROWS: tuple[Row, ...] = (
    Row(
        field="model.embedding.vocab_size",
        nemo=("data.vocab_size",),
        when=lambda recipe: recipe.corpus == "sources",
        owner="recipe",
        note="what the recipe is planned for; the tokenizer of existing data decides what is built",
    ),
    *flagged(
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
    *spec_carried(
        "model.embedding.ngram",
        "ngram",
        NGRAM,
        lambda recipe: recipe.features.ngram_hash,
        "orders",
        "heads_per_order",
        "table_size",
        "dim",
        "placement",
    ),
    Row(
        field="features.structure",
        nemo=(f"{CONFIG}.structure", "data.structure"),
        spec=STRUCTURE,
        stock=OFF_STRUCTURE,
        owner="spec",
        note="the data serves the channels that the model takes",
    ),
    *spec_carried(
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
        decides=DEPTHS,
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

MODEL_ROWS = (*PATTERN_ROWS, *SHAPE_ROWS, *INPUT_ROWS)
