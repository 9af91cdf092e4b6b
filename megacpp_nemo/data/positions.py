"""Tokens of whole files, and the byte of the file at which each of them starts.

- `DocumentEncoder`: ids and first bytes of files
- `first_bytes`: from the offsets of any tokenizer, which count characters
- `spelled_bytes`: how many bytes each token of a byte-level tokenizer stands for; first bytes are
  then sums, and the tokenizer can take its quick path without offsets

Syntax trees count bytes; the two counts differ after the first character that UTF-8 spells with
more than one byte. Tokens that share a character all start at its first byte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Places = npt.NDArray[np.int64]


class DocumentEncoder:
    """Encodes whole files; the spelling of a reserved token in one is ordinary text.

    Args:
        serialized: A tokenizer, as the text of its `tokenizer.json`.
        by_sums: Use `spelled_bytes` where the tokenizer allows it.
    """

    def __init__(self, serialized: str, by_sums: bool = True) -> None:
        self._tokenizer = document_tokenizer(serialized)
        self._spelled = spelled_bytes(self._tokenizer) if by_sums else None

    def ids(self, contents: Sequence[bytes]) -> list[list[int]]:
        """Return the token ids of each file, without an end token."""
        texts = [content.decode("utf-8") for content in contents]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def ids_and_places(self, contents: Sequence[bytes]) -> tuple[list[list[int]], list[Places]]:
        """Return the token ids of each file, and the first byte of each token [tokens]."""
        if self._spelled is None:
            return self._by_offsets(contents)
        ids, places = self.ids(contents), []
        for place, content in enumerate(contents):
            starts = _summed(self._spelled[np.array(ids[place], np.int64)], content)
            if starts is None:
                (ids[place],), (starts,) = self._by_offsets([content])
            places.append(starts)
        return ids, places

    def _by_offsets(self, contents: Sequence[bytes]) -> tuple[list[list[int]], list[Places]]:
        texts = [content.decode("utf-8") for content in contents]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        places = [first_bytes(*pair) for pair in zip(encodings, contents, strict=True)]
        return [encoding.ids for encoding in encodings], places


def document_tokenizer(serialized: str) -> Tokenizer:
    """Return a tokenizer (the text of its `tokenizer.json`) that encodes whole documents.

    Nothing is cut, padded or added. Post-processing is left out: without special tokens all that
    it does is to take the spaces around a token out of its offsets.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None
    tokenizer.encode_special_tokens = True
    return tokenizer


def first_bytes(encoding: Encoding, content: bytes) -> Places:
    """Return the byte of `content` at which each token starts, int64 [tokens].

    Every value is below `len(content)`, also for a token that stands for no character.

    Args:
        encoding: The text of `content`, encoded with offsets (`encode_batch`).
        content: UTF-8, not empty.
    """
    starts = np.fromiter((start for start, _ in encoding.offsets), np.int64, len(encoding))
    if content.isascii():
        return np.minimum(starts, len(content) - 1)
    characters = np.flatnonzero(_begins_character(content))
    places: Places = characters[np.minimum(starts, len(characters) - 1)]
    return places


def spelled_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int64] | None:
    """Return how many bytes each token stands for, by id; None if that depends on more.

    Known for byte-level BPE (Radford et al., 2019) that leaves the text as it is: every character
    of a token stands for one byte.
    """
    parts = json.loads(tokenizer.to_str())
    if not _is_byte_level(parts):
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    added = {token["id"]: token["content"] for token in parts["added_tokens"]}
    lengths = np.zeros(1 + max([*vocabulary.values(), *added]), np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token)
    for number, text in added.items():
        lengths[number] = len(text.encode("utf-8"))
    return lengths


def _is_byte_level(parts: dict[str, Any]) -> bool:
    cut = parts["pre_tokenizer"] or {"type": None}
    *before, last = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    model = parts["model"]
    return (
        parts["normalizer"] is None
        and last["type"] == "ByteLevel"
        and not last["add_prefix_space"]
        and all(step["type"] in ("Split", "Digits") for step in before)
        and all(step.get("behavior") != "Removed" for step in before)
        and model["type"] == "BPE"
        and not any(model[name] for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    )


def _summed(lengths: npt.NDArray[np.int64], content: bytes) -> Places | None:
    """Return first bytes from the lengths of tokens; None if they do not add up to the file."""
    ends = np.cumsum(lengths)
    if not len(ends) or ends[-1] != len(content):
        return None
    starts: Places = ends - lengths
    if content.isascii():
        return starts
    begins = np.where(_begins_character(content), np.arange(len(content)), 0)
    character: Places = np.maximum.accumulate(begins)[starts]
    return character


def _begins_character(content: bytes) -> npt.NDArray[np.bool_]:
    # All bytes of a character but its first are 0b10xxxxxx.
    begins: npt.NDArray[np.bool_] = (np.frombuffer(content, np.uint8) & 0xC0) != 0x80
    return begins
