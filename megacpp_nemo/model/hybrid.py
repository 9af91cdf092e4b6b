"""Megatron's Mamba model, with our input side and multi-token prediction (MTP).

Megatron 0.16 accepts `mtp_num_layers` on it and builds nothing. Here the last pipeline stage has
the depths of `prediction`, a copy of the embedding under pipeline parallelism, and joins the
depths' losses to training. The embedding is `InputEmbedding`, whose n-gram memory and structure
channels read what Megatron's model does not hand on. Without any of these it is Megatron's model.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.mamba import MambaModel
from megatron.core.transformer.multi_token_prediction import (
    MTPLossAutoScaler,
    roll_tensor,
    tie_word_embeddings_state_dict,
)
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor, nn

from megacpp_nemo.model.documents import DocumentBoundaries
from megacpp_nemo.model.embedding import InputEmbedding
from megacpp_nemo.model.prediction import DepthLosses, PredictionBlock
from megacpp_nemo.model.tied import as_replicas, order_parts, refuse_drift, tie
from megacpp_nemo.model.unused import zero_of


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """What the depths need of a micro-batch besides hidden states; all `[batch, seq]`."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    loss_mask: Tensor | None


class HybridMambaModel(MambaModel):
    """Megatron's Mamba model whose last pipeline stage may have prediction depths.

    Takes the arguments of Megatron's class.

    Attributes:
        depth_losses: The depths' losses since they were last taken, on the last stage.
    """

    embedding: InputEmbedding

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._batch: _Batch | None = None
        self.depth_losses = DepthLosses()
        super().__init__(*args, **kwargs)

    @property
    def mtp_process(self) -> bool:
        """Whether this stage has the depths, by the name that Megatron asks for."""
        return bool(self.config.mtp_num_layers and self.post_process)

    def setup_embeddings_and_output_layer(self) -> None:
        """Tie what stages share, which the depths' embedding is part of.

        Megatron calls this once everything else is built.
        """
        if self.pre_process:
            ours = self._input_embedding()
            ours.keep_tables_of(self.embedding)
            self.embedding = ours
        if self.mtp_process:
            self._add_depths()
        super().setup_embeddings_and_output_layer()
        if self.has_tied_inputs:
            tie(self.embedding, self.embd_group, copy=not self.pre_process)

    @property
    def has_tied_inputs(self) -> bool:
        """Whether this stage's embedding is one of several that are kept equal."""
        elsewhere = self.config.mtp_num_layers and not (self.pre_process and self.post_process)
        return bool(elsewhere and (self.pre_process or self.post_process))

    def _input_embedding(self) -> InputEmbedding:
        embedding = InputEmbedding(
            config=self.config,
            vocab_size=self.vocab_size,
            max_sequence_length=self.max_sequence_length,
            position_embedding_type=self.position_embedding_type,
            tp_group=self.pg_collection.tp,
        )
        order_parts(embedding)
        return embedding

    def _add_depths(self) -> None:
        if not self.pre_process:
            self.embedding = self._input_embedding()
            # So that the optimizer treats both copies alike.
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
            if self.share_embeddings_and_output_weights:
                self.output_layer.weight = None
        self.mtp = PredictionBlock(
            config=self.config,
            spec=self.mamba_stack_spec.submodules.mtp_block_spec,
            pg_collection=self.pg_collection,
        )
        # Megatron's forward pass has no place between the stack and the output head.
        self.decoder.register_forward_hook(self._predict, with_kwargs=True)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Return the weight that this stage shares with another: of the embedding if it has one."""
        if self.mtp_process:
            weight: Tensor = self.embedding.word_embeddings.weight
            return weight
        return super().shared_embedding_or_output_weight()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        *args: Any,
        loss_mask: Tensor | None = None,
        structure: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return what Megatron's model returns: logits, or with labels the main head's losses.

        In training the depths' losses join the backward pass. They are left out without labels,
        in evaluation and in inference.

        Args:
            input_ids: Tokens `[batch, seq]`.
            position_ids: Their positions `[batch, seq]`.
            attention_mask: Megatron's mask.
            decoder_input: Embedded tokens `[seq, batch, hidden]`, instead of `input_ids`.
            labels: The next tokens `[batch, seq]`.
            *args: Megatron's further arguments.
            loss_mask: `[batch, seq]`, 0 where a label does not count; all count if not given.
            structure: Ids `[batch, seq]` of the structure channels by name; None if all are absent.
            **kwargs: Megatron's further arguments.
        """
        if self.training and self.has_tied_inputs:
            refuse_drift(self)
        if self.mtp_process and self.training and labels is not None:
            self._batch = _Batch(
                input_ids=input_ids, position_ids=position_ids, labels=labels, loss_mask=loss_mask
            )
        try:
            with self._reading(input_ids, structure, kwargs):
                output: Tensor = super().forward(
                    input_ids, position_ids, attention_mask, decoder_input, labels, *args, **kwargs
                )
            return output
        finally:
            self._batch = None

    def _reading(
        self, tokens: Tensor, structure: Mapping[str, Tensor] | None, given: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """Return the context in which this stage's embedding, if it has one, knows the batch."""
        if not (self.pre_process or self._batch is not None):
            return nullcontext()
        boundaries = given.get("packed_seq_params")
        documents = boundaries.document_ids if isinstance(boundaries, DocumentBoundaries) else None
        return self.embedding.reading(
            tokens,
            document_ids=documents,
            structure=structure,
            inference_context=given.get("inference_context"),
        )

    def _predict(
        self, decoder: nn.Module, arguments: Any, given: dict[str, Any], hidden: Tensor
    ) -> Tensor | None:
        """Return the stack's output with the depths' losses joined; None leaves it as it is."""
        if self._batch is None:
            return None
        weight = self.config.mtp_loss_scaling_factor / self.config.mtp_num_layers
        # With no weight the depths are only measured: the load-balancing losses of their experts
        # would otherwise still train the model.
        with torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
            loss = weight * self._loss(hidden, self._batch, given)
        if not weight:
            loss = zero_of(self.mtp, self.embedding)
        joined: Tensor = MTPLossAutoScaler.apply(hidden, loss.view(1))
        return joined

    def _loss(self, hidden: Tensor, batch: _Batch, given: dict[str, Any]) -> Tensor:
        """Return the sum over depths of a micro-batch's mean losses, and count each of them.

        Labels and mask are rolled by one for each depth, over the whole row: what is masked at
        the end grows with the depth, and a target may lie in the next document, as it may for
        the main head.
        """
        chain = self.mtp(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            hidden_states=hidden,
            attention_mask=given.get("attention_mask"),
            rotary_pos_emb=given.get("rotary_pos_emb"),
            packed_seq_params=given.get("packed_seq_params"),
            embedding=self.embedding,
        )
        tied = self.share_embeddings_and_output_weights
        head = self.shared_embedding_or_output_weight() if tied else None
        labels, mask = batch.labels, batch.loss_mask
        mask = torch.ones_like(labels) if mask is None else mask
        mask = mask.float()
        tokens = mask.sum()
        losses = []
        for states in chain.chunk(1 + self.config.mtp_num_layers)[1:]:
            labels, _ = roll_tensor(labels)
            mask, counted = roll_tensor(mask)
            logits, _ = self.output_layer(states, weight=head)
            loss = (mask * self.compute_language_model_loss(labels, logits)).sum()
            losses.append(loss / counted.clamp(min=1))
        self.depth_losses.add(torch.stack(losses).detach())
        total = torch.stack(losses).sum()
        # Megatron then divides all gradients by the main head's tokens.
        return total * tokens if self.config.calculate_per_token_loss else total

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the stage's sharded state; the embedding's copy is a replica of the first one."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.mtp_process and not self.pre_process:
            tie_word_embeddings_state_dict(
                state,
                self.embedding.word_embeddings.weight,
                f"{prefix}embedding.word_embeddings.weight",
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
            as_replicas(state, f"{prefix}embedding.")
        return state
