"""`megacpp lift`: a Megatron command line as the words that `megacpp lower` takes."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from megacpp_nemo.cli.command_text import Command, command_of, read_command
from megacpp_nemo.cli.given import words_of, written
from megacpp_nemo.cli.lower import release_of, to_json
from megacpp_nemo.cli.output import native_path
from megacpp_nemo.cli.shell_text import Word
from megacpp_nemo.cli.usage import Parser, UsageError, add_release, whole_number
from megacpp_nemo.contract import (
    RECIPE_NAMES,
    HybridRecipe,
    MegaCppError,
    ParallelismMode,
    field_paths,
    recipe,
    with_paths,
)
from megacpp_nemo.lowering.lift import lift
from megacpp_nemo.lowering.lower import Lowering, lower

TAKES = "--release R [--file FILE | -- ARGUMENT ...] [--format F] ..."
MODES = tuple(mode.value for mode in ParallelismMode)


class Lifted(NamedTuple):
    """A lifted recipe beside the named recipe it is closest to."""

    recipe: HybridRecipe
    base: str
    mode: str
    changes: dict[str, Any]

    @property
    def words(self) -> list[str]:
        """What to give to `megacpp lower`."""
        own = "" if self.mode == MODES[0] else f":mode={self.mode}"
        return [self.base + own, *words_of(self.changes)]


def parser(name: str) -> Parser:
    """Return what `megacpp lift` takes."""
    made = Parser(
        name,
        TAKES,
        "Print a Megatron-LM command line as a recipe: the closest recipe by name, then the\n"
        "fields that differ, one word a line, as megacpp lower takes them.\n\n"
        "A FILE, or - for standard input, has one argument a line, as --format argv writes them,\n"
        "or shell text, as --format shell does; what stands before the arguments of the .py\n"
        "script is left out.",
        (
            "megacpp lift --release 0.19.0 --file run.sh --format shell",
            "megacpp lift --release 0.16.1 --file run.sh | xargs megacpp lower --release 0.16.1",
            "megacpp lower nam56r --format argv | megacpp lift --release 0.16.1 --file -",
        ),
        ("text", "json", "shell"),
        takes_rest=True,
        exact_text=True,
    )
    add_release(made, None)
    made.add("--file", metavar="FILE", help="read the arguments from here; - is standard input")
    made.add(
        "--num-nodes", metavar="N", type=whole_number(1), help="machines; as in a script, else 1"
    )
    made.add(
        "--devices-per-node",
        metavar="N",
        type=whole_number(1),
        help="processes on each; as in a script, else the fewest that the parallel sizes allow",
    )
    return made


def run(given: argparse.Namespace) -> str:
    """Return the lifted recipe in the format asked for.

    Raises:
        MegaCppError: If the arguments cannot be read, or no recipe can say them.
    """
    release = release_of(given.release)
    command = _command(given)
    nodes = given.num_nodes or _size(command, "--nnodes", "--num-nodes")
    devices = given.devices_per_node or _size(command, "--nproc-per-node", "--devices-per-node")
    found = lift(command.arguments, release, num_nodes=nodes or 1, devices_per_node=devices)
    lifted = closest(found, release)
    if given.format == "json":
        return to_json(_data(lifted, given.release))
    words = [shlex.quote(word) for word in lifted.words]
    if given.format == "text":
        return "".join(f"{word}\n" for word in words)
    parts = [f"megacpp lower {words[0]}", f"--release {shlex.quote(given.release)}", *words[1:]]
    return " \\\n  ".join(parts) + "\n"


def closest(found: HybridRecipe, release: str) -> Lifted:
    """Return a recipe beside the named one that needs the fewest changes to lower alike.

    A command line does not say every field of a recipe. Those it does not say are the named
    recipe's, and are left out.
    """
    named = [(name, mode, recipe(name, mode=mode)) for name in RECIPE_NAMES for mode in MODES]
    name, mode, base = min(named, key=lambda one: len(_differing(one[2], found)))
    changes = _differing(base, found)
    aim = _told(lower(found, release=release))
    for path in list(changes):
        fewer = {key: value for key, value in changes.items() if key != path}
        if _lowers_to(base, fewer, release) == aim:
            changes = fewer
    return Lifted(with_paths(base, changes), name, mode, changes)


def _differing(base: HybridRecipe, found: HybridRecipe) -> dict[str, Any]:
    """Return the fields of `found` that differ from `base`, its name left out."""
    known = field_paths(base)
    changes = {
        path: value
        for path, value in field_paths(found).items()
        if path != "name" and value != known[path]
    }
    if found.run_dir == base.run_dir:
        # A recipe's folder is named after it unless it says another.
        changes.pop("files.run_dir", None)
    return changes


def _lowers_to(base: HybridRecipe, changes: Mapping[str, Any], release: str) -> Any:
    try:
        return _told(lower(with_paths(base, dict(changes)), release=release))
    except MegaCppError:
        return None


def _told(lowering: Lowering) -> Any:
    return lowering.argv, lowering.policy


def _command(given: argparse.Namespace) -> Command:
    """Return the command behind `--` or in a file."""
    if (given.file is None) == (given.rest is None) or given.words:
        parser(given.command).refuse(
            "lift takes a command line from behind '--' or from a file",
            " ".join(given.words) or ("both" if given.file else "neither"),
            hint="--file FILE, or -- and then the arguments",
        )
    if given.rest is not None:
        # A shell has been over these already.
        return command_of([[Word(word) for word in given.rest]] if given.rest else [])
    return read_command(_text(given.file))


def _size(command: Command, torchrun: str, ours: str) -> int | None:
    """Return one of torchrun's sizes in a command; None if it does not say it."""
    text = command.sizes.get(torchrun)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
        raise UsageError(
            f"torchrun's {torchrun} is not a plain number in this command",
            given=f"{torchrun} {text}".rstrip(),
            allowed="a whole number, 1 or more",
            hint=f"{ours} N, which stands for it",
        )
    return int(text)


def _text(file: str) -> str:
    try:
        if file == "-":
            data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else b""
        else:
            with open(native_path(file), "rb") as opened:
                data = opened.read()
    except OSError as error:
        raise UsageError(
            "The file of a command line cannot be read",
            given=f"{native_path(file)}: {(error.strerror or str(error)).lower()}",
            allowed="a file of arguments, or - for standard input",
            hint="--file run.sh",
        ) from None
    return data.decode("utf-8", "surrogateescape")


def _data(lifted: Lifted, release: str) -> dict[str, Any]:
    fields = field_paths(lifted.recipe)
    return {
        "schema": 1,
        "release": release,
        "closest": lifted.base,
        "mode": lifted.mode,
        "words": lifted.words,
        "fields": {path: _plain(value) for path, value in fields.items()},
    }


def _plain(value: Any) -> Any:
    """Return a field's value as JSON's types."""
    if isinstance(value, tuple):
        return list(value)
    return value if value is None or isinstance(value, (bool, int, float)) else written(value)
