"""Megatron's GPT rows with the document of each position, and its code-structure channels.

Documents are packed one after another into rows of fixed length, so one row can hold the end of
one document and the start of the next. `document_ids` says which is which, for mixers and
structure embeddings that must not carry state across a document's end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megacpp_nemo.data.channels import Channel, open_channels
from megacpp_nemo.data.fim import Fim, FimOrder
from megacpp_nemo.data.pieces import (
    DocumentOrder,
    Indices,
    Span,
    StoredOrder,
    read_spans,
    row_pieces,
)


@dataclass
class DocumentDatasetConfig(GPTDatasetConfig):
    """Megatron's configuration, and what `DocumentDataset` adds to it."""

    channels: tuple[str, ...] = ()
    """Structure channels to serve. A cached sample order is not named by them, as it does not
    depend on them."""

    fim: Fim | None = None
    """Fill-in-the-middle, in the training split only."""


class _Row(NamedTuple):
    """A row as it lies in the files."""

    spans: list[Span]
    lengths: Indices
    """Tokens of each piece, [pieces]."""
    text: Indices
    """The pieces' tokens, padded, [seq + 1]; [seq] where no extra token is drawn."""


class DocumentDataset(GPTDataset):
    """`GPTDataset` whose rows also have `document_ids` and structure; all else is upstream's.

    With `config.fim` the documents of the training split are permuted (see `fim`). Those of the
    other splits stay plain, so that losses can be compared between runs.

    Raises:
        DataError: A channel's files are missing, damaged or not aligned with the tokens.
    """

    config: DocumentDatasetConfig
    document_index: Any
    sample_index: Any
    shuffle_index: Any

    def __init__(
        self,
        indexed_dataset: Any,
        dataset_path: str | None,
        indexed_indices: npt.NDArray[np.int32],
        num_samples: int | None,
        index_split: Split,
        config: DocumentDatasetConfig,
    ) -> None:
        self._channels: tuple[Channel, ...] = ()
        if config.channels:
            self._channels = open_channels(indexed_dataset.path_prefix, config.channels)
        self._order: DocumentOrder = StoredOrder(indexed_dataset)
        served = indexed_dataset
        if config.fim and index_split is Split.train:
            self._order = served = FimOrder(indexed_dataset, config.fim, config.random_seed)
        self._resolved: _Row | None = None
        super().__init__(served, dataset_path, indexed_indices, num_samples, index_split, config)
        if config.path_to_cache and not isinstance(self.shuffle_index, np.memmap):
            # Who builds an order holds it in memory; read back, it is mapped from the files.
            orders = self._build_document_sample_shuffle_indices()
            self.document_index, self.sample_index, self.shuffle_index = orders

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "fim"]

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        """Return upstream's row, `document_ids` [seq] and, if channels are served, `structure`.

        `document_ids`, int64, are 0 at the first position and grow by one where a document
        begins: at the next piece, and after an end-of-document token within a piece. Padding at
        the end of a row is a document of its own.

        `structure` has int64 ids [seq] by channel. Padding, and the tokens that
        fill-in-the-middle adds, are absent in all of them.

        Raises:
            DataError: A channel's file holds an id that the channel does not have.
        """
        row = self._resolved = self._resolve(0 if idx is None else idx)
        try:
            item: dict[str, Any] = super().__getitem__(idx)
        finally:
            self._resolved = None
        seq = item["tokens"].numel()
        item["document_ids"] = torch.from_numpy(
            document_ids(row.text, row.lengths, self._eod_id)[:seq]
        )
        if self._channels:
            item["structure"] = {
                channel.name: torch.from_numpy(channel.read(row.spans, row.text.size)[:seq])
                for channel in self._channels
            }
        return item

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[Indices, Indices]:
        """Return a row's tokens and documents, where upstream reads them from the file."""
        row = self._resolved or self._resolve(idx)
        documents = np.array([span.document for span in row.spans], dtype=np.int64)
        # Upstream writes to it, and the document ids are still to be read off it.
        return row.text.copy(), documents

    def _resolve(self, idx: int) -> _Row:
        extra = int(self.config.add_extra_token_to_sequence)
        position = int(self.shuffle_index[idx])
        pieces = row_pieces(self.sample_index, self.document_index, self._order, position, extra)
        spans = self._order.spans(*pieces)
        text = np.full(self.config.sequence_length + extra, self._pad_token_id, dtype=np.int64)
        read_spans(self._order.indexed, spans, self._order.fill, text)
        return _Row(spans, pieces[2], text)

    @cached_property
    def _eod_id(self) -> int:
        # NeMo's tokenizer converts the token's text at every access.
        return int(self.config.tokenizer.eod)


def document_ids(text: Indices, lengths: Indices, eod_id: int) -> Indices:
    """Return the 0-based document of each position of a packed row.

    Args:
        text: Token ids, [seq]; what is beyond the pieces is padding.
        lengths: Tokens of each piece of a document, [pieces].
        eod_id: The token that ends a document, itself part of the document it ends.

    Returns:
        Document ids, [seq], int64.
    """
    ends = lengths.cumsum()
    begins = np.zeros(text.size + 1, dtype=np.int64)
    begins[1 : ends[-1] + 1] = text[: ends[-1]] == eod_id
    begins[ends] = 1
    begins[0] = 0
    ids: Indices = begins.cumsum()[: text.size]
    return ids
