"""Rows of the correspondence table for the sizes of experts, Mamba, Gated DeltaNet and M2RNN."""

from __future__ import annotations

from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.lowering.ownership import MEGATRONS_CHUNK_SIZE, MEGATRONS_CONV_WIDTH
from megacpp_nemo.lowering.readers import (
    EXPERTS,
    MAMBA,
    OWN_MAMBA,
    STOCK_MAMBA,
)
from megacpp_nemo.lowering.roles import Role
from megacpp_nemo.lowering.row import CONFIG, Row, Spelling, flagged, layers, spec_carried


def _has_gated_delta_net(recipe: HybridRecipe) -> bool:
    depth = recipe.model.mtp.pattern if recipe.model.mtp.num_layers else ()
    family = BlockFamily.GATED_DELTA_NET
    return recipe.has(family) or family in tuple(depth)


BLOCK_ROWS: tuple[Row, ...] = (
    *flagged(
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
    *flagged(
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
    *spec_carried(
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
    *spec_carried(
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
