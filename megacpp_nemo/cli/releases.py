"""`megacpp releases`: the Megatron-LM releases that are known, one of them, and new ones."""

from __future__ import annotations

import argparse
from typing import Any

from megacpp_nemo.cli.lower import release_of, to_json
from megacpp_nemo.cli.output import native_path, say
from megacpp_nemo.cli.screen import Cell, Screen, visible
from megacpp_nemo.cli.usage import Parser, UsageError
from megacpp_nemo.contract.errors import lookup
from megacpp_nemo.lowering.releases import DEFAULT_RELEASE, RELEASE_NAMES, Release, load_release

ACTIONS = ("list", "show", "add")


def parser(name: str) -> Parser:
    """Return what `megacpp releases` takes."""
    made = Parser(
        name,
        "[list | show R | add TREE [--name N] [--replace]] [--format F] [--out FILE] ...",
        "List the Megatron-LM releases that are known; show one; or read a Megatron-LM source\n"
        "tree into a release file, NAME.json by default. Reading a tree runs its code.",
        (
            "megacpp releases",
            "megacpp releases show 0.19.0",
            "megacpp releases add src/Megatron-LM --name mine --out mine.json",
            "megacpp lower nam56r --release mine.json",
        ),
        ("text", "json"),
    )
    made.add("--name", metavar="N", help="name of the new release; its version by default")
    made.add("--replace", action="store_true", help="take a name or a file that is taken")
    return made


def run(given: argparse.Namespace) -> str:
    """Return what the action prints.

    Raises:
        MegaCppError: If there is no such action, release or tree.
    """
    action, *words = given.words or ["list"]
    known = {name: name for name in ACTIONS}
    action = lookup(known, action, what=f"releases cannot {action!r}", error=UsageError)
    if action == "list":
        if words:
            parser(given.command).refuse("releases list takes no more", " ".join(words))
        return _listed([load_release(name) for name in RELEASE_NAMES], given)
    given.words = words
    if action == "show":
        word = parser(given.command).one_word(given, "release to show")
        return _shown(load_release(release_of(word)), given)
    return _added(given)


def _added(given: argparse.Namespace) -> str:
    from megacpp_nemo.lowering.tree import add_release

    tree = native_path(parser(given.command).one_word(given, "source tree to add"))
    if given.out and (given.out == "-" or given.out.endswith("/")):
        hint = "--out mine.json"
        parser(given.command).refuse("releases add writes a file", f"--out {given.out}", hint)
    out = given.out and native_path(given.out)
    # The file it writes is its own.
    # The file is the release, and what is printed of it is asked for apart.
    given.format = given.format if "format" in given.seen else "text"
    given.out = None
    path = add_release(tree, name=given.name, out=out, overwrite=given.replace)
    say(f"Wrote {visible(str(path))}")
    return _shown(load_release(path), given)


def _data(release: Release) -> dict[str, Any]:
    texts = ("name", "package_version", "commit", "entry_script", "pattern_flag")
    rest = ("stage_separator", "mtp_separator", "carries_spec", "num_layers_rule")
    lists = ("deprecated_entry_scripts", "deprecated_pattern_flags", "stock_spec", "notes")
    return {
        **{key: getattr(release, key) for key in (*texts, *rest)},
        **{key: list(getattr(release, key)) for key in lists},
        "symbols": dict(release.symbols),
        "replaced": dict(release.replaced),
        "flags": len(release.canonical_flags()),
        "dead": [{"flags": list(rule.flags), "why": rule.why} for rule in release.dead],
    }


def _listed(releases: list[Release], given: argparse.Namespace) -> str:
    if given.format == "json":
        return to_json({"default": DEFAULT_RELEASE, "releases": [_data(r) for r in releases]})
    rows = [
        (
            _name(release),
            release.package_version,
            release.entry_script,
            release.pattern_flag,
            " ".join(release.symbols.values()),
            str(len(release.canonical_flags())),
            "yes" if release.carries_spec else "no",
        )
        for release in releases
    ]
    head = ("release", "core", "script", "pattern", "symbols", "flags", "seams")
    screen: Screen = given.screen
    note = "Only releases with seams take layers of this package, by their --spec."
    return f"{screen.table(head, rows)}\n{screen.wrapped(note)}\n"


def _name(release: Release) -> Cell:
    if release.name != DEFAULT_RELEASE:
        return Cell(release.name)
    return Cell(f"{release.name} (default)", "green")


def _shown(release: Release, given: argparse.Namespace) -> str:
    if given.format == "json":
        return to_json(_data(release))
    screen: Screen = given.screen
    symbols = ", ".join(f"{symbol} {kind}" for kind, symbol in release.symbols.items())
    facts = [
        ("megatron-core", release.package_version),
        ("commit", release.commit or "not known"),
        ("script", ", or ".join((release.entry_script, *release.deprecated_entry_scripts))),
        ("pattern", ", or ".join((release.pattern_flag, *release.deprecated_pattern_flags))),
        ("symbols", symbols),
        ("stage separator", release.stage_separator or "none"),
        ("MTP separator", release.mtp_separator or "none"),
        ("--num-layers", _NUM_LAYERS.get(release.num_layers_rule, release.num_layers_rule)),
        ("stock spec", " ".join(release.stock_spec)),
        ("takes seams", "yes" if release.carries_spec else "no"),
        ("flags", str(len(release.canonical_flags()))),
        *((f"for {flag}", f"write {other}") for flag, other in sorted(release.replaced.items())),
        *(("note", note) for note in release.notes),
    ]
    parts = [screen.heading(f"Megatron-LM {release.name}"), screen.table(("what", "value"), facts)]
    if release.dead:
        rows = [(" ".join(rule.flags), rule.why) for rule in release.dead]
        title = screen.heading("Flags that are accepted and go unread in some or all models")
        parts += ["", title, screen.table(("flags", "why"), rows)]
    return "\n".join(parts) + "\n"


_NUM_LAYERS = {
    "equals": "must be the length of the pattern",
    "overridden": "the length of the pattern overrides it",
}
