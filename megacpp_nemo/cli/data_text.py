"""A source file in a terminal: its tokens on the colours of a channel, or marked below.

1  #include <vector>
   p       p   p
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from megacpp_nemo.cli.screen import GAP, Screen
from megacpp_nemo.report.channels import TITLES, Key, id_name, keys, paints, terminal_color
from megacpp_nemo.report.source import Source

TAB = 8


class Run(NamedTuple):
    """Characters of a token on a line, and whether the token begins with them."""

    token: int
    text: str
    begins: bool


def source_text(source: Source, channel: str, screen: Screen) -> str:
    """Return a file, coloured by a channel, or with a line of marks below each of its lines."""
    legend = keys(channel, source.of_shown(channel))
    first, last = source.line_numbers
    wide = len(str(last))
    lines = [_head(source, channel, screen), ""]
    for number, runs in enumerate(_lines(source), first):
        drawn = [
            screen.filled(run.text, _fill(legend[source.value(channel, run.token)]),
                          underlined=run.token % 2 == 1)
            for run in runs
        ]  # fmt: skip
        gutter = screen.paint(f"{number:>{wide}}", "dim")
        lines.append(f"{gutter}{GAP}{''.join(drawn)}".rstrip(" "))
        if not screen.color and (marks := _marks(runs, source, channel, legend)):
            lines.append(" " * wide + GAP + marks)
    lines += ["", *_legend(legend, screen)]
    lines += [screen.wrapped(note) for note in source.notes]
    return "\n".join(lines) + "\n"


def token_table(source: Source, channel: str, screen: Screen) -> str:
    """Return the tokens as a table with every channel, the one asked for first."""
    order = [channel, *(name for name in source.channels if name != channel)]
    numbered = source.ids is not None
    head = ["token", *(["id"] if numbered else []), "byte", "text", *order]
    rows = []
    for token in range(source.first, source.last):
        own = [str(token), *([str(int(source.ids[token]))] if source.ids is not None else [])]
        own += [str(int(source.starts[token])), json.dumps(source.text(token), ensure_ascii=False)]
        rows.append([*own, *(id_name(name, source.value(name, token)) for name in order)])
    parts = [_head(source, channel, screen), "", screen.table(head, rows)]
    if source.notes:
        parts += ["", *(screen.wrapped(note) for note in source.notes)]
    return "\n".join(parts) + "\n"


def _head(source: Source, channel: str, screen: Screen) -> str:
    first, last = source.line_numbers
    count = source.last - source.first
    lines = f"line {first:,}" if first == last else f"lines {first:,} to {last:,}"
    where = f"{lines} of {len(source.line_starts):,}"
    if last - first + 1 == len(source.line_starts):
        where = f"{last:,} line{'s' * (last > 1)}"
    what = f"{count:,} {'pieces' if source.ids is None else 'tokens'}"
    return screen.heading(f"{source.name}: {TITLES[channel]} of {what}, {where}")


def _lines(source: Source) -> Iterator[list[Run]]:
    """Yield the lines that are shown; tabs are spaces, and the end of a line is an empty run."""
    runs: list[Run] = []
    column = 0
    for token, text in source.pieces():
        begins = True
        for number, part in enumerate(text.split("\n")):
            if number:
                yield [*runs, Run(token, "", begins)]
                runs, column, begins = [], 0, False
            if part:
                spaced, column = _spaced(part, column)
                runs.append(Run(token, spaced, begins))
                begins = False
    if runs:
        yield runs


def _spaced(text: str, column: int) -> tuple[str, int]:
    """Return text with its tabs as spaces, and the column behind it."""
    parts = []
    for character in text:
        if character == "\t":
            character = " " * (TAB - column % TAB)
        parts.append(character)
        column += _columns(character)
    return "".join(parts), column


def _columns(text: str) -> int:
    """Return how many columns of a terminal text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def _marks(runs: list[Run], source: Source, channel: str, legend: dict[int, Key]) -> str:
    """Return the line below a line: a mark where a token begins."""
    text, column = "", 0
    for run in runs:
        # A character that takes no column has no room for its mark.
        if run.begins and len(text) <= column:
            text = text.ljust(column) + legend[source.value(channel, run.token)].mark
        column += _columns(run.text)
    return text


def _legend(legend: dict[int, Key], screen: Screen) -> list[str]:
    """Return what the colours and marks mean, and how many tokens have each, in lines."""
    lines, line, room = [], "", screen.width
    for key in legend.values():
        said = f" {key.name} {key.tokens:,}"
        mark = f" {key.mark} "
        if room < len(mark) + len(said) and line:
            lines.append(line.rstrip())
            line, room = "", screen.width
        line += screen.filled(mark, _fill(key)) + said + GAP
        room -= len(mark) + len(said) + len(GAP)
    return [*lines, line.rstrip()]


_FILLS = {paint: terminal_color(fill) for paint, fill in paints().items()}


def _fill(key: Key) -> int | None:
    return _FILLS.get(key.paint)
