"""A source file as its tokens, and what each structure channel says of them.

- `of_file`: a file by itself, cut as a byte-level tokenizer cuts text before it merges
- `in_corpus`: a file with the tokens and the dependency levels that a corpus has of it
- `Source.lines`: a part of either
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megacpp_nemo.cli.screen import visible
from megacpp_nemo.data.corpus_spec import SPLITS, Corpus, Split

LEVEL = "dependency_level"
_LINE_END = re.compile(rb"\r\n|\n")


class Piece(NamedTuple):
    """What is shown of a token: its number in the file, and its characters, as one sees them."""

    token: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """Tokens of a file, all or some lines of them.

    Args:
        name: The file's, as it is shown.
        content: All bytes of the file, UTF-8.
        starts: The byte that each token starts at [tokens].
        ids: Ids of the tokens [tokens]; None where no tokenizer made them.
        channels: Ids of each channel [tokens].
        notes: What is missing, and why, a sentence each.
        first: The first token that is shown.
        last: The token behind the last one that is shown.
        shown: The bytes that are shown, from and to.
    """

    name: str
    content: bytes
    starts: NDArray[np.int64]
    ids: NDArray[np.int64] | None
    channels: Mapping[str, NDArray[Any]]
    notes: tuple[str, ...]
    first: int
    last: int
    shown: tuple[int, int]

    @cached_property
    def line_starts(self) -> list[int]:
        """The byte that each line starts at."""
        starts = [0, *(found.end() for found in _LINE_END.finditer(self.content))]
        return starts[:-1] if len(starts) > 1 and starts[-1] == len(self.content) else starts

    @property
    def line_numbers(self) -> tuple[int, int]:
        """The first and the last line that are shown, from 1."""
        starts = np.array(self.line_starts)
        from_byte, to_byte = self.shown
        first, last = np.searchsorted(starts, [from_byte, max(from_byte, to_byte - 1)], "right")
        return int(first), int(last)

    def value(self, channel: str, token: int) -> int:
        """Return the id of a token."""
        return int(self.channels[channel][token])

    def of_shown(self, channel: str) -> NDArray[Any]:
        """Return the ids of the tokens that are shown."""
        return self.channels[channel][self.first : self.last]

    def text(self, token: int) -> str:
        """Return a token's characters; none of one that only ends a character begun before."""
        end = self.starts[token + 1] if token + 1 < len(self.starts) else len(self.content)
        start = self.starts[token] if token else 0
        return self.content[start:end].decode("utf-8")

    def pieces(self) -> Iterator[Piece]:
        """Yield what is shown of each token: control characters are spelled, lines end in LF."""
        low, high = self.shown
        ends = [*self.starts[1:].tolist(), len(self.content)]
        for token in range(self.first, self.last):
            start = int(self.starts[token]) if token else 0
            part = self.content[max(start, low) : min(ends[token], high)].decode("utf-8")
            yield Piece(token, spelled(part))

    def lines(self, first: int, last: int | None) -> Source:
        """Return the part from one line to another, both with it; None is the last one."""
        starts = self.line_starts
        low = starts[first - 1]
        high = len(self.content) if last is None or last >= len(starts) else starts[last]
        return self.between(low, high)

    def at_most(self, tokens: int) -> Source:
        """Return the part of whole lines that has no more tokens than that, or one line."""
        if self.last - self.first <= tokens:
            return self
        limit = int(self.starts[self.first + tokens])
        fitting = [start for start in self.line_starts if self.shown[0] < start <= limit]
        after = [start for start in self.line_starts if start > self.shown[0]]
        return self.between(self.shown[0], fitting[-1] if fitting else after[0])

    def between(self, low: int, high: int) -> Source:
        """Return the part from one byte up to another."""
        first = max(int(np.searchsorted(self.starts, low, "right")) - 1, 0)
        last = int(np.searchsorted(self.starts, high, "left"))
        # Of tokens that start where the part does, the first is the one that has its character.
        first = int(np.searchsorted(self.starts, self.starts[first], "left"))
        return replace(self, first=first, last=max(last, first + 1), shown=(low, high))


def spelled(text: str) -> str:
    r"""Return text with what would not be seen spelled as Python does; tabs and lines stay."""
    parts = text.replace("\r\n", "\n").split("\t")
    return "\t".join(visible(part) for part in parts)


def of_file(name: str, content: bytes) -> Source:
    """Return a file by itself: no token ids, no dependency levels."""
    from tokenizers import pre_tokenizers

    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # It spells each byte as one character.
    sizes = [len(piece) for piece, _ in cut.pre_tokenize_str(content.decode("utf-8"))]
    starts = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
    notes = (
        "Pieces that a byte-level tokenizer starts from, no tokens, and no dependency levels: "
        "--data DIR takes both from a corpus.",
    )
    return _source(name, content, starts, None, {}, notes)


def in_corpus(name: str, path: Path, content: bytes, folder: Path) -> Source:
    """Return a file with the tokenizer of a corpus, and the dependency levels in it.

    Raises:
        DataError: If the corpus cannot be read.
    """
    from megacpp_nemo.data.corpus_folder import open_folder
    from megacpp_nemo.data.positions import DocumentEncoder

    corpus = open_folder(folder)
    serialized = (corpus.tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    (encoded,), (starts,) = DocumentEncoder(serialized).ids_and_places([content])
    ids = np.array(encoded, np.int64)
    levels, note = _levels(corpus, path, content, ids)
    channels = {} if levels is None else {LEVEL: levels}
    return _source(name, content, starts, ids, channels, note)


def _source(
    name: str,
    content: bytes,
    starts: NDArray[np.int64],
    ids: NDArray[np.int64] | None,
    more: Mapping[str, NDArray[Any]],
    notes: tuple[str, ...],
) -> Source:
    from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
    from megacpp_nemo.syntax.paint import read_syntax

    syntax = read_syntax(content)
    painted = {channel: ids_of[starts] for channel, ids_of in syntax.channels.items()} | dict(more)
    if lost := syntax.unparsed_bytes:
        notes = (*notes, f"{lost:,} of {len(content):,} bytes could not be parsed: absent.")
    return Source(
        name=name,
        content=content,
        starts=starts,
        ids=ids,
        channels={
            channel: painted[channel] for channel in STRUCTURE_CHANNELS if channel in painted
        },
        notes=notes,
        first=0,
        last=len(starts),
        shown=(0, len(content)),
    )


def _levels(
    corpus: Corpus, path: Path, content: bytes, ids: NDArray[np.int64]
) -> tuple[NDArray[Any] | None, tuple[str, ...]]:
    """Return the dependency levels that a corpus has of a file, or why there are none."""
    from megacpp_nemo.data.verify_sources import document_elements

    if LEVEL not in corpus.channels:
        return None, (f"The corpus has no {LEVEL} channel.",)
    place = _document(corpus, sha256(content).hexdigest())
    if place is None:
        return None, (_unknown(corpus, path),)
    if not np.array_equal(document_elements(corpus, *place, None)[:-1], ids):
        return None, ("No dependency levels: the corpus has other tokens of this file.",)
    return document_elements(corpus, *place, LEVEL)[:-1], ()


def _document(corpus: Corpus, digest: str) -> tuple[Split, int] | None:
    """Return the split and the number of the document of these bytes; None if there is none."""
    for split in SPLITS:
        for number, (_, known) in enumerate(corpus.listing[split]):
            if known == digest:
                return split, number
    return None


def _unknown(corpus: Corpus, path: Path) -> str:
    """Return why a corpus has no document of a file."""
    root = Path(corpus.manifest["spec"]["root"])
    with suppress(ValueError):
        name = path.resolve().relative_to(root.resolve()).as_posix()
        if any(name in corpus.documents(split) for split in SPLITS):
            return "No dependency levels: the file has changed since the corpus was built."
    return f"No dependency levels: the corpus, of {root}, has no such file."
