"""Find the types that C++ files define and use, for the dependency graph."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import tree_sitter
from numpy.typing import NDArray

from megacpp_nemo.syntax.category import Region
from megacpp_nemo.syntax.facts import Definition, FileFacts
from megacpp_nemo.syntax.roles import Role
from megacpp_nemo.syntax.table import words
from megacpp_nemo.syntax.tree import Forest, kinds_named

_TEMPLATES = (Role.TEMPLATE_CLASS, Role.TEMPLATE_TYPEDEF)
_DEFINITIONS = (Role.CLASS_DEFINITION, Role.TYPEDEF)
_SCOPES = (*_TEMPLATES, *_DEFINITIONS, Role.TEMPLATE, Role.TEMPLATE_FORWARD, Role.FUNCTION)
_NAMES = words("type_identifier namespace_identifier")
_PARAMETERS = words(
    """
    type_parameter_declaration optional_type_parameter_declaration
    variadic_type_parameter_declaration
    """
)
# Under these a name is no use of a type.
_NO_USE = words("friend_declaration namespace_definition nested_namespace_specifier")
_INCLUDE, _PATHS = words("preproc_include"), words("string_literal system_lib_string")


def owners(forest: Forest, role: NDArray[np.uint8], region: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the outermost type definition, template or function around nodes, or -1 [nodes]."""
    owner = np.full(role.size, -1, np.int64)
    opens = np.isin(role, _SCOPES)
    outside = ~np.isin(region, (Region.BODY, Region.LOST_IN_BODY))
    for first, last in pairwise(forest.levels[1:]):
        around = forest.parent[first:last]
        own = np.arange(first, last, dtype=np.int64)
        new = np.where(opens[first:last] & outside[around], own, -1)
        owner[first:last] = np.where(owner[around] >= 0, owner[around], new)
    return owner


def file_facts(
    forest: Forest,
    role: NDArray[np.uint8],
    owner: NDArray[np.int64],
    contents: Sequence[bytes],
) -> tuple[list[FileFacts], NDArray[np.int32]]:
    """Return the facts of each file, and the definition around each node, or -1 [nodes]."""
    texts = _Texts(forest, owner, contents)
    titles, local = _declared(forest, role, owner, texts)
    used = _used(forest, role, texts)
    definitions: list[list[Definition]] = [[] for _ in contents]
    unit = np.full(role.size + 1, -1, np.int32)  # the last one is for nodes without an owner
    for scope in sorted(titles, key=lambda node: int(forest.start[node])):
        uses = used.pop(scope, set()) - local[scope]
        place = texts.file(scope)
        unit[scope] = len(definitions[place])
        definitions[place].append(Definition(name=_decoded(titles[scope]), uses=_sorted(uses)))
    rest: list[set[bytes]] = [set() for _ in contents]
    for scope, names in used.items():
        rest[texts.file(scope) if scope >= 0 else -1 - scope] |= names - local[scope]
    includes = _includes(forest, texts, len(contents))
    facts = [
        FileFacts(includes=tuple(paths), definitions=tuple(items), uses=_sorted(names))
        for paths, items, names in zip(includes, definitions, rest, strict=True)
    ]
    return facts, unit[owner]


class _Texts:
    """Where nodes stand, and their text."""

    def __init__(self, forest: Forest, owner: NDArray[np.int64], contents: Sequence[bytes]) -> None:
        self._forest, self._owner, self._contents = forest, owner, contents
        self._bases: list[int] = forest.bases.tolist()

    def file(self, node: int) -> int:
        """Return the file of a node."""
        return bisect.bisect_right(self._bases, self._forest.start[node]) - 1

    def of(self, at: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
        """Yield the scope and the text of nodes; -1 less the file is the scope outside of all."""
        bases, start, end = self._forest.bases, self._forest.start[at], self._forest.end[at]
        place = np.searchsorted(bases, start, side="right") - 1
        scope = np.where(self._owner[at] >= 0, self._owner[at], -1 - place)
        first, last = start - bases[place], end - bases[place]
        columns = (scope.tolist(), place.tolist(), first.tolist(), last.tolist())
        for around, file, begin, stop in zip(*columns, strict=True):
            yield around, self._contents[file][begin:stop]


def _declared(
    forest: Forest, role: NDArray[np.uint8], owner: NDArray[np.int64], texts: _Texts
) -> tuple[dict[int, bytes], defaultdict[int, set[bytes]]]:
    """Return the names of outermost definitions, and of all that each scope declares."""
    titles, local = dict[int, bytes](), defaultdict[int, set[bytes]](set)
    plain = np.flatnonzero(np.isin(role, _DEFINITIONS))
    wrapped = np.isin(role, _TEMPLATES)[forest.parent]
    for node, (scope, text) in zip(plain.tolist(), texts.of(plain), strict=True):
        parsed = forest.parsed(node, texts.file(node))
        name = None if parsed is None else _name_in(parsed)
        if parsed is None or name is None:
            continue
        title = text[name.start_byte - parsed.start_byte : name.end_byte - parsed.start_byte]
        local[scope].add(title)
        outermost = node
        while wrapped[outermost]:
            outermost = int(forest.parent[outermost])
        if owner[node] == outermost:
            titles[outermost] = title
    parent = forest.parent
    inside = kinds_named(_PARAMETERS)[forest.kind[parent]]
    at = np.flatnonzero(kinds_named(_NAMES)[forest.kind] & inside)
    # The first name is the parameter's, a second one its default.
    for scope, title in texts.of(at[np.diff(parent[at], prepend=-1) != 0]):
        local[scope].add(title)
    return titles, local


def _name_in(node: tree_sitter.Node) -> tree_sitter.Node | None:
    """Return where a class or an alias is named, or the first name that a typedef gives."""
    field = "declarator" if node.type == "type_definition" else "name"
    found = node.child_by_field_name(field)
    while found is not None and (inner := _inner_name(found, field)) is not None:
        found = inner
    return found


def _inner_name(node: tree_sitter.Node, field: str) -> tree_sitter.Node | None:
    if node.type == "parenthesized_declarator":
        return next(iter(node.named_children), None)
    return node.child_by_field_name(field)


def _used(forest: Forest, role: NDArray[np.uint8], texts: _Texts) -> defaultdict[int, set[bytes]]:
    """Return the names of types and scopes that each scope mentions."""
    parent = forest.parent
    at = np.flatnonzero(kinds_named(_NAMES)[forest.kind])
    at = at[(role[parent[at]] != Role.FORWARD)]
    at = at[~kinds_named(_NO_USE)[forest.kind[parent[at]]]]
    used = defaultdict[int, set[bytes]](set)
    for scope, name in texts.of(at):
        used[scope].add(name)
    return used


def _includes(forest: Forest, texts: _Texts, files: int) -> list[list[str]]:
    """Return the paths that each file includes, in their order."""
    found: list[list[str]] = [[] for _ in range(files)]
    parent = forest.parent
    path = kinds_named(_PATHS)[forest.kind]
    at = np.flatnonzero(path & kinds_named(_INCLUDE)[forest.kind[parent]])
    at = at[np.argsort(forest.start[at], kind="stable")]
    for node, (_, text) in zip(at.tolist(), texts.of(at), strict=True):
        found[texts.file(node)].append(_decoded(text[1:-1]))
    return found


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def _sorted(names: set[bytes]) -> tuple[str, ...]:
    return tuple(sorted({_decoded(name) for name in names}))
