"""The conditions of dead-flag rules: a few words of JSON about a parsed argument vector.

    {"flag": "--save"}                               the flag is given
    {"flag": "--tensor-model-parallel-size", "above": 1}
    {"flag": "--position-embedding-type", "is": ["rope", "yarn"]}
    {"indivisible": ["--hidden-size", "--num-attention-heads"]}   the first, by the second
    {"layer": ["MOE"]}                               some part of the pattern has such a layer
    {"pattern": true}   {"mtp": true}                a pattern is given; it has an MTP part
    {"spec": "custom"}   {"spec": "stock"}           whose layer spec builds the model
    {"all": [...]}   {"any": [...]}   {"not": {...}}   {"never": true}

`above` and `is` look at the value in force: the flag's, or its default. With several values, one
that fits is enough. Without a pattern nothing is known about layers, and `layer` and `mtp` hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

Condition = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What conditions ask about.

    Args:
        given: Values by canonical flag, as parsed.
        defaults: Values of the flags that are not given.
        layers: Kinds of layers in any part of the pattern; None without a pattern.
        has_mtp: Whether the pattern has a multi-token prediction part.
        custom_spec: Whether a layer spec other than the stock one is named.
    """

    given: Mapping[str, Any]
    defaults: Callable[[str], Any]
    layers: Collection[str] | None
    has_mtp: bool
    custom_spec: bool

    def values(self, flag: str) -> tuple[Any, ...]:
        """Return the values in force of a flag, one or several."""
        value = self.given[flag] if flag in self.given else self.defaults(flag)
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def holds(condition: Condition, facts: Facts) -> bool:
    """Return whether `condition`, one that `checked` has accepted, holds."""
    word = next(iter(condition))
    return _WORDS[word](condition, facts)


def checked(condition: object, flags: Collection[str]) -> Condition:
    """Return `condition` if it is well formed and names only `flags`.

    Raises:
        ValueError: Otherwise, saying what is wrong.
    """
    if not isinstance(condition, Mapping) or not condition:
        raise ValueError(f"{condition!r} is not a condition")
    word = next(iter(condition))
    if word not in _WORDS or not set(condition) <= {word, *_MODIFIERS.get(word, ())}:
        raise ValueError(f"{dict(condition)!r} is not a condition")
    if word == "flag" and condition["flag"] not in flags:
        raise ValueError(f"a condition names {condition['flag']}, which is not a flag")
    if word == "indivisible" and not set(condition[word]) <= set(flags):
        raise ValueError(f"a condition names {condition[word]}, which are not all flags")
    if word in ("all", "any"):
        for part in condition[word]:
            checked(part, flags)
    if word == "not":
        checked(condition["not"], flags)
    return condition


def _flag(condition: Condition, facts: Facts) -> bool:
    flag = condition["flag"]
    if "above" in condition:
        numbers = [value for value in facts.values(flag) if isinstance(value, (int, float))]
        return any(number > condition["above"] for number in numbers)
    if "is" in condition:
        return any(value in condition["is"] for value in facts.values(flag))
    # `--no-x` of a flag that can be switched both ways does not count as `--x`.
    return flag in facts.given and facts.given[flag] is not None


def _layer(condition: Condition, facts: Facts) -> bool:
    return facts.layers is None or any(layer in facts.layers for layer in condition["layer"])


def _indivisible(condition: Condition, facts: Facts) -> bool:
    first, second = (facts.values(flag)[0] for flag in condition["indivisible"])
    return bool(first and second and first % second)


_MODIFIERS = {"flag": ("above", "is")}
_WORDS: dict[str, Callable[[Condition, Facts], bool]] = {
    "flag": _flag,
    "indivisible": _indivisible,
    "layer": _layer,
    "pattern": lambda condition, facts: facts.layers is not None,
    "mtp": lambda condition, facts: facts.layers is None or facts.has_mtp,
    "spec": lambda condition, facts: facts.custom_spec == (condition["spec"] == "custom"),
    "all": lambda condition, facts: all(holds(part, facts) for part in condition["all"]),
    "any": lambda condition, facts: any(holds(part, facts) for part in condition["any"]),
    "not": lambda condition, facts: not holds(condition["not"], facts),
    "never": lambda condition, facts: False,
}
