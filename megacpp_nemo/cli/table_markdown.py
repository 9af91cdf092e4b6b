"""The correspondence table as a document in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megacpp_nemo.cli.markdown import code, codes, plain, table

if TYPE_CHECKING:
    from megacpp_nemo.cli.table import Entry

INTRODUCTION = """\
One row is one setting and all its places: the recipe's field and its default, the paths in the
NeMo recipe that carry it, Megatron-LM's flags, and who owns it. A flag stands with the versions
of Megatron-Core in which it holds, all where none are named, and with the layers that read it,
every model where none are named: in other models it is not written. Where no flag can say a
setting, the name of this package's spec carries it as the `key` after *spec*, for the models
named. A path marked *object* holds an object of torch or NeMo rather than the value;
`PlasticitySchedule` in a path is the entry of that class in the list."""


def document(
    title: str,
    parts: Mapping[str, Sequence[Entry]],
    owners: Mapping[str, str],
    *,
    fixed: Sequence[str],
) -> str:
    """Return the table by parts of the recipe."""
    listed = "\n".join(f"- *{name}*: {words}" for name, words in owners.items())
    blocks = [f"# {plain(title)}", INTRODUCTION, f"Owners:\n\n{listed}"]
    for group, entries in parts.items():
        head = ("value",) if group in fixed else ("field", "default")
        rows = [_cells(entry, entry.group in fixed) for entry in entries]
        blocks += [f"## {group}", table((*head, "NeMo", "Megatron-LM", "owner", "notes"), rows)]
    return "\n\n".join(blocks) + "\n"


def _cells(entry: Entry, fixed: bool) -> list[str]:
    first = [code(entry.default)] if fixed else [code(entry.field), code(entry.default)]
    paths = [_path(path) for path in entry.nemo]
    return [
        *first,
        "<br>".join(paths),
        "<br>".join(_places(entry)),
        entry.owner,
        "; ".join(map(plain, entry.notes)),
    ]


def _path(path: str) -> str:
    name, built, _ = path.partition(" (an object)")
    return f"{codes([name])} *object*" if built else code(name)


def _places(entry: Entry) -> list[str]:
    places = []
    for flag, span, readers in entry.flags:
        words = ", ".join(filter(None, (span, plain(readers))))
        places.append(f"{code(flag)}, {words}" if words else code(flag))
    key, when = entry.spec
    return [*places, *([f"*spec* {code(key)}, {plain(when)}"] if key else [])]
