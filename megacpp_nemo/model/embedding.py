"""Megatron's token embedding, with the hashed n-gram memory and the structure channels added.

Megatron's model hands its embedding tokens and positions. What the memory and the channels need
besides is given to `InputEmbedding.reading`, around the model's forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from torch import Tensor

from megacpp_nemo.contract.structure import structure_channels
from megacpp_nemo.model.ngram import NO_ROW, NgramMemory
from megacpp_nemo.model.shape import shape_of
from megacpp_nemo.model.structure import StructureEmbedding


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows of the tables for a micro-batch, `[batch, seq, tables]`; None for what is off."""

    ngrams: Tensor | None
    structure: Tensor | None


class InputEmbedding(LanguageModelEmbedding):
    """Megatron's embedding of tokens and positions, and what else the input side has.

    Takes the arguments of Megatron's class. Without `ngram_hash` and `structure` in the
    configuration it is Megatron's.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        embedding = shape_of(config)[0].embedding
        self.ngram_hash: NgramMemory | None = None
        self.structure: StructureEmbedding | None = None
        if config.ngram_hash:
            self.ngram_hash = NgramMemory(config, embedding.ngram, self.tp_group)
        if config.structure:
            channels = structure_channels(config.structure)
            width = embedding.structure.bottleneck
            self.structure = StructureEmbedding(config, channels, width, self.tp_group)
        self._rows: _Rows | None = None

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
        added = []
        if self.ngram_hash is not None:
            none = torch.full_like(rows.ngrams[:, :ahead], NO_ROW)
            added.append(self.ngram_hash(torch.cat((rows.ngrams[:, ahead:], none), dim=1)))
        if self.structure is not None:
            none = self.structure.rows(None, input_ids[:, :ahead])
            added.append(self.structure(torch.cat((rows.structure[:, ahead:], none), dim=1)))
        for part in added:
            embedded = embedded + part
        return embedded

    def _rows_of(
        self,
        tokens: Tensor,
        document_ids: Tensor | None,
        structure: Mapping[str, Tensor] | None,
        context: Any,
    ) -> _Rows:
        ngrams = channels = None
        if self.ngram_hash is not None:
            ngrams = self.ngram_hash.hash.rows(tokens, document_ids)
        if self.structure is not None:
            channels = self.structure.rows(structure, tokens)
        return _Rows(ngrams=ngrams, structure=channels)
