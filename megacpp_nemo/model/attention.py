"""Attention behind one narrow adapter.

- `LatentAttention`: Megatron's multi-latent attention (MLA) for a hybrid stack, whatever the
  release passes to it.
- `LatentDotProduct`: its attention core where Transformer Engine is absent.
- `GroupedAttention`: Megatron's plain attention, told of document boundaries.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from megacpp_nemo.model.documents import attention_within_documents
from megacpp_nemo.model.generation_attention import attend_heads, attend_latents
from megacpp_nemo.model.generation_state import GenerationState, state_of, visible

_TAKES_OFFSET = "pp_layer_offset" in inspect.signature(MLASelfAttention.__init__).parameters


class LatentAttention(MLASelfAttention):
    """Megatron's multi-latent self-attention, for hybrid stacks of any release.

    Absorbs what drifts between releases: a `pp_layer_offset` that comes or goes, and a rotary
    embedding made by the model, which MLA refuses because it makes its own. Document
    boundaries of packed rows become an attention mask where the configuration asks for it.
    """

    def __init__(
        self, config: Any, *args: Any, pp_layer_offset: int | None = None, **kwargs: Any
    ) -> None:
        if _TAKES_OFFSET and pp_layer_offset is not None:
            kwargs["pp_layer_offset"] = pp_layer_offset
        if getattr(config, "experimental_attention_variant", None):
            # It speaks of every layer at once: upstream would give a dense core DSA's inputs.
            config = copy.copy(config)
            config.experimental_attention_variant = None
        super().__init__(config, *args, **kwargs)
        # Transformer Engine's projection is whole on every rank and needs none of this.
        if self.tp_group.size() > 1 and isinstance(self.linear_kv_down_proj, ColumnParallelLinear):
            self.linear_kv_down_proj.register_forward_hook(self._gather_latents)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over `hidden_states` `[seq, batch, hidden]`; return output and bias."""
        state = state_of(kwargs.get("inference_context") or kwargs.get("inference_params"))
        if state is not None:
            return attend_latents(self, hidden_states, state)
        kwargs.update(rotary_pos_emb=None, rotary_pos_cos=None, rotary_pos_sin=None)
        attention_mask = attention_within_documents(self.config, attention_mask, kwargs)
        return super().forward(hidden_states, attention_mask, **kwargs)

    def keys_in_sight(
        self, hidden_states: Tensor, query_latents: Tensor, state: GenerationState
    ) -> Tensor | None:
        """Return where the next tokens look as they are generated, true for what they see.

        Args:
            hidden_states: The layer's normalized input `[seq, batch, hidden]`.
            query_latents: `[seq, batch, q_lora_rank]`, behind their norm.
            state: What the layers carry.

        Returns:
            A mask that broadcasts to `[batch, heads, seq, tokens so far]`; None for all.
        """
        return visible(state, new=len(hidden_states), device=hidden_states.device)

    def _gather_latents(
        self, projection: nn.Module, inputs: Any, output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Return this rank's tokens with all columns, as a projection that is not split would.

        Given a split projection's columns, upstream gathers them by itself and then keeps, of
        the gradient of the rotary keys, which all heads share, only that of one rank's heads.
        Given whole columns, it gathers the rotary keys over the tokens and sums over the heads.
        """
        columns, bias = output
        whole = gather_from_tensor_model_parallel_region(columns, group=self.tp_group)
        return scatter_to_sequence_parallel_region(whole, group=self.tp_group), bias


class LatentDotProduct(DotProductAttention):
    """Megatron's torch attention core, for values of another width than the keys.

    Upstream's class takes neither `k_channels` nor `v_channels`, which MLA passes, and sizes
    its output by the query heads' width.
    """

    def __init__(
        self,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


class GroupedAttention(SelfAttention):
    """Megatron's grouped-query self-attention, told where documents begin in packed rows."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over `hidden_states` `[seq, batch, hidden]`; return output and bias."""
        state = state_of(kwargs.get("inference_context") or kwargs.get("inference_params"))
        if state is not None:
            return attend_heads(self, hidden_states, state, kwargs.get("rotary_pos_emb"))
        attention_mask = attention_within_documents(self.config, attention_mask, kwargs)
        return super().forward(hidden_states, attention_mask, **kwargs)
