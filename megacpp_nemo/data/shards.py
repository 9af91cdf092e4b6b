"""Shards: fixed runs of source files, tokenized and parsed one at a time, each by one process.

- `plan_shards`: which files make up which shard, from the scan alone
- `ShardJob`: what all shards of a build share
- `make_shard`: read, tokenize, parse and sample the files of one shard, and write it
- `missing_shards`: what is left to do

Nothing here imports torch, Megatron or transformers: a worker process starts in a fraction of a
second.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.data.positions import DocumentEncoder, Places
from megacpp_nemo.data.shard_file import ShardContent, ShardError, read_shard, write_shard
from megacpp_nemo.data.sources import SourceFile, read_content

if TYPE_CHECKING:
    from megacpp_nemo.syntax.paint import FileSyntax

# Source text of a shard: enough to keep a core busy for a second, little beside a process.
SHARD_BYTES = 1 << 20
# Source text parsed at a time: it takes two hundred times as much memory.
_PARSED_BYTES = 128 << 10
# Unit of a byte that lies in no definition of its file, and of one that was not parsed.
NO_UNIT, UNPARSED = -1, -2


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A run of files of one split; `number` counts the shards of a corpus from 0."""

    number: int
    split: str
    files: tuple[SourceFile, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of source text."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What all shards of a build share.

    Args:
        root: Folder of the sources.
        folder: Where shards are written.
        identity: Names all that decides their content.
        tokenizer: The tokenizer, as the text of its `tokenizer.json`.
        end_id: The end-of-document token.
        token_dtype: Name of the type of tokens on disk.
        channels: Structure channels to sample; without any, no file is parsed.
    """

    root: Path
    folder: Path
    identity: str
    tokenizer: str
    end_id: int
    token_dtype: str
    channels: tuple[str, ...]

    def path(self, shard: Shard) -> Path:
        """Return where a shard is written."""
        return self.folder / f"{shard.number:06d}.shard"

    @functools.cached_property
    def encoder(self) -> DocumentEncoder:
        """The tokenizer, ready; it stays in the process that asks for it."""
        return DocumentEncoder(self.tokenizer)


def plan_shards(splits: dict[str, Sequence[SourceFile]]) -> list[Shard]:
    """Return the shards of the splits in order; the number of workers has no part in it."""
    shards: list[Shard] = []
    for split, files in splits.items():
        for run in _runs(files):
            shards.append(Shard(number=len(shards), split=split, files=tuple(run)))
    return shards


def missing_shards(job: ShardJob, shards: Sequence[Shard]) -> list[Shard]:
    """Return the shards that are not there, whole and of this build."""
    missing = []
    for shard in shards:
        try:
            read_shard(job.path(shard), job.identity)
        except ShardError:
            missing.append(shard)
    return missing


def make_shard(job: ShardJob, shard: Shard) -> None:
    """Write one shard: tokens and channels of its files, each ending in the end token.

    Its arrays, one value per token: `tokens`; each channel but `dependency_level`; where that is
    asked for, `units` (the definition of its file that the token lies in, `NO_UNIT` or
    `UNPARSED`). `lengths` holds the tokens of each file. Its facts are one entry per file: what
    the dependency graph needs, and how many bytes were not parsed.

    Raises:
        DataError: A file changed since the scan.
    """
    contents = [read_content(job.root, file) for file in shard.files]
    facts: list[dict[str, Any]] = []
    arrays: dict[str, npt.NDArray[Any]] = {}
    if job.channels:
        ids, places = job.encoder.ids_and_places(contents)
        documents, facts = sampled(job.channels, contents, places)
        for name in documents[0]:
            arrays[name] = np.concatenate([document[name] for document in documents])
    else:
        ids = job.encoder.ids(contents)
    tokens = [np.array([*document, job.end_id], job.token_dtype) for document in ids]
    arrays["tokens"] = np.concatenate(tokens)
    arrays["lengths"] = np.array([len(document) for document in tokens], np.int32)
    write_shard(job.path(shard), job.identity, ShardContent(facts=facts, arrays=arrays))


def channel_dtype(channel: str) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds a channel's ids, the absent one included."""
    return np.dtype(np.min_scalar_type(STRUCTURE_CHANNELS[channel]))


def sampled(
    channels: tuple[str, ...], contents: Sequence[bytes], places: Sequence[Places]
) -> tuple[list[dict[str, npt.NDArray[Any]]], list[dict[str, Any]]]:
    """Return what the tokens of each file say, and the facts of each file.

    Args:
        channels: The channels to sample.
        contents: The files.
        places: The first byte of each of their tokens, [tokens].

    Returns:
        For each file its arrays by name, [tokens + 1] (the last is the end of the document,
        absent in every channel); and its facts.
    """
    from megacpp_nemo.syntax.paint import read_syntaxes

    arrays, facts = [], []
    for run in _batches(contents):
        for syntax, starts in zip(read_syntaxes(contents[run]), places[run], strict=True):
            arrays.append(dict(_at_starts(channels, syntax, starts)))
            facts.append({"unparsed_bytes": syntax.unparsed_bytes, "graph": syntax.facts.to_json()})
    return arrays, facts


def _at_starts(
    channels: tuple[str, ...], syntax: FileSyntax, starts: Places
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for name in channels:
        if name == "dependency_level":
            unparsed = syntax.channels["category"][starts] == STRUCTURE_CHANNELS["category"]
            units = np.where(unparsed, UNPARSED, syntax.units[starts])
            yield "units", np.append(units, UNPARSED).astype(np.int32)
        else:
            ids = np.append(syntax.channels[name][starts], STRUCTURE_CHANNELS[name])
            yield name, ids.astype(channel_dtype(name))


def _batches(contents: Sequence[bytes]) -> Iterator[slice]:
    """Yield runs of texts that are parsed at once."""
    first, size_bytes = 0, 0
    for place, content in enumerate(contents):
        size_bytes += len(content)
        if size_bytes >= _PARSED_BYTES or place == len(contents) - 1:
            yield slice(first, place + 1)
            first, size_bytes = place + 1, 0


def _runs(files: Sequence[SourceFile]) -> Iterator[list[SourceFile]]:
    run: list[SourceFile] = []
    size_bytes = 0
    for file in files:
        run.append(file)
        size_bytes += file.size_bytes
        if size_bytes >= SHARD_BYTES:
            yield run
            run, size_bytes = [], 0
    if run:
        yield run
