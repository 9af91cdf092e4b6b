"""The name of a spec: all that Megatron's command line cannot say about our layers.

Megatron's `--spec MODULE NAME` names an object in a module. Ours is made when it is asked for,
and its name says which layers are what and the settings that no flag carries:

    --spec megacpp_nemo.spec layers=LemR,recurrent.num_heads=44,recurrent.key_dim=64

`layers` has one letter per layer (`Role`), `mtp` one per layer of a prediction depth. A capital
is a layer built by this package, a small letter one that the release builds from its own spec.
Every other key is a recipe's field, without a leading `model.`; `+` stands between the items of
a tuple, and what no shell leaves alone is written `%2C`. Nothing is read from the environment,
and no setting is left to a default of this package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megacpp_nemo.contract.checks import Kind
from megacpp_nemo.contract.errors import LoweringError, nearest
from megacpp_nemo.contract.pattern import LayerPattern
from megacpp_nemo.contract.recipe import field_paths, kind_of
from megacpp_nemo.contract.training import Precision
from megacpp_nemo.lowering.roles import Role

SPEC_MODULE = "megacpp_nemo.spec"
MODEL = "model."
# What is escaped, alone and as an item of a tuple.
_UNSAFE, _UNSAFE_ITEM = re.compile(r"[^\w./:@=+-]", re.ASCII), re.compile(r"[^\w./:@=-]", re.ASCII)
_ESCAPED = re.compile(r"(?:%[0-9A-F]{2})+")


class NamedLayer(NamedTuple):
    """One layer in the name of a spec.

    Args:
        role: What the layer is.
        custom: Whether this package builds it.
    """

    role: Role
    custom: bool

    @property
    def letter(self) -> str:
        """The role's letter, a capital if this package builds the layer."""
        return self.role.value.upper() if self.custom else self.role.value


@dataclass(frozen=True, kw_only=True)
class SpecName:
    """What the name of a spec says.

    Args:
        layers: Every layer of the main pattern.
        mtp: Layers of one prediction depth.
        settings: Value by recipe field (`model.recurrent.num_heads`).
    """

    layers: tuple[NamedLayer, ...]
    mtp: tuple[NamedLayer, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"layers={_letters(self.layers)}"]
        if self.mtp:
            parts.append(f"mtp={_letters(self.mtp)}")
        for path in sorted(self.settings):
            parts.append(key_and_value(path, self.settings[path]))
        return ",".join(parts)

    @classmethod
    def parse(cls, text: str) -> SpecName:
        """Read the name of a spec.

        Raises:
            LoweringError: If a part is not `key=value`, a key is unknown or given twice, or a
                value cannot be read.
        """
        given: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if not equals or not key or key in given:
                raise _refusal(text, f"{part!r} is not a new key=value")
            given[key] = value
        if "layers" not in given:
            raise _refusal(text, "it does not say which layers are what")
        layers = _layers(text, given.pop("layers"))
        mtp = _layers(text, given.pop("mtp")) if "mtp" in given else ()
        settings = dict(_setting(text, key, value) for key, value in given.items())
        return cls(layers=layers, mtp=mtp, settings=settings)


def _letters(layers: tuple[NamedLayer, ...]) -> str:
    return "".join(layer.letter for layer in layers)


def _layers(text: str, letters: str) -> tuple[NamedLayer, ...]:
    known = {role.value: role for role in Role}
    unknown = [letter for letter in letters if letter.lower() not in known]
    if unknown or not letters:
        raise _refusal(text, f"layers {letters!r} are not all of {', '.join(known)}")
    return tuple(NamedLayer(known[letter.lower()], letter.isupper()) for letter in letters)


def key_and_value(path: str, value: Any) -> str:
    """Return a field and its value as the name of a spec writes them."""
    if isinstance(value, tuple):
        text = "+".join(_UNSAFE_ITEM.sub(_escape, written(item)) for item in value)
    else:
        text = _UNSAFE.sub(_escape, written(value))
    return f"{path.removeprefix(MODEL)}={text}"


def _escape(letter: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in letter[0].encode())


def _unescaped(text: str) -> str:
    if "%" in _ESCAPED.sub("", text):
        raise ValueError
    return _ESCAPED.sub(lambda run: bytes.fromhex(run[0].replace("%", "")).decode(), text)


def written(value: Any) -> str:
    """Return a field's value as text for reports."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, tuple):
        return "+".join(map(written, value))
    if isinstance(value, Precision):
        return value.value
    return str(value)


def _setting(text: str, key: str, value: str) -> tuple[str, Any]:
    leaves = field_paths()
    path = next((path for path in (f"{MODEL}{key}", key) if path in leaves), None)
    if path is None:
        close = nearest(key, [leaf.removeprefix(MODEL) for leaf in leaves])
        raise _refusal(text, f"{key!r} is no recipe field" + (f"; {close!r} is" if close else ""))
    try:
        return path, _read(value, kind_of(path))
    except ValueError:
        raise _refusal(text, f"{key}={value!r} cannot be read") from None


def _read(value: str, kind: Kind) -> Any:
    """Return `value` as a field of this kind holds it."""
    if kind.item:
        item = kind.item
        return tuple(_read(part, item) for part in value.split("+")) if value else ()
    text = _unescaped(value)
    if kind.optional and text == "null":
        return None
    if kind.type is bool:
        return _truth(text)
    if kind.type is LayerPattern:
        return LayerPattern.parse(text)
    return kind.type(text)


def _truth(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError
    return value == "true"


def _refusal(text: str, why: str) -> LoweringError:
    return LoweringError(
        f"This is not the name of a spec of {SPEC_MODULE}: {why}",
        given=repr(text),
        allowed="layers=LETTERS, then FIELD=VALUE, with commas between",
        hint="the name that megacpp lower prints",
    )
