"""One row of the correspondence table: a setting and all its places.

A row is one recipe field, or one setting that every recipe fixes. It says where NeMo's
configuration carries it, which Megatron flags spell it in which releases, which layers read
those flags, and how the name of a spec carries it where no flag does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.lowering.ownership import version_of
from megacpp_nemo.lowering.plan import Plan
from megacpp_nemo.lowering.roles import Role

CONFIG = "model.config"


class Condition(NamedTuple):
    """When something holds for a model on a release, in words and as a test."""

    text: str
    holds: Callable[[Plan], bool]


EVERY = Condition("every model", lambda plan: True)


def layers(*roles: Role) -> Condition:
    """Return the condition that a model has layers of one of these roles."""
    words = " or ".join(role.words for role in roles)
    return Condition(f"{words} layers", lambda plan: plan.has(*roles))


def _same(value: Any, recipe: HybridRecipe) -> Any:
    return value


def _always(recipe: HybridRecipe) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How Megatron's command line spells a setting.

    Args:
        flag: The flag.
        value: `(value, recipe) -> value`: True for a flag without a value, a tuple for several
            values, None to leave the flag out.
        since: First version in which it holds (`0.17`); None for all.
        until: Last version in which it holds; None for all.
        read: Which models read the flag; it is left out of every other.
        back: The field's value from the flag's, for lifting.
    """

    flag: str
    value: Callable[[Any, HybridRecipe], Any] = _same
    since: str | None = None
    until: str | None = None
    read: Condition = EVERY
    back: Callable[[Any], Any] = lambda value: value

    def holds(self, plan: Plan) -> bool:
        """Whether the flag exists, and is read, in a model on its release."""
        return self.in_version(version_of(plan.release.package_version)) and self.read.holds(plan)

    def in_version(self, version: tuple[int, int]) -> bool:
        """Whether the flag holds in the releases of a version, `(0, 16)`."""
        return (self.since is None or version_of(self.since) <= version) and (
            self.until is None or version <= version_of(self.until)
        )

    @property
    def span(self) -> str:
        """The versions in which it holds, in words."""
        if self.since and self.until:
            return f"{self.since} to {self.until}"
        if self.since:
            return f"from {self.since}"
        return f"to {self.until}" if self.until else "all"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting and its places.

    Args:
        field: Dotted path in the recipe; empty for a setting that every recipe fixes.
        fixed: Value of such a setting.
        nemo: Dotted paths in the NeMo recipe that carry it.
        built: Dotted paths that carry it as an object of torch or NeMo, which this storey does
            not import; `recipes.build` makes the objects.
        spell: `(value, recipe) -> value` as NeMo spells it at the `nemo` paths.
        unspell: The field's value from NeMo's, where it can be told from the path alone.
        when: Whether the NeMo recipe carries the field; the paths keep NeMo's defaults
            otherwise.
        flags: Megatron's spellings.
        spec: When the name of a spec carries the field; None for never.
        stock: When the value is the one that Megatron has without being told; None for never.
        owner: `megatron`, `spec`, `megatron or spec` (by release), `policy` (the launch),
            `pattern` (it decides the layers), `recipe` (it means nothing to Megatron) or `host`
            (it means something to NeMo only).
        decides: When a setting of the pattern decides any layer.
        note: Why there is no path or flag, or what is special.
    """

    field: str = ""
    fixed: Any = None
    nemo: tuple[str, ...] = ()
    built: tuple[str, ...] = ()
    spell: Callable[[Any, HybridRecipe], Any] = _same
    unspell: Callable[[Any], Any] | None = lambda value: value
    when: Callable[[HybridRecipe], bool] = _always
    flags: tuple[Spelling, ...] = ()
    spec: Condition | None = None
    stock: Condition | None = None
    owner: str = "megatron"
    decides: Condition = EVERY
    note: str = ""

    def value(self, recipe: HybridRecipe) -> Any:
        """Return the setting's value in `recipe`."""
        if not self.field:
            return self.fixed
        value: Any = recipe
        for name in self.field.split("."):
            value = getattr(value, name)
        return value


def flagged(
    prefix: str, names: dict[str, tuple[str, str]], read: Condition = EVERY, **more: Any
) -> list[Row]:
    """Return rows for fields with one place in NeMo's model and one flag."""
    return [
        Row(
            field=f"{prefix}.{name}",
            nemo=(f"{CONFIG}.{place}",),
            flags=(Spelling(flag=flag, read=read),),
            **more,
        )
        for name, (place, flag) in names.items()
    ]


def spec_carried(
    prefix: str, place: str, spec: Condition, when: Callable[[HybridRecipe], bool], *names: str
) -> list[Row]:
    """Return rows for fields that only the name of a spec carries to Megatron."""
    return [
        Row(
            field=f"{prefix}.{name}",
            nemo=(f"{CONFIG}.{place}_{name}",),
            when=when,
            spec=spec,
            owner="spec",
        )
        for name in names
    ]
