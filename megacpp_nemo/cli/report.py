"""`megacpp report`: a recipe as one HTML page."""

from __future__ import annotations

import argparse
import re
import shlex
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megacpp_nemo.cli.given import read_recipe
from megacpp_nemo.cli.lower import release_of
from megacpp_nemo.cli.output import native_path, say, write
from megacpp_nemo.cli.screen import Screen, visible
from megacpp_nemo.cli.usage import Parser, UsageError, add_recipe_options, add_release
from megacpp_nemo.contract import HybridRecipe
from megacpp_nemo.contract.errors import MegaCppError
from megacpp_nemo.lowering.releases import DEFAULT_RELEASE
from megacpp_nemo.planner.gpus import DEFAULT_GPU, GPUS

if TYPE_CHECKING:
    from megacpp_nemo.report.subject import Subject
    from megacpp_nemo.report.tables import Figure


class ReportError(MegaCppError):
    """A report that cannot be shown."""


def parser(name: str) -> Parser:
    """Return what `megacpp report` takes."""
    made = Parser(
        name,
        "RECIPE [FIELD=VALUE ...] [--against 'RECIPE ...'] [--gpu G] [--release R] [--open] ...",
        "Write a recipe as one HTML page: its layers, parameters, operations, memory, pipeline,\n"
        "communication, seams, command and launch; beside another recipe or layout, if asked for.\n"
        "The page is RECIPE.html unless --out names it, and needs no network.",
        (
            "megacpp report nam56r",
            "megacpp report nam56r --against nam52 --out report.html",
            "megacpp report nam56r --against 'nam56r pipeline_model_parallel_size=2'",
        ),
        ("html",),
    )
    add_recipe_options(made)
    add_release(made, DEFAULT_RELEASE)
    made.add("--against", metavar="WORDS", help="what to compare with: a recipe and its changes")
    made.add(
        "--gpu",
        metavar="G",
        default=DEFAULT_GPU,
        help=f"{', '.join(GPUS)}; {DEFAULT_GPU} by default",
    )
    made.add("--open", action="store_true", help="show the page in a browser")
    return made


def run(given: argparse.Namespace) -> str:
    """Write the page, and return what is told of it; the page itself for `--out -`.

    Raises:
        MegaCppError: If the words mean no recipe, the page cannot be written or not be shown.
    """
    if not given.words:
        parser(given.command).refuse("report needs a recipe", "none", hint="megacpp report nam56r")
    from megacpp_nemo.report.figures import figures
    from megacpp_nemo.report.page import page

    subject = _subject(given.words, given)
    against = None if given.against is None else _subject(_words(given.against), given)
    text = page(subject, against)
    if given.out == "-":
        if given.open:
            parser(given.command).refuse("--open needs a file", "--open --out -", "--out FILE")
        return text
    # The page is written here; what is left to print is what there is to say of it.
    out, given.out, given.format = given.out or _file_name(subject.recipe), None, "text"
    write(text, screen=given.screen, out=out, exact=True)
    say(f"Wrote {visible(native_path(out))}")
    if given.open:
        _open(Path(native_path(out)).resolve())
    return _told(subject, figures(subject), given.screen)


def _subject(words: Sequence[str], given: argparse.Namespace) -> Subject:
    from megacpp_nemo.report.subject import subject

    recipe = read_recipe(words[0], words[1:], given.mode)
    return subject(" ".join(words), recipe, release_of(given.release), given.gpu)


def _file_name(recipe: HybridRecipe) -> str:
    """Return the name of a recipe's page; a recipe may be called what no file may."""
    return re.sub(r"[^\w.-]", "_", recipe.name).lstrip(".") + ".html"


def _words(text: str) -> list[str]:
    """Return the words of `--against`."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    if not words:
        raise UsageError(
            "--against takes a recipe and its changes, as one argument",
            given=f"--against {text!r}",
            allowed="a recipe's name, and field=value words behind it",
            hint="--against 'nam56r pipeline_model_parallel_size=2'",
        )
    return words


def _open(path: Path) -> None:
    try:
        shown = webbrowser.open(path.as_uri())
    except webbrowser.Error:
        shown = False
    if not shown:
        raise ReportError(
            "The page is written, but no browser opens here",
            given=f"--open {path}",
            allowed="a machine with a browser",
            hint="no --open, and the file in a browser of your own",
        )


def _told(subject: Subject, figures: Sequence[Figure], screen: Screen) -> str:
    lines = [screen.heading(f"{subject.label} on Megatron-LM {subject.release}")]
    lines += [
        f"  {figure.name:<16} {figure.value}" + (f", {figure.note}" if figure.note else "")
        for figure in figures
    ]
    if subject.refusal:
        lines += ["", screen.wrapped(f"Refused: {subject.refusal.what}.")]
    return "\n".join(lines) + "\n"
