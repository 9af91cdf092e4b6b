"""Structure channels of C++ sources, painted on their bytes.

- `read_syntax`: the channels of one file
- `read_syntaxes`: of several files at once, which is quicker for small ones
- `FileSyntax`: one id per byte and channel, and the facts for the dependency graph

The innermost node that covers a byte decides, so white space is of the node that spans it. Depth
is the number of nodes around that node (the root has 0), the sibling index the number of named
nodes before it under its parent; both end at 63. Macros that no grammar could place are read as
white space (`table.without_macros`). Under a node that the parser could not make sense of,
whole declarations, statements, comments and directives keep their ids, and the rest is absent.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.syntax.category import CATEGORY_OF, regions
from megacpp_nemo.syntax.definitions import file_facts, owners
from megacpp_nemo.syntax.facts import Definition, FileFacts
from megacpp_nemo.syntax.roles import roles
from megacpp_nemo.syntax.table import node_type_bucket
from megacpp_nemo.syntax.tree import Forest, kind_table, read_forest

__all__ = ["Definition", "FileFacts", "FileSyntax", "read_syntax", "read_syntaxes"]

_BATCH_BYTES = 1 << 14


@dataclass(frozen=True, kw_only=True)
class FileSyntax:
    """What one file's syntax tree says.

    Args:
        channels: Ids of `category`, `ast_depth`, `sibling_index` and `node_type` [bytes]. The
            number of a channel's values is its id for bytes that could not be placed.
        units: Index into `facts.definitions` of the definition around each byte, or -1 [bytes].
        facts: For `dependency_levels`.
        unparsed_bytes: How many bytes are absent.
    """

    channels: dict[str, NDArray[np.uint16]]
    units: NDArray[np.int32]
    facts: FileFacts
    unparsed_bytes: int

    @property
    def parsed(self) -> bool:
        """Whether every byte was placed."""
        return self.unparsed_bytes == 0


def read_syntax(content: bytes) -> FileSyntax:
    """Parse one file; never raises, whatever the bytes are."""
    return read_syntaxes([content])[0]


def read_syntaxes(contents: Sequence[bytes]) -> list[FileSyntax]:
    """Parse files; each result is what `read_syntax` gives for that file alone.

    Small files are read together, some 16 KB at a time: more would leave the processor's cache.
    """
    return [found for batch in _batches(contents) for found in _read_batch(batch)]


def _batches(contents: Sequence[bytes]) -> Iterator[list[bytes]]:
    batch, size = list[bytes](), 0
    for content in contents:
        batch.append(content)
        size += len(content)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read_batch(contents: list[bytes]) -> list[FileSyntax]:
    forest = read_forest(contents)
    role = roles(forest)
    region = regions(forest, role)
    owner = owners(forest, role, region)
    facts, unit = file_facts(forest, role, owner, contents)
    channels = _values(forest, region)
    node = _painted(forest)
    lost = CATEGORY_OF[region] == STRUCTURE_CHANNELS["category"]
    found = []
    for place, base in enumerate(forest.bases[:-1].tolist()):
        inside = node[base : base + len(contents[place])]
        found.append(
            FileSyntax(
                channels={name: values[inside] for name, values in channels.items()},
                units=unit[inside],
                facts=facts[place],
                unparsed_bytes=int(np.count_nonzero(lost[inside])),
            )
        )
    return found


def _values(forest: Forest, region: NDArray[np.uint8]) -> dict[str, NDArray[np.uint16]]:
    """Return each channel's id of every node [nodes]."""
    depth = np.repeat(np.arange(len(forest.levels) - 1), np.diff(forest.levels))
    channels = {
        "category": CATEGORY_OF[region],
        "ast_depth": _clamped(depth, "ast_depth"),
        "sibling_index": _clamped(_siblings_before(forest), "sibling_index"),
        "node_type": _node_types()[forest.kind],
    }
    lost = channels["category"] == STRUCTURE_CHANNELS["category"]
    for name, values in channels.items():
        values[lost] = STRUCTURE_CHANNELS[name]
    return channels


def _clamped(values: NDArray[np.int64], name: str) -> NDArray[np.uint16]:
    return np.minimum(values, STRUCTURE_CHANNELS[name] - 1).astype(np.uint16)


def _siblings_before(forest: Forest) -> NDArray[np.int64]:
    named = _named()[forest.kind]
    before = np.cumsum(named) - named
    # Roots have no parent; their own place stands there, which is also their children's parent.
    parent = np.where(np.arange(named.size) < forest.levels[1], -1, forest.parent)
    new = np.flatnonzero(np.diff(parent, prepend=-2))
    counts = np.diff(new, append=named.size)
    siblings: NDArray[np.int64] = before - np.repeat(before[new], counts)
    siblings[: forest.levels[1]] = 0
    return siblings


@functools.cache
def _node_types() -> NDArray[np.uint16]:
    return kind_table(np.uint16, node_type_bucket)


@functools.cache
def _named() -> NDArray[np.bool_]:
    return kind_table(np.bool_, lambda _, named: named)


def _painted(forest: Forest) -> NDArray[np.int64]:
    """Return the innermost node over every byte [bytes of all files and one after each].

    A byte at which nodes begin is of the deepest of them, which is the last in order. One at
    which nodes end, and none begins, is of the parent of the outermost, which is the first.
    """
    change = np.full(int(forest.bases[-1]) + 1, -1, np.int64)
    wide = np.flatnonzero(forest.end > forest.start)
    outermost_last = wide[::-1]
    change[forest.end[outermost_last]] = forest.parent[outermost_last]
    change[forest.start[wide]] = wide
    change[0] = max(int(change[0]), 0)
    at = np.flatnonzero(change >= 0)
    return np.repeat(change[at], np.diff(at, append=change.size))
