"""`megacpp data build`: a folder of C++ as a corpus of tokens and structure channels."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from megacpp_nemo.cli.data_summary import facts_of, summary
from megacpp_nemo.cli.data_words import MANIFEST, in_options, share, source_folder
from megacpp_nemo.cli.lower import to_json
from megacpp_nemo.cli.output import native_path
from megacpp_nemo.cli.usage import Parser, UsageError, whole_number
from megacpp_nemo.contract.errors import nearest
from megacpp_nemo.contract.structure import (
    STRUCTURE_CHANNELS,
    STRUCTURE_SETS,
    is_structure_choice,
)

NONE = "none"
OUT = "folder of the corpus; it appears whole, or not at all"
STRUCTURE = f"{', '.join(STRUCTURE_SETS)} (default), {NONE}, or channels joined by '+'"


def parser(name: str) -> Parser:
    """Return what `megacpp data build` takes."""
    made = Parser(
        name,
        "FOLDER --out DIR [--workers N] [--structure S] [--exclude GLOB ...] ...",
        "Read the C++ sources of a folder into a corpus to train on: tokens, and beside each\n"
        "token what the syntax tree says of it. Files that are empty, no UTF-8 text or copies of\n"
        "another are left out and counted; what cannot be parsed of a file is marked absent.\n\n"
        "The bytes of the corpus depend on the sources and the options, not on the number of\n"
        "workers. Stopped at any moment, the same command goes on where it was. The channels:\n"
        + "\n".join(
            f"  {channel:<17} {size} values" for channel, size in STRUCTURE_CHANNELS.items()
        ),
        (
            "megacpp data build src --out corpus",
            "megacpp data build src --out corpus --workers 8 --exclude 'third_party' \\",
            "    --exclude '*.pb.h'",
            "megacpp data build more --out more-corpus --tokenizer corpus/tokenizer",
        ),
        ("text", "json"),
    )
    made.describe_out("DIR", OUT)
    made.add("--workers", metavar="N", type=whole_number(1), help="processes; one a core")
    made.add("--structure", metavar="S", default="all", help=STRUCTURE)
    made.add(
        "--vocab-size",
        metavar="N",
        type=whole_number(1),
        help="tokens of the tokenizer that is trained; 4096 by default",
    )
    made.add(
        "--tokenizer", metavar="DIR", help="a tokenizer to take instead, such as a corpus' own"
    )
    made.add("--exclude", metavar="GLOB", action="append", default=[],
             help="paths to leave out; * stays in a folder; for several, again")  # fmt: skip
    made.add("--suffixes", metavar="LIST", help="endings that count as C++, as in .h,.cpp")
    made.add(
        "--validation-fraction",
        metavar="F",
        default="0.05",
        help="share of the files to hold back; 0.05 by default",
    )
    made.add(
        "--seed",
        metavar="N",
        type=whole_number(0),
        default=1234,
        help="chooses the files held back; 1234 by default",
    )
    made.add("--no-progress", action="store_true", help="draw no progress bar on the terminal")
    return made


def run(given: argparse.Namespace) -> str:
    """Build the corpus, and return what is in it.

    Raises:
        UsageError: If there is not one folder and one place to write to.
        DataError: If the sources or the tokenizer cannot be used, or the corpus not be written.
    """
    source, out = _places(given)
    settings = _settings(given)
    folder = source_folder(source)
    given.out = None
    from megacpp_nemo.data.corpus_folder import build_folder
    from megacpp_nemo.data.corpus_spec import CorpusSpec

    kept, resumed = (out / MANIFEST).is_file(), out.with_name(f".{out.name}.building").is_dir()
    began = time.perf_counter()
    with in_options():
        corpus = build_folder(
            CorpusSpec(root=folder, **settings),
            out,
            progress=not given.no_progress and sys.stderr.isatty(),
            workers=given.workers,
        )
    facts = facts_of(corpus, out, None if kept else time.perf_counter() - began, resumed=resumed)
    return to_json(facts) if given.format == "json" else summary(facts, given.screen)


def _places(given: argparse.Namespace) -> tuple[str, Path]:
    """Return the folder of the sources, and that of the corpus."""
    own = parser(given.command)
    hint = "megacpp data build src --out corpus"
    if not given.words:
        own.refuse("data build needs a folder of C++ sources", "none", hint)
    source = own.one_word(given, "folder of sources")
    if given.out in (None, "-"):
        shown = "none" if given.out is None else "--out -"
        own.refuse("data build needs --out, the folder of the corpus", shown, hint)
    if "format" not in given.seen:
        # The name of a folder says nothing of how its summary is printed.
        given.format = own.formats[0]
    return source, Path(native_path(given.out)).expanduser()


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    """Return the options as `CorpusSpec` takes them, what is not given left out."""
    fraction = share("--validation-fraction", given.validation_fraction)
    found: dict[str, Any] = {
        "structure": _structure(given.structure),
        "exclude": tuple(given.exclude),
        "validation_fraction": fraction,
        "seed": given.seed,
    }
    if given.vocab_size is not None:
        found["vocab_size"] = given.vocab_size
    if given.tokenizer is not None:
        if given.vocab_size is not None:
            parser(given.command).refuse(
                "A tokenizer that is given has its own vocabulary",
                f"--tokenizer {given.tokenizer} --vocab-size {given.vocab_size}",
                "one of the two",
            )
        found["tokenizer_dir"] = native_path(given.tokenizer)
    if given.suffixes is not None:
        found["suffixes"] = _suffixes(given.suffixes)
    return found


def _suffixes(text: str) -> tuple[str, ...]:
    """Return file name endings, each with its dot."""
    endings = [part.strip() for part in text.split(",")]
    if not all(ending.strip(".") for ending in endings):
        raise UsageError(
            "--suffixes lists endings of file names",
            given=f"--suffixes {text!r}",
            allowed="endings with commas between",
            hint="--suffixes .h,.cpp",
        )
    return tuple("." + ending.removeprefix(".") for ending in endings)


def _structure(choice: str) -> str | None:
    """Return the choice of channels; None for none of them."""
    known = (NONE, *STRUCTURE_SETS, *STRUCTURE_CHANNELS)
    if choice == NONE:
        return None
    if is_structure_choice(choice):
        return choice
    parts = choice.split("+")
    wrong = [part for part in parts if part not in STRUCTURE_CHANNELS]
    close = nearest(wrong[0], known) or "all" if wrong else "+".join(dict.fromkeys(parts))
    raise UsageError(
        f"--structure knows no {wrong[0]!r}" if wrong else "A channel is named twice",
        given=f"--structure {choice}",
        allowed=f"{', '.join(known)}; channels may be joined by '+'",
        hint=f"--structure {close}",
    )
