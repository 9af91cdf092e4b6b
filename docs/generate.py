"""Write the pages of this folder that come from the code, and renew every shown output.

    make docs

- `table.md`, `matrix.md`: whole, from the correspondence table and the releases
- every other page: what follows a `$ megacpp ...` line in a console block is that command's
  output; a block opened with ```console N shows the first N lines of it
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from pathlib import Path
from unittest import mock

from megacpp_nemo.cli import main

FOLDER = Path(__file__).parent
WHOLE = {
    "table.md": "table --format md",
    "matrix.md": "matrix --format md",
}
BLOCK = re.compile(r"^```console( \d+)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROMPT = "$ megacpp "


def pages() -> dict[Path, str]:
    """Return what every page of this folder should hold."""
    found = {FOLDER / name: output(command) for name, command in WHOLE.items()}
    for path in [*FOLDER.glob("*.md"), FOLDER.parent / "README.md"]:
        if path.name not in WHOLE:
            found[path] = BLOCK.sub(_renewed, path.read_text(encoding="utf-8"))
    return found


def output(command: str) -> str:
    """Return all that a `megacpp` command prints in this folder's parent, errors included."""
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    before = Path.cwd()
    os.chdir(FOLDER.parent)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _same_width():
            main(shlex.split(command))
        said.seek(0)
        return said.read()
    finally:
        os.chdir(before)


def _same_width() -> contextlib.AbstractContextManager[object]:
    """Leave the width of this terminal out of the pages."""
    return mock.patch.dict(os.environ, {"COLUMNS": "100"})


def _renewed(block: re.Match[str]) -> str:
    commands = [line for line in block.group(2).splitlines() if line.startswith(PROMPT)]
    if not commands:
        return block.group(0)
    most = int(block.group(1) or 0)
    renewed = [f"```console{block.group(1) or ''}"]
    for command in commands:
        shown = output(command.removeprefix(PROMPT)).rstrip("\n").splitlines()
        cut = most and len(shown) > most
        renewed += [command, *(shown[:most] if cut else shown), *(["..."] if cut else [])]
    return "\n".join([*renewed, "```"])


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
