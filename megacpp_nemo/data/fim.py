"""Fill-in-the-middle (FIM), after Bavarian et al. (arXiv:2207.14255): documents cut and reordered.

A model that reads left to right learns to fill a gap from documents whose middle comes last:

- PSM: `<prefix> prefix <suffix> suffix <middle> middle end`
- SPM: `<prefix> <suffix> suffix <middle> prefix middle end`, the paper's second variant

Whole documents are permuted, before they are packed into rows. Nothing is written: `FimOrder`
serves an indexed file as if its documents lay in that order, so that packing, shuffling,
blending and resuming stay Megatron's. Which documents are permuted, and where they are cut, is
a function of the seed, the file's content and the document's number alone: it is the same in
every epoch, on every rank and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.pieces import Indices, Span, read_spans
from megacpp_nemo.data.tokenizer import SPECIAL_TOKENS

_, PREFIX_TOKEN, MIDDLE_TOKEN, SUFFIX_TOKEN, _ = SPECIAL_TOKENS
ADDED_TOKENS = 3
# Tokens of text, the end left out, that a document needs to be cut into three.
SHORTEST = 3
PLAIN, PSM, SPM = 0, 1, 2
_DRAWS = np.uint64(4)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
# The added tokens by their place in `FimOrder.fill`.
_PREFIX, _SUFFIX, _MIDDLE = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Sentinels:
    """Ids of the tokens that stand before the parts of a permuted document."""

    prefix: int
    suffix: int
    middle: int

    @classmethod
    def of(cls, tokenizer: Any) -> Sentinels:
        """Return those of a NeMo tokenizer over a transformers one.

        Raises:
            DataError: The tokenizer lacks one.
        """
        known = tokenizer.tokenizer.get_vocab()
        names = (PREFIX_TOKEN, SUFFIX_TOKEN, MIDDLE_TOKEN)
        if missing := [name for name in names if name not in known]:
            raise DataError(
                "The tokenizer has no tokens for fill-in-the-middle",
                given=f"fim_rate above 0 and a vocabulary without {', '.join(missing)}",
                allowed=f"a tokenizer with the special tokens {', '.join(names)}",
                hint="data.fim_rate=0, or encode the data with a tokenizer trained here",
            )
        prefix, suffix, middle = (int(known[name]) for name in names)
        return cls(prefix=prefix, suffix=suffix, middle=middle)


@dataclass(frozen=True, kw_only=True)
class Fim:
    """How documents are permuted.

    Args:
        rate: Share of the documents to permute, of those that can be cut in three.
        spm_rate: Share of the permuted ones in SPM order; the others are PSM.
        sentinels: The tokens that mark the parts.
    """

    rate: float
    spm_rate: float
    sentinels: Sentinels

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What Megatron's name of a cached sample order takes in."""
        return asdict(self)


class Cuts(NamedTuple):
    """How each of some documents is served; all int64 [documents]."""

    order: Indices
    """PLAIN, PSM or SPM."""
    first: Indices
    """Where the middle begins."""
    second: Indices
    """Where the suffix begins."""


class FimOrder:
    """An indexed file whose documents are partly permuted; reads like Megatron's dataset.

    Args:
        indexed: Megatron's `IndexedDataset` of tokens.
        fim: How to permute.
        seed: Chooses the documents and the cuts, together with the file's content.
    """

    def __init__(self, indexed: Any, fim: Fim, seed: int) -> None:
        self.indexed, self.fim = indexed, fim
        self.path_prefix = indexed.path_prefix
        ids = fim.sentinels
        self.fill: tuple[int, ...] = (ids.prefix, ids.suffix, ids.middle)
        self._stream = _stream_of(indexed.sequence_lengths, seed)

    def __len__(self) -> int:
        return len(self.indexed)

    @property
    def sequence_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each document with its sentinels, [documents]; computed at every access."""
        return self.lengths(np.arange(len(self))).astype(np.int32)

    def lengths(self, documents: Indices) -> Indices:
        """Return the tokens of some documents, sentinels included, [documents]."""
        stored = self.indexed.sequence_lengths[documents].astype(np.int64)
        return stored + ADDED_TOKENS * (self._cuts(documents, stored).order != PLAIN)

    def spans(self, documents: Indices, offsets: Indices, lengths: Indices) -> list[Span]:
        """Return where pieces of documents are stored, in the order they are read.

        Args:
            documents: The document of each piece, [pieces].
            offsets: Where in the permuted document the piece begins, [pieces].
            lengths: Its tokens, sentinels included, [pieces].
        """
        stored = self.indexed.sequence_lengths[documents].astype(np.int64)
        cuts = self._cuts(documents, stored)
        numbers = (documents, offsets, lengths, stored, *cuts)
        pieces = zip(*(values.tolist() for values in numbers), strict=True)
        return [span for piece in pieces for span in _piece(*piece)]

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> Indices:
        """Return the tokens of a permuted document, or `length` of them from `offset` on."""
        documents = np.array([idx])
        if length is None:
            length = int(self.lengths(documents)[0]) - offset
        spans = self.spans(documents, np.array([offset]), np.array([length]))
        return read_spans(self.indexed, spans, self.fill, np.empty(length, dtype=np.int64))

    def _cuts(self, documents: Indices, stored: Indices) -> Cuts:
        """Draw for some documents; `stored` counts their tokens."""
        drawn, kind, one, other = _uniform(self._stream, documents)
        text = stored - 1
        order = np.where(kind < self.fim.spm_rate, SPM, PSM)
        order[(drawn >= self.fim.rate) | (text < SHORTEST)] = PLAIN
        # Two different places of text + 1, the ends included, every pair as likely as another.
        first = (one * (text + 1)).astype(np.int64)
        second = (other * text).astype(np.int64)
        second += second >= first
        return Cuts(order, np.minimum(first, second), np.maximum(first, second))


def undo_fim(tokens: Sequence[int], ids: Sentinels) -> list[int]:
    """Return the document that a permuted one was made from; a plain one comes back as it is.

    Args:
        tokens: A whole document, the end-of-document token last. Its text must not contain
            sentinels of its own.
        ids: The sentinels.
    """
    document = [int(token) for token in tokens]
    if not document or document[0] != ids.prefix:
        return document
    suffix, middle = document.index(ids.suffix), document.index(ids.middle)
    # In SPM nothing stands before the suffix, and the prefix before the middle.
    before, after = document[1:suffix], document[suffix + 1 : middle]
    *inside, end = document[middle + 1 :]
    return [*before, *inside, *after, end]


def _piece(
    document: int,
    offset: int,
    length: int,
    stored: int,
    order: int,
    first: int,
    second: int,
) -> list[Span]:
    """Return the spans of `length` tokens from `offset` on of a document cut like this."""
    if order == PLAIN:
        return [Span(document, offset, length)]
    end = stored - 1
    suffix = [(0, 1, _SUFFIX), (second, end - second, None), (0, 1, _MIDDLE)]
    if order == PSM:
        parts = [(0, 1, _PREFIX), (0, first, None), *suffix, (first, second - first, None)]
    else:
        parts = [(0, 1, _PREFIX), *suffix, (0, second, None)]
    parts.append((end, 1, None))
    spans, at = [], 0
    for source, count, added in parts:
        begin, stop = max(offset - at, 0), min(offset + length - at, count)
        if begin < stop:
            spans.append(Span(document, source + begin, stop - begin, added))
        at += count
    return spans


def _stream_of(lengths: npt.NDArray[np.int32], seed: int) -> int:
    """Return what the draws of a file start from: its content counts, not where it lies."""
    digest = hashlib.sha256(f"{seed} {len(lengths)}".encode())
    for part in (lengths[:4096], lengths[-4096:]):
        digest.update(np.ascontiguousarray(part, dtype="<i4").tobytes())
    return int.from_bytes(digest.digest()[:8], "little")


def _uniform(stream: int, documents: Indices) -> npt.NDArray[np.float64]:
    """Return four draws for each document, in [0, 1), [4, documents].

    The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), which can be read at any
    place: document n takes its outputs 4n to 4n + 3.
    """
    place = documents.astype(np.uint64) * _DRAWS + np.arange(1, 5, dtype=np.uint64)[:, None]
    state = np.uint64(stream) + place * _STEP
    state = (state ^ (state >> _SHIFTS[0])) * _FACTORS[0]
    state = (state ^ (state >> _SHIFTS[1])) * _FACTORS[1]
    state ^= state >> _SHIFTS[2]
    values: npt.NDArray[np.float64] = (state >> np.uint64(11)) * 2.0**-53
    return values
