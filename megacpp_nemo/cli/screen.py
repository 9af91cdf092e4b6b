"""How text is drawn: colour, characters and width, and tables that fit.

Nothing is told by colour alone, and nothing by characters that ASCII lacks.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

CODES = {"bold": "1", "dim": "2", "red": "1;31", "green": "32", "yellow": "1;33"}
COLORS = ("auto", "always", "never")
NARROWEST, PAPER = 40, 100
WORD = 14
GAP = "  "
# What would move a terminal's cursor, change its state, or turn the order of the letters around.
_CONTROL = r"\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
_BLACK_ON = "38;5;16;48;5;"
_PAINT = "|".join(
    rf"\x1b\[{code}m" for code in (*CODES.values(), "0", "4", rf"(?:4;)?{_BLACK_ON}\d{{1,3}}")
)
_HIDDEN = re.compile(f"[{_CONTROL}]")
_HIDDEN_OR_PAINT = re.compile(f"{_PAINT}|{_HIDDEN.pattern}")


class Cell(NamedTuple):
    """Text of a table's cell, and its style of `CODES`."""

    text: str
    style: str = ""


@dataclass(frozen=True, kw_only=True)
class Screen:
    """Where text is drawn.

    Args:
        color: Whether in colour.
        unicode: Whether it takes characters beyond ASCII.
        width: Columns.
    """

    color: bool = False
    unicode: bool = False
    width: int = PAPER

    def paint(self, text: str, style: str) -> str:
        """Return text in a style of `CODES`; as it is for no style, or without colour."""
        return f"\x1b[{CODES[style]}m{text}\x1b[0m" if self.color and style and text else text

    def filled(self, text: str, color: int | None, *, underlined: bool = False) -> str:
        """Return text in black on one of a terminal's 256 colours; None for its own."""
        codes = ["4"] * underlined + ([] if color is None else [f"{_BLACK_ON}{color}"])
        return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if self.color and codes and text else text

    def mark(self, drawn: str, plain: str) -> str:
        """Return a character, or what stands for it in ASCII."""
        return drawn if self.unicode else plain

    def heading(self, text: str) -> str:
        """Return the heading of a part."""
        return self.paint(text, "bold")

    def wrapped(self, text: str, indent: str = "") -> str:
        """Return text as lines that fit, all but the first indented."""
        return f"\n{indent}".join(_wrapped(text, max(self.width - len(indent), NARROWEST // 2)))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
        """Return a table that fits the width, long cells on several lines.

        Where the columns are too many even for that, each row becomes a block of lines.
        """
        cells = [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in rows]
        widths = self._widths(head, cells)
        if widths is None:
            return "\n".join(line for row in cells for line in self._block(head, row))
        rule = [self.mark("─", "-") * width for width in widths]
        lines = [
            *self._lines([Cell(text, "bold") for text in head], widths),
            GAP.join(self.paint(part, "dim") for part in rule),
        ]
        for row in cells:
            lines += self._lines(row, widths)
        return "\n".join(lines)

    def _widths(self, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[int] | None:
        """Return widths that fit; None where even short words would have to be cut."""
        columns = [[Cell(name), *cells] for name, *cells in zip(head, *rows, strict=True)]
        widths = [
            max(len(line) for c in column for line in c.text.split("\n")) for column in columns
        ]
        room = self.width - len(GAP) * (len(head) - 1)
        # Words stay whole as long as there is room, and short ones in any case.
        for longest in (WORD, WORD // 2):
            least = [_longest_word(column, longest) for column in columns]
            while sum(widths) > room:
                slack = [width > low for width, low in zip(widths, least, strict=True)]
                if not any(slack):
                    break
                widths[max(range(len(widths)), key=lambda i: (slack[i], widths[i]))] -= 1
        return widths if sum(widths) <= room else None

    def _block(self, head: Sequence[str], row: Sequence[Cell]) -> list[str]:
        """Return a row as its first cell, and each other one behind its column's name."""
        label = max(map(len, head[1:]), default=0)
        room = max(self.width - label - 2 * len(GAP), NARROWEST // 4)
        lines = [self.paint(part, row[0].style) for part in _wrapped(row[0].text, self.width)]
        for name, cell in zip(head[1:], row[1:], strict=True):
            for part in _wrapped(cell.text, room) if cell.text else ():
                lines.append(f"{GAP}{name:<{label}}{GAP}{self.paint(part, cell.style)}")
                name = ""
        return lines

    def _lines(self, row: Sequence[Cell], widths: Sequence[int]) -> list[str]:
        columns = [_wrapped(cell.text, width) for cell, width in zip(row, widths, strict=True)]
        lines = []
        for index in range(max(map(len, columns))):
            parts = []
            for cell, width, column in zip(row, widths, columns, strict=True):
                text = column[index] if index < len(column) else ""
                parts.append(self.paint(text, cell.style) + " " * (width - len(text)))
            lines.append(GAP.join(parts).rstrip())
        return lines


def visible(text: str, *, painted: bool = False) -> str:
    """Return text with control characters as Python writes them; line breaks stay.

    Args:
        text: Text to show on a terminal.
        painted: Whether it is painted by a `Screen`, whose colours stay too.
    """
    return (_HIDDEN_OR_PAINT if painted else _HIDDEN).sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0] if len(match[0]) > 1 else match[0].encode("unicode_escape").decode("ascii")


def screen_for(color: str, out: str | None) -> Screen:
    """Return the screen that output to `out`, or to standard output, is drawn on."""
    stream = sys.stdout
    drawable = out is not None or _takes(stream, "─·│")
    width = _width(stream) if out is None else PAPER
    colored = color == "always" if out is not None else in_color(color, stream)
    return Screen(color=colored, unicode=drawable, width=width)


def in_color(choice: str, stream: Any) -> bool:
    """Return whether a stream is written in colour: on a terminal that did not decline it."""
    if choice != "auto":
        return choice == "always"
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream is not None and stream.isatty()


def on_terminal(out: str | None) -> bool:
    """Return whether output to `out`, None for standard output, is for a terminal."""
    return out is None and sys.stdout is not None and sys.stdout.isatty()


def _takes(stream: Any, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeError, LookupError):
        return False
    # What is written is UTF-8: another encoding that has these characters is drawn in ASCII.
    return re.sub(r"[-_]", "", str(stream.encoding)).lower() == "utf8"


def _width(stream: Any) -> int:
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return max(int(columns), NARROWEST)
    try:
        return max(os.get_terminal_size(stream.fileno()).columns, NARROWEST)
    except (AttributeError, OSError, ValueError):
        return PAPER


def _wrapped(text: str, width: int) -> list[str]:
    """Return text in lines of at most `width`, broken at spaces, and within longer words."""
    lines: list[str] = []
    for part in text.split("\n"):
        line = ""
        for word in part.split(" "):
            if line and len(line) + 1 + len(word) <= width:
                line += f" {word}"
                continue
            if line:
                lines.append(line)
            *full, line = _pieces(word, width)
            lines += full
        lines.append(line)
    return lines


def _pieces(word: str, width: int) -> list[str]:
    """Return a word cut to `width`, at a dot or a slash where there is one."""
    pieces = []
    while len(word) > width:
        cuts = [max(word.rfind(mark, 0, width) for mark in marks) + 1 for marks in ("./=", "_-")]
        cut = next((cut for cut in cuts if cut > width // 3), width)
        pieces.append(word[:cut])
        word = word[cut:]
    return [*pieces, word]


def _longest_word(column: Sequence[Cell], most: int) -> int:
    """Return the length of the longest word of a column, at most `most`."""
    return min(most, max((len(word) for cell in column for word in cell.text.split()), default=0))
