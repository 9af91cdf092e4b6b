"""`megacpp plasticity report RUN`: a run's journal of levers as a picture and a page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megacpp_nemo.cli.output import OutputError, native_path
from megacpp_nemo.cli.plasticity_picture import Story, draw, page
from megacpp_nemo.cli.screen import Screen
from megacpp_nemo.cli.usage import UsageError
from megacpp_nemo.contract.journal import FILE_NAME, read_journal


def report(given: argparse.Namespace) -> str:
    """Write `report.png` and `report.html`, and return what they show in a few lines.

    They go beside the journal, or where `--folder` says.

    Raises:
        UsageError: If there is not one run.
        DataError: If the run has no journal, or it cannot be read.
        OutputError: If the files cannot be written.
    """
    if len(given.words) != 2:
        raise UsageError(
            "plasticity report takes one run",
            given=" ".join(given.words[1:]) or "none",
            allowed="megacpp plasticity report RUN [--folder DIR]",
            hint="megacpp plasticity report runs/NAME",
        )
    run = Path(native_path(given.words[1]))
    journal = run / FILE_NAME if run.is_dir() else run
    story = Story.of(read_journal(journal))
    folder = Path(native_path(given.folder)) if given.folder else journal.parent
    title = f"Levers of {journal.resolve().parent.parent.name}"
    picture = draw(story, title)
    image, text = folder / "report.png", folder / "report.html"
    _write(image, picture)
    _write(text, page(story, title, picture).encode())
    return "\n".join([*_lines(story, given.screen), "", f"Wrote {image} and {text}", ""])


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(
            "The report cannot be written",
            given=f"{path}: {(error.strerror or str(error)).lower()}",
            allowed="a folder that can be written",
            hint="--folder DIR",
        ) from None


def _lines(story: Story, screen: Screen) -> list[str]:
    """Return every action in a table, and where the curves begin and end."""
    rows = [
        [
            str(action["step"]),
            action["lever"],
            action["cause"],
            ", ".join(f"{name} {float(value):.4g}" for name, value in action["totals"].items()),
            f"{action['seconds']:.2f}",
        ]
        for action in story.actions
    ]
    lines = []
    if rows:
        lines.append(screen.table(["step", "lever", "cause", "what came of it", "seconds"], rows))
    for name, points in story.curves.items():
        (first, begins), (last, ends) = points[0], points[-1]
        lines.append(f"{name}: {begins:.4f} at step {first}, {ends:.4f} at step {last}")
    return lines
