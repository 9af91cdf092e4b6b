"""Shell text as the words of its lines: quotes, backslashes and comments, without a shell.

Nothing is expanded. A word in whose place a shell would put something else (`$NAME`, backquotes,
a redirection) says so in `unexpanded`, for whoever needs the word to refuse. Patterns of file
names stay as they are, as a shell leaves those that no file fits: a layer pattern is full of `*`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from megacpp_nemo.cli.usage import UsageError

_PIECE = re.compile(
    r"""
      (?P<joined> \\\n | \\\Z )
    | (?P<gap> [ \t]+ )
    | (?P<end> \n )
    | (?P<operator> [;&|]+ )
    | ' (?P<single> [^']* ) '
    | " (?P<double> (?: [^"\\] | \\. )* ) "
    | \\ (?P<escaped> . )
    | (?P<dollar> \$ (?=['"]) )
    | (?P<bare> (?: [^ \t\n;&|'"\\$] | \$ (?!['"]) )+ )
    """,
    re.VERBOSE | re.DOTALL,
)
_SEPARATORS = ("gap", "end", "operator")
_EXPANDED = {
    "bare": re.compile(r"[`<>()]|\$[\w{(@*#?!$-]|\{[^{}]*(,|\.\.)[^{}]*\}"),
    "double": re.compile(r"`|\$[\w{(@*#?!$-]"),
    "dollar": re.compile(r"\$"),
}


class Word(NamedTuple):
    """A word as a shell hands it over, and as it is written where a shell would expand it."""

    text: str
    unexpanded: str = ""


def shell_lines(text: str) -> list[list[Word]]:
    """Return the words of each line; `;`, `|` and `&` are words that a shell acts on.

    Raises:
        UsageError: If a quote is not closed.
    """
    lines: list[list[Word]] = [[]]
    pieces = _pieces(text)
    for between, group in itertools.groupby(pieces, lambda piece: piece.lastgroup in _SEPARATORS):
        if not between:
            lines[-1] += _words(list(group))
            continue
        for piece in group:
            if piece.lastgroup == "end":
                lines.append([])
            elif piece.lastgroup == "operator":
                lines[-1].append(Word(piece[0], piece[0]))
    return [line for line in lines if line]


def _pieces(text: str) -> Iterator[re.Match[str]]:
    place, begins = 0, True
    while place < len(text):
        if begins and text[place] == "#":
            end = text.find("\n", place)
            place = end if end >= 0 else len(text)
            continue
        piece = _PIECE.match(text, place)
        if piece is None:
            raise UsageError(
                "The text of a command line cannot be read as a shell would",
                given=f"no closing quotation for {text[place : place + 40]!r}",
                allowed="matching quotes, or one bare argument a line",
                hint="megacpp lower RECIPE --format argv",
            )
        yield piece
        place = piece.end()
        if piece.lastgroup != "joined":
            begins = piece.lastgroup in _SEPARATORS


def _words(pieces: list[re.Match[str]]) -> list[Word]:
    """Return the word that adjoining pieces make; none where they only join lines."""
    if all(piece.lastgroup == "joined" for piece in pieces):
        return []
    first = next(piece for piece in pieces if piece.lastgroup != "joined")
    home = first.lastgroup == "bare" and first[0].startswith("~")
    whole = "".join(piece[0] for piece in pieces)
    return [Word("".join(map(_text, pieces)), whole if home or any(map(_expands, pieces)) else "")]


def _text(piece: re.Match[str]) -> str:
    kind = piece.lastgroup or ""
    if kind == "joined":
        return ""
    if kind == "double":
        return re.sub(r"\\([$`\"\\\n])", lambda pair: pair[1].strip("\n"), piece[kind])
    return piece[kind]


def _expands(piece: re.Match[str]) -> bool:
    """Whether a shell would put something else in the place of a piece."""
    kind = piece.lastgroup or ""
    text = piece[0] if kind != "double" else re.sub(r"\\.", "", piece[0], flags=re.DOTALL)
    return kind in _EXPANDED and bool(_EXPANDED[kind].search(text))
