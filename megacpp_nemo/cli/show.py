"""`megacpp show`: the curves of a run, in the terminal and as a picture or a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacpp_nemo.cli.lower import to_json
from megacpp_nemo.cli.numbers import finite
from megacpp_nemo.cli.output import native_path, received, say, write
from megacpp_nemo.cli.runs import ago, number, steps
from megacpp_nemo.cli.screen import Screen, screen_for
from megacpp_nemo.cli.sparks import spark
from megacpp_nemo.cli.usage import Parser, UsageError

if TYPE_CHECKING:
    from megacpp_nemo.runs.curves import Panel
    from megacpp_nemo.runs.events import History
    from megacpp_nemo.runs.folders import Run
    from megacpp_nemo.runs.summary import Summary

PAGE, PICTURE = "curves.html", "curves.png"
SUFFIXES = (".html", ".png")
BARS = 40


def parser(name: str) -> Parser:
    """Return what `megacpp show` takes."""
    made = Parser(
        name,
        "RUN [--out FILE.html|FILE.png] [--open]",
        "Draw a run: loss, validation loss, learning rate, throughput, expert load, and what else\n"
        "it logged. RUN is its folder, or anything in it.\n\n"
        "Without --out the folder of the run gets a page, curves.html, and a picture, curves.png.\n"
        "The page is one file, needs no network, and is light or dark as its reader is. --format\n"
        "json gives the numbers and draws nothing.",
        (
            "megacpp show runs/nam56r_tiny",
            "megacpp show runs/nam56r_tiny --out curves.html --open",
            "megacpp show runs/nam56r_tiny --format json --out curves.json",
        ),
        ("text", "json"),
    )
    made.add("--open", action="store_true", help="open the page in a browser")
    return made


def run(given: argparse.Namespace) -> str:
    """Write the drawings, and return the run in a few lines; or return its numbers.

    Raises:
        UsageError: If there is not one run, or the file has another ending.
        DataError: If it is no run, or its curves cannot be read.
        OutputError: If a file cannot be written.
    """
    place = parser(given.command).one_word(given, "run")
    _check_out(given)
    from megacpp_nemo.runs.curves import panels
    from megacpp_nemo.runs.events import read_history
    from megacpp_nemo.runs.folders import find_run
    from megacpp_nemo.runs.summary import summary

    one = find_run(Path(native_path(place)).expanduser())
    history = _with_curves(one, read_history(one.events, one.start_step))
    about, drawn = summary(one, history), panels(history, one.seq_length)
    if given.format == "json":
        return to_json(finite(_data(about, drawn, history)))
    out, given.out = given.out, None
    given.screen = screen_for(given.color, None)
    files = [out] if out else [received(str(one.folder / name)) for name in (PAGE, PICTURE)]
    for file in files:
        write(_drawing(file, about, drawn, history), screen=given.screen, out=file)
    if given.open:
        _open(next((file for file in files if file.endswith(".html")), files[0]))
    return _text(about, drawn, history, files, given.screen)


def _check_out(given: argparse.Namespace) -> None:
    if given.format == "json":
        if given.open:
            parser(given.command).refuse("--open opens a page, not numbers", "--format json --open")
        return
    if given.out is not None and not given.out.lower().endswith(SUFFIXES):
        raise UsageError(
            "A run is drawn as a page or a picture",
            given=f"--out {given.out}",
            allowed="a file ending in .html or .png",
            hint="--out curves.html, or --format json for the numbers",
        )


def _with_curves(one: Run, history: History) -> History:
    """Return the history, or refuse to draw nothing."""
    from megacpp_nemo.contract.errors import DataError

    if history.curves:
        return history
    files = "one file" if len(one.events) == 1 else f"{len(one.events)} files"
    given = f"{one.folder}: {files} of TensorBoard, no value in them"
    raise DataError(
        "This run has logged nothing yet",
        given=given if one.events else f"{one.folder}: no file of TensorBoard",
        allowed="a run that logged one step; trainer.log_every_n_steps says how often",
        hint="the same command after some steps",
    )


def _drawing(file: str, about: Summary, drawn: Sequence[Panel], history: History) -> str | bytes:
    from megacpp_nemo.runs.figures import png, svgs
    from megacpp_nemo.runs.page import run_page

    title, line = about.name, _subtitle(about)
    if file.lower().endswith(".png"):
        return png(drawn, title, line, history.resumed)
    notes = [*_notes(about, history), *_legend(drawn, history)]
    return run_page(title, line, _facts(about), svgs(drawn, history.resumed), notes).encode()


def _subtitle(about: Summary) -> str:
    words = [about.recipe, f"step {steps(about)}", about.end.value]
    return ", ".join(filter(None, words))


def _facts(about: Summary) -> dict[str, str]:
    rate = about.tokens_per_second
    facts = {
        "step": steps(about),
        "training loss": number(about.loss),
        "validation loss": number(about.validation_loss),
        "tokens per second": "-" if rate is None else f"{rate:,.0f}",
        "newest checkpoint": "-" if about.checkpoint is None else f"step {about.checkpoint:,}",
        "written": "-" if about.written is None else _date(about.written),
    }
    return {name: value for name, value in facts.items() if value != "-"}


def _notes(about: Summary, history: History) -> list[str]:
    """Return what should be known beside the curves."""
    notes = [f"Not read: {note}." for note in about.notes]
    if history.resumed:
        listed = ", ".join(f"{step:,}" for step in history.resumed)
        notes.append(f"Resumed at step {listed}.")
    return notes


def _legend(drawn: Sequence[Panel], history: History) -> list[str]:
    """Return what lines of the drawings mean that have no name in them."""
    keys = {panel.key for panel in drawn}
    lines = {
        "Dashed: the run was resumed.": bool(history.resumed),
        "Throughput: dotted is the mean; dips are validation and checkpoints.": "throughput"
        in keys,
        "Expert load: grey are single layers, dotted an even load.": "expert_load" in keys,
    }
    return [line for line, holds in lines.items() if holds]


def _text(
    about: Summary,
    drawn: Sequence[Panel],
    history: History,
    files: Sequence[str],
    screen: Screen,
) -> str:
    """Return the run in a few lines: its figures, and a small curve of each kind."""
    import time

    head = [screen.heading(about.name), _subtitle(about)]
    if about.written is not None:
        head[1] += f", written {ago(time.time() - about.written)}"
    rows = []
    for panel in drawn:
        for name, curve in panel.curves.items():
            if curve:
                bars = min(BARS, screen.width // 3)
                line = spark([value for _, value in curve], bars, unicode=screen.unicode)
                title = f"{panel.title}: {name}" if len(panel.curves) > 1 else panel.title
                rows.append([title, line, _shown(curve[0][1]), _shown(curve[-1][1])])
    notes = [screen.wrapped(note, "  ") for note in _notes(about, history)]
    wrote = ["Wrote " + " and ".join(files)]
    parts = [head, [screen.table(("curve", "", "first", "last"), rows)], notes, wrote]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _date(seconds: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _data(about: Summary, drawn: Sequence[Panel], history: History) -> dict[str, Any]:
    return {
        "schema": 1,
        "run": about.to_dict(),
        "resumed": list(history.resumed),
        "panels": {
            panel.key: {
                "title": panel.title,
                "unit": panel.unit,
                "curves": {
                    name: [{"step": step, "value": value} for step, value in curve]
                    for name, curve in {**panel.curves, **panel.faint}.items()
                },
            }
            for panel in drawn
        },
    }


def _open(file: str) -> None:
    """Open a file in a browser, or say that there is none."""
    import webbrowser

    if not webbrowser.open(Path(native_path(file)).absolute().as_uri()):
        say(f"No browser could be started; open {file} in one")
