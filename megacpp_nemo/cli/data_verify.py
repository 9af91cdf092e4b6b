"""`megacpp data verify`: whether a corpus is what its manifest says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacpp_nemo.cli.data_words import corpus_folder, in_options
from megacpp_nemo.cli.lower import to_json
from megacpp_nemo.cli.screen import Screen
from megacpp_nemo.cli.usage import Parser, whole_number

if TYPE_CHECKING:
    from megacpp_nemo.data.verify import Verification

FOUND = 1


def parser(name: str) -> Parser:
    """Return what `megacpp data verify` takes."""
    made = Parser(
        name,
        "DIR [--reparse N] [--format F] [--out FILE]",
        "Check a corpus: the size and hash of every file, its versions, its tokenizer, that every\n"
        "channel has one id for each token of every document, and that all ids are in range.\n"
        "--reparse makes N documents again from their sources, and compares every token and all\n"
        "channels but dependency levels, which need the whole corpus.\n\n"
        "Exit status: 0 all is well, 1 something is not, 3 there is no corpus.",
        ("megacpp data verify corpus", "megacpp data verify corpus --reparse 100 --format json"),
        ("text", "json"),
    )
    made.add(
        "--reparse",
        metavar="N",
        type=whole_number(0),
        default=0,
        help="documents to make again, spread over the corpus; 0 by default",
    )
    return made


def run(given: argparse.Namespace) -> str:
    """Return what was checked and found; `given.status` is what the process ends with.

    Raises:
        UsageError: If there is not one folder.
        DataError: If it holds no corpus.
    """
    folder = corpus_folder(parser(given.command).one_word(given, "folder of a corpus"))
    from megacpp_nemo.data.verify import verify_folder

    with in_options():
        found = verify_folder(folder, reparse=given.reparse)
    given.status = 0 if found.ok else FOUND
    data = _data(folder, found)
    return to_json(data) if given.format == "json" else _text(found, given.screen)


def _data(folder: Path, found: Verification) -> dict[str, Any]:
    return {
        "schema": 1,
        "folder": str(folder),
        "ok": found.ok,
        "findings": list(found.findings),
        "documents": found.documents,
        "tokens": found.tokens,
        "channels": list(found.channels),
        "checked_bytes": found.checked_bytes,
        "reparsed": found.reparsed,
        "not_reparsed": found.not_reparsed,
    }


def _text(found: Verification, screen: Screen) -> str:
    lines = [screen.heading(str(found.folder)), *_checked(found)]
    if found.ok:
        lines += ["", screen.paint("All is well.", "green")]
        return "\n".join(lines) + "\n"
    count = len(found.findings)
    verdict = "One thing is wrong:" if count == 1 else f"{count} things are wrong:"
    lines += ["", screen.paint(verdict, "red")]
    lines += [screen.wrapped(f"- {finding}", "  ") for finding in found.findings]
    return "\n".join(lines) + "\n"


def _checked(found: Verification) -> list[str]:
    """Return what was looked at, in lines."""
    lines = [
        f"documents   {found.documents:,}",
        f"tokens      {found.tokens:,}",
        f"channels    {', '.join(found.channels) or 'none'}",
        f"read        {found.checked_bytes / 1e6:,.1f} MB",
    ]
    if found.reparsed or found.not_reparsed:
        gone = found.not_reparsed
        left = f"; {gone:,} could not be: their sources are gone or changed" if gone else ""
        lines.append(f"made again  {found.reparsed:,} documents{left}")
    return lines
