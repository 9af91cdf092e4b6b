"""What a packed row is made of: pieces of documents, and where each lies in the files.

A piece (document, offset, length) counts in documents as they are served. Resolving it once into
the spans where it is stored serves the tokens and every channel beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


class Span(NamedTuple):
    """Neighbouring tokens of a document as it is stored, or one added token."""

    document: int
    offset: int
    length: int
    added: int | None = None
    """Which of the tokens that its order adds, or None for stored ones."""


class DocumentOrder(Protocol):
    """How the documents of an indexed file are served."""

    indexed: Any
    """Megatron's `IndexedDataset` of tokens."""
    fill: tuple[int, ...]
    """Ids of the tokens that the order adds."""

    def lengths(self, documents: Indices) -> Indices:
        """Return the tokens of some documents, added ones included, [documents]."""

    def spans(self, documents: Indices, offsets: Indices, lengths: Indices) -> list[Span]:
        """Return where pieces of documents are stored, in the order they are read.

        Args:
            documents: The document of each piece, [pieces].
            offsets: Where in the served document the piece begins, [pieces].
            lengths: Its tokens, [pieces].
        """


class StoredOrder:
    """Documents as they are stored."""

    fill: tuple[int, ...] = ()

    def __init__(self, indexed: Any) -> None:
        self.indexed = indexed

    def lengths(self, documents: Indices) -> Indices:
        """Return the tokens of some documents, [documents]."""
        stored: Indices = self.indexed.sequence_lengths[documents].astype(np.int64)
        return stored

    def spans(self, documents: Indices, offsets: Indices, lengths: Indices) -> list[Span]:
        """Return the pieces themselves."""
        pieces = (documents.tolist(), offsets.tolist(), lengths.tolist())
        return [Span(*piece) for piece in zip(*pieces, strict=True)]


def read_spans(indexed: Any, spans: Sequence[Span], fill: Sequence[int], out: Indices) -> Indices:
    """Write what an indexed file holds at `spans` to the head of `out`, and return `out`.

    Args:
        indexed: Megatron's `IndexedDataset`, of tokens or of a channel.
        spans: What to read, in order.
        fill: What to write for each of the added tokens.
        out: As long as the spans together, or longer.
    """
    at = 0
    for document, offset, length, added in spans:
        if added is not None:
            out[at] = fill[added]
        elif length:
            out[at : at + length] = indexed.get(document, offset, length)
        at += length
    return out


def row_pieces(
    samples: npt.NDArray[np.integer[Any]],
    documents: npt.NDArray[np.integer[Any]],
    order: DocumentOrder,
    position: int,
    extra: int,
) -> tuple[Indices, Indices, Indices]:
    """Return documents, offsets and lengths of the pieces of one row, each [pieces].

    Args:
        samples: Megatron's sample index, [rows + 1, 2]: place in `documents`, offset therein.
        documents: Megatron's document index, every epoch's documents in turn.
        order: How documents are served.
        position: The row's place in `samples`.
        extra: Tokens that the row takes from the next one, as the last label: 1 or 0.
    """
    (first, offset), (last, end) = samples[position : position + 2].tolist()
    numbers = np.asarray(documents[first : last + 1], dtype=np.int64)
    stops = order.lengths(numbers)
    stops[-1] = end + extra
    starts = np.zeros_like(stops)
    starts[0] = offset
    return numbers, starts, stops - starts
