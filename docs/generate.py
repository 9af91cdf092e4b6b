"""Write the pages of this folder that come from the code, and renew every shown output.

    make docs

- `table.md`, `matrix.md`: whole, from the correspondence table and the releases
- `commands.md`: the help of every command
- `nam56r.md`: whole, from `nam56r_page.py` and the planner
- `reference/`: a page a room of the package, which names its modules; the site's generator fills in
  their docstrings
- every other page: what follows a `$ megacpp ...` line in a console block is that command's
  output; a block opened with ```console N shows the first N lines of it
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
from pathlib import Path
from unittest import mock

from megacpp_nemo.cli import main
from megacpp_nemo.cli.group import Group
from megacpp_nemo.cli.usage import COMMANDS, Command

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
WHOLE = {
    "table.md": "table --format md",
    "matrix.md": "matrix --format md",
}
ROOMS = {
    "contract": "The contract",
    "planner": "The planner",
    "lowering": "Lowering",
    "recipes": "Recipes",
    "spec": "Specs for Megatron's scripts",
    "model": "Models",
    "callbacks": "Callbacks",
    "data": "Data",
    "syntax": "Syntax",
    "host": "Runtime",
    "launch": "Launching",
    "report": "Reports",
    "doctor": "What is installed",
    "runs": "Watching runs",
}
BLOCK = re.compile(r"^```console( \d+)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROMPT = "$ megacpp "


def pages() -> dict[Path, str]:
    """Return what every page of this folder should hold."""
    found = {FOLDER / name: output(command) for name, command in WHOLE.items()}
    found[FOLDER / "commands.md"] = commands()
    found[FOLDER / "nam56r.md"] = runpy.run_path(str(FOLDER / "nam56r_page.py"))["page"]()
    found |= {FOLDER / "reference" / f"{room}.md": reference(room) for room in ROOMS}
    for path in [*FOLDER.rglob("*.md"), ROOT / "README.md"]:
        if path not in found:
            found[path] = BLOCK.sub(_renewed, path.read_text(encoding="utf-8"))
    return found


def commands() -> str:
    """Return the page of all commands: what each takes."""
    parts = [f"# Commands\n\n{_console('--help')}"]
    names = [name for command in COMMANDS for name in _names(command)]
    parts += [f"## {name}\n\n{_console(f'{name} --help')}" for name in names]
    return "\n\n".join(parts) + "\n"


def _names(command: Command) -> list[str]:
    """Return a command, and behind a group its own."""
    module = importlib.import_module(f"megacpp_nemo.cli.{command.module}")
    made = module.parser(command.name)
    actions = made.actions if isinstance(made, Group) else ()
    return [command.name, *(f"{command.name} {action.name}" for action in actions)]


def reference(room: str) -> str:
    """Return the reference page of a room: its title, what it says of itself, its modules."""
    folder = ROOT / "recipes" if room == "recipes" else ROOT / "megacpp_nemo" / room
    package = "recipes" if room == "recipes" else f"megacpp_nemo.{room}"
    text = (folder / "__init__.py").read_text(encoding="utf-8")
    parts = [f"# {ROOMS[room]}", ast.get_docstring(ast.parse(text)) or ""]
    for path in sorted(folder.glob("[a-z]*.py")):
        # The recipes stand beside the package, and are installed as a part of it.
        installed = f"megacpp_nemo.{room}.{path.stem}"
        heading = f"\n    options:\n      heading: {installed}" if room == "recipes" else ""
        parts.append(f"::: {package}.{path.stem}{heading}")
    return "\n\n".join(filter(None, parts)) + "\n"


def _console(command: str) -> str:
    return f"```console\n{PROMPT}{command}\n{output(command).rstrip()}\n```"


def output(command: str) -> str:
    """Return all that a `megacpp` command prints in this folder's parent, errors included."""
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    before = Path.cwd()
    os.chdir(ROOT)
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
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
