"""DeepSeek sparse attention (DSA, DeepSeek-V3.2) over multi-latent attention.

Every query attends to the keys that the indexer scores best. The selection has no gradient: the
indexer learns from its own loss only, which reaches no other weight.

- `SparseLatentAttention`: latent attention with a sparse core; its other parameters, and their
  names, are those of a dense layer.
- `SparseDotProduct`: the core, with the indexer and its loss.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from megatron.core import num_microbatches_calculator as calculator
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.experimental_attention_variant.dsa import DSAttention
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.shapes import SparseAttentionShape
from megacpp_nemo.model.attention import LatentAttention
from megacpp_nemo.model.documents import DocumentBoundaries
from megacpp_nemo.model.gathered_attention import attend_gathered, attend_masked, gathering_pays
from megacpp_nemo.model.generation_state import GenerationState, append, visible
from megacpp_nemo.model.indexer import (
    as_indices,
    hidden_keys,
    index_scores_by_head,
    indexer_loss,
    select,
)
from megacpp_nemo.model.limits import refuse_indexer
from megacpp_nemo.model.unused import zero_of


class SparseLatentAttention(LatentAttention):
    """Latent attention to the keys that an indexer chooses.

    Args:
        config: Megatron configuration.
        indexer: Shape of the indexer, its loss and how many keys it chooses.

    Raises:
        RuntimeRefusal: If the configuration asks for what the indexer cannot do.
    """

    def __init__(
        self, config: Any, *args: Any, indexer: SparseAttentionShape, **kwargs: Any
    ) -> None:
        refuse_indexer(config, indexer)
        own = copy.copy(config)
        own.dsa_indexer_n_heads = indexer.indexer_num_heads
        own.dsa_indexer_head_dim = indexer.indexer_head_dim
        own.dsa_indexer_topk = indexer.indexer_topk
        own.dsa_indexer_loss_coeff = indexer.indexer_loss_coeff
        super().__init__(own, *args, **kwargs)
        self.indexer_shape = indexer
        # The core multiplies by this weight too, whose gradient a fused product would replace.
        for switch in ("gradient_accumulation_fusion", "fuse_wgrad_accumulation"):
            if hasattr(self.linear_kv_up_proj, switch):
                setattr(self.linear_kv_up_proj, switch, False)
        # Megatron's schedule tells the configuration it was given how it scales losses.
        self.core_attention.schedule_config = config

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over `hidden_states` `[seq, batch, hidden]`; return output and bias.

        Raises:
            RuntimeRefusal: For Megatron's `thd` packing, and Megatron's inference contexts.
        """
        packed = kwargs.get("packed_seq_params")
        if packed is not None and not isinstance(packed, DocumentBoundaries):
            raise RuntimeRefusal(
                "Sparse attention (DSA) does not read Megatron's packed (thd) sequences",
                given=f"packed_seq_params with qkv_format={packed.qkv_format!r}",
                allowed="rows of shape [batch, seq] with document_ids",
                hint="a data module of this package, or one document per row",
            )
        return super().forward(hidden_states, attention_mask, **kwargs)

    def keys_in_sight(
        self, hidden_states: Tensor, query_latents: Tensor, state: GenerationState
    ) -> Tensor:
        """Return `[batch, 1, seq, tokens so far]`, true for what the indexer chooses.

        The indexer's keys are carried beside the latents.
        """
        indexer = self.core_attention.indexer
        queries, keys, weights = indexer.project(
            hidden_states, query_latents, position=state.position
        )
        keys = append(state, self.layer_number, "index_keys", keys)
        earlier = visible(state, new=len(queries), device=keys.device)
        hidden = keys.new_zeros((), dtype=torch.bool) if earlier is None else ~earlier
        scores = index_scores_by_head(queries, keys, weights).masked_fill_(hidden, float("-inf"))
        return select(scores, hidden, self.config.dsa_indexer_topk).unsqueeze(1)

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return Megatron's queries, keys, values and latents, and show the core what it needs."""
        found = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        self.core_attention.layer_input = LayerInput(
            hidden_states.detach(), found[3].detach(), found[4], self.linear_kv_up_proj.weight
        )
        return found


class LayerInput(NamedTuple):
    """What the core needs of its layer besides queries, keys and values.

    Sequences are this rank's part under sequence parallelism.

    Args:
        hidden: `[seq, batch, hidden]`, the layer's normalized input, for the indexer.
        query_latent: `[seq, batch, q_lora_rank]`, after its norm, for the indexer.
        latent: `[seq, batch, kv_lora_rank]`, of keys and values, after its norm.
        up: `[heads * (key width + value width), kv_lora_rank]`, the projection of `latent`.
    """

    hidden: Tensor
    query_latent: Tensor
    latent: Tensor
    up: Tensor


class SparseDotProduct(DSAttention):
    """Megatron's sparse attention core, within documents and in the memory of one head.

    Attributes:
        layer_input: What the layer shows it before each forward pass.
        gathers: Whether to gather the chosen keys or to mask the others; None for what pays.
        schedule_config: The configuration that Megatron's schedule knows.
    """

    layer_input: LayerInput | None = None
    gathers: bool | None = None
    schedule_config: Any = None
    _loss_sum: Tensor | None = None
    _loss_count: int = 0

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """Return the mixed values `[seq, batch, heads * value width]`.

        Args:
            query: `[seq, batch, heads, width]`, this rank's heads.
            key: `[seq, batch, heads, width]`.
            value: `[seq, batch, heads, value width]`.
            attention_mask: `[batch or 1, 1, seq, seq]`, true where a key must not be seen; later
                keys never are.
        """
        shown, self.layer_input = self.layer_input, None
        if shown is None:
            raise RuntimeRefusal(
                "A sparse attention core reads what its layer shows it",
                given="a core that is called by itself",
                allowed="a call of its SparseLatentAttention layer",
                hint="the layer's forward pass",
            )
        coefficient = self.config.dsa_indexer_loss_coeff
        trains = bool(self.training and torch.is_grad_enabled())
        learns = bool(trains and coefficient)
        with torch.set_grad_enabled(learns):
            index = self.indexer.project(shown.hidden, shown.query_latent)
        hidden = hidden_keys(query.size(0), attention_mask, query.device)
        with torch.no_grad():
            scores = index_scores_by_head(*index).masked_fill_(hidden, float("-inf"))
            chosen = select(scores, hidden, self.config.dsa_indexer_topk)
        mixed = self._attend(query, key, value, shown, chosen).flatten(2)
        # A query whose scores are not numbers chooses nothing, which must not pass for a result.
        broken = scores.amax(-1).isnan().t().unsqueeze(-1)
        mixed = mixed.masked_fill(broken, float("nan"))
        if not learns:
            return mixed + zero_of(self.indexer).to(mixed.dtype) if trains else mixed
        if self.config.dsa_indexer_use_sparse_loss:
            hidden = ~chosen
            scores = scores.masked_fill_(hidden, float("-inf"))
        target = self._target(query.detach(), key.detach(), hidden)
        loss = indexer_loss(index[0], index[1], index[2], scores, target)
        self._count(loss)
        joined: Tensor = _Join.apply(mixed, loss * (coefficient * self._loss_scale()))
        return joined

    def take_losses(self) -> tuple[Tensor | None, int]:
        """Return the sum of the losses since it was last asked for, in nats, and their number."""
        taken = self._loss_sum, self._loss_count
        self._loss_sum, self._loss_count = None, 0
        return taken

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, shown: LayerInput, chosen: Tensor
    ) -> Tensor:
        """Return the mixed values `[seq, batch, heads, value width]`."""
        dropout = self.config.attention_dropout if self.training else 0.0
        topk = min(self.config.dsa_indexer_topk, key.size(0))
        gathers = self.gathers
        if gathers is None:
            gathers = not dropout and gathering_pays(key.size(0), topk, key.device)
        if gathers:
            latent, group = shown.latent, self.indexer.pg_collection.tp
            if self.config.sequence_parallel and group.size() > 1:
                latent = gather_from_sequence_parallel_region(latent, group=group)
            # All heads have the same rotated channels.
            rotary = key[:, :, 0, -self.config.qk_pos_emb_head_dim :]
            best, there = as_indices(chosen, topk)
            scale = self.softmax_scale
            return attend_gathered(query, latent, rotary, shown.up, best, there, scale)
        # Heads are split over the tensor ranks, which must not drop alike.
        with get_cuda_rng_tracker().fork() if dropout else nullcontext():
            return attend_masked(query, key, value, chosen, self.softmax_scale, dropout)

    @torch.no_grad()
    def _target(self, query: Tensor, key: Tensor, hidden: Tensor) -> Tensor:
        """Return the mean of all ranks' heads' attention to the keys that are not hidden."""
        total = torch.zeros(query.size(1), query.size(0), key.size(0), device=query.device)
        for q, k in zip(query.unbind(2), key.unbind(2), strict=True):
            logits = torch.einsum("sbd,tbd->bst", q.float(), k.float()) * self.softmax_scale
            total += logits.masked_fill_(hidden, float("-inf")).softmax(-1)
        group = self.indexer.pg_collection.tp
        if group.size() > 1:
            torch.distributed.all_reduce(total, group=group)
        return total / total.sum(-1, keepdim=True)

    def _loss_scale(self) -> Tensor | float:
        """Return the factor of a micro-batch's loss in Megatron's schedule."""
        # Without Megatron's counter the model is run by hand, a batch at a time.
        known = calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None
        scale = 1 / calculator.get_num_microbatches() if known else 1.0
        if self.schedule_config is None or self.schedule_config.grad_scale_func is None:
            return scale
        device = next(self.indexer.parameters()).device
        factor: Tensor = self.schedule_config.grad_scale_func(torch.ones((), device=device))
        return factor.squeeze() * scale

    def _count(self, loss: Tensor) -> None:
        loss = loss.detach()
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
        self._loss_count += 1


class _Join(torch.autograd.Function):
    """A tensor as it is; its backward pass is a loss's, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (loss,) = ctx.saved_tensors
        return gradient, torch.ones_like(loss)
