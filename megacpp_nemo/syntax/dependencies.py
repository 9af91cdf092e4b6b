"""How much other code each file and each type of a corpus rests on.

- `dependency_levels`: the levels of all files of a corpus, from their facts
- `resting_heights`: the longest path from each node of a graph, cycles taken as one node

The nodes are files and outermost type definitions. A definition rests on those whose names it
uses; a file on the files that it includes, on its own definitions, and on those whose names it
uses elsewhere. A node's height is the length of the longest path that starts there, with all
nodes of a cycle as one; its level is a bucket of the height (`DEPENDENCY_BOUNDS`).
"""

from __future__ import annotations

import bisect
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megacpp_nemo.syntax.facts import FileFacts
from megacpp_nemo.syntax.table import DEPENDENCY_BOUNDS


@dataclass(frozen=True, kw_only=True)
class FileLevels:
    """Dependency levels, 0 to 15, of one file.

    Args:
        file: Of the file, for what lies outside of its definitions.
        units: Of each of its definitions, in the order of `FileFacts.definitions`.
    """

    file: int
    units: tuple[int, ...]


def dependency_levels(files: Sequence[tuple[str, FileFacts]]) -> list[FileLevels]:
    """Return the levels of each file of a corpus, given its relative posix path and its facts.

    Levels depend on the set of files only, not on their order.
    """
    graph, first_unit = dependency_graph(files)
    level = [bisect.bisect_right(DEPENDENCY_BOUNDS, height) for height in resting_heights(graph)]
    return [
        FileLevels(file=level[place], units=tuple(level[first : first + len(facts.definitions)]))
        for place, ((_, facts), first) in enumerate(zip(files, first_unit, strict=True))
    ]


def dependency_graph(
    files: Sequence[tuple[str, FileFacts]],
) -> tuple[list[list[int]], list[int]]:
    """Return what each node rests on, and where the definitions of each file begin.

    Nodes are the files, in their order, and after them the definitions of one file after the
    other.
    """
    first_unit, total = [], len(files)
    for _, facts in files:
        first_unit.append(total)
        total += len(facts.definitions)
    types, paths = _Types(files, first_unit), _Paths([path for path, _ in files])
    graph: list[list[int]] = []
    for place, ((path, facts), first) in enumerate(zip(files, first_unit, strict=True)):
        own = range(first, first + len(facts.definitions))
        graph.append([*own, *types.named(place, facts.uses), *paths.included(path, facts)])
    for place, (_, facts) in enumerate(files):
        graph.extend(list(types.named(place, unit.uses)) for unit in facts.definitions)
    return graph, first_unit


class _Types:
    """Definitions by name: the first in the same file, or the first of the only file with any."""

    def __init__(self, files: Sequence[tuple[str, FileFacts]], first_unit: list[int]) -> None:
        self._near: list[dict[str, int]] = []
        self._far: dict[str, int | None] = {}
        for (_, facts), first in zip(files, first_unit, strict=True):
            near: dict[str, int] = {}
            for node, unit in enumerate(facts.definitions, first):
                near.setdefault(unit.name, node)
            self._near.append(near)
            for name, node in near.items():
                self._far[name] = None if name in self._far else node

    def named(self, place: int, names: Sequence[str]) -> Iterator[int]:
        near = self._near[place]
        for name in names:
            node = near[name] if name in near else self._far.get(name)
            if node is not None:
                yield node


class _Paths:
    """Files by path: beside the including file, under the root, or the only one that ends so."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._exact = {path: place for place, path in enumerate(paths)}
        self._by_name = defaultdict[str, list[str]](list)
        for path in paths:
            self._by_name[posixpath.basename(path)].append(path)
        self._ending: dict[str, int | None] = {}

    def included(self, path: str, facts: FileFacts) -> Iterator[int]:
        folder = posixpath.dirname(path)
        for written in facts.includes:
            place = self._exact.get(posixpath.normpath(posixpath.join(folder, written)))
            if place is None:
                place = self._under_root(posixpath.normpath(written))
            if place is not None:
                yield place

    def _under_root(self, written: str) -> int | None:
        if written in self._exact:
            return self._exact[written]
        if written not in self._ending:
            named = self._by_name.get(posixpath.basename(written), ())
            found = [path for path in named if path.endswith("/" + written)]
            self._ending[written] = self._exact[found[0]] if len(found) == 1 else None
        return self._ending[written]


def resting_heights(graph: Sequence[Sequence[int]]) -> list[int]:
    """Return the length of the longest path from each node, the nodes of a cycle taken as one.

    Strongly connected components come out with what they rest on before them (Tarjan, "Depth-first
    search and linear graph algorithms", 1972), so that one pass suffices; with a stack instead of
    recursion.

    Args:
        graph: The nodes that each node rests on; loops and repetitions do no harm.
    """
    unseen, done = -1, len(graph)
    order, lowest, heights = [unseen] * done, [0] * done, [0] * done
    waiting: list[int] = []
    seen = 0
    for root in range(done):
        if order[root] != unseen:
            continue
        path = [(root, iter(graph[root]))]
        order[root] = lowest[root] = seen
        waiting.append(root)
        seen += 1
        while path:
            node, further = path[-1]
            for other in further:
                if order[other] == unseen:
                    order[other] = lowest[other] = seen
                    seen += 1
                    waiting.append(other)
                    path.append((other, iter(graph[other])))
                    break
                # A component that is finished cannot lower this one.
                lowest[node] = min(lowest[node], order[other])
            else:
                path.pop()
                if path:
                    above = path[-1][0]
                    lowest[above] = min(lowest[above], lowest[node])
                if lowest[node] == order[node]:
                    _finish(graph, waiting, node, heights, order)
    return heights


def _finish(
    graph: Sequence[Sequence[int]],
    waiting: list[int],
    node: int,
    heights: list[int],
    order: list[int],
) -> None:
    """Take a component, which `node` was the first of, and give its height to its nodes."""
    members = waiting[waiting.index(node) :]
    del waiting[-len(members) :]
    inside = set(members)
    below = [heights[other] for one in members for other in graph[one] if other not in inside]
    height = max(below, default=-1) + 1
    for member in members:
        heights[member] = height
        order[member] = len(graph)
