"""The structure channels the plain way: from node to node, each painted over its parent."""

from __future__ import annotations

import tree_sitter
from tree_sitter import Node

from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.syntax.table import CATEGORIES, node_type_bucket, without_macros
from megacpp_nemo.syntax.tree import grammar

CLASSES = {"class_specifier", "struct_specifier", "union_specifier", "enum_specifier"}
CONDITIONALS = {"preproc_if", "preproc_ifdef", "preproc_elif", "preproc_elifdef", "preproc_else"}
DIRECTIVES = {"preproc_include", "preproc_def", "preproc_function_def", "preproc_call"}
ALIASES = {"type_definition", "alias_declaration"}
SCOPES = {"namespace_definition", "namespace_alias_definition"}
BODIES = {"compound_statement", "try_statement", "field_initializer_list"}
CLASS_BODIES = {"field_declaration_list", "enumerator_list"}
POINTERS = {"pointer_declarator", "reference_declarator", "attributed_declarator"}
POINTERS |= {"init_declarator"}
HOLDERS = {"translation_unit", "declaration_list", "linkage_specification", "ERROR"}
HOLDERS |= {"template_declaration", "compound_statement", "try_statement"} | CONDITIONALS
HOLDERS |= {"field_initializer_list"}
WHOLE = {"concept_definition", "static_assert_declaration", "template_instantiation"}
WHOLE |= {"friend_declaration", "field_declaration", "declaration", "function_definition"}
WHOLE |= {"template_declaration", "using_declaration", "access_specifier", "translation_unit"}
WHOLE |= {"linkage_specification", "for_range_loop"} | CONDITIONALS


def naive_channels(content: bytes) -> dict[str, list[int]]:
    """Return ids of each channel but the dependency level, one for each byte."""
    tree = tree_sitter.Parser(grammar()).parse(without_macros(content))
    channels = {name: [0] * len(content) for name in STRUCTURE_CHANNELS}
    del channels["dependency_level"]
    # A node, the category and the place ("file", "class", "body") around it, depth, siblings.
    todo = [(tree.root_node, "other", "file", 0, 0)]
    while todo:
        node, around, place, depth, siblings = todo.pop()
        category, place = decided(node, around, place)
        ids = {
            "category": CATEGORIES.index(category) if category != "absent" else 9,
            "ast_depth": min(depth, 63),
            "sibling_index": min(siblings, 63),
            "node_type": node_type_bucket(node.type, node.is_named),
        }
        if category == "absent":
            ids = {name: STRUCTURE_CHANNELS[name] for name in ids}
        first, last = node.start_byte, node.end_byte
        if node.parent is None:
            first, last = 0, len(content)
        for name, value in ids.items():
            channels[name][first:last] = [value] * (last - first)
        before = 0
        for child in node.children:
            todo.append((child, category, place, depth + 1, before))
            before += child.is_named
    return channels


def decided(node: Node, around: str, place: str) -> tuple[str, str]:
    """Return the category of a node and the place that its children are in."""
    kind = node.type
    if around == "comment" or kind == "comment":
        return "comment", place
    if kind == "ERROR":
        return "absent", place if place in {"class", "body"} else "file"
    if place == "line" or kind in DIRECTIVES or is_directive(node) or is_condition(node):
        return "preamble", "line"
    made = made_by(node)
    if made in BODIES:
        return "function body", "body"
    if made in CLASS_BODIES or made in CLASSES:
        return "class declaration", "class"
    if kind == "access_specifier" and place == "class":
        return "class declaration", place
    if made in ALIASES:
        return "typedef", "typedef"
    if kind in SCOPES or kind in {"linkage_specification", "declaration_list"}:
        return "namespace", "file"
    return inherited(node, made, around, place)


def inherited(node: Node, made: str, around: str, place: str) -> tuple[str, str]:
    """Return what a node is by where it stands."""
    above = node.parent.type if node.parent else ""
    if above in CLASS_BODIES and node.is_named:
        return "class member", place
    listed = above == "declaration_list" and node.is_named
    if above == "linkage_specification":
        listed = node.is_named and node.type != "string_literal"
    if above in {"declaration_list", "linkage_specification"} and not listed:
        return "namespace", "closed"
    lost = around == "absent"
    whole = node.type in WHOLE or node.type.endswith("_statement")
    if lost and not (whole and node.is_named):
        return "absent", place
    if place == "file" and (listed or lost or around == "other"):
        if made == "function_definition":
            return "function signature", "signature"
        return ("preamble", "line") if made == "using_declaration" else ("other", place)
    if lost:
        return {"class": "class member", "body": "function body"}.get(place, "other"), place
    return around, place


def is_directive(node: Node) -> bool:
    return not node.is_named and (node.type.startswith("#") or node.type == "\n")


def is_condition(node: Node) -> bool:
    """Return whether a node is what #if or #ifdef asks: the next node after it, if no statement."""
    before = node.prev_sibling
    if before is None or not before.type.startswith("#") or not node.is_named:
        return False
    return node.parent.type in CONDITIONALS and plain(node)


def plain(node: Node) -> bool:
    kind = node.type
    if kind in CLASSES:
        return False
    listed = WHOLE | DIRECTIVES | ALIASES | SCOPES | BODIES | CLASS_BODIES
    listed |= {"declaration_list", "string_literal", "comment", "ERROR"}
    return kind not in listed and not kind.endswith("_statement")


def made_by(node: Node) -> str:
    """Return what a node is for: a template is for what it is a template of."""
    kind = node.type
    if kind == "template_declaration":
        made = [made_by(child) for child in node.children]
        wanted = {"function_definition", *CLASSES, *ALIASES}
        return next((name for name in made if name in wanted), kind)
    if kind in CLASSES and not any(child.type in CLASS_BODIES for child in node.children):
        alone = node.parent is not None and node.parent.type in HOLDERS
        return kind if alone else ""
    if kind == "declaration":
        inner = list(node.children)
        while inner:
            child = inner.pop()
            if child.type == "function_declarator":
                return "function_definition"
            if child.type in POINTERS:
                inner.extend(child.children)
    return kind
