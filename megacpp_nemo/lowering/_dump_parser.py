"""Print the options of one Megatron-LM source tree's own parser, as JSON.

    python -B _dump_parser.py TREE OUT [STUB ...]

A program of its own, run by `lowering.tree` in a fresh process: a tree's `megatron` must not
meet the installed one. Modules that the tree needs only to be imported (kernels, loggers) are
stubbed one by one as they turn out to be missing; torch must be there.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import re
import sys
import types
from collections.abc import Sequence
from typing import Any

ACTIONS = {
    "_StoreAction": "store",
    "_StoreTrueAction": "store_true",
    "_StoreFalseAction": "store_false",
    "_StoreConstAction": "store_const",
    "_AppendAction": "append",
    "_CountAction": "count",
    "BooleanOptionalAction": "boolean_optional",
}
NEEDED = ("torch", "megatron")
MOST_STUBS = 20


class Stub(types.ModuleType):
    """A module whose every attribute is an empty class."""

    __path__: list[str] = []  # noqa: RUF012 - the import system reads it off the module
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the named modules, and all below them, as stubs."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for a stubbed name, None for any other."""
        if fullname.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Return an empty stub."""
        return Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing: a stub has no code."""


def complete_typing(names: Sequence[str]) -> None:
    """Give `typing` these names of later Pythons, which a newer tree imports from it."""
    typing, extensions = map(importlib.import_module, ("typing", "typing_extensions"))
    for name in names:
        setattr(typing, name, getattr(extensions, name))


def plain(value: Any) -> Any:
    """Return `value` as JSON can hold it; a member of an enumeration by its name."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [plain(item) for item in value]
    return str(value)


def described(action: argparse.Action) -> dict[str, Any]:
    """Return what decides how an option is read."""
    kind = type(action).__name__
    of_type = getattr(action.type, "__name__", None if action.type is None else str(action.type))
    return {
        "names": list(action.option_strings),
        "action": ACTIONS.get(kind, kind),
        "type": of_type,
        "nargs": None if kind != "_StoreAction" and action.nargs == 0 else action.nargs,
        "choices": None if action.choices is None else plain(list(action.choices)),
        "default": plain(action.default),
        "const": plain(action.const)
        if action.nargs == "?" or kind == "_StoreConstAction"
        else None,
        "dest": action.dest,
        "required": action.required,
    }


def options(tree: str) -> list[dict[str, Any]]:
    """Return every option of the parser that `megatron/training/arguments.py` builds."""
    importlib.import_module("torch")
    arguments = importlib.import_module("megatron.training.arguments")
    if not os.path.realpath(str(arguments.__file__)).startswith(os.path.realpath(tree) + os.sep):
        raise SystemExit(f"megatron.training.arguments came from {arguments.__file__}")
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    arguments.add_megatron_arguments(parser)
    return [described(action) for action in parser._actions if action.option_strings]


def lacking(error: ImportError) -> str:
    """Return what to supply after `error`: `package`, or `typing.Name`; empty if it is no help."""
    from_typing = re.match(r"cannot import name '(\w+)' from 'typing'", str(error))
    if from_typing:
        return f"typing.{from_typing[1]}"
    name = (error.name or "").partition(".")[0]
    missing = isinstance(error, ModuleNotFoundError) and name not in NEEDED
    return name if missing else ""


def main(tree: str, out: str, *supplied: str) -> None:
    """Write `{"options": ..., "stubs": ...}` to `out`; start over if one stub more is needed."""
    sys.path[0] = tree  # instead of this program's folder, whose modules have common names
    complete_typing([name[len("typing.") :] for name in supplied if name.startswith("typing.")])
    stubs = [name for name in supplied if not name.startswith("typing.")]
    sys.meta_path.append(Stubs(stubs))
    try:
        found = options(tree)
    except ImportError as error:
        more = lacking(error)
        if not more or more in supplied or len(supplied) == MOST_STUBS:
            raise
        # A fresh process: half-imported modules may have registered operators with torch.
        os.execv(sys.executable, [sys.executable, "-B", __file__, tree, out, *supplied, more])
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"options": found, "stubs": stubs}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
