"""`megacpp data inspect`: a source file with its tokens, coloured by a structure channel."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from megacpp_nemo.cli.data_words import corpus_folder, in_options, source_file
from megacpp_nemo.cli.lower import to_json
from megacpp_nemo.cli.usage import Parser, UsageError
from megacpp_nemo.contract.errors import DataError, lookup
from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS

if TYPE_CHECKING:
    from megacpp_nemo.report.source import Source

LEVEL = "dependency_level"
# A page of so many takes a browser a second or two.
MOST_ON_A_PAGE = 30_000
_LINES = re.compile(r"(\d{1,9})?(:)?(\d{1,9})?")


def parser(name: str) -> Parser:
    """Return what `megacpp data inspect` takes."""
    made = Parser(
        name,
        "FILE [--channel C] [--data DIR] [--lines A:B] [--tokens] ...",
        "Show a source file with its tokens coloured by a structure channel. A token begins where\n"
        "the underline changes, or without colour, where there is a mark below the text.\n\n"
        "With --data the tokens are those of a corpus, and dependency levels those that it holds\n"
        "of the file. A page, --out FILE.html, has all channels, and needs no network.",
        (
            "megacpp data inspect src/main.cpp",
            "megacpp data inspect src/main.cpp --channel ast_depth --lines 10:40",
            "megacpp data inspect src/main.cpp --data corpus --tokens",
            "megacpp data inspect src/main.cpp --data corpus --out main.html",
        ),
        ("text", "json", "html"),
    )
    channels = ", ".join(STRUCTURE_CHANNELS)
    made.add("--channel", metavar="C", default="category", help=f"{channels}; the first by default")
    made.add("--data", metavar="DIR", help="a corpus of `megacpp data build`")
    made.add("--lines", metavar="A:B", help="some lines only, as in 10:40, 10: or 10")
    made.add("--tokens", action="store_true", help="list the tokens with all channels")
    return made


def run(given: argparse.Namespace) -> str:
    """Return the file in the format asked for.

    Raises:
        UsageError: If there is not one file, or there are no such lines or channel.
        DataError: If the file or the corpus cannot be read, or has no such channel.
    """
    word = parser(given.command).one_word(given, "source file")
    known = {name: name for name in STRUCTURE_CHANNELS}
    what = f"There is no channel {given.channel!r}"
    channel = lookup(known, given.channel, what=what, field="--channel", error=UsageError)
    if channel == LEVEL and given.data is None:
        raise UsageError(
            "Dependency levels are read off a whole corpus, not off one file",
            given=f"--channel {LEVEL}, and no --data",
            allowed="a corpus that holds the file",
            hint="--data DIR",
        )
    source = _part(_source(word, given), given.lines)
    if channel not in source.channels:
        raise DataError(
            f"The corpus says nothing of the {channel} of this file",
            given=" ".join(source.notes) or word,
            allowed=", ".join(source.channels),
            hint="--channel category",
        )
    return _drawn(source, channel, given)


def _drawn(source: Source, channel: str, given: argparse.Namespace) -> str:
    if given.format == "json":
        return to_json(data(source))
    if given.format == "html":
        from megacpp_nemo.report.source_page import source_page

        return source_page(source.at_most(MOST_ON_A_PAGE), channel)
    from megacpp_nemo.cli.data_text import source_text, token_table

    drawn = token_table if given.tokens else source_text
    return drawn(source, channel, given.screen)


def _source(word: str, given: argparse.Namespace) -> Source:
    path, content = source_file(word)
    folder = None if given.data is None else corpus_folder(given.data)
    from megacpp_nemo.report import source

    if folder is None:
        return source.of_file(word, content)
    with in_options():
        return source.in_corpus(word, path, content, folder)


def _part(source: Source, lines: str | None) -> Source:
    """Return the lines that are asked for; all without a word."""
    if lines is None:
        return source
    count = len(source.line_starts)
    found = _LINES.fullmatch(lines)
    first, colon, last = found.groups() if found else (None, None, None)
    low = int(first or 1)
    high = int(last) if last else count if colon else low
    if not (first or last) or not 1 <= low <= high <= count:
        raise UsageError(
            "The file has no such lines",
            given=f"--lines {lines}",
            allowed=f"lines 1 to {count}, as in A:B, A: or A",
            hint=f"--lines {min(max(low, 1), count)}:{count}",
        )
    return source.lines(low, high)


def data(source: Source) -> dict[str, Any]:
    """Return the tokens that are shown, and what each channel says of them, as plain data."""
    from megacpp_nemo.report.channels import keys

    tokens = [
        {
            "token": token,
            "id": None if source.ids is None else int(source.ids[token]),
            "byte": int(source.starts[token]),
            "text": source.text(token),
            **{channel: source.value(channel, token) for channel in source.channels},
        }
        for token in range(source.first, source.last)
    ]
    legend = {
        channel: [
            {"id": key.id, "name": key.name, "tokens": key.tokens}
            for key in keys(channel, source.of_shown(channel)).values()
        ]
        for channel in source.channels
    }
    return {
        "schema": 1,
        "file": source.name,
        "lines": list(source.line_numbers),
        "channels": legend,
        "tokens": tokens,
        "notes": list(source.notes),
    }
