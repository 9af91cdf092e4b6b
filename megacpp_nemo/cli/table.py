"""`megacpp table`: the correspondence table, every setting and all its places."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

from megacpp_nemo.cli.given import written
from megacpp_nemo.cli.lower import release_of, to_json
from megacpp_nemo.cli.screen import Screen
from megacpp_nemo.cli.usage import Parser, add_release
from megacpp_nemo.contract import field_paths
from megacpp_nemo.lowering.ownership import version_of
from megacpp_nemo.lowering.releases import Release, load_release
from megacpp_nemo.lowering.row import EVERY, Row, Spelling
from megacpp_nemo.lowering.rows_plasticity import NAMES as LEVER_NAMES
from megacpp_nemo.lowering.spec_name import MODEL
from megacpp_nemo.lowering.table import TABLE

ALL = "all"
# Parts of a recipe by the beginning of their fields, in the order of the report; what begins
# like several belongs to the longest.
GROUPS = (
    ("", "The run"),
    ("pattern", "Layers"),
    ("depth", "Layers"),
    ("features", "Features"),
    ("model", "Widths and lengths"),
    ("model.attention", "Attention"),
    ("model.latent", "Multi-latent attention"),
    ("model.sparse_attention", "Sparse attention (DSA)"),
    ("model.experts", "Experts"),
    ("model.mamba", "Mamba-2"),
    ("model.author_mamba", "Mamba-3"),
    ("model.gated_delta_net", "Gated DeltaNet"),
    ("model.recurrent", "M2RNN"),
    ("model.embedding", "Embedding"),
    ("model.mtp", "Multi-token prediction"),
    ("parallelism", "Parallelism"),
    ("precision", "Precision"),
    ("batch", "Batch"),
    ("schedule", "Optimizer and schedule"),
    ("cadence", "Cadence"),
    ("files", "Files"),
    *((f"plasticity.{lever}", f"Lever: {name}") for lever, name in LEVER_NAMES.items()),
)
FIXED, HOST = "Fixed by every recipe", "Fixed for NeMo alone"
OWNERS = {
    "megatron": "Megatron-LM, by the flags",
    "spec": "this package, by the name of its spec",
    "policy": "the launch",
    "pattern": "the layer pattern",
    "recipe": "the recipe alone",
    "host": "NeMo alone",
}


class Entry(NamedTuple):
    """One setting of the table in words; several rows of one field are one setting."""

    group: str
    field: str
    default: str
    nemo: tuple[str, ...]
    flags: tuple[tuple[str, str, str], ...]
    spec: tuple[str, str]
    owner: str
    notes: tuple[str, ...]


def parser(name: str) -> Parser:
    """Return what `megacpp table` takes."""
    made = Parser(
        name,
        "[FIELD ...] [--release R] [--format F] ...",
        "Print every setting and all its places: the recipe's field, its paths in the NeMo\n"
        "recipe, Megatron-LM's flags and the versions in which they hold, who reads them, and\n"
        "the key that carries it in the name of a spec. Words keep the fields that have one of\n"
        "them in their name, path or flag.",
        ("megacpp table", "megacpp table latent", "megacpp table --release 0.19.0 --format md"),
        ("text", "md", "json"),
    )
    add_release(made, ALL)
    return made


def run(given: argparse.Namespace) -> str:
    """Return the table in the format asked for.

    Raises:
        MegaCppError: If there is no such release, or no setting has one of the words.
    """
    release = None if given.release == ALL else load_release(release_of(given.release))
    found = [entry for entry in entries(release) if _meant(entry, given.words)]
    if not found:
        parser(given.command).refuse(
            "No setting has this in its field, path or flag",
            " ".join(given.words),
            hint="megacpp table, for every setting",
        )
    title = f"The correspondence table{f' on Megatron-LM {release.name}' if release else ''}"
    if given.format == "json":
        return to_json({"schema": 1, "release": given.release, "rows": list(map(_data, found))})
    return _markdown(title, found) if given.format == "md" else _text(title, found, given.screen)


def entries(release: Release | None = None) -> list[Entry]:
    """Return every setting, by parts of the recipe; with the flags of a release if one is given."""
    rows: dict[str, list[Row]] = {}
    for index, row in enumerate(TABLE):
        rows.setdefault(row.field or f"#{index}", []).append(row)
    order = [*dict.fromkeys(title for _, title in GROUPS), FIXED, HOST]
    found = [_entry(alike, release) for alike in rows.values()]
    return sorted(found, key=lambda entry: order.index(entry.group))


def _entry(rows: list[Row], release: Release | None) -> Entry:
    first = rows[0]
    built = [f"{path} (an object)" for row in rows for path in row.built]
    spec = next((row.spec for row in rows if row.spec is not None), None)
    default = field_paths()[first.field] if first.field else first.fixed
    return Entry(
        group=_group(first),
        field=first.field,
        default=written(default),
        nemo=tuple(dict.fromkeys([*(path for row in rows for path in row.nemo), *built])),
        flags=tuple(_flags(rows, release)),
        spec=(first.field.removeprefix(MODEL), spec.text) if spec else ("", ""),
        owner=_owner(rows),
        notes=tuple(dict.fromkeys(row.note for row in rows if row.note)),
    )


def _owner(rows: list[Row]) -> str:
    """Return who owns a setting: of several rows, the one that says more than the recipe alone."""
    owners = [row.owner for row in rows]
    return next((owner for owner in owners if owner != "recipe"), "recipe")


def _flags(rows: list[Row], release: Release | None) -> Iterator[tuple[str, str, str]]:
    """Yield each flag with its versions and who reads it."""
    for row in rows:
        for spelling in row.flags:
            if release is None or spelling.in_version(version_of(release.package_version)):
                span = "" if spelling.span == ALL else spelling.span
                yield spelling.flag, span, _readers(spelling)


def _readers(spelling: Spelling) -> str:
    return "" if spelling.read is EVERY else spelling.read.text


def _group(row: Row) -> str:
    if not row.field:
        return HOST if row.owner == "host" else FIXED
    fits = [begin for begin, _ in GROUPS if f"{row.field}.".startswith(f"{begin}.") or not begin]
    return dict(GROUPS)[max(fits, key=len)]


def _meant(entry: Entry, words: list[str]) -> bool:
    texts = " ".join((entry.field, *entry.nemo, *(flag for flag, _, _ in entry.flags)))
    return not words or any(word.lower() in texts.lower() for word in words)


def _data(entry: Entry) -> dict[str, Any]:
    key, when = entry.spec
    return {
        "part": entry.group,
        "field": entry.field,
        "default" if entry.field else "value": entry.default,
        "nemo": list(entry.nemo),
        "flags": [{"flag": f, "versions": s or ALL, "read_by": r} for f, s, r in entry.flags],
        "spec": {"key": key, "when": when} if key else None,
        "owner": entry.owner,
        "notes": list(entry.notes),
    }


def _parts(found: list[Entry]) -> dict[str, list[Entry]]:
    parts: dict[str, list[Entry]] = {}
    for entry in found:
        parts.setdefault(entry.group, []).append(entry)
    return parts


def _told(span: str, readers: str) -> str:
    """Return in words when a flag holds and who reads it."""
    return ", ".join(filter(None, (span, readers and f"read by {readers}")))


def _text(title: str, found: list[Entry], screen: Screen) -> str:
    parts = [screen.heading(title)]
    for group, entries_ in _parts(found).items():
        rows = []
        for entry in entries_:
            flags = [f"{f} ({t})" if (t := _told(s, r)) else f for f, s, r in entry.flags]
            flags += [f"spec: {entry.spec[0]} ({entry.spec[1]})"] if entry.spec[0] else []
            field = entry.field or f"= {entry.default}"
            rows.append((field, "\n".join(entry.nemo), "\n".join(flags), entry.owner))
        head = ("field" if group not in (FIXED, HOST) else "value", "NeMo", "Megatron", "owner")
        parts.append(f"{screen.heading(group)}\n{screen.table(head, rows)}")
    return "\n\n".join(parts) + "\n"


def _markdown(title: str, found: list[Entry]) -> str:
    from megacpp_nemo.cli.table_markdown import document

    return document(title, _parts(found), OWNERS, fixed=(FIXED, HOST))
