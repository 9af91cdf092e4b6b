"""The section that holds a recipe against another one, or against another layout of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from megacpp_nemo.cli.given import written
from megacpp_nemo.contract import field_paths
from megacpp_nemo.lowering.difference import difference
from megacpp_nemo.report.layers import details
from megacpp_nemo.report.numbers import change, count, size, work
from megacpp_nemo.report.subject import Subject
from megacpp_nemo.report.tables import Table
from megacpp_nemo.report.traffic import most_sent

SIDES = ("here", "there")


class _Measure(NamedTuple):
    """One number of both sides, and how it is written."""

    name: str
    values: tuple[float, float]
    texts: tuple[str, str]


def comparison(subject: Subject, against: Subject) -> dict[str, Any]:
    """Return what `templates/comparison.html` draws."""
    tables = [table for table in (_fields(subject, against), *_lowered(subject, against)) if table]
    same = "" if tables else " They are one and the same recipe."
    return {
        "about": f"Here is {subject.label}; there is {against.label}, whose layers are drawn below."
        + same,
        "figures": Table(
            caption="Figures side by side",
            head=("figure", *SIDES, "change"),
            rows=[
                (one.name, *one.texts, change(*one.values)) for one in _measures(subject, against)
            ],
            note=f"Memory is of the fullest rank; a GPU has {size(subject.gpu.memory_bytes)}.",
        ),
        "picture": against.picture,
        "details": details(against),
        "tables": tables,
    }


def _measures(*sides: Subject) -> Iterator[_Measure]:
    plans = [side.plan for side in sides]
    seams = [len(side.lowering.seams) for side in sides if side.lowering]
    rows: tuple[tuple[str, list[float], Callable[[float], str]], ...] = (
        ("layers", [plan.recipe.depth for plan in plans], _whole),
        ("parameters", [plan.whole.count.total for plan in plans], count),
        ("active parameters", [plan.whole.count.active for plan in plans], count),
        ("training, a token", [plan.whole.training_flops for plan in plans], work),
        ("memory of a GPU", [plan.fullest.total_bytes for plan in plans], size),
        ("sent by a rank, a step", [most_sent(plan) for plan in plans], size),
        ("GPUs", [plan.recipe.parallelism.world_size for plan in plans], _whole),
        ("pipeline bubble", [plan.pipeline.bubble_share for plan in plans], _percent),
        ("most loaded stage, to the mean", [plan.pipeline.imbalance for plan in plans], _factor),
        ("predicted tokens a second", [plan.tokens_per_second for plan in plans], _whole),
    )
    if len(seams) == len(sides):
        rows += (("seams", list(seams), _whole),)
    for name, values, text in rows:
        texts = [text(value) for value in values]
        yield _Measure(name, (values[0], values[1]), (texts[0], texts[1]))


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _factor(value: float) -> str:
    return f"{value:.3f}"


def _fields(one: Subject, other: Subject) -> Table | None:
    theirs = field_paths(other.recipe)
    rows = [
        (path, written(value), written(theirs[path]))
        for path, value in field_paths(one.recipe).items()
        if value != theirs[path]
    ]
    head = ("field", *SIDES)
    return Table(caption="Fields that differ", head=head, rows=rows, code=(1, 2)) if rows else None


def _lowered(one: Subject, other: Subject) -> Iterator[Table | None]:
    """Yield what differs of the two commands; nothing where a side has none."""
    if one.lowering is None or other.lowering is None:
        return
    found = difference(one.lowering, other.lowering)
    flags = [(flag.flag, flag.before or "-", flag.after or "-") for flag in found.flags]
    seams = [(name, "yes", "-") for name in found.seams_gone]
    seams += [(name, "-", "yes") for name in found.seams_new]
    policy = [(each.name, each.before or "-", each.after or "-") for each in found.policy]
    for caption, name, rows in (
        ("Seams that differ", "seam", seams),
        ("Flags that differ", "flag", flags),
        ("Launch that differs", "what", policy),
    ):
        if rows:
            yield Table(caption=caption, head=(name, *SIDES), rows=rows, code=(1, 2))
