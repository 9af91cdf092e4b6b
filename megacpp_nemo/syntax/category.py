"""Which of the nine categories every node of a syntax tree belongs to.

A node's role (what its kind can mean) and its parent's region (where it stands) give its own
region, from the roots down; a region's bytes are of one category. What stands under an ERROR node
is kept if it is a whole statement, declaration, comment or directive, and absent otherwise.
"""

from __future__ import annotations

from enum import IntEnum, auto
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megacpp_nemo.syntax.roles import Role
from megacpp_nemo.syntax.table import CATEGORIES
from megacpp_nemo.syntax.tree import Forest


class Region(IntEnum):
    """Where a node stands."""

    FILE = 0
    NAMESPACE = auto()
    NAMESPACE_LIST = auto()
    LINKAGE = auto()
    SIGNATURE = auto()
    BODY = auto()
    CLASS = auto()
    CLASS_LIST = auto()
    MEMBER = auto()
    COMMENT = auto()
    TYPEDEF = auto()
    PREAMBLE = auto()
    LOST_IN_FILE = auto()
    LOST_IN_CLASS = auto()
    LOST_IN_BODY = auto()


def regions(forest: Forest, role: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the region of every node [nodes]."""
    region = np.full(role.size, Region.FILE, np.uint8)
    first = forest.levels[1]
    region[:first] = _REGION_AFTER[Region.FILE, role[:first]]
    for first, last in pairwise(forest.levels[1:]):
        around = region[forest.parent[first:last]]
        region[first:last] = _REGION_AFTER[around, role[first:last]]
    return region


def _transitions() -> NDArray[np.uint8]:
    """Return the region of a node from its parent's region and its role [regions, roles]."""
    table = np.repeat(np.arange(len(Region), dtype=np.uint8)[:, None], len(Role), axis=1)
    in_class = (Region.CLASS, Region.CLASS_LIST, Region.MEMBER, Region.LOST_IN_CLASS)
    in_file = (Region.FILE, Region.NAMESPACE_LIST, Region.LINKAGE, Region.LOST_IN_FILE)
    lost = (Region.LOST_IN_FILE, Region.LOST_IN_CLASS, Region.LOST_IN_BODY)
    inside = (Region.FILE, Region.MEMBER, Region.BODY)
    whole = [role for role in Role if role not in (Role.PART, Role.TEXT, Role.STRING)]
    for region, kept in zip(lost, inside, strict=True):
        table[region, whole] = kept
    table[Region.NAMESPACE_LIST] = table[Region.LINKAGE] = Region.FILE
    table[[Region.NAMESPACE_LIST, Region.LINKAGE], Role.TEXT] = Region.NAMESPACE
    table[Region.LINKAGE, Role.STRING] = Region.NAMESPACE
    table[Region.CLASS_LIST] = Region.MEMBER
    table[[*in_class], Role.ACCESS] = Region.CLASS
    table[Region.CLASS_LIST, Role.TEXT] = Region.CLASS
    table[[*in_file], Role.FUNCTION] = Region.SIGNATURE
    table[[*in_file], Role.USING] = Region.PREAMBLE
    for role, region in {
        Role.FORWARD: Region.CLASS,
        Role.TEMPLATE_FORWARD: Region.CLASS,
        Role.CLASS_DEFINITION: Region.CLASS,
        Role.TEMPLATE_CLASS: Region.CLASS,
        Role.CLASS_BODY: Region.CLASS_LIST,
        Role.TYPEDEF: Region.TYPEDEF,
        Role.TEMPLATE_TYPEDEF: Region.TYPEDEF,
        Role.NAMESPACE: Region.NAMESPACE,
        Role.LINKAGE: Region.LINKAGE,
        Role.LIST: Region.NAMESPACE_LIST,
        Role.BODY: Region.BODY,
        Role.COMMENT: Region.COMMENT,
        Role.DIRECTIVE: Region.PREAMBLE,
    }.items():
        table[:, role] = region
    table[:, Role.ERROR] = Region.LOST_IN_FILE
    table[[*in_class], Role.ERROR] = Region.LOST_IN_CLASS
    table[[Region.BODY, Region.LOST_IN_BODY], Role.ERROR] = Region.LOST_IN_BODY
    closed = [role for role in Role if role not in (Role.COMMENT, Role.ERROR)]
    table[Region.PREAMBLE, closed] = Region.PREAMBLE
    table[Region.COMMENT] = Region.COMMENT
    return table


_REGION_AFTER = _transitions()
_CATEGORY = {
    Region.PREAMBLE: "preamble",
    Region.SIGNATURE: "function signature",
    Region.BODY: "function body",
    Region.CLASS: "class declaration",
    Region.CLASS_LIST: "class declaration",
    Region.MEMBER: "class member",
    Region.COMMENT: "comment",
    Region.TYPEDEF: "typedef",
    Region.NAMESPACE: "namespace",
    Region.NAMESPACE_LIST: "namespace",
    Region.LINKAGE: "namespace",
    Region.FILE: "other",
}
# The category of every region; of the lost ones, absent.
CATEGORY_OF = np.array(
    [
        CATEGORIES.index(_CATEGORY[region]) if region in _CATEGORY else len(CATEGORIES)
        for region in Region
    ],
    np.uint16,
)
