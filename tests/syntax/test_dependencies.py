from __future__ import annotations

import functools
import random
import sys

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.syntax.dependencies import (
    FileLevels,
    dependency_graph,
    dependency_levels,
    resting_heights,
)
from megacpp_nemo.syntax.paint import Definition, FileFacts, read_syntax
from megacpp_nemo.syntax.table import DEPENDENCY_BOUNDS


def facts(includes=(), uses=(), **definitions) -> FileFacts:
    return FileFacts(
        includes=tuple(includes),
        definitions=tuple(Definition(name=n, uses=tuple(u)) for n, u in definitions.items()),
        uses=tuple(uses),
    )


def rests_on(files: dict[str, FileFacts], path: str, definition: str | None = None) -> set[str]:
    """Return the names of what a file, or a definition in it, rests on."""
    graph, first_unit = dependency_graph(list(files.items()))
    names = list(files)
    for found in files.values():
        names.extend(unit.name for unit in found.definitions)
    node = place = list(files).index(path)
    if definition is not None:
        units = [unit.name for unit in files[path].definitions]
        node = first_unit[place] + units.index(definition)
    return {names[other] for other in graph[node]}


def test_an_include_is_found_beside_the_file_under_the_root_or_by_its_only_ending():
    files = {
        "a/x.h": facts(),
        "b/x.h": facts(),
        "x.h": facts(),
        "b/c/y.h": facts(),
        "d/z.h": facts(),
        "e/z.h": facts(),
        "a/beside.h": facts(["x.h"]),
        "a/up.h": facts(["../b/x.h"]),
        "f/root.h": facts(["x.h"]),
        "f/other_root.h": facts(["a/x.h"]),
        "f/ending.h": facts(["c/y.h"]),
        "f/ambiguous.h": facts(["z.h"]),
        "f/partial_name.h": facts(["eside.h"]),
        "f/system.h": facts(["vector", "", "/", ".."]),
    }
    assert rests_on(files, "a/beside.h") == {"a/x.h"}
    assert rests_on(files, "a/up.h") == {"b/x.h"}
    assert rests_on(files, "f/root.h") == {"x.h"}
    assert rests_on(files, "f/other_root.h") == {"a/x.h"}
    assert rests_on(files, "f/ending.h") == {"b/c/y.h"}
    for path in ("f/ambiguous.h", "f/partial_name.h", "f/system.h"):
        assert rests_on(files, path) == set()


def test_a_name_is_the_file_s_own_or_the_corpus_s_only_one():
    files = {
        "a.h": facts(A=["B", "Own", "Unknown"], Own=[]),
        "b.h": facts(B=[], Own=[], Two=[]),
        "c.h": facts(uses=["B", "Own", "Two"], Two=["Own"]),
    }
    assert rests_on(files, "a.h", "A") == {"B", "Own"}
    graph, first_unit = dependency_graph(list(files.items()))
    a, b, c = first_unit
    assert graph[a] == [b, a + 1]
    # `Own` is ambiguous from outside, and `Two` is the near one.
    assert graph[2] == [c, b, c]
    assert graph[c] == []


def test_levels_are_the_longest_ways_down():
    files = [
        ("leaf.h", facts()),
        ("types.h", facts(Base=[], Middle=["Base"], Top=["Middle", "Base"])),
        ("user.h", facts(["leaf.h"], ["Top"])),
        ("main.cc", facts(["user.h", "leaf.h"])),
        ("one.h", facts(["two.h"])),
        ("two.h", facts(["one.h"])),
    ]
    assert dependency_levels(files) == [
        FileLevels(file=0, units=()),
        FileLevels(file=3, units=(0, 1, 2)),
        FileLevels(file=3, units=()),
        FileLevels(file=4, units=()),
        FileLevels(file=0, units=()),
        FileLevels(file=0, units=()),
    ]


def test_levels_of_real_code():
    sources = {
        "base.h": b"namespace n { struct Base { int x; }; struct Wide : Base {}; }",
        "list.h": b'#include "base.h"\ntemplate <class Base> class List { Base* first; };',
        "use.cc": b"#include <list.h>\nList<n::Wide> all() { return {}; }",
    }
    files = [(path, read_syntax(content).facts) for path, content in sources.items()]
    assert dependency_levels(files) == [
        FileLevels(file=2, units=(0, 1)),
        # The parameter of the template is not the type of its name.
        FileLevels(file=3, units=(0,)),
        FileLevels(file=4, units=()),
    ]


def test_levels_do_not_depend_on_the_order_of_files():
    names = [f"f{place}.h" for place in range(30)]
    draw = random.Random(3)
    files = [
        (name, facts(draw.sample(names, 2), draw.sample(names, 2), **{name: draw.sample(names, 3)}))
        for name in names
    ]
    levels = dict(zip(names, dependency_levels(files), strict=True))
    draw.shuffle(files)
    for (name, _), level in zip(files, dependency_levels(files), strict=True):
        assert levels[name] == level


def test_levels_end_where_the_channel_ends():
    most = STRUCTURE_CHANNELS["dependency_level"] - 1
    assert len(DEPENDENCY_BOUNDS) == most
    assert list(DEPENDENCY_BOUNDS) == sorted(set(DEPENDENCY_BOUNDS))
    files = [(f"{place}.h", facts([f"{place - 1}.h"])) for place in range(200)]
    levels = [found.file for found in dependency_levels(files)]
    assert levels[:9] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert levels == sorted(levels)
    assert set(levels) == set(range(most + 1))


def test_an_empty_corpus_has_no_levels():
    assert dependency_levels([]) == []


@st.composite
def graphs(draw) -> list[list[int]]:
    size = draw(st.integers(1, 12))
    node = st.integers(0, size - 1)
    return draw(st.lists(st.lists(node, max_size=4), min_size=size, max_size=size))


def heights_by_networkx(graph: list[list[int]]) -> list[int]:
    whole = networkx.DiGraph()
    whole.add_nodes_from(range(len(graph)))
    whole.add_edges_from((node, other) for node, below in enumerate(graph) for other in below)
    condensed = networkx.condensation(whole)
    heights: dict[int, int] = {}
    for component in reversed(list(networkx.topological_sort(condensed))):
        below = condensed.successors(component)
        heights[component] = max((heights[other] + 1 for other in below), default=0)
    return [heights[condensed.graph["mapping"][node]] for node in range(len(graph))]


def heights_by_closure(graph: list[list[int]]) -> list[int]:
    """Return heights from the set of nodes that each node reaches."""
    reach = [{node} for node in range(len(graph))]
    for _ in graph:
        for node, below in enumerate(graph):
            reach[node] = reach[node].union(*(reach[other] for other in below))

    @functools.cache
    def height(node: int) -> int:
        beyond = [other for other in reach[node] if node not in reach[other]]
        return max((height(other) + 1 for other in beyond), default=0)

    return [height(node) for node in range(len(graph))]


@given(graph=graphs())
def test_heights_are_the_longest_paths_between_components(graph):
    heights = resting_heights(graph)
    assert heights == heights_by_networkx(graph)
    assert heights == heights_by_closure(graph)


@pytest.mark.parametrize("seed", range(5))
def test_heights_of_larger_graphs(seed):
    draw = random.Random(seed)
    graph = [[draw.randrange(300) for _ in range(draw.randrange(3))] for _ in range(300)]
    assert resting_heights(graph) == heights_by_networkx(graph)


def test_heights_of_a_long_chain_and_a_long_cycle_need_no_recursion():
    size = 10 * sys.getrecursionlimit()
    chain = [[node - 1] if node else [] for node in range(size)]
    assert resting_heights(chain) == list(range(size))
    other_way = [[node + 1] if node + 1 < size else [] for node in range(size)]
    assert resting_heights(other_way) == list(range(size))[::-1]
    cycle = [[(node + 1) % size] for node in range(size)]
    assert resting_heights(cycle) == [0] * size
