"""Megatron's token embedding, with the hashed n-gram memory and the structure channels added.

Megatron's model hands its embedding tokens and positions. What the memory and the channels need
besides is given to `InputEmbedding.reading`, around the model's forward pass.

While a model generates, the memory looks back at tokens of earlier pieces, and a document ends
behind the state's end-of-document token; the channels are absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn

from megacpp_nemo.contract.structure import structure_channels
from megacpp_nemo.model.generation_state import enter, keep, state_of
from megacpp_nemo.model.ngram import NO_ROW, NgramMemory, check_vocabulary
from megacpp_nemo.model.shape import shape_of
from megacpp_nemo.model.structure import StructureEmbedding

# Of the embedding, in what a model carries while it generates: layers count from 1.
NUMBER = 0
TOKENS = "tokens"


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows of the tables for a micro-batch, `[batch, seq, tables]`; None for what is off."""

    ngrams: Tensor | None
    structure: Tensor | None


class InputEmbedding(LanguageModelEmbedding):
    """Megatron's embedding of tokens and positions, and what else the input side has.

    Takes the arguments of Megatron's class. Without `ngram_hash` and `structure` in the
    configuration it is Megatron's. What is added is dropped with the tokens, by one mask.

    Raises:
        RuntimeRefusal: If the vocabulary is too large for the n-gram hash.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        embedding = shape_of(config)[0].embedding
        self.ngram_hash: NgramMemory | None = None
        self.structure: StructureEmbedding | None = None
        if config.ngram_hash:
            check_vocabulary(self.vocab_size)
            self.ngram_hash = NgramMemory(config, embedding.ngram, self.tp_group)
        if config.structure:
            channels = structure_channels(config.structure)
            width = embedding.structure.bottleneck
            self.structure = StructureEmbedding(config, channels, width, self.tp_group)
        self._rows: _Rows | None = None
        # Megatron drops before anything could be added.
        self._drop: nn.Module = nn.Dropout(config.hidden_dropout)
        self.embedding_dropout = nn.Identity()

    def keep_tables_of(self, other: LanguageModelEmbedding) -> None:
        """Take the tables of tokens and positions that Megatron drew with the model."""
        self.word_embeddings = other.word_embeddings
        if self.add_position_embedding:
            self.position_embeddings = other.position_embeddings

    @contextmanager
    def reading(
        self,
        tokens: Tensor,
        *,
        document_ids: Tensor | None = None,
        structure: Mapping[str, Tensor] | None = None,
        inference_context: Any = None,
    ) -> Iterator[None]:
        """Give the memory and the channels what they read of a micro-batch.

        Args:
            tokens: `[batch, seq]`.
            document_ids: `[batch, seq]`, changing where a document begins; None if each row is
                one document.
            structure: Ids `[batch, seq]` by channel; None if all are absent.
            inference_context: What a model carries while it generates.

        Raises:
            RuntimeRefusal: If a channel is missing, or not as long as the tokens.
        """
        self._rows = self._rows_of(tokens, document_ids, structure, inference_context)
        try:
            yield
        finally:
            self._rows = None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        tokentype_ids: Any = None,
        *,
        ahead: int = 0,
    ) -> Tensor:
        """Return embedded tokens `[seq, batch, hidden]`.

        Outside of `reading` each row is one document, and the channels are absent.

        Args:
            input_ids: Tokens `[batch, seq]`, moved `ahead` places to the front.
            position_ids: Their positions `[batch, seq]`.
            tokentype_ids: Megatron's, of other models.
            ahead: Places by which a prediction depth looks ahead in the row that is read.
        """
        embedded: Tensor = super().forward(input_ids, position_ids, tokentype_ids)
        rows = self._rows or self._rows_of(input_ids, None, None, None)
        if self.ngram_hash is not None and rows.ngrams is not None:
            none = torch.full_like(rows.ngrams[:, :ahead], NO_ROW)
            embedded = embedded + self.ngram_hash(torch.cat((rows.ngrams[:, ahead:], none), dim=1))
        if self.structure is not None and rows.structure is not None:
            none = self.structure.rows(None, input_ids[:, :ahead])
            embedded = embedded + self.structure(
                torch.cat((rows.structure[:, ahead:], none), dim=1)
            )
        with get_cuda_rng_tracker().fork() if self.config.sequence_parallel else nullcontext():
            dropped: Tensor = self._drop(embedded)
        return dropped

    def _rows_of(
        self,
        tokens: Tensor,
        document_ids: Tensor | None,
        structure: Mapping[str, Tensor] | None,
        context: Any,
    ) -> _Rows:
        ngrams = channels = None
        if self.ngram_hash is not None:
            ngrams = self._ngrams(tokens, document_ids, context)
        if self.structure is not None:
            channels = self.structure.rows(structure, tokens)
        return _Rows(ngrams=ngrams, structure=channels)

    def _ngrams(self, tokens: Tensor, document_ids: Tensor | None, context: Any) -> Tensor:
        """Return the rows of n-grams that end at `tokens`, behind those of earlier pieces."""
        assert self.ngram_hash is not None
        hashed, state = self.ngram_hash.hash, state_of(context)
        if state is None:
            return hashed.rows(tokens, document_ids)
        carried = enter(state, NUMBER)
        longer = tokens if carried is None else torch.cat((carried[TOKENS], tokens), dim=1)
        keep(state, NUMBER, **{TOKENS: longer[:, -hashed.reach :].clone()})
        if state.end_id is not None:
            ends = longer == state.end_id
            document_ids = ends.cumsum(1) - ends.long()
        return hashed.rows(longer, document_ids)[:, -tokens.size(1) :]
