"""What part every node of a syntax tree plays in the categories of code.

Mostly its kind decides, sometimes with its children (a declaration of a function, a template of a
class) or its parent (a forward declaration, the condition after #if).
"""

from __future__ import annotations

import functools
from enum import IntEnum, auto

import numpy as np
from numpy.typing import NDArray

from megacpp_nemo.syntax.table import words
from megacpp_nemo.syntax.tree import Forest, kind_table, kinds_named


class Role(IntEnum):
    """What a kind of node can change about its region."""

    PART = 0  # of its parent: an expression, a declarator, a type
    TEXT = auto()  # keywords and punctuation
    STATEMENT = auto()
    DECLARATION = auto()
    FUNCTION = auto()
    TEMPLATE = auto()
    CLASS = auto()  # class, struct, union, enum: until its parent says which of the next two
    FORWARD = auto()
    CLASS_DEFINITION = auto()
    CLASS_BODY = auto()
    ACCESS = auto()
    TYPEDEF = auto()
    TEMPLATE_CLASS = auto()
    TEMPLATE_FORWARD = auto()
    TEMPLATE_TYPEDEF = auto()
    NAMESPACE = auto()
    LINKAGE = auto()
    LIST = auto()  # between the braces of a namespace
    BODY = auto()
    USING = auto()
    COMMENT = auto()
    DIRECTIVE = auto()
    CONDITIONAL = auto()  # from #if to #endif
    STRING = auto()
    FILE = auto()
    ERROR = auto()


_ROLES = {
    Role.FUNCTION: "function_definition",
    Role.DECLARATION: "declaration",
    Role.TEMPLATE: "template_declaration",
    Role.CLASS: "class_specifier struct_specifier union_specifier enum_specifier",
    Role.CLASS_BODY: "field_declaration_list enumerator_list",
    Role.ACCESS: "access_specifier",
    Role.TYPEDEF: "type_definition alias_declaration",
    Role.NAMESPACE: "namespace_definition namespace_alias_definition",
    Role.LINKAGE: "linkage_specification",
    Role.LIST: "declaration_list",
    Role.BODY: "compound_statement try_statement field_initializer_list",
    Role.USING: "using_declaration",
    Role.COMMENT: "comment",
    Role.DIRECTIVE: "preproc_include preproc_def preproc_function_def preproc_call",
    Role.CONDITIONAL: "preproc_if preproc_ifdef preproc_elif preproc_elifdef preproc_else",
    Role.STRING: "string_literal",
    Role.FILE: "translation_unit",
    Role.ERROR: "ERROR",
    Role.STATEMENT: """
        attributed_statement break_statement case_statement co_return_statement co_yield_statement
        concept_definition continue_statement do_statement expression_statement field_declaration
        for_range_loop for_statement friend_declaration goto_statement if_statement
        labeled_statement return_statement seh_leave_statement seh_try_statement
        static_assert_declaration switch_statement template_instantiation throw_statement
        while_statement
    """,
}
_ROLE_OF = {kind: role for role, kinds in _ROLES.items() for kind in kinds.split()}
_FUNCTION_DECLARATOR = words("function_declarator")
_DECLARATORS = words(
    "pointer_declarator reference_declarator attributed_declarator init_declarator"
)


def _role(kind: str, named: bool) -> Role:
    if not named:
        # The end of a line is a token where it ends a directive.
        return Role.DIRECTIVE if kind.startswith(("#", "\n")) else Role.TEXT
    return _ROLE_OF.get(kind, Role.PART)


@functools.cache
def _roles_of_kinds() -> NDArray[np.uint8]:
    return kind_table(np.uint8, _role)


def roles(forest: Forest) -> NDArray[np.uint8]:
    """Return the role of every node, with what its children and its parent make of it [nodes]."""
    role = _roles_of_kinds()[forest.kind]
    parent = forest.parent
    _find_functions(forest, role)
    _find_classes(role, parent)
    _find_templates(role, parent)
    _find_conditions(forest, role)
    return role


def _find_functions(forest: Forest, role: NDArray[np.uint8]) -> None:
    """Let declarations of functions have the role of functions."""
    wraps = kinds_named(_DECLARATORS)[forest.kind]
    at = forest.parent[kinds_named(_FUNCTION_DECLARATOR)[forest.kind]]
    while at.size:
        role[at[role[at] == Role.DECLARATION]] = Role.FUNCTION
        at = forest.parent[at[wraps[at]]]


def _find_classes(role: NDArray[np.uint8], parent: NDArray[np.int64]) -> None:
    """Tell definitions of classes from forward declarations, and both from mere mentions."""
    bodied = parent[role == Role.CLASS_BODY]
    role[bodied[role[bodied] == Role.CLASS]] = Role.CLASS_DEFINITION
    bare = np.flatnonzero(role == Role.CLASS)
    alone = np.isin(role[parent[bare]], _HOLDS_STATEMENTS)
    role[bare] = np.where(alone, Role.FORWARD, Role.PART)


_HOLDS_STATEMENTS = (
    Role.FILE,
    Role.LIST,
    Role.LINKAGE,
    Role.CONDITIONAL,
    Role.TEMPLATE,
    Role.BODY,
    Role.ERROR,
)


def _find_templates(role: NDArray[np.uint8], parent: NDArray[np.int64]) -> None:
    """Let templates have the role of what they are templates of, the inner ones first."""
    inner = np.flatnonzero(role[parent] == Role.TEMPLATE)
    for child in inner[::-1].tolist():
        made = _TEMPLATES.get(role[child])
        if made is not None:
            role[parent[child]] = made


_TEMPLATES = {
    Role.FUNCTION: Role.FUNCTION,
    Role.FORWARD: Role.TEMPLATE_FORWARD,
    Role.TEMPLATE_FORWARD: Role.TEMPLATE_FORWARD,
    Role.CLASS_DEFINITION: Role.TEMPLATE_CLASS,
    Role.TEMPLATE_CLASS: Role.TEMPLATE_CLASS,
    Role.TYPEDEF: Role.TEMPLATE_TYPEDEF,
    Role.TEMPLATE_TYPEDEF: Role.TEMPLATE_TYPEDEF,
}


def _find_conditions(forest: Forest, role: NDArray[np.uint8]) -> None:
    """Let the second child of #if and its like, which is the condition, be a directive."""
    first = np.flatnonzero((role == Role.DIRECTIVE) & (role[forest.parent] == Role.CONDITIONAL))
    second = first[first + 1 < role.size] + 1
    second = second[forest.parent[second] == forest.parent[second - 1]]
    second = second[role[second] == Role.PART]
    role[second] = Role.DIRECTIVE
