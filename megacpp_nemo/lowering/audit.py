"""What changes when a recipe moves from one release to another.

`audit(recipe, from_release, to_release)` says which seams graduate, which flags were renamed,
removed, became alive or dead, and what the command line and its launch would be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.lowering.arguments import parse
from megacpp_nemo.lowering.difference import Difference, difference
from megacpp_nemo.lowering.lower import Lowering, lower
from megacpp_nemo.lowering.plan import Plan, make_plan
from megacpp_nemo.lowering.releases import Release, load_release
from megacpp_nemo.lowering.table import TABLE

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A recipe's way from one release to another.

    Args:
        recipe: The recipe's name.
        from_release: Release it runs on.
        to_release: Release it would run on.
        entry_scripts: Entry script here and there.
        graduated: Seams that the other release owns.
        remaining: Seams that stay.
        returned: Seams that the other release no longer owns.
        renamed: Flags of this command line that are spelled otherwise there, as `(old, new)`.
        removed: Flags of this command line that the other release does not know.
        alive: Flags that a layer reads only there.
        dead: Flags that a layer reads only here.
        difference: Every flag and layer that differs.
        after: The lowering as it would be.
    """

    recipe: str
    from_release: str
    to_release: str
    entry_scripts: tuple[str, str]
    graduated: tuple[str, ...]
    remaining: tuple[str, ...]
    returned: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    removed: tuple[str, ...]
    alive: tuple[str, ...]
    dead: tuple[str, ...]
    difference: Difference
    after: Lowering

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as JSON's types; `schema` changes when a key changes meaning."""
        names = ("graduated", "remaining", "returned", "removed", "alive", "dead")
        return {
            "schema": SCHEMA,
            "recipe": self.recipe,
            "from_release": self.from_release,
            "to_release": self.to_release,
            "entry_scripts": list(self.entry_scripts),
            **{name: list(getattr(self, name)) for name in names},
            "renamed": [list(pair) for pair in self.renamed],
            "difference": self.difference.to_dict(),
            "argv": list(self.after.argv),
        }


def audit(recipe: HybridRecipe, from_release: str | Release, to_release: str | Release) -> Audit:
    """Return what moving a recipe from one release to another changes.

    Raises:
        LoweringError: If the recipe cannot be lowered to one of the two.
    """
    old, new = _loaded(from_release), _loaded(to_release)
    before, after = _side(recipe, old, "from"), _side(recipe, new, "to")
    changes = difference(before, after)
    here, there = set(parse(before.argv, old)), set(parse(after.argv, new))
    renamed = tuple(_renamed(before, after, old, new))
    moved = {flag for pair in renamed for flag in pair}
    old_plan, new_plan = make_plan(recipe, old), make_plan(recipe, new)
    kept = {seam.id for seam in after.seams}
    return Audit(
        recipe=recipe.name,
        from_release=old.name,
        to_release=new.name,
        entry_scripts=(old.entry_script, new.entry_script),
        graduated=changes.seams_gone,
        remaining=tuple(seam.id for seam in before.seams if seam.id in kept),
        returned=changes.seams_new,
        renamed=renamed,
        removed=tuple(sorted(flag for flag in here - moved if flag not in new.flags)),
        alive=_woken(old_plan, new_plan, there - here - moved),
        dead=_woken(
            new_plan, old_plan, {flag for flag in here - there - moved if flag in new.flags}
        ),
        difference=changes,
        after=after,
    )


def _loaded(release: str | Release) -> Release:
    return release if isinstance(release, Release) else load_release(release)


def _side(recipe: HybridRecipe, release: Release, side: str) -> Lowering:
    try:
        return lower(recipe, release=release)
    except LoweringError as error:
        raise LoweringError(
            f"The audit's {side} side cannot be lowered: {error.what}",
            given=error.given,
            allowed=error.allowed,
            hint=error.hint,
        ) from None


def _renamed(
    before: Lowering, after: Lowering, old: Release, new: Release
) -> Iterator[tuple[str, str]]:
    if old.pattern_flag != new.pattern_flag:
        yield old.pattern_flag, new.pattern_flag


def _woken(asleep: Plan, awake: Plan, flags: set[str]) -> tuple[str, ...]:
    """Return those flags that the table says only the second plan reads."""
    spellings = [spelling for row in TABLE for spelling in row.flags]
    return tuple(
        sorted(
            flag
            for flag in flags
            if any(s.flag == flag and s.holds(awake) and not s.holds(asleep) for s in spellings)
        )
    )
