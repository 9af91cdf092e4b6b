"""The hybrid stack: Megatron's MambaStack, building each layer from its block family.

Forward pass, pipeline hand-over and checkpoint layout are Megatron's. What is ours is which
module stands at which depth, that only expert layers run in FP8, and that whole layers can be
recomputed.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from megatron.core.fp8_utils import get_fp8_context
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.pattern import BlockFamily, LayerPattern
from megacpp_nemo.model.experts import without_fp8
from megacpp_nemo.model.recompute import FULL, run_layers

# Families that Megatron's own bookkeeping of a stack knows, by its symbols.
_UPSTREAM_SYMBOLS = {
    BlockFamily.ATTENTION: Symbols.ATTENTION,
    BlockFamily.SPARSE_ATTENTION: Symbols.ATTENTION,
    BlockFamily.EXPERTS: Symbols.MOE,
    BlockFamily.MAMBA: Symbols.MAMBA,
}


@dataclass
class HybridStackSubmodules(MambaStackSubmodules):
    """Megatron's layer specs of a Mamba stack, and three more.

    Args:
        sparse_attention_layer: Layer of a D block, and of A blocks of chosen ranks.
        recurrent_layer: Layer of an R block.
        final_norm: Norm after the last layer.
        mtp_block_spec: Multi-token prediction depths; later releases have them here, too.
    """

    sparse_attention_layer: ModuleSpec | type = IdentityOp
    recurrent_layer: ModuleSpec | type = IdentityOp
    final_norm: ModuleSpec | type = IdentityOp
    mtp_block_spec: Any = None


class HybridStack(MambaStack):
    """A stack of attention, Mamba, expert and recurrent layers.

    Args:
        config: Megatron configuration of the model.
        submodules: Layer specs by family.
        residual_in_fp32: Keep the residual of M and R layers in fp32.
        pre_process: Whether this is the first pipeline stage.
        hybrid_attention_ratio: Taken for Megatron's call; the pattern decides.
        hybrid_mlp_ratio: Taken for Megatron's call; the pattern decides.
        hybrid_override_pattern: Our pattern, tiled to `config.num_layers`; `|` fixes the
            pipeline stages.
        post_layer_norm: Whether a norm follows the last layer.
        post_process: Whether this is the last pipeline stage.
        device: Taken for Megatron's call.
        dtype: Taken for Megatron's call.
        pg_collection: Megatron's process groups.

    Raises:
        PatternError: If the pattern does not fit the depth or the stages.
        RuntimeRefusal: If a family has no layer here.
    """

    def __init__(
        self,
        config: Any,
        submodules: HybridStackSubmodules,
        residual_in_fp32: bool = False,
        pre_process: bool = True,
        hybrid_attention_ratio: float = 0.0,
        hybrid_mlp_ratio: float = 0.0,
        hybrid_override_pattern: str | None = None,
        post_layer_norm: bool = True,
        post_process: bool = True,
        device: Any = None,
        dtype: Any = None,
        pg_collection: Any = None,
    ) -> None:
        # Upstream's constructor knows only its own letters and norm; its ancestors' is called,
        # with a configuration in which the stack itself does not enter FP8.
        MegatronModule.__init__(self, config=without_fp8(config))
        self.residual_in_fp32 = residual_in_fp32
        self.pre_process, self.post_process = pre_process, post_process
        self.post_layer_norm = post_layer_norm
        self.pp_group, self.tp_group = pg_collection.pp, pg_collection.tp
        self.input_tensor = None
        self.hybrid_attention_ratio, self.hybrid_mlp_ratio = 0.0, 0.0
        self.hybrid_override_pattern = hybrid_override_pattern
        layers = LayerPattern.parse(hybrid_override_pattern or "").tile(config.num_layers)
        first, families = self._stage(layers)
        ranks = layers.a_ranks()
        sparse = {ranks[rank] for rank in config.dsa_a_ranks}
        families = tuple(
            BlockFamily.SPARSE_ATTENTION if number in sparse else family
            for number, family in enumerate(families, first + 1)
        )
        symbols = {**_UPSTREAM_SYMBOLS}
        if _is_dense(submodules):
            symbols[BlockFamily.EXPERTS] = Symbols.MLP
        self.layer_type_list = [symbols.get(f, f.letter) for f in families]
        self.layers = nn.ModuleList(
            self._layer(submodules, family, first + i + 1, first, config, pg_collection)
            for i, family in enumerate(families)
        )
        self.num_layers_per_pipeline_rank = len(self.layers)
        if post_process and post_layer_norm:
            self.final_norm = build_module(
                submodules.final_norm,
                config=self.config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )

    def forward(
        self,
        hidden_states: Any,
        attention_mask: Tensor | None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | None = None,
        *,
        inference_params: Any = None,
        packed_seq_params: Any = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the last layer's output `[seq, batch, hidden]`, behind the norm if there is one.

        Takes the arguments of Megatron's stack, of which those of inference are for no training.
        """
        told = {
            "attention_mask": attention_mask,
            "rotary_pos_emb": rotary_pos_emb,
            "packed_seq_params": packed_seq_params,
            "padding_mask": padding_mask,
        }
        if not (self.training and self.config.recompute_granularity == FULL):
            context = inference_context or inference_params
            kept: Tensor = super().forward(hidden_states, inference_context=context, **told)
            return kept
        layers: Any = self.layers
        states: Any = hidden_states if self.pre_process else self.input_tensor
        states = run_layers(layers, self.config, states, **told)
        if self.post_process and self.post_layer_norm:
            states = self.final_norm(states)
        # The pipeline frees what a stage sends on, which must not be a view.
        output: Tensor = make_viewless_tensor(states, states.requires_grad, keep_graph=True)
        return output

    def _stage(self, layers: LayerPattern) -> tuple[int, tuple[BlockFamily, ...]]:
        """Return the number of layers before this pipeline stage, and its families."""
        stages = layers.split(self.pp_group.size())
        if len(stages) != self.pp_group.size():
            raise RuntimeRefusal(
                "This stack has no virtual pipeline stages",
                given=f"{len(stages)} pattern segments on {self.pp_group.size()} pipeline stages",
                allowed="as many segments as pipeline stages, or a pattern without '|'",
                hint=f"pipeline_model_parallel_size={len(stages)}",
            )
        rank = self.pp_group.rank()
        return sum(len(stage) for stage in stages[:rank]), stages[rank].layers

    def _layer(
        self,
        submodules: HybridStackSubmodules,
        family: BlockFamily,
        number: int,
        offset: int,
        config: Any,
        groups: Any,
    ) -> nn.Module:
        """Build the layer at 1-based `number`."""
        own = config if family is BlockFamily.EXPERTS else self.config
        arguments: dict[str, Any] = {"config": own, "pg_collection": groups}
        if family in (BlockFamily.MAMBA, BlockFamily.RECURRENT):
            arguments.update(
                layer_number=number,
                residual_in_fp32=self.residual_in_fp32,
                pp_layer_offset=offset,
            )
        else:
            # Megatron's transformer layer adds the offset of an even pipeline split by itself.
            upstream = get_transformer_layer_offset(own, pp_rank=self.pp_group.rank())
            arguments.update(layer_number=number - upstream)
        context = nullcontext()
        if family is BlockFamily.EXPERTS and own.fp8:
            context = get_fp8_context(own, number - 1, is_init=True)
        with context:
            return build_module(_spec_of(submodules, family), **arguments)


def _is_dense(submodules: HybridStackSubmodules) -> bool:
    """Whether E layers are dense MLPs."""
    return submodules.moe_layer is IdentityOp


def _spec_of(submodules: HybridStackSubmodules, family: BlockFamily) -> ModuleSpec | type:
    specs = {
        BlockFamily.ATTENTION: submodules.attention_layer,
        BlockFamily.SPARSE_ATTENTION: submodules.sparse_attention_layer,
        BlockFamily.EXPERTS: (
            submodules.mlp_layer if _is_dense(submodules) else submodules.moe_layer
        ),
        BlockFamily.MAMBA: submodules.mamba_layer,
        BlockFamily.RECURRENT: submodules.recurrent_layer,
    }
    spec = specs.get(family, IdentityOp)
    if spec is IdentityOp:
        raise RuntimeRefusal(
            f"No layer is built for the block family {family.name.lower()}",
            given=f"{family.letter} in the pattern",
            allowed=", ".join(f"{f.letter} ({f.name.lower()})" for f in specs),
            hint="a pattern of these letters",
        )
    return spec
