"""Recipes as words: `nam56r precision=fp8 parallelism.num_nodes=2`.

A recipe's own word may carry changes too, each behind a colon: `nam56r:mode=author_dp`. Values
are read as their field holds them; `written` is the inverse of `read_value`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from megacpp_nemo.cli.usage import UsageError
from megacpp_nemo.contract import HybridRecipe, RecipeError, recipe
from megacpp_nemo.contract.recipe import resolve_field

NOTHING = ("null", "none")
MODE = "mode"
# A colon begins a change only where `name=` follows, so values may hold colons.
_CHANGE = re.compile(r":(?=[A-Za-z_][\w.]*=)")


class Kind(NamedTuple):
    """A field's type, and whether it may be nothing."""

    type: Any
    optional: bool


def read_recipe(word: str, changes: Sequence[str] = (), mode: str | None = None) -> HybridRecipe:
    """Return the recipe that a word and further `field=value` words mean.

    Raises:
        UsageError: If a word is no `field=value`.
        MegaCppError: If there is no such recipe or field, or the result contradicts itself.
    """
    name, *own = _CHANGE.split(word)
    fields, modes = read_changes([*own, *changes])
    if modes and mode and modes != mode:
        raise UsageError(
            "The mode is given twice",
            given=f"--mode {mode}, mode={modes}",
            allowed="one of the two",
            hint=f"mode={modes} alone",
        )
    return recipe(name, mode=modes or mode or "nemo_native", changes=fields)


def read_changes(words: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """Return the fields that words change, by path, and the mode if one of them is `mode=`.

    Raises:
        UsageError: If a word is no `field=value`.
        RecipeError: If there is no such field, or one is changed twice.
    """
    fields: dict[str, Any] = {}
    mode = None
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


def kind_of(path: str) -> Kind:
    """Return the kind of the field at a dotted path."""
    kind = Kind(HybridRecipe, False)
    for name in path.split("."):
        kind = _kind(get_type_hints(kind.type, include_extras=True)[name])
    return kind


def _kind(hint: Any) -> Kind:
    optional = get_origin(hint) in (Union, UnionType)
    inner = get_args(hint)[0] if optional else hint
    return Kind(get_args(inner)[0] if get_origin(inner) is Annotated else inner, optional)


def read_value(text: str, kind: Kind) -> Any:
    """Return a value as its field holds it; what cannot be read is kept for the field to refuse."""
    if kind.optional and text.lower() in NOTHING:
        return None
    if get_origin(kind.type) is tuple:
        return _read_tuple(text, _kind(get_args(kind.type)[0]))
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
    return tuple(read_value(part, item) for part in text.split(",")) if text else ()


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
