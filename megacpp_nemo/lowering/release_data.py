"""The content of a release file, from a tree's options and the text of its files."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megacpp_nemo.lowering.releases import LAYERS, RELEASE_NAMES, SCHEMA, load_release
from megacpp_nemo.lowering.values import KNOWN_TYPES

# From the newest place of a file to the oldest.
SYMBOLS = (
    "megatron/core/models/hybrid/hybrid_layer_allocation.py",
    "megatron/core/ssm/mamba_hybrid_layer_allocation.py",
)
SCRIPTS = ("pretrain_hybrid.py", "pretrain_mamba.py")
SPECS = (
    ("megatron/core/models/hybrid/hybrid_layer_specs.py", "hybrid_stack_spec"),
    ("megatron/core/models/mamba/mamba_layer_specs.py", "mamba_stack_spec"),
)
SEPARATORS: tuple[str, ...] = ("PIPE", "MTP_SEPARATOR")
PATTERN_FLAGS = ("--hybrid-layer-pattern", "--hybrid-override-pattern")
MTP_PATTERN_FLAG = "--mtp-hybrid-override-pattern"
OURS_SINCE = (0, 16)


def release_data(
    tree: Path, options: Sequence[Mapping[str, Any]], *, name: str, version: str, commit: str
) -> dict[str, Any]:
    """Return the content of a tree's release file, without rules for dead flags."""
    flags = _flags(options)
    symbols, separators, notes = _symbols(tree)
    scripts = [script for script in SCRIPTS if (tree / script).is_file()]
    specs = [(_module(path), spec) for path, spec in SPECS if _defines(tree / path, spec)]
    known = {spelling for entry in options for spelling in entry["names"]}
    patterns = [flag for flag in PATTERN_FLAGS if flag in known]
    for found, what in ((scripts, "entry script"), (specs, "stock spec"), (patterns, "pattern")):
        if not found:
            notes.append(f"the tree has no hybrid {what} of a known name")
    for flag, entry in flags.items():
        if entry.get("type") not in KNOWN_TYPES and "choices" not in entry:
            notes.append(f"{flag}: any text is taken; {entry['type']} of the release reads it")
    return {
        "schema": SCHEMA,
        "name": name,
        "package_version": version,
        "commit": commit,
        "entry_script": scripts[0] if scripts else "",
        "deprecated_entry_scripts": scripts[1:],
        "pattern_flag": patterns[0] if patterns else "",
        "deprecated_pattern_flags": [
            *patterns[1:],
            *(flag for flag in (MTP_PATTERN_FLAG,) if flag in known),
        ],
        "symbols": symbols,
        "stage_separator": separators.get("PIPE"),
        "mtp_separator": separators.get("MTP_SEPARATOR"),
        "stock_spec": list(specs[0] if specs else ("", "")),
        "carries_spec": numbers(version) >= OURS_SINCE,
        "num_layers_rule": "overridden" if patterns[:1] == [PATTERN_FLAGS[0]] else "equals",
        "replaced": {},
        "notes": notes,
        "dead": [],
        "flags": flags,
    }


def inherited_rules(data: dict[str, Any]) -> dict[str, Any]:
    """Return `data` with the rules of the newest known release that is not newer."""
    known = [(numbers(load_release(name).package_version), name) for name in RELEASE_NAMES]
    own = numbers(data["package_version"])
    parent = load_release(max([item for item in known if item[0] <= own] or known[:1])[1])
    flags = data["flags"]
    rules = []
    for rule in parent.dead:
        kept = [flag for flag in rule.flags if flag in flags]
        unknown = [flag for flag in _named(rule.needs) if flag not in flags]
        if kept and not unknown:
            rules.append({"flags": kept, "needs": rule.needs, "why": rule.why})
        elif kept:
            data["notes"].append(f"no rule for {kept[0]}: {unknown[0]} is not a flag here")
    data["dead"] = rules
    if parent.bounded_mtp_experts:
        data["bounded_mtp_experts"] = True
    data["replaced"] = {old: new for old, new in parent.replaced.items() if old in flags}
    data["notes"].append(f"rules for dead flags are those of {parent.name}, not read off this tree")
    return data


def text_of(data: Mapping[str, Any]) -> str:
    """Return `data` as JSON with one rule and one flag a line."""
    lines = [f" {json.dumps(key)}: {_block(key, value)}" for key, value in data.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version for comparing."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _block(key: str, value: Any) -> str:
    if key == "flags" and value:
        rows = [f"  {json.dumps(name)}: {json.dumps(value[name])}" for name in sorted(value)]
        return "{\n" + ",\n".join(rows) + "\n }"
    if key in ("dead", "notes") and value:
        return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
    return json.dumps(value)


def _flags(options: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return options by canonical spelling, with what differs from an option of plain text."""
    common = Counter(s for name in RELEASE_NAMES for s in _spellings(name))
    flags: dict[str, dict[str, Any]] = {}
    for option in options:
        name, *aliases = sorted(option["names"], key=lambda spelling: _rank(spelling, common))
        entry = {
            key: option[key]
            for key in ("action", "type", "nargs", "choices", "default", "const")
            if option[key] is not None
        }
        if option["dest"] != name.lstrip("-").replace("-", "_"):
            entry["dest"] = option["dest"]
        if aliases:
            entry["aliases"] = sorted(aliases)
        flags[name] = entry
    return flags


def _spellings(name: str) -> Iterable[str]:
    return load_release(name).flags


def _rank(spelling: str, common: Mapping[str, int]) -> tuple[Any, ...]:
    """Return the order of spellings of one flag: the most widely known, then the plainest."""
    negative = spelling.startswith(("--no-", "--disable-"))
    return (-common[spelling], negative, "_" in spelling, len(spelling), spelling)


def _symbols(tree: Path) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Return the tree's layer symbols and separators, and what was not understood."""
    path = next((tree / part for part in SYMBOLS if (tree / part).is_file()), None)
    if path is None:
        return {}, {}, [f"no layer symbols: the tree has none of {', '.join(SYMBOLS)}"]
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == "Symbols":
            found |= dict(pair for statement in node.body for pair in _constant(statement))
    separators = {key: found.pop(key) for key in SEPARATORS if key in found}
    notes = [f"unknown layer symbol {key} {found[key]!r}" for key in found if key not in LAYERS]
    if not found:
        notes.append(f"no layer symbols: {path.name} has no class Symbols of text constants")
    return {key: found[key] for key in LAYERS if key in found}, separators, notes


def _constant(statement: ast.stmt) -> Iterable[tuple[str, str]]:
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
        target, value = statement.targets[0], statement.value.value
        if isinstance(target, ast.Name) and isinstance(value, str):
            yield target.id, value


def _module(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def _defines(path: Path, name: str) -> bool:
    return path.is_file() and bool(re.search(rf"^{name} = ", path.read_text("utf-8"), re.M))


def _named(condition: Mapping[str, Any]) -> Iterable[str]:
    """Yield the flags that a condition names."""
    for word, value in condition.items():
        if word == "flag":
            yield value
        elif word == "indivisible":
            yield from value
        elif word == "not":
            yield from _named(value)
        elif word in ("all", "any"):
            for part in value:
                yield from _named(part)
