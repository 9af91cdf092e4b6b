"""Every setting of a recipe on a release: who owns it, and what carries it, exactly once."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.lowering.plan import Plan
from megacpp_nemo.lowering.row import Row
from megacpp_nemo.lowering.spec_name import key_and_value, written
from megacpp_nemo.lowering.table import FRAME, ROWS
from megacpp_nemo.lowering.values import spelled


class Owner(str, enum.Enum):
    """Who owns a setting of one model on one release."""

    MEGATRON = "megatron"
    SPEC = "spec"
    BOTH = "megatron and spec"
    PATTERN = "pattern"
    POLICY = "policy"
    RECIPE = "recipe"
    UNREAD = "unread"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting and its owner.

    Args:
        field: The recipe's field; empty for a setting that every recipe fixes.
        value: Its value, as text.
        owner: `megatron` by flags of its own; `spec` by the name of the spec; `megatron and
            spec` where the flag says what and the spec where; `pattern`; `policy` of the launch;
            `recipe` where it means nothing to Megatron; `unread` where no layer of this model
            reads it.
        carried: The flags with their values, the key in the spec's name, or empty.
        evidence: Which layers read it, or why nothing carries it.
    """

    field: str
    value: str
    owner: Owner
    carried: str
    evidence: str


def settings_of(plan: Plan) -> tuple[Setting, ...]:
    """Return every setting of a recipe, and every one it fixes by a flag, once each."""
    fields = dict.fromkeys(row.field for row in ROWS)
    own = [_setting(plan, [row for row in ROWS if row.field == field]) for field in fields]
    fixed = [_setting(plan, [row]) for row in FRAME if row.flags]
    return (*own, *fixed)


def flag_words(plan: Plan, row: Row) -> Iterator[list[str]]:
    """Yield each flag that a row writes on a plan's command line, with its values."""
    for spelling in row.flags:
        value = spelling.value(row.value(plan.recipe), plan.recipe)
        if value is None or not spelling.holds(plan):
            continue
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        try:
            yield spelled(spelling.flag, *map(text_of, values))
        except ValueError as error:
            raise LoweringError(
                f"{spelling.flag} cannot be told a value that begins with '-' among others",
                given=f"{row.field}={','.join(map(text_of, values))}",
                allowed="values that begin otherwise, or that one alone",
                hint=f"./{error} in {row.field}",
            ) from None


def text_of(value: Any) -> str:
    """Return a value as Megatron's parser reads it, the same in every locale."""
    return repr(value) if isinstance(value, float) else str(value)


def _setting(plan: Plan, rows: list[Row]) -> Setting:
    row = rows[0]
    flags = [" ".join(words) for each in rows for words in flag_words(plan, each)]
    named = any(each.spec is not None and each.spec.holds(plan) for each in rows)
    value = row.value(plan.recipe)
    key = key_and_value(row.field, value) if named else ""
    owner, evidence = _owned(plan, rows, bool(flags), named)
    return Setting(
        field=row.field,
        value=written(value),
        owner=owner,
        carried="; ".join([*flags, *([key] if key else [])]),
        evidence=evidence,
    )


def _owned(plan: Plan, rows: list[Row], flagged: bool, named: bool) -> tuple[Owner, str]:
    """Return the owner of a setting, and its evidence."""
    readers = dict.fromkeys(
        spelling.read.text for row in rows for spelling in row.flags if spelling.holds(plan)
    )
    specs = dict.fromkeys(row.spec.text for row in rows if row.spec and row.spec.holds(plan))
    by_owner = {"pattern": Owner.PATTERN, "policy": Owner.POLICY, "recipe": Owner.RECIPE}
    notes = "; ".join(dict.fromkeys(row.note for row in rows if row.note))
    if flagged or named:
        both = Owner.BOTH if flagged and named else Owner.MEGATRON if flagged else Owner.SPEC
        return both, "read by " + ", ".join([*readers, *specs])
    if rows[0].owner == "pattern" and not rows[0].decides.holds(plan):
        return Owner.UNREAD, f"would decide {rows[0].decides.text}"
    if rows[0].owner in by_owner:
        return by_owner[rows[0].owner], notes or "decides the layers of the pattern"
    stock = [row.stock.text for row in rows if row.stock and row.stock.holds(plan)]
    if stock:
        return Owner.MEGATRON, ", ".join(stock)
    if readers:
        return Owner.MEGATRON, "said by the absence of a flag; " + ", ".join(readers)
    waiting = dict.fromkeys(
        [spelling.read.text for row in rows for spelling in row.flags]
        + [row.spec.text for row in rows if row.spec]
    )
    return Owner.UNREAD, "would be read by " + ", ".join(waiting)
