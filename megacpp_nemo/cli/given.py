"""Recipes as words: `nam56r precision=fp8 parallelism.num_nodes=2`.

A recipe's own word may carry changes too, each behind a colon: `nam56r:mode=author_dp`. Values
are read as their field holds them; `written` is the inverse of `read_value`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megacpp_nemo.cli.usage import UsageError
from megacpp_nemo.contract import HybridRecipe, RecipeError, recipe
from megacpp_nemo.contract.checks import Kind
from megacpp_nemo.contract.recipe import kind_of, resolve_field

NOTHING = ("null", "none")
MODE = "mode"
# A colon begins a change only where `name=` follows, so values may hold colons.
_CHANGE = re.compile(r":(?=[A-Za-z_][\w.]*=)")
# An item of a list: text in double quotes, which may hold commas, or what stands before a comma.
_ITEM = re.compile(r'("(?:[^"\\]|\\.)*"|[^,]*),', re.DOTALL)


def read_recipe(word: str, changes: Sequence[str] = (), mode: str | None = None) -> HybridRecipe:
    """Return the recipe that a word and further `field=value` words mean.

    Raises:
        UsageError: If a word is no `field=value`.
        MegaCppError: If there is no such recipe or field, or the result contradicts itself.
    """
    name, *own = parts_of(word)
    fields, modes = read_changes([*own, *changes])
    if modes is not None and mode is not None and modes != mode:
        raise _two_modes(f"--mode {mode}", f"mode={modes}")
    chosen = [found for found in (modes, mode) if found is not None]
    return recipe(name, mode=chosen[0] if chosen else "nemo_native", changes=fields)


def parts_of(word: str) -> list[str]:
    """Return a recipe's name and the changes that its word carries."""
    return _CHANGE.split(word)


def _two_modes(one: str, other: str) -> UsageError:
    return UsageError(
        "The mode is given twice",
        given=f"{one}, {other}",
        allowed="one of the two",
        hint=f"{other} alone",
    )


def read_changes(words: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """Return the fields that words change, by path, and the mode if one of them is `mode=`.

    Raises:
        UsageError: If a word is no `field=value`, or the mode is given twice.
        RecipeError: If there is no such field, or one is changed twice.
    """
    fields: dict[str, Any] = {}
    mode: str | None = None
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise UsageError(
                "A change to a recipe is field=value",
                given=repr(word),
                allowed="the name of a field, '=' and its value, as in depth=26",
                hint=f"{name or 'depth'}=VALUE; megacpp table lists the fields",
            )
        if name == MODE:
            if mode is not None:
                raise _two_modes(f"{MODE}={mode}", word)
            mode = text
            continue
        path = resolve_field(name)
        if path in fields:
            raise RecipeError(
                f"{path} is changed twice",
                given=f"{path}={written(fields[path])}, {word}",
                allowed="each field once",
                hint=f"only {word}",
            )
        fields[path] = read_value(text, kind_of(path))
    return fields, mode


def read_value(text: str, kind: Kind) -> Any:
    """Return a value as its field holds it; what cannot be read is kept for the field to refuse."""
    if kind.optional and text.lower() in NOTHING:
        return None
    if kind.item:
        return _read_tuple(text, kind.item)
    if kind.type is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind.type in (int, float):
        return _read_number(text, kind.type)
    return _unquoted(text)


def _read_number(text: str, kind: type) -> Any:
    for read in dict.fromkeys((int, kind)):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _read_tuple(text: str, item: Kind) -> Any:
    if text.startswith("["):
        try:
            listed = json.loads(text)
        except ValueError:
            return text
        return tuple(listed)
    parts = _ITEM.findall(f"{text},") if text else []
    if any(part.startswith('"') and _unquoted(part) == part for part in parts):
        return text
    return tuple(read_value(part, item) for part in parts)


def _unquoted(text: str) -> str:
    """Return text, read as JSON if it stands in double quotes."""
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text


def written(value: Any) -> str:
    """Return a field's value as `read_value` reads it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, tuple):
        parts = [written(item) for item in value]
        plain = all(part and not re.search(r'[,"\[]', part) for part in parts)
        return ",".join(parts) if plain and parts else json.dumps(value)
    if isinstance(value, float):
        return repr(value)
    text = str(getattr(value, "value", value))
    return json.dumps(text) if text.lower() in NOTHING or text.startswith('"') else text


def words_of(changes: Mapping[str, Any]) -> list[str]:
    """Return changes as `field=value` words."""
    return [f"{path}={written(value)}" for path, value in changes.items()]
