"""How structure channels are drawn: the name, the mark and the colour of every id.

Categories and node types have hues, those of Tol's light scheme ("Colour Schemes", technical note
SRON/EPS/TN/09-002), which are told apart with every common kind of colour vision under dark text.
Depths, levels and indices have a ramp from light yellow to blue, whose lightness falls all along.
Of the many node types the eight that occur most have a hue; the rest are grey.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.syntax.table import CATEGORIES, FIRST_NAMED, NODE_TYPES

HUES = (
    *("#ffaabb", "#ee8866", "#eedd88", "#77aadd", "#99ddff"),
    *("#44bb99", "#aaaa00", "#bbcc33", "#dddddd"),
)
RAMP_ENDS = ("#fdeaa7", "#8fc1a9", "#7b97d3")
STEPS = 16
ABSENT = "absent"
ABSENT_PAINT = "n"
CATEGORY_MARKS = "pfbcm/tno"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTERS = DIGITS[10:] + DIGITS[:10]
ABSENT_MARK, LAST_MARK = "-", "+"
UNNAMED = (
    *("other node", "directive", "keyword", "bracket"),
    *("separator", "operator", "quote", "line end"),
)
TITLES = {
    "category": "structure category",
    "dependency_level": "dependency level",
    "ast_depth": "depth in the syntax tree",
    "sibling_index": "index among siblings",
    "node_type": "node type",
}


class Key(NamedTuple):
    """What stands for an id of a channel.

    Args:
        id: The id.
        name: What it means.
        mark: One character for it, in ASCII.
        paint: Its colour: `k` and a place in `HUES`, `s` and a step of the ramp, or
            `ABSENT_PAINT`.
        tokens: How many tokens have it.
    """

    id: int
    name: str
    mark: str
    paint: str
    tokens: int


def keys(channel: str, ids: NDArray[Any]) -> dict[int, Key]:
    """Return the key of each id that occurs, in the order of a legend.

    Args:
        channel: Key of `STRUCTURE_CHANNELS`.
        ids: Of tokens [tokens].
    """
    found, counts = np.unique(ids, return_counts=True)
    counted = dict(zip(found.tolist(), counts.tolist(), strict=True))
    order = list(counted)
    if channel == "node_type":
        order.sort(key=lambda each: (-counted[each], each))
    # The absent id is the largest.
    absent = STRUCTURE_CHANNELS[channel]
    order.sort(key=lambda each: each >= absent)
    return {
        each: Key(each, id_name(channel, each), *_sign(channel, each, rank), counted[each])
        for rank, each in enumerate(order)
    }


def id_name(channel: str, number: int) -> str:
    """Return what an id means."""
    size = STRUCTURE_CHANNELS[channel]
    if number >= size:
        return ABSENT
    if channel == "category":
        return CATEGORIES[number]
    if channel == "node_type":
        names = dict(enumerate(UNNAMED)) | dict(enumerate(NODE_TYPES, FIRST_NAMED))
        return names.get(number, f"bucket {number}")
    # A level is a bucket of heights by itself; the others end at their last value.
    clamped = number == size - 1 and channel != "dependency_level"
    return f"{number} or more" if clamped else str(number)


def paints() -> dict[str, str]:
    """Return every colour, `#rrggbb`, by its paint; text on it, and it as text, stand out."""
    hues = {f"k{place}": hue for place, hue in enumerate(HUES)}
    return hues | {f"s{step}": _ramp(step / (STEPS - 1)) for step in range(STEPS)}


def mixed(one: str, other: str, share: float) -> str:
    """Return a colour between two, at a share of the way from the first."""
    pairs = zip(_parts(one), _parts(other), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def terminal_color(fill: str) -> int:
    """Return the nearest colour of a terminal's cube of 6 x 6 x 6."""
    levels = (0, 95, 135, 175, 215, 255)
    red, green, blue = (
        min(range(6), key=lambda step: abs(levels[step] - part)) for part in _parts(fill)
    )
    return 16 + 36 * red + 6 * green + blue


def _sign(channel: str, number: int, rank: int) -> tuple[str, str]:
    """Return the mark and the paint of an id, `rank` in the order of the legend."""
    size = STRUCTURE_CHANNELS[channel]
    if number >= size:
        return ABSENT_MARK, ABSENT_PAINT
    if channel == "category":
        return CATEGORY_MARKS[number], f"k{number}"
    if channel == "node_type":
        mark = LETTERS[rank] if rank < len(LETTERS) else LAST_MARK
        return mark, f"k{min(rank, len(HUES) - 1)}"
    mark = DIGITS[number] if number < len(DIGITS) else LAST_MARK
    # Most values are small: the ramp is logarithmic, and the same for every file.
    return mark, f"s{round((STEPS - 1) * math.log1p(number) / math.log(size))}"


def _ramp(place: float) -> str:
    low, middle, high = RAMP_ENDS
    return mixed(low, middle, 2 * place) if place < 0.5 else mixed(middle, high, 2 * place - 1)


def _parts(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
