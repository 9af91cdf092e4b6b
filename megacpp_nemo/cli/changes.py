"""`megacpp audit` and `megacpp diff`: what changes between releases, or between recipes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from megacpp_nemo.cli.given import read_recipe, written
from megacpp_nemo.cli.lower import release_of, to_json
from megacpp_nemo.cli.screen import Cell, Screen
from megacpp_nemo.cli.usage import Parser, add_recipe_options, add_release
from megacpp_nemo.contract import HybridRecipe, field_paths
from megacpp_nemo.lowering.audit import Audit, audit
from megacpp_nemo.lowering.difference import Change, Difference, difference
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.releases import DEFAULT_RELEASE
from megacpp_nemo.lowering.spec_name import SPEC_MODULE

FORMATS = ("text", "json", "md")
Rows = list[tuple[str, str, str]]
Part = tuple[str, Sequence[str], Rows]


def parser(name: str) -> Parser:
    """Return what `megacpp audit`, or `megacpp diff`, takes."""
    made = _audit_parser() if name == "audit" else _diff_parser()
    add_recipe_options(made)
    return made


def _audit_parser() -> Parser:
    made = Parser(
        "audit",
        "RECIPE [FIELD=VALUE ...] --from R --to R [--mode M] [--format F] ...",
        "Print what moving a recipe from one release to another changes: seams that graduate,\n"
        "flags that are renamed, removed, or read only on one of the two, and the launch.",
        ("megacpp audit nam56r --from 0.16.1 --to 0.19.0",),
        FORMATS,
    )
    made.add("--from", metavar="R", dest="from_release", required=True, help="release it runs on")
    made.add("--to", metavar="R", dest="to_release", required=True, help="release it would run on")
    return made


def _diff_parser() -> Parser:
    made = Parser(
        "diff",
        "RECIPE OTHER [FIELD=VALUE ...] [--release R] [--mode M] [--format F] ...",
        "Print how two recipes differ: fields, seams, launch, flags and layers. A FIELD=VALUE is\n"
        "of both; one recipe's own stand behind its name, each after a colon.",
        (
            "megacpp diff nam52 nam56r",
            "megacpp diff nam56r nam56r:precision=fp8 --release 0.19.0",
            "megacpp diff nam56r nam56r:mode=author_dp:mtp.num_layers=0",
        ),
        FORMATS,
    )
    add_release(made, DEFAULT_RELEASE)
    return made


def run(given: argparse.Namespace) -> str:
    """Return what changes, in the format asked for.

    Raises:
        MegaCppError: If the words mean no recipe, or a release cannot have it.
    """
    needed = 1 if given.command == "audit" else 2
    if len(given.words) < needed:
        parser(given.command).refuse(
            f"{given.command} needs {'a recipe' if needed == 1 else 'two recipes'}",
            " ".join(given.words) or "none",
        )
    names, changes = given.words[:needed], given.words[needed:]
    recipes = [read_recipe(name, changes, given.mode) for name in names]
    if given.command == "audit":
        return _audited(
            audit(recipes[0], release_of(given.from_release), release_of(given.to_release)), given
        )
    return _compared(names, recipes, given)


def _audited(found: Audit, given: argparse.Namespace) -> str:
    if given.format == "json":
        return to_json(found.to_dict())
    old, new = found.from_release, found.to_release
    told: Rows = [
        ("graduate", str(len(found.graduated)), ", ".join(found.graduated)),
        ("remain", str(len(found.remaining)), ", ".join(found.remaining)),
        ("return", str(len(found.returned)), ", ".join(found.returned)),
    ]
    kinds: Rows = [("renamed", one, other) for one, other in found.renamed]
    kinds += [("unknown there", flag, "") for flag in found.removed]
    kinds += [("read only there", "", flag) for flag in found.alive]
    kinds += [("read only here", flag, "") for flag in found.dead]
    parts: list[Part] = [
        ("Seams", ("seams that", "count", "which"), told),
        ("Flags", ("what", old, new), kinds),
        *_parts(found.difference, (old, new)),
    ]
    return _drawn(f"{found.recipe} from Megatron-LM {old} to {new}", parts, given)


def _compared(names: Sequence[str], recipes: Sequence[HybridRecipe], given: Any) -> str:
    release = release_of(given.release)
    one, other = (lower(recipe, release=release) for recipe in recipes)
    changes = difference(one, other)
    fields = list(_fields(*recipes))
    if given.format == "json":
        data = {"schema": 1, "release": one.release, "recipes": list(names)}
        listed = [{"field": f, "before": a, "after": b} for f, a, b in fields]
        return to_json(data | {"fields": listed} | changes.to_dict())
    first, second = names
    seams: Rows = [(name, "yes", "") for name in changes.seams_gone]
    seams += [(name, "", "yes") for name in changes.seams_new]
    parts: list[Part] = [
        ("Fields", ("field", first, second), fields),
        ("Seams", ("seam", first, second), seams),
        *_parts(changes, (first, second)),
    ]
    return _drawn(f"{first} and {second} on Megatron-LM {one.release}", parts, given)


def _fields(one: HybridRecipe, other: HybridRecipe) -> Iterable[tuple[str, str, str]]:
    theirs = field_paths(other)
    for path, value in field_paths(one).items():
        if value != theirs[path]:
            yield path, written(value), written(theirs[path])


def _parts(changes: Difference, sides: tuple[str, str]) -> list[Part]:
    """Return what differs of the flags, the layers and the launch."""
    flags = [row for change in changes.flags for row in _flag_rows(change)]
    layers = [(str(c.number), c.before or "", c.after or "") for c in changes.layers]
    launch = [(c.name, c.before or "", c.after or "") for c in changes.policy]
    return [
        ("Launch", ("what", *sides), launch),
        ("Values on the command line", ("flag", *sides), flags),
        ("Layers", ("layer", *sides), layers),
    ]


def _flag_rows(change: Change) -> Rows:
    """Return a flag that differs; of the name of a spec, each setting that does."""
    before, after = change.before or "", change.after or ""
    ours = before.startswith(SPEC_MODULE) and after.startswith(SPEC_MODULE)
    if change.flag != "--spec" or not ours:
        return [(change.flag, _shown(change.before), _shown(change.after))]
    one, other = (
        dict(part.split("=", 1) for part in text.split(" ", 1)[1].split(","))
        for text in (before, after)
    )
    keys = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
    return [(f"--spec {key}", one.get(key, ""), other.get(key, "")) for key in keys]


def _shown(value: str | None) -> str:
    """Return a flag's values: nothing where it is absent, and a word where it has none."""
    return "" if value is None else value or "given"


def _drawn(title: str, parts: Sequence[Part], given: argparse.Namespace) -> str:
    if given.format == "md":
        return _markdown(title, parts)
    screen: Screen = given.screen
    blocks = [screen.heading(title)]
    for name, head, rows in parts:
        styled = [
            (row[0], Cell(row[1] or "-", "red"), Cell(row[2] or "-", "green")) for row in rows
        ]
        body = screen.table(head, styled) if rows else "  no difference"
        blocks.append(f"{screen.heading(name)}\n{body}")
    return "\n\n".join(blocks) + "\n"


def _markdown(title: str, parts: Sequence[Part]) -> str:
    from megacpp_nemo.cli.markdown import code, plain, table

    blocks = [f"# {plain(title)}"]
    for name, head, rows in parts:
        cells = [(code(a) if " " not in a else a, *map(code, rest)) for a, *rest in rows]
        body = table([plain(word) for word in head], cells) if rows else "No difference."
        blocks += [f"## {name}", body]
    return "\n\n".join(blocks) + "\n"
