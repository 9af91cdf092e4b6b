"""Colours of block families, told apart with every common kind of colour vision.

They are those of Okabe and Ito, "Color Universal Design" (2008). A letter always stands on
them: colour is never the only sign.
"""

from __future__ import annotations

from typing import NamedTuple

from megacpp_nemo.contract.pattern import BlockFamily

DARK, LIGHT = "#111111", "#ffffff"


class Paint(NamedTuple):
    """A fill, and the ink of the letter on it, `#rrggbb`; their contrast is at least 4.5."""

    fill: str
    ink: str = DARK


PAINTS = {
    BlockFamily.ATTENTION: Paint("#0072b2", LIGHT),
    BlockFamily.SPARSE_ATTENTION: Paint("#56b4e9"),
    BlockFamily.EXPERTS: Paint("#e69f00"),
    BlockFamily.GATED_DELTA_NET: Paint("#f0e442"),
    BlockFamily.MAMBA: Paint("#009e73"),
    BlockFamily.RECURRENT: Paint("#cc79a7"),
}
PLAIN = Paint("#d4d4d4")


def paint_of(family: BlockFamily | None) -> Paint:
    """Return the colours of a family; those of what is no layer for None."""
    return PLAIN if family is None else PAINTS[family]
