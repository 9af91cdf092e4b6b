"""Tables of a page, as data; `templates/table.html` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose first column names its rows.

    Args:
        caption: What it shows.
        head: Names of the columns.
        rows: Text of the cells.
        note: A sentence below it; how its figures are counted.
        words: Places of columns that hold words; the others but the first hold numbers.
        code: Places of columns that hold code; they are words too.
        last_is_sum: Whether the last row sums up the others.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: Sequence[int] = ()
    code: Sequence[int] = ()
    last_is_sum: bool = False

    def kind(self, place: int) -> str:
        """Return the class of a column: `words`, `code` or `number`."""
        if place in self.code:
            return "code"
        return "words" if place in self.words or place == 0 else "number"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number that leads a page.

    Args:
        name: What it is.
        value: It, with its unit.
        note: What is to be known of it, in a few words.
    """

    name: str
    value: str
    note: str = ""
