"""`megacpp runs`: the runs in a folder, a line each."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megacpp_nemo.cli.lower import to_json
from megacpp_nemo.cli.numbers import finite
from megacpp_nemo.cli.output import native_path
from megacpp_nemo.cli.screen import Cell, Screen
from megacpp_nemo.cli.usage import Parser

if TYPE_CHECKING:
    from megacpp_nemo.runs.summary import Summary

FOLDER = "runs"
HEAD = ("run", "recipe", "step", "loss", "val loss", "tokens/s", "written", "state")
STYLES = {"finished": "green", "running": "bold", "stopped": "yellow", "unreadable": "red"}


def parser(name: str) -> Parser:
    """Return what `megacpp runs` takes."""
    return Parser(
        name,
        "[FOLDER]",
        "List the runs in a folder, `runs` by default: recipe, step, training and validation\n"
        "loss in nats per token, mean tokens per second with validation and checkpoints\n"
        "included, when it last wrote, and whether it is over: finished (it did all its steps),\n"
        "running (it wrote lately), or stopped.",
        ("megacpp runs", "megacpp runs /data/experiments --format json"),
        ("text", "json"),
    )


def run(given: argparse.Namespace) -> str:
    """Return the runs of a folder.

    Raises:
        UsageError: If several folders are named.
        DataError: If the folder cannot be read, or has no runs.
    """
    if len(given.words) > 1:
        parser(given.command).refuse("runs takes one folder", " ".join(given.words))
    from megacpp_nemo.runs.folders import find_runs
    from megacpp_nemo.runs.summary import summarized

    folder = Path(native_path(given.words[0] if given.words else FOLDER)).expanduser()
    now = time.time()
    found = [summarized(one, now) for one in find_runs(folder)]
    if given.format == "json":
        return to_json({"schema": 1, "runs": [finite(one.to_dict()) for one in found]})
    return _text(found, folder, given.screen, now)


def _text(found: Sequence[Summary], folder: Path, screen: Screen, now: float) -> str:
    rows = [_row(one, folder, now) for one in found]
    lines = [screen.table(HEAD, rows)]
    notes = [screen.wrapped(f"{one.name}: {note}", "  ") for one in found for note in one.notes]
    if notes:
        lines += ["", *notes]
    return "\n".join(lines) + "\n"


def _row(one: Summary, folder: Path, now: float) -> list[str | Cell]:
    path = Path(one.path)
    name = str(path.relative_to(folder)) if path != folder else one.name
    return [
        name,
        one.recipe or "-",
        steps(one),
        number(one.loss),
        number(one.validation_loss),
        "-" if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}",
        "-" if one.written is None else ago(now - one.written),
        Cell(one.end.value, STYLES[one.end.value]),
    ]


def steps(one: Summary) -> str:
    """Return how far a run is, of how far it goes."""
    return f"{one.step:,}" + (f" of {one.max_steps:,}" if one.max_steps else "")


def number(value: float | None) -> str:
    """Return a loss; a dash for none."""
    return "-" if value is None else f"{value:.4f}"


def ago(seconds: float) -> str:
    """Return how long ago something was, in its largest unit."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} seconds ago"
