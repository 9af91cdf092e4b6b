"""The file of a release, read and checked: damage is refused by the file's name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.lowering.conditions import checked
from megacpp_nemo.lowering.releases.release import LAYERS, DeadRule, Flag, Release

SCHEMA = 1
NARGS = (None, "?", "*", "+")
RELEASE_NAMES: tuple[str, ...] = (
    "0.15.3",
    "0.16.1",
    "0.17.1",
    "0.18.2",
    "0.19.0",
    "main-2026-08",
)


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
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"is not whole JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        raise _unreadable(path, f"has schema {found!r}, and this package reads schema {SCHEMA}")
    try:
        return from_data(data)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
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
    module, spec = _texts(data, "stock_spec")
    return Release(
        name=_text(data, "name"),
        package_version=_version(data),
        commit=_text(data, "commit"),
        entry_script=_text(data, "entry_script"),
        deprecated_entry_scripts=_texts(data, "deprecated_entry_scripts"),
        pattern_flag=_text(data, "pattern_flag"),
        deprecated_pattern_flags=_texts(data, "deprecated_pattern_flags"),
        symbols=_by_name(data, "symbols", _symbol),
        stage_separator=_separator(data, "stage_separator"),
        mtp_separator=_separator(data, "mtp_separator"),
        stock_spec=(module, spec),
        carries_spec=bool(data["carries_spec"]),
        num_layers_rule=_text(data, "num_layers_rule"),
        flags=MappingProxyType(flags),
        dead=rules,
        replaced=_by_name(data, "replaced", _text),
        bounded_mtp_experts=bool(data.get("bounded_mtp_experts", False)),
        notes=_texts(data, "notes"),
    )


def _text(data: Mapping[str, Any], key: str) -> str:
    text = data[key]
    if not isinstance(text, str):
        raise TypeError(f"{key} is {text!r}, not text")
    return text


def _texts(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    listed = data[key]
    if not isinstance(listed, (list, tuple)) or not all(isinstance(text, str) for text in listed):
        raise TypeError(f"{key} is {listed!r}, not a list of text")
    return tuple(listed)


def _by_name(
    data: Mapping[str, Any], key: str, read: Callable[[Mapping[str, Any], str], str]
) -> Mapping[str, str]:
    table = data[key]
    if not isinstance(table, Mapping):
        raise TypeError(f"{key} is {table!r}, not text by name")
    return MappingProxyType({name: read(table, name) for name in table})


def _symbol(data: Mapping[str, Any], key: str) -> str:
    text = _text(data, key)
    if len(text) != 1:
        raise ValueError(f"{key} is {text!r}, not one character")
    return text


def _separator(data: Mapping[str, Any], key: str) -> str | None:
    return None if data[key] is None else _symbol(data, key)


def _version(data: Mapping[str, Any]) -> str:
    text = _text(data, "package_version")
    if not re.match(r"[0-9]{1,9}\.[0-9]{1,9}(\.|$)", text):
        raise ValueError(f"package_version is {text!r}, which begins with no MAJOR.MINOR")
    return text


def _flag(name: str, entry: Mapping[str, Any]) -> Flag:
    choices, nargs = entry.get("choices"), entry.get("nargs")
    texts = (entry.get("action", ""), entry.get("type", ""), entry.get("dest", ""))
    if not all(isinstance(text, str) for text in (*texts, *entry.get("aliases", ()))):
        raise TypeError(f"{name} is {dict(entry)!r}, which names no option")
    if nargs not in NARGS and type(nargs) is not int:
        raise ValueError(f"{name} takes {nargs!r} values")
    return Flag(
        name,
        texts[0] or "store",
        texts[1] or None,
        nargs,
        None if choices is None else tuple(choices),
        entry.get("default"),
        texts[2] or name.lstrip("-").replace("-", "_"),
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
