"""Megatron-LM releases as data: what each one's parser accepts and its hybrid models read.

One JSON file per release, one flag a line. The flags are those of the release's own parser, read
by `lowering.tree`; the symbols and the rules for dead flags are read off its sources. A release
of one's own is a file of the same form, loaded by its path.
"""

from __future__ import annotations

import functools
from pathlib import Path

from megacpp_nemo.contract.errors import LoweringError, nearest
from megacpp_nemo.lowering.releases.reading import RELEASE_NAMES, SCHEMA, from_data, read_release
from megacpp_nemo.lowering.releases.release import LAYERS, DeadRule, Flag, Release

__all__ = [
    "DEFAULT_RELEASE",
    "FOLDER",
    "LAYERS",
    "RELEASE_NAMES",
    "SCHEMA",
    "DeadRule",
    "Flag",
    "Release",
    "from_data",
    "load_release",
    "read_release",
]

DEFAULT_RELEASE = "0.16.1"
FOLDER = Path(__file__).parent


def load_release(name_or_path: str | Path) -> Release:
    """Return a release by its name (also `core_v0.16.1`, `v0.16.1`) or by the path of its file.

    Raises:
        LoweringError: If no release has this name, or its file cannot be read.
    """
    text = str(name_or_path)
    name = text.removeprefix("core_").removeprefix("v").removesuffix("/")
    if name in RELEASE_NAMES:
        return _packaged(name)
    if text.endswith(".json"):
        return read_release(Path(text))
    raise LoweringError(
        "No Megatron-LM release is known by this name",
        given=repr(text),
        allowed=", ".join(RELEASE_NAMES) + ", or the path of a .json file",
        hint=repr(_closest(name)),
    )


def _closest(name: str) -> str:
    begun = [known for known in RELEASE_NAMES if name and known.startswith(name)]
    return begun[0] if begun else nearest(name, RELEASE_NAMES) or DEFAULT_RELEASE


@functools.cache
def _packaged(name: str) -> Release:
    return read_release(FOLDER / f"{name}.json")
