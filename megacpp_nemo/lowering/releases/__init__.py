"""Megatron-LM releases as data: what each one's parser accepts and its hybrid models read.

One JSON file per release, one flag a line. The flags are those of the release's own parser, read
by `lowering.tree`; the symbols and the rules for dead flags are read off its sources. A release
of one's own is a file of the same form, loaded by its path.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megacpp_nemo.contract.errors import LoweringError, nearest
from megacpp_nemo.lowering.conditions import Condition, checked

SCHEMA = 1
RELEASE_NAMES: tuple[str, ...] = (
    "0.15.3",
    "0.16.1",
    "0.17.1",
    "0.18.2",
    "0.19.0",
    "main-2026-08",
)
DEFAULT_RELEASE = "0.16.1"
FOLDER = Path(__file__).parent

# What a layer of the pattern is, by the name that Megatron's `Symbols` gives it.
LAYERS = ("MAMBA", "ATTENTION", "MLP", "MOE", "GDN", "DS_ATTENTION", "MLA")


@dataclass(frozen=True)
class Flag:
    """One option of a release's parser.

    Args:
        name: Canonical spelling.
        action: `store`, `store_true`, `store_false`, `boolean_optional` or argparse's name.
        type: Name of the function that reads a value; None keeps the text.
        nargs: None for exactly one value, a number, `?`, `*` or `+`.
        choices: The accepted values, if they are listed.
        default: Value without the flag.
        dest: Name under which the release's code reads the value.
        aliases: Other accepted spellings; `--no-x` of a `boolean_optional` is one of them.
        const: Value of the flag without its optional value, or of `store_const`.
    """

    name: str
    action: str = "store"
    type: str | None = None
    nargs: int | str | None = None
    choices: tuple[Any, ...] | None = None
    default: Any = None
    dest: str = ""
    aliases: tuple[str, ...] = ()
    const: Any = None

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every accepted spelling, the canonical one first."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class DeadRule:
    """Flags that no layer of a hybrid model reads unless a condition holds.

    Args:
        flags: Canonical spellings.
        needs: What must hold for the flags to be read (`lowering.conditions`).
        why: What goes unread otherwise, with the upstream file that shows it.
    """

    flags: tuple[str, ...]
    needs: Condition
    why: str


@dataclass(frozen=True, kw_only=True)
class Release:
    """One Megatron-LM release.

    Args:
        name: Name in this package.
        package_version: Version of its megatron-core.
        commit: Commit of Megatron-LM; empty if it was not known.
        entry_script: Script that pretrains a hybrid model.
        deprecated_entry_scripts: Scripts that still do.
        pattern_flag: Flag of the layer pattern.
        deprecated_pattern_flags: Flags it still takes a pattern, or a part of one, from.
        symbols: Symbol of each kind of layer it has, by `LAYERS`.
        stage_separator: Symbol between pipeline stages in a pattern; None if it has none.
        mtp_separator: Symbol before a multi-token prediction part; None if it has none.
        stock_spec: Module and name of its own hybrid layer spec.
        carries_spec: Whether the spec package of this project supports it.
        num_layers_rule: `equals`: --num-layers must be the length of the pattern; `overridden`:
            the pattern sets it.
        flags: Its flags by every accepted spelling.
        dead: Rules for accepted flags that nothing reads.
        replaced: What to write instead of flags that only warn, by flag.
        bounded_mtp_experts: Whether expert layers beyond the first `--mtp-num-layers` places of a
            prediction part end training with an IndexError: the router's metrics have no room
            for them (core/transformer/moe/router.py).
        notes: What could not be read off its sources, or was inherited from another release.
    """

    name: str
    package_version: str
    commit: str
    entry_script: str
    deprecated_entry_scripts: tuple[str, ...]
    pattern_flag: str
    deprecated_pattern_flags: tuple[str, ...]
    symbols: Mapping[str, str]
    stage_separator: str | None
    mtp_separator: str | None
    stock_spec: tuple[str, str]
    carries_spec: bool
    num_layers_rule: str
    flags: Mapping[str, Flag] = field(repr=False)
    dead: tuple[DeadRule, ...] = field(default=(), repr=False)
    replaced: Mapping[str, str] = field(default_factory=dict, repr=False)
    bounded_mtp_experts: bool = False
    notes: tuple[str, ...] = ()

    def canonical(self, spelling: str) -> str:
        """Return the canonical spelling of a flag; KeyError if the release does not know it."""
        return self.flags[spelling].name

    def canonical_flags(self) -> Mapping[str, Flag]:
        """Return every flag once, by its canonical spelling."""
        return {flag.name: flag for spelling, flag in self.flags.items() if spelling == flag.name}


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


def read_release(path: Path) -> Release:
    """Return the release in a file that `lowering.tree` or this package has written.

    Raises:
        LoweringError: If the file is missing, truncated, of another schema or damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoweringError(
            "The file of a Megatron-LM release cannot be read",
            given=f"{path}: {error.strerror}",
            allowed="a file that can be read",
            hint=f"another path, or one of {', '.join(RELEASE_NAMES)}",
        ) from error
    except ValueError as error:
        raise _unreadable(path, f"is not whole JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        raise _unreadable(path, f"has schema {found!r}, and this package reads schema {SCHEMA}")
    try:
        return from_data(data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        detail = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged: {error}"
        raise _unreadable(path, detail) from error


def from_data(data: Mapping[str, Any]) -> Release:
    """Return the release that `data`, the content of its file, describes.

    Raises:
        KeyError, TypeError, ValueError: If something is missing or of the wrong kind.
    """
    flags: dict[str, Flag] = {}
    for name, entry in data["flags"].items():
        flag = _flag(name, entry)
        for spelling in flag.spellings:
            if flags.setdefault(spelling, flag) is not flag:
                raise ValueError(f"two flags are spelled {spelling}")
    rules = tuple(_rule(entry, set(data["flags"])) for entry in data["dead"])
    unknown = set(data["symbols"]) - set(LAYERS)
    if unknown:
        raise ValueError(f"unknown layers {sorted(unknown)}")
    module, spec = data["stock_spec"]
    return Release(
        name=_text(data, "name"),
        package_version=_text(data, "package_version"),
        commit=_text(data, "commit"),
        entry_script=_text(data, "entry_script"),
        deprecated_entry_scripts=tuple(data["deprecated_entry_scripts"]),
        pattern_flag=_text(data, "pattern_flag"),
        deprecated_pattern_flags=tuple(data["deprecated_pattern_flags"]),
        symbols=MappingProxyType(dict(data["symbols"])),
        stage_separator=data["stage_separator"],
        mtp_separator=data["mtp_separator"],
        stock_spec=(module, spec),
        carries_spec=bool(data["carries_spec"]),
        num_layers_rule=_text(data, "num_layers_rule"),
        flags=MappingProxyType(flags),
        dead=rules,
        replaced=MappingProxyType(dict(data["replaced"])),
        bounded_mtp_experts=bool(data.get("bounded_mtp_experts", False)),
        notes=tuple(data["notes"]),
    )


def _text(data: Mapping[str, Any], key: str) -> str:
    text = data[key]
    if not isinstance(text, str):
        raise TypeError(f"{key} is {text!r}, not text")
    return text


def _flag(name: str, entry: Mapping[str, Any]) -> Flag:
    choices = entry.get("choices")
    return Flag(
        name,
        entry.get("action", "store"),
        entry.get("type"),
        entry.get("nargs"),
        None if choices is None else tuple(choices),
        entry.get("default"),
        entry.get("dest") or name.lstrip("-").replace("-", "_"),
        tuple(entry.get("aliases", ())),
        entry.get("const"),
    )


def _rule(entry: Mapping[str, Any], flags: set[str]) -> DeadRule:
    for name in entry["flags"]:
        if name not in flags:
            raise ValueError(f"a rule names {name}, which is no flag's canonical spelling")
    return DeadRule(tuple(entry["flags"]), checked(entry["needs"], flags), str(entry["why"]))


def _unreadable(path: Path, what: str) -> LoweringError:
    return LoweringError(
        "The file of a Megatron-LM release cannot be used",
        given=f"{path}, which {what}",
        allowed="a whole release file, as `add_release` writes it",
        hint=f"write it again from its source tree, or name one of {', '.join(RELEASE_NAMES)}",
    )
