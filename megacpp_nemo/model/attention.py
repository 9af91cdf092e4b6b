"""Multi-latent attention behind one narrow adapter.

- `LatentAttention`: Megatron's MLA for a hybrid stack, whatever the release passes to it.
- `LatentDotProduct`: the attention core where Transformer Engine is absent.
"""

from __future__ import annotations

import inspect
from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megacpp_nemo.model.documents import DocumentBoundaries

_TAKES_OFFSET = "pp_layer_offset" in inspect.signature(MLASelfAttention.__init__).parameters


class LatentAttention(MLASelfAttention):
    """Megatron's multi-latent self-attention, for hybrid stacks of any release.

    Absorbs what drifts between releases: a `pp_layer_offset` that comes or goes, and a rotary
    embedding made by the model, which MLA refuses because it makes its own. Document
    boundaries of packed rows become an attention mask where the configuration asks for it.
    """

    def __init__(self, *args: Any, pp_layer_offset: int | None = None, **kwargs: Any) -> None:
        if _TAKES_OFFSET and pp_layer_offset is not None:
            kwargs["pp_layer_offset"] = pp_layer_offset
        super().__init__(*args, **kwargs)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over `hidden_states` `[seq, batch, hidden]`; return output and bias."""
        kwargs.update(rotary_pos_emb=None, rotary_pos_cos=None, rotary_pos_sin=None)
        boundaries = kwargs.get("packed_seq_params")
        if isinstance(boundaries, DocumentBoundaries):
            kwargs["packed_seq_params"] = None
            if getattr(self.config, "reset_attention_mask", False):
                attention_mask = boundaries.attention_mask()
        return super().forward(hidden_states, attention_mask, **kwargs)


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
