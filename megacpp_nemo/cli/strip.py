"""`megacpp strip`: the layers of a recipe as a strip, drawn as text, SVG or PNG."""

from __future__ import annotations

import argparse

from megacpp_nemo.cli.given import read_recipe
from megacpp_nemo.cli.lower import release_of
from megacpp_nemo.cli.screen import on_terminal
from megacpp_nemo.cli.usage import Parser, UsageError, add_recipe_options, add_release
from megacpp_nemo.contract import HybridRecipe
from megacpp_nemo.lowering.releases import DEFAULT_RELEASE

DRAWN = ("svg", "png")
NOT_DRAWN = ("pdf", "jpg", "jpeg", "gif", "webp", "eps", "html")


def parser(name: str) -> Parser:
    """Return what `megacpp strip` takes."""
    made = Parser(
        name,
        "RECIPE [FIELD=VALUE ...] [--release R] [--mode M] [--format F] [--out FILE]",
        "Draw the layers of a recipe: family, native or custom, pipeline stage, and how much of\n"
        "the model's bytes and operations each is. A FILE ending in .svg or .png is a picture.",
        (
            "megacpp strip nam56r",
            "megacpp strip nam56r pipeline_model_parallel_size=2 --release 0.19.0 --out strip.svg",
        ),
        ("text", *DRAWN),
    )
    add_recipe_options(made)
    add_release(made, DEFAULT_RELEASE)
    return made


def run(given: argparse.Namespace) -> str | bytes:
    """Return the picture in the format asked for.

    Raises:
        MegaCppError: If the words mean no recipe, or the picture cannot be drawn.
    """
    if not given.words:
        parser(given.command).refuse("strip needs a recipe", "none", hint="megacpp strip nam56r")
    ending = (given.out or "").rpartition(".")[2].lower()
    if given.format == "text" and ending in NOT_DRAWN:
        raise UsageError(
            f"A strip cannot be drawn as {ending.upper()}",
            given=f"--out {given.out}",
            allowed="a file ending in .svg or .png, or one of text",
            hint=f"--out {given.out[: -len(ending)]}svg",
        )
    if given.format == "png" and on_terminal(None if given.out == "-" else given.out):
        raise UsageError(
            "A terminal cannot show a PNG",
            given="--format png to a terminal",
            allowed="a file, or a pipe",
            hint="--out strip.png",
        )
    return _drawn(read_recipe(given.words[0], given.words[1:], given.mode), given)


def _drawn(recipe: HybridRecipe, given: argparse.Namespace) -> str | bytes:
    from megacpp_nemo.report.subject import subject

    found = subject(recipe.name, recipe, release_of(given.release))
    picture = found.picture
    if given.format == "svg":
        from megacpp_nemo.report.svg import svg

        return svg(picture)
    if given.format == "png":
        from megacpp_nemo.report.png import png

        return png(picture)
    from megacpp_nemo.cli.strip_text import strip_text

    return strip_text(picture, given.screen, found.refusal)
