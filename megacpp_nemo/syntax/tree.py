"""The syntax trees of several C++ files as flat arrays.

- `read_forest`: parse files and list all of their nodes
- `Forest`: the nodes, parents before children, siblings in order, level by level

The walk is most of what Python does for a tree, so nothing is done for one node at a time that
arrays can do for all of them. There is no recursion: depth is not limited.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import tree_sitter
import tree_sitter_cpp
from numpy.typing import NDArray

from megacpp_nemo.syntax.table import without_macros


@functools.cache
def grammar() -> tree_sitter.Language:
    """Return the C++ grammar."""
    return tree_sitter.Language(tree_sitter_cpp.language())


def kind_table(dtype: type[np.generic], value: Callable[[str, bool], Any]) -> NDArray[Any]:
    """Return `value(name, named)` of every kind of node by its id; ERROR is the last one."""
    language = grammar()
    kinds = range(language.node_kind_count)
    values = [
        value(language.node_kind_for_id(kind) or "", language.node_kind_is_named(kind))
        for kind in kinds
    ]
    return np.array([*values, value("ERROR", True)], dtype)


@functools.cache
def kinds_named(names: frozenset[str]) -> NDArray[np.bool_]:
    """Return whether each kind of node is a named one of these names [kinds]."""
    return kind_table(np.bool_, lambda name, named: named and name in names)


@dataclass(frozen=True, kw_only=True)
class Forest:
    """Nodes of all files, level by level: all roots, all their children, and so on.

    Args:
        kind: Kind of each, for `kind_table` [nodes].
        start: First byte, counted from the first file's first [nodes]; a file ends one byte
            before the next one begins. A root spans its whole file.
        end: The byte after its last one [nodes].
        parent: Index of the parent, and of a root its own [nodes].
        levels: Index of each level's first node, and the number of nodes at last.
        bases: First byte of each file, and of the one after the last.
        roots: The parser's root of each file.
    """

    kind: NDArray[np.int32]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    parent: NDArray[np.int64]
    levels: tuple[int, ...]
    bases: NDArray[np.int64]
    roots: tuple[tree_sitter.Node, ...]

    def parsed(self, node: int, file: int) -> tree_sitter.Node | None:
        """Return the parser's node that is the innermost one with the range of a node."""
        base = int(self.bases[file])
        first, last = int(self.start[node]) - base, int(self.end[node]) - base
        return self.roots[file].descendant_for_byte_range(first, last)


class _Walk:
    """Nodes of files as they come, each before its children."""

    def __init__(self) -> None:
        self.kinds, self.starts, self.ends = list[int](), list[int](), list[int]()
        self.parents, self.depths = list[int](), list[int]()

    def over(self, root: tree_sitter.Node) -> None:
        """Add the nodes of a tree.

        A node of the parser is dropped before the next one is made, which keeps the walk in the
        processor's cache.
        """
        cursor = root.walk()
        down, across, up = cursor.goto_first_child, cursor.goto_next_sibling, cursor.goto_parent
        kinds, starts, ends = self.kinds.append, self.starts.append, self.ends.append
        parents, depths = self.parents.append, self.depths.append
        parent = len(self.kinds)
        open_nodes: list[int] = []
        while (node := cursor.node) is not None:
            kinds(node.kind_id)
            starts(node.start_byte)
            ends(node.end_byte)
            parents(parent)
            depths(len(open_nodes))
            if down():
                open_nodes.append(parent)
                parent = len(self.kinds) - 1
                continue
            while not across():
                if not up():
                    return
                parent = open_nodes.pop()


def read_forest(contents: Sequence[bytes]) -> Forest:
    """Parse files; bad C++ becomes ERROR nodes."""
    parser, walk = tree_sitter.Parser(grammar()), _Walk()
    roots = [parser.parse(without_macros(content)).root_node for content in contents]
    for root in roots:
        walk.over(root)
    order, parent, levels = _by_level(walk)
    sizes = np.array([len(content) for content in contents], np.int64)
    bases = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes + 1)))
    base = np.empty(order.size, np.int64)
    base[: len(roots)] = bases[:-1]
    for first, last in pairwise(levels[1:]):
        base[first:last] = base[parent[first:last]]
    start = np.array(walk.starts, np.int64)[order] + base
    end = np.array(walk.ends, np.int64)[order] + base
    start[: len(roots)], end[: len(roots)] = bases[:-1], bases[:-1] + sizes
    return Forest(
        kind=np.minimum(np.array(walk.kinds, np.int32)[order], grammar().node_kind_count),
        start=start,
        end=end,
        parent=parent,
        levels=levels,
        bases=bases,
        roots=tuple(roots),
    )


def _by_level(walk: _Walk) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[int, ...]]:
    """Return the nodes in order, the parents in that order, and where each level begins."""
    depth = np.array(walk.depths, np.int32)
    order = np.argsort(depth, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    parent = place[np.array(walk.parents, np.int64)[order]]
    levels = np.searchsorted(depth[order], np.arange(int(depth.max()) + 2))
    return order, parent, tuple(levels.tolist())
