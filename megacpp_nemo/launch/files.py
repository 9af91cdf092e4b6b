"""A lowering as a folder of files, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megacpp_nemo.cli.markdown import lowering_markdown
from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.lowering.lower import Lowering


def files_of(lowering: Lowering) -> dict[str, str]:
    """Return the text of each file by its name.

    - `megatron.args`: the entry script's arguments, one a line
    - `launch.env`: the launch policy's environment, `NAME=VALUE` lines by name
    - `seams.json`: the whole lowering as data
    - `seams.md`: the report to read

    Raises:
        LoweringError: If an argument has a line break.
    """
    broken = [word for word in lowering.command if "\n" in word]
    if broken:
        raise LoweringError(
            "An argument has a line break, and megatron.args has one argument a line",
            given=repr(broken[0]),
            allowed="arguments without line breaks",
            hint="a path or a name without one",
        )
    environment = sorted(lowering.policy.environment.items())
    return {
        "megatron.args": "".join(f"{word}\n" for word in lowering.command),
        "launch.env": "".join(f"{name}={value}\n" for name, value in environment),
        "seams.json": json.dumps(lowering.to_dict(), indent=2, sort_keys=True) + "\n",
        "seams.md": lowering_markdown(lowering),
    }


def write_folder(folder: Path, files: Mapping[str, str]) -> Path:
    """Write files into a new folder and return it.

    An existing folder is left as it is: the new one is called `NAME_2`, `NAME_3`, ...

    Raises:
        LoweringError: If the folder cannot be made or written.
    """
    part = ""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
        for name, text in files.items():
            Path(part, name).write_text(text, encoding="utf-8", newline="\n")
        os.chmod(part, 0o755)
        return _renamed(part, folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise LoweringError(
            "The lowered files cannot be written",
            given=f"{folder}: {error.strerror}",
            allowed="a folder on this machine that can be written",
            hint="LoweringPlugin(folder='/tmp/lowering')",
        ) from None


def _renamed(part: str, folder: Path) -> Path:
    """Give a folder the first name that is free."""
    number, target = 1, folder
    while True:
        try:
            if not os.path.lexists(target):
                os.rename(part, target)
                return target
        except OSError:
            if not os.path.lexists(target):  # else another process took the name
                raise
        number += 1
        target = folder.with_name(f"{folder.name}_{number}")
