"""Checks of single fields, read off the annotations of a dataclass.

    @dataclass(frozen=True, kw_only=True)
    class ExpertsShape(Checked):
        topk: Positive = 4        # Annotated[int, Rule("a whole number, 1 or more", ...)]

A field takes a value of its annotated type that its `Rule`, if any, accepts. Lists become
tuples and whole numbers become floats where the annotation says so; nothing else is converted,
so `True` is not 1 and `"4"` is not 4.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from megacpp_nemo.contract.errors import RecipeError, nearest


class Rule(NamedTuple):
    """What a field accepts beyond its type.

    Args:
        text: The accepted values in words.
        accepts: Whether a value of the right type is accepted.
        choices: The accepted values, where they can be listed.
    """

    text: str
    accepts: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def one_of(*choices: str) -> Rule:
    """Return the rule that accepts only these words."""
    return Rule(", ".join(map(repr, choices)), choices.__contains__, choices)


def up_to(most: int) -> Rule:
    """Return the rule that accepts 1 to `most`."""
    return Rule(f"a whole number from 1 to {most:,}", lambda n: 1 <= n <= most)


Positive = Annotated[int, Rule("a whole number, 1 or more", lambda n: n >= 1)]
Count = Annotated[int, Rule("a whole number, 0 or more", lambda n: n >= 0)]
# Of what is laid out one by one, so that a slip of the finger does not take all memory.
Depth = Annotated[int, up_to(1000)]
Experts = Annotated[int, up_to(65_536)]
Tables = Annotated[int, up_to(256)]
Rows = Annotated[int, up_to(2**31)]
AtLeastTwo = Annotated[int, Rule("a whole number, 2 or more", lambda n: n >= 2)]
# Megatron and NeMo add rank offsets to the seed, and NumPy takes 32 bits.
Seed = Annotated[int, Rule("a whole number from 0 to 2**31 - 1", lambda n: 0 <= n < 2**31)]
PositiveFloat = Annotated[float, Rule("a finite number above 0", lambda x: x > 0)]
NonNegativeFloat = Annotated[float, Rule("a finite number, 0 or more", lambda x: x >= 0)]
Decay = Annotated[float, Rule("a number from 0 to below 1", lambda x: 0 <= x < 1)]
Text = Annotated[str, Rule("text that is not blank", lambda text: bool(text.strip()))]


class Checked:
    """Base of the dataclasses whose fields are checked on construction.

    Raises:
        RecipeError: If a field has a value that its annotation does not accept.
    """

    def __post_init__(self) -> None:
        owner: Any = type(self)
        for name, kind in kinds_of(owner).items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, _accepted(kind, value))
            except (ValueError, OverflowError):
                raise RecipeError(
                    f"{owner.__name__}.{name} cannot be {value!r}",
                    given=f"{name}={value!r}",
                    allowed=_in_words(kind),
                    hint=f"{name}={_suggestion(owner, name, kind, value)}",
                ) from None


class Kind(NamedTuple):
    """An annotation taken apart: `Annotated[type, rule] | None`."""

    type: Any
    rule: Rule | None = None
    optional: bool = False

    @property
    def item(self) -> Kind | None:
        """The kind of a tuple's items; None for anything else."""
        return _kind(get_args(self.type)[0]) if get_origin(self.type) is tuple else None


@functools.cache
def kinds_of(owner: type) -> dict[str, Kind]:
    """Return the kind of each field of a dataclass."""
    hints = get_type_hints(owner, include_extras=True)
    return {name: _kind(hint) for name, hint in hints.items()}


def _kind(hint: Any) -> Kind:
    optional = get_origin(hint) in (Union, UnionType)
    inner = get_args(hint)[0] if optional else hint
    if get_origin(inner) is Annotated:
        base, rule = get_args(inner)
        return Kind(base, rule, optional)
    return Kind(inner, None, optional)


def _accepted(kind: Kind, value: Any) -> Any:
    """Return `value` as the field holds it, or raise ValueError or OverflowError."""
    if value is None and kind.optional:
        return None
    held = _typed(kind, value)
    if kind.rule and not kind.rule.accepts(held):
        raise ValueError
    return held


def _typed(kind: Kind, value: Any) -> Any:
    expected = kind.type
    if kind.item:
        if not isinstance(value, (list, tuple)):
            raise ValueError
        return tuple(_accepted(kind.item, element) for element in value)
    if isinstance(value, bool) and expected is not bool:
        raise ValueError
    if expected is float and isinstance(value, int):
        value = float(value)
    if not isinstance(value, expected) or (expected is float and not math.isfinite(value)):
        raise ValueError
    return value


def _in_words(kind: Kind) -> str:
    if kind.rule:
        words = kind.rule.text
    elif kind.item:
        words = f"a tuple or list, each {_in_words(kind.item)}"
    else:
        words = "True or False" if kind.type is bool else f"a {kind.type.__name__}"
    return f"{words}, or None" if kind.optional else words


def _suggestion(owner: Any, name: str, kind: Kind, value: Any) -> str:
    """Return the choice closest to `value`, or else the field's default, as source text."""
    close = nearest(value, kind.rule.choices) if kind.rule else None
    if close is not None:
        return repr(close)
    field = next(item for item in dataclasses.fields(owner) if item.name == name)
    return (
        f"{kind.type.__name__}()" if field.default is dataclasses.MISSING else repr(field.default)
    )
